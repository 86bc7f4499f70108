"""``qwen3-embeddings serve --engine torch``: this package's own server over the PyTorch engine."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from qwen3_embeddings import models
from qwen3_embeddings.cli.doctor import json_object
from qwen3_embeddings.cli.serve import LOOPBACK, own_key
from qwen3_embeddings.engines.base import require
from qwen3_embeddings.engines.torch.engine import TorchEngine
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.vectors import check_dimensions

NEEDED = ("aiohttp", "orjson", "prometheus_client")
"""Modules that the server needs in addition to those of the engine."""
INSTALL = "Run pip install 'qwen3-embeddings[torch-server]'."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See qwen3-embeddings serve --help.")


def run(options: argparse.Namespace) -> int:
    """Start the server, serve until a signal, and return the exit code.

    Raises:
        ConfigurationError: an option is not one of this server, or has a value that cannot work, or
            no client could send the key.
        MissingDependencyError: the extra torch-server is not installed.
        Qwen3EmbeddingsError: the model cannot be loaded.
    """
    own = _own_options(options)
    for module in NEEDED:
        require(module, f"{module} is not installed.", INSTALL)
    dimensions = options.dimensions
    if dimensions is not None:
        dimensions = check_dimensions(dimensions, models.describe(options.model).dimensions)
    engine = TorchEngine(options.model, dtype=options.dtype, engine_kwargs=own.engine_kwargs)
    key = own_key()
    if key is None and options.host not in LOOPBACK:
        print(
            "qwen3-embeddings: anyone who reaches this port can use the server. Set "
            "QWEN3_EMBEDDINGS_API_KEY.",
            file=sys.stderr,
        )
    from qwen3_embeddings.server import run as running
    from qwen3_embeddings.server.app import Server

    names = own.served_model_name or [options.model]
    return running.run(
        engine,
        lambda served: Server(engine, served, names, dimensions=dimensions, key=key),
        options.host,
        options.port,
    )


def _own_options(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options that only this server has.

    Raises:
        ConfigurationError: another option was given.
    """
    if options.print:
        raise ConfigurationError(
            "--print shows the command that starts vLLM. With --engine torch the server runs in "
            "this process, so there is none. Leave --print out."
        )
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--engine-kwargs", type=json_object)
    own, rest = parser.parse_known_args(options.vllm_flags)
    if not "".join(own.served_model_name or []).isprintable():
        raise ConfigurationError(
            "--served-model-name holds a character that cannot be printed. Choose another name."
        )
    if options.api_server_count is not None:
        rest.append("--api-server-count")
    if rest:
        names = ", ".join(word.split("=")[0] for word in rest if word.startswith("-"))
        raise ConfigurationError(
            f"--engine torch does not have {names or 'further arguments'}. Leave it out, or use "
            "--engine vllm."
        )
    return own
