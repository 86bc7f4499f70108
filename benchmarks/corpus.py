"""Corpus jobs: speed against the engine alone, time to resume, and memory.

    python benchmarks/corpus.py ratio  [--model MODEL]   embed from Parquet / encode_document
    python benchmarks/corpus.py resume                   jobs that are done, of 10^6 to 10^8 rows
    python benchmarks/corpus.py memory [--rows N]        memory while N rows pass, without an engine

`ratio` measures both in one process, with one engine, the engine alone before and after the job.
Without --model it uses the demo model.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen3_embeddings import Embedder, Served
from qwen3_embeddings.cli.bench import take
from qwen3_embeddings.corpus import embed
from qwen3_embeddings.corpus.inputs import find
from qwen3_embeddings.corpus.options import Options
from qwen3_embeddings.corpus.splits import Shard, plan
from qwen3_embeddings.corpus.storage import Store
from qwen3_embeddings.engines.base import Usage


def main(arguments: list[str]) -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser("python benchmarks/corpus.py", description=__doc__)
    option = parser.add_argument
    option("what", choices=["ratio", "resume", "memory"])
    option("--model", help="hub id or folder (the demo model)")
    option("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    option("--tokens", type=int, nargs="+", default=[512, 128], help="lengths of texts (512 128)")
    option("--seconds", type=float, default=8.0, help="seconds per measurement (8)")
    option("--rows", type=int, default=10_000_000, help="memory: rows (10000000)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        {"ratio": ratio, "resume": resume, "memory": memory}[options.what](options, Path(folder))


def ratio(options: argparse.Namespace, folder: Path) -> None:
    """Print texts per second of the engine alone and of a job, and their ratio."""
    with Embedder(options.model or demo_model(), dtype=options.dtype) as embedder:
        embedder.start()
        for tokens in options.tokens:
            words = words_for(embedder, tokens)
            warm = take(256, words, seed=0)
            embedder.encode_document(warm)
            rate = 256 / seconds(lambda: embedder.encode_document(warm))  # noqa: B023
            count = max(512, int(rate * options.seconds))
            before = count / engine_alone(embedder, take(count, words, seed=1))
            texts = take(count, words, seed=2)
            path = folder / f"{tokens}.parquet"
            pq.write_table(pa.table({"id": range(count), "text": texts}), path)
            output = str(folder / f"vectors-{tokens}")
            job = count / seconds(lambda: embed(str(path), output, embedder=embedder))  # noqa: B023
            after = count / engine_alone(embedder, take(count, words, seed=3))
            alone = statistics.mean([before, after])
            print(
                f"{tokens} tokens, {count:,} texts: engine alone {before:,.0f} and {after:,.0f} "
                f"texts/s, embed {job:,.0f} texts/s, ratio {job / alone:.3f}",
                flush=True,
            )


def engine_alone(embedder: Embedder, texts: list[str]) -> float:
    """Return the seconds of one call for all texts."""
    return seconds(lambda: embedder.encode_document(texts))


def words_for(embedder: Embedder, tokens: int) -> int:
    """Return how many words make about so many tokens."""
    sample = take(50, 80, seed=-1)
    return max(1, round(tokens * 50 * 80 / sum(embedder.count_tokens(sample))))


def resume(options: argparse.Namespace, folder: Path) -> None:
    """Print the seconds of a job whose shards are all there; the shards are empty files."""
    embedder = Embedder(options.model or demo_model(), dtype=options.dtype)
    for millions in (1, 10, 100):
        inputs, output = folder / f"in-{millions}", folder / f"out-{millions}"
        write_rows(inputs, millions * 1_000_000)
        pq.write_table(pa.table({"text": ["one row"]}), inputs / "small.parquet")
        # The first run of one row writes the job's description.
        embed(str(inputs / "small.parquet"), str(output), embedder=Instant(embedder))
        for split in plan(find([str(inputs)], Store.at(str(output))), Options()):
            (output / Shard.of(split).name).touch()
        spent = seconds(lambda: embed(str(inputs), str(output), embedder=embedder))  # noqa: B023
        shards = len(list(output.glob("part-*")))
        print(f"{millions} million rows done, {shards:,} shards: {spent:.2f} s", flush=True)


def memory(options: argparse.Namespace, folder: Path) -> None:
    """Print the memory of this process while rows pass through a job."""
    write_rows(folder / "in", options.rows)
    samples: list[float] = []
    engine = Instant(None, lambda: samples.append(resident()))
    spent = seconds(lambda: embed(str(folder / "in"), str(folder / "out"), embedder=engine))
    tenth = max(1, len(samples) // 10)
    for i in range(0, len(samples), tenth):
        reached, most = min(i + tenth, len(samples)) * 2048, max(samples[i : i + tenth])
        print(f"{reached:>12,} rows  {most:,.0f} MiB")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.rows:,} rows in {spent:.0f} s, at most {most:,.0f} MiB")


class Instant:
    """An embedder without an engine: zeros, as fast as they can be made.

    Args:
        like: the embedder whose fingerprint it has, or None.
        each: called once per batch.
    """

    engine, model, dimensions, embedding_dimension = "vllm", "instant", None, 32
    usage = Usage()

    def __init__(self, like: Embedder | None, each: Callable[[], object] = lambda: None) -> None:
        self._like, self._each = like, each
        if like is not None:
            self.model, self.dimensions = like.model, like.dimensions

    def fingerprint(self, role: Any) -> str:
        """Return the fingerprint of the embedder it stands for."""
        return self._like.fingerprint(role) if self._like else "instant"

    def _instruction(self, role: str) -> str:
        return ""

    def start(self) -> Served:
        """Return what it serves."""
        return Served("instant", "instant", 32, 32, None)

    def _finishing(self) -> Instant:
        return self

    def close(self) -> None:
        """Do nothing."""

    def stream(self, texts: Iterator[str], *, role: str, size: int) -> Iterator[Any]:
        """Yield one zero vector per text."""
        count = 0
        for count, _ in enumerate(texts, 1):
            if count % size == 0:
                self._each()
                yield np.zeros((size, 32), np.float32)
        if count % size:
            yield np.zeros((count % size, 32), np.float32)


def write_rows(folder: Path, rows: int) -> None:
    """Write Parquet files of up to a million rows each."""
    folder.mkdir(parents=True)
    for start in range(0, rows, 1_000_000):
        count = min(1_000_000, rows - start)
        text = pa.array(["some text of a few words"]).take(pa.repeat(0, count))
        pq.write_table(pa.table({"text": text}), folder / f"{start:012d}.parquet",
                       row_group_size=100_000)  # fmt: skip


def resident() -> float:
    """Return the memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call lasts."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def demo_model() -> str:
    """Return the folder of the demo model."""
    import qwen3_embeddings_demo_model

    return str(qwen3_embeddings_demo_model.path())


if __name__ == "__main__":
    main(sys.argv[1:])
