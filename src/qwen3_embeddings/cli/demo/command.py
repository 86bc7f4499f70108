"""The command ``qwen3-embeddings demo``: its options and its steps."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from qwen3_embeddings import Embedder, Served
from qwen3_embeddings.cli.demo import model, page, report
from qwen3_embeddings.cli.demo.corpus import Passage, Query, load_passages, load_queries
from qwen3_embeddings.cli.demo.frameworks import FRAMEWORKS, Framework, check_installed
from qwen3_embeddings.engines.registry import KINDS
from qwen3_embeddings.models import MIN_DIMENSIONS
from qwen3_embeddings.vectors import check_dimensions

HITS = 3
"""Passages to show per query."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its options among `commands`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="search a small corpus through LangChain and LlamaIndex",
        description="Embed a small corpus in English, Chinese and code, and answer queries on it "
        "through LangChain and LlamaIndex. Without options: Qwen/Qwen3-Embedding-0.6B if it is "
        "available, else a small demo model; vLLM if it is installed, else "
        "sentence-transformers.",
    )
    option = parser.add_argument
    option("--model", help="hub id, folder, or name on the server (QWEN3_EMBEDDINGS_MODEL)")
    option("--base-url", help="OpenAI-compatible server to use (QWEN3_EMBEDDINGS_BASE_URL)")
    option("--dimensions", type=int, help=f"Matryoshka size, {MIN_DIMENSIONS} to native (native)")
    option("--engine", choices=sorted(KINDS), help="engine to run the model")
    option("--dtype", default="auto", help="auto, bfloat16 or float32 (auto)")
    option("--html", type=Path, metavar="FILE", help="also write the results to one HTML page")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the demo."""
    if options.html:
        page.check(options.html)
    check_installed()
    passages, queries = load_passages(), load_queries()
    facts: list[report.Line] = []
    report.heading()
    with (
        model.choose(options.model, options.base_url, options.engine) as choice,
        _started(choice, options, queries[0], facts) as served,
    ):
        size = options.dimensions or served.dimensions
        facts += report.corpus(passages, queries, size)

        def search(kind: type[Framework], dimensions: int | None) -> report.Search:
            framework = kind(
                choice.model,
                choice.base_url,
                engine=choice.engine,
                dtype=options.dtype,
                dimensions=dimensions,
            )
            return _search(framework, passages, queries, served.engine, facts)

        searches = [search(kind, options.dimensions) for kind in FRAMEWORKS]
        report.answers(passages, queries, searches)
        if small := _smaller(size):
            facts.append(report.shrinking(FRAMEWORKS[0].name, small))
            again = search(FRAMEWORKS[0], small)
            sizes = (size, searches[0]), (small, again)
            facts.append(report.shrunk(queries, len(passages), *sizes))
        facts += report.summary(queries, searches)
        if choice.fallback:
            facts.append(report.published())
    if options.html:
        page.write(options.html, facts, passages, queries, searches)
        report.written(options.html)
    return 0


@contextmanager
def _started(
    choice: model.Choice, options: argparse.Namespace, query: Query, facts: list[report.Line]
) -> Iterator[Served]:
    """Start the engine that both frameworks share, embed one query, and stop the engine."""
    with Embedder(
        choice.model,
        base_url=choice.base_url,
        engine=choice.engine,  # type: ignore[arg-type]  # argparse has checked it
        dtype=options.dtype,
        dimensions=options.dimensions,
    ) as embedder:
        facts += report.starting(choice)
        start = time.perf_counter()
        served = embedder.start()
        ready = time.perf_counter() - start
        if options.dimensions is not None:
            check_dimensions(options.dimensions, served.native)
        embedder.with_task(query.task).encode_query(query.text)
        facts.append(report.started(choice, served, ready, time.perf_counter() - start))
        yield served


def _search(
    framework: Framework,
    passages: Sequence[Passage],
    queries: Sequence[Query],
    engine: str,
    facts: list[report.Line],
) -> report.Search:
    """Embed the corpus in one framework and answer all queries."""
    with closing(framework):
        start = time.perf_counter()
        framework.index(passages)
        seconds = time.perf_counter() - start
        facts.append(report.indexed(framework.name, len(passages), seconds, engine))
        return report.Search(framework.name, [framework.search(query, HITS) for query in queries])


def _smaller(size: int) -> int | None:
    """Return a smaller Matryoshka size to compare with, or None if `size` is the smallest."""
    small = min(128, max(MIN_DIMENSIONS, size // 4))
    return small if small < size else None
