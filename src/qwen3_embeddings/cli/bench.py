"""The command ``qwen3-embeddings bench``: what an engine or a server gives, in figures.

Throughput by length of the texts, and latency by number of clients that send one query after the
other. Texts are random words, none twice, so that no cache helps.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import pydoc
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen3_embeddings.embedder import Embedder
from qwen3_embeddings.engines.registry import KINDS
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.models import MIN_DIMENSIONS

Query = Callable[[str], Awaitable[Any]]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its options among `commands`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure texts a second and latency of an engine or a server",
        description="Measure texts a second by length, and the latency of single queries by number "
        "of clients, in this process or through a server.",
    )
    option = parser.add_argument
    option("--model", help="hub id, folder, or name on the server (QWEN3_EMBEDDINGS_MODEL)")
    option("--base-url", help="OpenAI-compatible server to use (QWEN3_EMBEDDINGS_BASE_URL)")
    option("--dimensions", type=int, help=f"Matryoshka size, {MIN_DIMENSIONS} to native (native)")
    option("--engine", choices=sorted(KINDS), help="what runs the model")
    option("--dtype", default="auto", help="auto, bfloat16 or float32 (auto)")
    count = _at_least(1, int)
    option("--words", type=count, nargs="+", default=[20, 80, 330], help="words a text (20 80 330)")
    option("--texts", type=count, default=2048, help="texts a measurement (2048)")
    option("--clients", type=count, nargs="+", default=[1, 16, 64], help="(1 16 64)")
    option("--seconds", type=_at_least(0.1, float), default=5.0,
           help="seconds a number of clients is measured (5)")  # fmt: skip
    option("--json", metavar="FILE", help="write the figures there too; - for stdout alone")
    return parser


def _at_least(least: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    """What argparse reads a number of at least so much with."""

    def read(word: str) -> float:
        try:
            number = kind(word)
        except ValueError:
            number = math.nan
        if not least <= number < math.inf:
            raise argparse.ArgumentTypeError(f"{word!r} is not a number of {least} or more")
        return number

    return read


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    if options.json and options.json != "-":
        try:  # before the measurement, which takes minutes; earlier figures stay till then
            Path(options.json).open("a", encoding="utf-8").close()
        except OSError as error:
            raise ConfigurationError(
                f"--json {options.json} cannot be written ({error.strerror}). Pass another file."
            ) from error
    with Embedder(
        options.model,
        base_url=options.base_url,
        engine=options.engine,
        dtype=options.dtype,
        dimensions=options.dimensions,
    ) as embedder:
        results = measure(embedder, options)
    if options.json:
        text = json.dumps(results, indent=1) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
            return 0
        Path(options.json).write_text(text, encoding="utf-8")
    print("\n".join(table(results)))
    return 0


def measure(embedder: Embedder, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one embedder."""
    served = embedder.start()
    results: dict[str, Any] = {"served": asdict(served), "documents": {}, "queries": {}}
    for words in options.words:
        texts = take(options.texts, words, seed=words)
        embedder.encode_document(take(64, words, seed=-1))
        rate = per_second(lambda: embedder.encode_document(texts), len(texts))  # noqa: B023
        results["documents"][str(words)] = rate
    for clients in options.clients:
        loop = closed_loop(
            lambda text: embedder.aencode_query([text]), clients, options.seconds, words=80
        )
        results["queries"][str(clients)] = asyncio.run(loop)
    return results


def table(results: dict[str, Any]) -> Iterator[str]:
    """The figures for reading."""
    served = results["served"]
    yield f"{served['model']} ({served['engine']}), {served['dimensions']} numbers a text"
    yield ""
    yield "documents, in one call"
    for words, rate in results["documents"].items():
        yield f"{words:>8} words a text  {rate:>10,.0f} texts/s"
    yield ""
    yield "single queries of 80 words"
    for clients, loop in results["queries"].items():
        yield (
            f"{clients:>8} clients       {loop['texts_per_second']:>10,.0f} texts/s"
            f"   p50 {loop['p50_ms']:.1f} ms   p99 {loop['p99_ms']:.1f} ms"
        )


# Measuring; benchmarks/ measures others with the same functions.


def texts_of(words: int, seed: int) -> Iterator[str]:
    """Texts of random words without end: of a module of Python's library, prose and code."""
    lines = Path(pydoc.__file__).read_text(encoding="utf-8").splitlines()
    vocabulary = [line.split()[0] for line in lines if line.split()][:600]
    chance = random.Random(seed)
    while True:
        yield " ".join(chance.choices(vocabulary, k=words))


def take(count: int, words: int, seed: int) -> list[str]:
    """So many of `texts_of`."""
    return list(itertools.islice(texts_of(words, seed), count))


def per_second(call: Callable[[], Any], count: int) -> float:
    """Texts a second of a call for `count` texts."""
    start = time.perf_counter()
    call()
    return count / (time.perf_counter() - start)


async def closed_loop(query: Query, clients: int, seconds: float, words: int) -> dict[str, float]:
    """So many clients, each sending one text after the other.

    Returns:
        Texts a second, the latencies' median and 99th percentile in milliseconds, their number.
    """
    texts = texts_of(words, seed=random.randrange(1 << 30))
    latencies: list[float] = []

    async def client(until: float, sink: list[float]) -> None:
        while (start := time.perf_counter()) < until:
            await query(next(texts))
            sink.append(time.perf_counter() - start)

    # For those that send blocking calls to threads.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(clients))
    warm_up = time.perf_counter() + min(1.0, seconds)
    await asyncio.gather(*(client(warm_up, []) for _ in range(clients)))
    start = time.perf_counter()
    await asyncio.gather(*(client(start + seconds, latencies) for _ in range(clients)))
    elapsed = time.perf_counter() - start
    ordered = sorted(latencies)

    def percentile(share: float) -> float:
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {
        "texts_per_second": len(ordered) / elapsed,
        "p50_ms": percentile(0.50),
        "p99_ms": percentile(0.99),
        "count": float(len(ordered)),
    }
