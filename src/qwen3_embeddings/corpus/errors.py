"""Errors of a corpus job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from qwen3_embeddings.errors import ConfigurationError, Qwen3EmbeddingsError


class JobRefusedError(ConfigurationError):
    """The output, the inputs and the options do not fit together; nothing was changed."""


class JobFailedError(Qwen3EmbeddingsError, RuntimeError):
    """The job stopped before its end. The same command continues it."""


class InputError(Qwen3EmbeddingsError, RuntimeError):
    """An input file cannot be read."""


CONTINUE = "Run the same command again: it continues after the shards that are there."


@contextmanager
def output_errors(output: str) -> Iterator[None]:
    """Turn an operating system's error about the output into a `JobFailedError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, Qwen3EmbeddingsError):  # a server's connection error is an OSError
            raise
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())[:300]
        raise JobFailedError(
            f"cannot write to {output} ({reason}). Check free space, permissions and the "
            f"connection. {CONTINUE}"
        ) from error
