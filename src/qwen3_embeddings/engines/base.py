"""The interface of an engine, and what the engines share."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qwen3_embeddings.errors import (
    EngineClosedError,
    MissingDependencyError,
    TextTooLongError,
)
from qwen3_embeddings.vectors import Vectors

Prompt = str | list[int]
"""A text, or its token ids with the end token, to which nothing is added."""

MIXED_SECONDS = 10.0
"""Seconds after a query during which capacity is kept for the next one
(benchmarks/notes/in-process.md)."""


@dataclass(frozen=True)
class Served:
    """What a started engine serves.

    Attributes:
        engine: "vllm", "torch", "server" or "reference".
        model: name of the model, as the engine knows it.
        dimensions: dimensions of a vector when no number is asked for.
        native: native dimensions of the model, the most that can be asked for.
        context: longest input in tokens, end token included; None when the engine does not say.
        strips: whether the engine strips leading and trailing whitespace, which changes the vector.
        vocabulary: number of token ids that the model has embeddings for; None when the engine does
            not say.
    """

    engine: str
    model: str
    dimensions: int
    native: int
    context: int | None
    strips: bool = False
    vocabulary: int | None = None


@dataclass
class Usage:
    """Running totals of what was embedded.

    Attributes:
        texts: number of prompts embedded.
        tokens: number of tokens in them, end tokens included.
        uncounted: number of those prompts whose tokens the engine did not report. They are not in
            `tokens`.

    Example:
        >>> usage = Usage()
        >>> vectors = embedder.encode_document(["Hello", "Hello"], usage=usage)
        >>> usage
        Usage(texts=2, tokens=4, uncounted=0)
    """

    texts: int = 0
    tokens: int = 0
    uncounted: int = 0

    def add(self, texts: int, tokens: int | None) -> None:
        """Add prompts and their tokens.

        Args:
            texts: number of prompts.
            tokens: number of tokens in all of them together, or None when it is not known.
        """
        self.texts += texts
        if tokens is None:
            self.uncounted += texts
        else:
            self.tokens += tokens

    def merge(self, other: Usage) -> None:
        """Add the totals of another counter."""
        self.texts += other.texts
        self.tokens += other.tokens
        self.uncounted += other.uncounted


class Engine(Protocol):
    """An engine turns prompts into vectors. All methods run on the background loop.

    Attributes:
        chunk_texts: most prompts the embedder should pass to one call of `embed`.
        chunk_tokens: most tokens, by estimate, that it should pass to one call.
        chunks_in_flight: number of calls it should keep in flight per caller.
    """

    chunk_texts: int
    chunk_tokens: int
    chunks_in_flight: int

    async def start(self) -> Served:
        """Start or reach the engine once; later calls return immediately."""

    async def tokenize(self, texts: list[str], urgent: bool = False) -> list[list[int]]:
        """Return the token ids of each text, end token included, even over the context."""

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        """Return one vector per prompt, in order: float32 (n, dimensions), not necessarily unit.

        `urgent` prompts (queries) have priority over others in the queue. An error about prompts
        is a `TextError`, whose positions count within `prompts`. The engine adds the prompts that
        it embedded to `usage`.
        """

    async def close(self) -> None:
        """Stop, free all memory, and fail waiting calls with `EngineClosedError`."""


def closed_error() -> EngineClosedError:
    """Return the error for calls during and after the closing of an embedder."""
    return EngineClosedError("the embedder was closed. Create a new one, or close it later.")


def check_lengths(encodings: Sequence[Sequence[int]], context: int | None) -> None:
    """Refuse encodings longer than the context, which engines truncate or fail on.

    Args:
        encodings: token ids of each text.
        context: longest input in tokens; None if it is not known.

    Raises:
        TextTooLongError: some are longer.
    """
    long = [i for i, ids in enumerate(encodings) if context and len(ids) > context]
    if long:
        most = max(len(encodings[i]) for i in long)
        raise TextTooLongError(
            f"{most} tokens, over the context of {context}. Pass overflow='truncate' or "
            "overflow='mean', or split the text.",
            long,
        )


def require(module: str, missing: str, install: str) -> None:
    """Check that a module is installed, without importing it.

    Args:
        module: name of the module.
        missing: what to say when it is not installed.
        install: how to install it, or what to use instead.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingDependencyError(f"{missing} {install}")
