"""The command ``qwen3-embeddings bench``: measure throughput and latency.

Throughput is measured by text length. Latency is measured by number of clients, each of which
sends one query after the other. Texts are random words and never repeat, so no cache helps.
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
    """Add the command and its options to `commands`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure throughput and latency of an engine or a server",
        description="Measure texts/s by text length, and the latency of single queries by number "
        "of clients, in this process or through a server.",
    )
    option = parser.add_argument
    option("--model", help="hub id, folder, or name on the server (QWEN3_EMBEDDINGS_MODEL)")
    option("--base-url", help="OpenAI-compatible server to use (QWEN3_EMBEDDINGS_BASE_URL)")
    option("--dimensions", type=int, help=f"Matryoshka size, {MIN_DIMENSIONS} to native (native)")
    option("--engine", choices=sorted(KINDS), help="engine that runs the model")
    option("--dtype", default="auto", help="auto, bfloat16 or float32 (auto)")
    option("--batch-size", type=_at_least(1, int), help="largest number of texts per request (64)")
    option("--timeout", type=_at_least(0.001, float), default=60.0,
           help="seconds that one request to a server may last (60)")  # fmt: skip
    count = _at_least(1, int)
    option(
        "--words", type=count, nargs="+", default=[20, 80, 330], help="words per text (20 80 330)"
    )
    option("--texts", type=count, default=2048, help="texts per measurement (2048)")
    option(
        "--clients", type=count, nargs="+", default=[1, 16, 64], help="numbers of clients (1 16 64)"
    )
    option("--seconds", type=_at_least(0.1, float), default=5.0,
           help="duration of each latency measurement in seconds (5)")  # fmt: skip
    option(
        "--json",
        metavar="FILE",
        help="also write the results to this file; - writes only JSON, to stdout",
    )
    return parser


def _at_least(least: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return a converter for argparse that accepts finite numbers of at least `least`."""

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
    """Measure, print the results, and return the exit code."""
    if options.json and options.json != "-":
        try:  # before measuring for minutes; "a" keeps earlier results until then
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
        batch_size=options.batch_size,
        timeout=options.timeout,
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
    """Measure one embedder and return all results, in types that JSON can represent."""
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
    """Yield the lines of a table of the results."""
    served = results["served"]
    yield f"{served['model']} ({served['engine']}), {served['dimensions']} dimensions"
    yield ""
    yield "documents, in one call"
    for words, rate in results["documents"].items():
        yield f"{words:>8} words per text  {rate:>10,.0f} texts/s"
    yield ""
    yield "single queries of 80 words"
    for clients, loop in results["queries"].items():
        yield (
            f"{clients:>8} clients         {loop['texts_per_second']:>10,.0f} texts/s"
            f"   p50 {loop['p50_ms']:.1f} ms   p99 {loop['p99_ms']:.1f} ms"
        )


# The measurements. benchmarks/ uses the same functions for other libraries.


def texts_of(words: int, seed: int) -> Iterator[str]:
    """Yield texts of random words without end; the words are those of a standard-library module.

    Args:
        words: words per text.
        seed: of the random choice.
    """
    lines = Path(pydoc.__file__).read_text(encoding="utf-8").splitlines()
    vocabulary = [line.split()[0] for line in lines if line.split()][:600]
    chance = random.Random(seed)
    while True:
        yield " ".join(chance.choices(vocabulary, k=words))


def take(count: int, words: int, seed: int) -> list[str]:
    """Return `count` texts of `texts_of`."""
    return list(itertools.islice(texts_of(words, seed), count))


def per_second(call: Callable[[], Any], count: int) -> float:
    """Return the throughput, in texts/s, of one call for `count` texts."""
    start = time.perf_counter()
    call()
    return count / (time.perf_counter() - start)


async def closed_loop(query: Query, clients: int, seconds: float, words: int) -> dict[str, float]:
    """Measure clients that each send one query after the other.

    Args:
        query: embeds one text.
        clients: number of clients.
        seconds: duration of the measurement, after a warm-up of at most one second.
        words: words per text.

    Returns:
        Throughput in texts/s, median and 99th percentile of the latency in ms, and the number of
        queries.
    """
    texts = texts_of(words, seed=random.randrange(1 << 30))
    latencies: list[float] = []

    async def client(until: float, sink: list[float]) -> None:
        while (start := time.perf_counter()) < until:
            await query(next(texts))
            sink.append(time.perf_counter() - start)

    # Libraries without async methods run their blocking calls in these threads.
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
