"""The command ``qwen3-embeddings embed``: a corpus of any size, every row exactly once."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from qwen3_embeddings.embedder import Embedder
from qwen3_embeddings.engines.registry import KINDS
from qwen3_embeddings.errors import (
    ConfigurationError,
    DimensionsError,
    EngineError,
    UnknownTaskError,
)
from qwen3_embeddings.models import MIN_DIMENSIONS


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its options among `commands`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "embed",
        help="embed files of any size into Parquet, every row exactly once",
        description="Embed Parquet, JSONL, CSV and text files into Parquet shards. The same "
        "command continues a job that was stopped. Exit code 0: everything is embedded; 3: it is "
        "finished and some rows were rejected; 1: work is left; 2: wrong usage. The server's key "
        "comes from QWEN3_EMBEDDINGS_API_KEY.",
    )
    option = parser.add_argument
    option("inputs", nargs="+", metavar="INPUT", help="file, folder or glob pattern, or a URL")
    option("output", metavar="OUTPUT", help="folder for the shards, or a URL")
    option("--text-column", default="text", help="column or JSON key with the texts (text)")
    option("--id-column", help="column that becomes `id`")
    option("--keep", type=_names, default=(), metavar="C,...", help="columns to copy")
    option("--role", choices=["document", "query"], default="document", help="(document)")
    option("--dimensions", type=int, help=f"vector size, {MIN_DIMENSIONS} to native (native)")
    option("--dtype", choices=["float32", "float16", "int8", "binary"], default="float32",
           help="number type of the stored vectors (float32)")  # fmt: skip
    option("--chunk", type=int, metavar="TOKENS", help="split longer texts into chunks")
    option("--overlap", type=int, default=0, metavar="TOKENS", help="shared by neighbours (0)")
    option("--shard-rows", type=int, default=20_000, metavar="N", help="input rows a shard (20000)")
    _engine_options(parser.add_argument_group("engine"))
    _run_options(parser.add_argument_group("run"))
    parser.set_defaults(usage_error=parser.error)
    return parser


def _engine_options(group: Any) -> None:
    option = group.add_argument
    option("--model", help="hub id, folder, or name on the server (QWEN3_EMBEDDINGS_MODEL)")
    option("--base-url", help="OpenAI-compatible server to use (QWEN3_EMBEDDINGS_BASE_URL)")
    option("--engine", choices=sorted(KINDS), help="what runs the model")
    option("--model-dtype", default="auto", help="precision of an engine in this process (auto)")
    option("--task", default="web_search", help="preset with the instruction (web_search)")
    option("--query-instruction", help="instruction for --role query in place of the task's")
    option("--document-instruction", help="instruction for documents")
    option("--overflow", choices=["error", "truncate", "mean"], default="error",
           help="texts over the model's context: reject them, or one of these (error)")  # fmt: skip
    option("--max-concurrency", type=int, help="requests to a server in flight (16)")
    option("--tokenizer", help="folder or hub id, for --chunk (the model's)")


def _run_options(group: Any) -> None:
    option = group.add_argument
    option("--shards", metavar="I/N", help="do part I of N, counted from 0")
    option("--ray", nargs="?", const=True, default=False, metavar="ADDRESS",
           help="use a Ray cluster; without an address one on this machine")  # fmt: skip
    option("--actors", type=int, help="engines on the cluster (one per GPU, else one per node)")
    option("--retry-rejects", action="store_true", help="embed rejected rows again")
    option("--replace-changed", action="store_true",
           help="replace shards of inputs that changed or are gone")  # fmt: skip
    option("--estimate", action="store_true", help="embed a sample, and print what is needed")
    option("--tokens-per-second", type=float, help="--estimate: a rate, instead of measuring one")
    option("--price-per-hour", type=float, help="--estimate: price of the machine")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def run(options: argparse.Namespace) -> int:
    """Embed the corpus, or estimate what that needs."""
    from qwen3_embeddings import corpus  # here: it imports pyarrow
    from qwen3_embeddings.corpus.errors import CONTINUE

    try:
        embedder = _embedder(options)
    except (ConfigurationError, DimensionsError, UnknownTaskError) as error:
        options.usage_error(str(error))
    names = ("text_column", "id_column", "keep", "role", "dtype", "chunk", "overlap", "shard_rows")
    layout = {name: getattr(options, name) for name in names}
    with embedder:
        if options.estimate:
            return _estimate(embedder, options, layout)
        try:
            summary = corpus.embed(
                options.inputs,
                options.output,
                embedder=embedder,
                tokenizer=options.tokenizer,
                shards=options.shards,
                retry_rejects=options.retry_rejects,
                replace_changed=options.replace_changed,
                ray=options.ray,
                actors=options.actors,
                show_progress=True,
                **layout,
            )
        except EngineError as error:
            raise corpus.JobFailedError(f"{error} {CONTINUE}") from error
    print(summary)
    for message in summary.failed:
        print(f"not done: {message}")
    if summary.rejects:
        print(f"the rejected rows are listed in {options.output}/_embed/rejects")
    return summary.exit_code


def _embedder(options: argparse.Namespace) -> Embedder:
    """Return the embedder that the options describe."""
    return Embedder(
        options.model,
        base_url=options.base_url,
        engine=options.engine,
        dtype=options.model_dtype,
        dimensions=options.dimensions,
        task=options.task,
        query_instruction=options.query_instruction,
        document_instruction=options.document_instruction,
        overflow=options.overflow,
        max_concurrency=options.max_concurrency,
    )


def _estimate(embedder: Embedder, options: argparse.Namespace, layout: dict[str, Any]) -> int:
    from qwen3_embeddings import corpus
    from qwen3_embeddings.corpus.estimate import estimate

    job = corpus.Job(
        options.inputs,
        options.output,
        corpus.Options(**layout),
        embedder,
        tokenizer=options.tokenizer,
        part=corpus.part_of(options.shards),
    )
    with contextlib.closing(job):
        needed = estimate(
            job,
            job.plan(),
            tokens_per_second=options.tokens_per_second,
            price_per_hour=options.price_per_hour,
        )
    print(needed)
    return 0
