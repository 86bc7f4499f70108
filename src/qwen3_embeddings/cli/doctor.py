"""The command ``qwen3-embeddings doctor``."""

from __future__ import annotations

import argparse
import json
import shutil
from typing import Any

from qwen3_embeddings.embedder import Embedder
from qwen3_embeddings.engines.registry import KINDS
from qwen3_embeddings.errors import ConfigurationError, DimensionsError, UnknownTaskError
from qwen3_embeddings.models import MIN_DIMENSIONS


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command and its options to `commands`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="check that a server or an engine in this process returns the right vectors",
        description="Check that a server, or an engine in this process, returns the vectors that "
        "Qwen3-Embedding should return. Exit code 0: no check failed; 1: a check failed; 2: wrong "
        "usage. The server's key is read from QWEN3_EMBEDDINGS_API_KEY.",
    )
    option = parser.add_argument
    option("--model", help="hub id, folder, or name on the server (QWEN3_EMBEDDINGS_MODEL)")
    option("--base-url", help="OpenAI-compatible server to check (QWEN3_EMBEDDINGS_BASE_URL)")
    option("--dimensions", type=int, help=f"another Matryoshka size to check ({MIN_DIMENSIONS})")
    option("--task", default="web_search", help="preset whose instruction is sent (web_search)")
    option("--engine", choices=sorted(KINDS), help="engine that runs the model")
    option("--dtype", default="auto", help="precision of an engine in this process (auto)")
    option(
        "--engine-kwargs",
        type=json_object,
        metavar="JSON",
        help="arguments of an engine in this process",
    )
    option(
        "--timeout",
        type=float,
        default=60.0,
        help="seconds that one request to a server may last (60)",
    )
    option(
        "--reference",
        metavar="MODEL",
        help="compare with sentence-transformers running this hub id or folder here",
    )
    option("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(usage_error=parser.error)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the checks, print the report, and return the exit code."""
    try:
        embedder = Embedder(
            options.model,
            base_url=options.base_url,
            dimensions=options.dimensions,
            task=options.task,
            engine=options.engine,
            dtype=options.dtype,
            engine_kwargs=options.engine_kwargs,
            timeout=options.timeout,
        )
    except (ConfigurationError, DimensionsError, UnknownTaskError) as error:
        options.usage_error(str(error))
    with embedder:
        report = embedder.doctor(reference=options.reference)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(report.to_text(shutil.get_terminal_size((100, 24)).columns))
    return 0 if report.ok else 1


def json_object(text: str) -> dict[str, Any]:
    """Read the value of an option as a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
