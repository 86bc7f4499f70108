"""A call over several of LlamaIndex's batches.

LlamaIndex waits for each batch before it asks for the next, keeps none when one fails, and its
events take nothing but `str`. So a call computes a few batches ahead, remembers what there is,
and gives what is no text a form that passes.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Self

import numpy as np
from llama_index.core.base.embeddings.base import Embedding

from qwen3_embeddings import Computed, Qwen3EmbeddingsError, TextError, TextsFailedError
from qwen3_embeddings.stream import Stream
from qwen3_embeddings.vectors import Vectors, lists


class NoText(str):
    """What is no text, as LlamaIndex's events take it; the core gets the value, and refuses it."""

    value: Any

    def __new__(cls, value: Any) -> Self:
        """The form of a value, unlike that of another, as texts are keys of caches."""
        marked = super().__new__(cls, f"no text: {object.__repr__(value)}")
        marked.value = value
        return marked


def given(texts: list[str]) -> list[Any]:
    """The texts as the caller gave them."""
    return [text.value if isinstance(text, NoText) else text for text in texts]


class Call:
    """What one call has computed, and what it computes ahead.

    Args:
        texts: all of the call.
        owner: the model that was called; a handler of an event may call another.

    Attributes:
        stream: the vectors of the call's batches in turn, when they are computed ahead.
    """

    def __init__(self, texts: Iterable[str], owner: object) -> None:
        self.texts = [str.__str__(t) if isinstance(t, str) else NoText(t) for t in texts]
        self.owner = owner
        self.stream: Stream | None = None
        self._place = 0  # of the text the stream goes on with
        self._vectors: dict[int, Embedding] = {}  # by id of the text
        self._failures: list[TextError] = []

    def next(self, batch: list[str]) -> Vectors | None:
        """The vectors of a batch, when it is the one the stream goes on with."""
        ahead = self.texts[self._place : self._place + len(batch)]
        same = len(batch) == len(ahead) and all(map(operator.is_, batch, ahead))
        if self.stream is None or not same:
            return None  # as of a handler of an event that embeds something in between
        self._place += len(batch)
        return self.stream.take()[1].result()

    def keep(self, batch: list[str], rows: list[Embedding]) -> list[Embedding]:
        """A batch's vectors, remembered."""
        self._vectors.update(zip(map(id, batch), rows, strict=True))
        return rows

    def after(self, error: Qwen3EmbeddingsError, batch: list[str]) -> list[Embedding]:
        """What to do after an error in a batch: raise it, or go on, an empty row a failed text."""
        if done := error.computed:
            self.keep([batch[i] for i in done.positions], lists(done.vectors))
        if not isinstance(error, TextsFailedError):
            raise self._located(error, batch) if isinstance(error, TextError) else error
        self._failures += [self._located(failure, batch) for failure in error.errors]
        return [self._vectors.get(id(text), []) for text in batch]

    def _located(self, error: TextError, batch: list[str]) -> TextError:
        """An error about a batch as one about the call's texts."""
        ids = {id(batch[position]) for position in error.positions}
        return error.at(i for i, text in enumerate(self.texts) if id(text) in ids)

    def checked(self, rows: list[Embedding]) -> list[Embedding]:
        """The result of the call, when no text failed."""
        if self._failures:
            self._vectors = {id(text): row for text, row in zip(self.texts, rows, strict=True)}
            raise TextsFailedError.of(self._failures)
        return rows

    def computed(self) -> Computed:
        """All vectors there are."""
        there = [i for i, text in enumerate(self.texts) if self._vectors.get(id(text))]
        rows = [self._vectors[id(self.texts[i])] for i in there]
        return Computed(np.array(there, np.intp), np.array(rows, np.float32), len(self.texts))


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def current(owner: object) -> Call | None:
    """The call of this model that a batch belongs to."""
    call = _current.get()
    return call if call and call.owner is owner else None


@contextlib.contextmanager
def over(texts: Iterable[str], owner: object) -> Iterator[Call]:
    """A call whose errors name positions in `texts` and carry the vectors of all its batches."""
    call = Call(texts, owner)
    token = _current.set(call)
    try:
        yield call
    except Qwen3EmbeddingsError as error:
        raise error.carrying(call.computed()) from error.__cause__
    finally:
        _current.reset(token)
        if call.stream:
            call.stream.close()
