"""What every engine offers, whatever runs behind it."""

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
"""A text, or its token ids with the end token (sent as they are, nothing is added)."""

MIXED_SECONDS = 10.0
"""How long after a query documents leave capacity for the next one
(benchmarks/notes/in-process.md)."""


@dataclass(frozen=True)
class Served:
    """What a started engine runs.

    Attributes:
        engine: "vllm", "server" or "reference".
        model: name the engine knows the model by.
        dimensions: size of a vector when no size is asked for.
        native: size of the model, the largest that can be asked for.
        context: longest input in tokens, end token included; None when the engine does not say.
        strips: whether it strips leading and trailing whitespace, which changes the vector.
    """

    engine: str
    model: str
    dimensions: int
    native: int
    context: int | None
    strips: bool = False


@dataclass
class Usage:
    """Running totals of what was embedded.

    Attributes:
        texts: number of prompts embedded.
        tokens: number of tokens in them, end tokens included.
        uncounted: number of those prompts whose tokens the engine did not report. They are not in
            `tokens`.
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
    """Turns prompts into vectors. All methods run on the background loop.

    Attributes:
        chunk_texts: prompts the embedder should pass at once.
        chunk_tokens: estimated tokens the embedder should pass at once.
        chunks_in_flight: calls of `embed` the embedder should keep going for one caller.
    """

    chunk_texts: int
    chunk_tokens: int
    chunks_in_flight: int

    async def start(self) -> Served:
        """Start or reach the engine once; later calls answer at once."""

    async def tokenize(self, texts: list[str], urgent: bool = False) -> list[list[int]]:
        """Token ids of each text, the end token included, whatever their number."""

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        """One vector a prompt, in order, float32 (n, dimensions), not necessarily of unit length.

        `urgent` prompts (queries) pass others in the queue. Errors about a prompt are
        `TextError`s whose positions count within `prompts`. The engine adds the prompts that it
        embedded to `usage`.
        """

    async def close(self) -> None:
        """Stop, free everything, and fail calls still waiting with `EngineClosedError`."""


def closed_error() -> EngineClosedError:
    """Return the error of calls that waited when the embedder was closed, or came later."""
    return EngineClosedError("the embedder was closed. Make a new one, or close it later.")


def check_lengths(encodings: Sequence[Sequence[int]], context: int | None) -> None:
    """Refuse encodings longer than the context, ahead of an engine that would cut or choke.

    Raises:
        TextTooLongError: some are.
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
