"""Exceptions, one class for each kind of fix.

All exceptions inherit from `Qwen3EmbeddingsError`, and most also from the matching built-in
(`TypeError`, `ValueError`, `ConnectionError` …), so that code that catches it keeps working. Every
message ends with a suggested fix.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Computed:
    """The vectors that a call had computed when it failed.

    Attributes:
        positions: indices (k,) into the list that the caller passed, rising.
        vectors: float32 array (k, dimensions), the unit vectors of these texts.
        total: number of texts in the call.

    Example:
        >>> try:
        ...     vectors = embedder.encode_document(texts)
        ... except Qwen3EmbeddingsError as error:
        ...     if error.computed:
        ...         store.add(error.computed.positions, error.computed.vectors)
    """

    positions: NDArray[np.intp]
    vectors: NDArray[np.float32]
    total: int

    @classmethod
    def of(
        cls, pieces: Iterable[tuple[Sequence[int], NDArray[np.float32]]], total: int
    ) -> Computed | None:
        """Return what pieces of positions and rows hold together; None if there are none."""
        held = list(pieces)
        if not held:
            return None
        positions = np.concatenate([np.asarray(where, dtype=np.intp) for where, _ in held])
        order = np.argsort(positions)
        return cls(positions[order], np.concatenate([rows for _, rows in held])[order], total)

    @property
    def missing(self) -> list[int]:
        """Positions of the texts without a vector, rising: those left to embed."""
        there = np.zeros(self.total, dtype=bool)
        there[self.positions] = True
        rest: list[int] = np.flatnonzero(~there).tolist()
        return rest


class Qwen3EmbeddingsError(Exception):
    """Base class of all exceptions of this package.

    Attributes:
        computed: what the call had computed before it failed; None for nothing. It is pickled with
            the error, so that the vectors of a worker process are not lost.
    """

    computed: Computed | None = None

    def carrying(self, computed: Computed | None) -> Self:
        """Return a copy with what one call computed: calls that share an engine share errors."""
        twin = copy.copy(self)
        twin.computed = computed if computed is not None and len(computed.positions) else None
        return twin.with_traceback(self.__traceback__)

    def __str__(self) -> str:
        if self.computed is None:
            return self._say()
        count, total = len(self.computed.positions), self.computed.total
        return f"{self._say()} error.computed holds the vectors of {count} of {total} texts."

    def _say(self) -> str:
        return super().__str__()


class ConfigurationError(Qwen3EmbeddingsError, ValueError):
    """An argument or setting has a value that cannot work."""


class MissingDependencyError(Qwen3EmbeddingsError, ImportError):
    """An optional dependency is not installed. The message has the ``pip install`` command."""


class UnknownModelError(Qwen3EmbeddingsError, ValueError):
    """`model` is no known, local or reachable checkpoint, or has another architecture."""


class UnknownTaskError(Qwen3EmbeddingsError, ValueError):
    """`task` is not the name of a preset in `TASKS`."""


class DimensionsError(Qwen3EmbeddingsError, ValueError):
    """The number of dimensions is outside the range that the model was trained for."""


class TextError(Qwen3EmbeddingsError):
    """Some texts of a call cannot be embedded.

    Attributes:
        positions: indices into the list that the caller passed, in rising order.
    """

    def __init__(self, message: str, positions: Iterable[int] = ()) -> None:
        self.message = message
        self.positions = tuple(positions)
        super().__init__(message, self.positions)

    def at(self, positions: Iterable[int]) -> Self:
        """Return the same error about other positions, for a caller that counts differently.

        It has no `computed`, which counted like the old positions.
        """
        return type(self)(self.message, sorted(set(positions)))

    def _say(self) -> str:
        named = ", ".join(map(str, self.positions[:10]))
        more = f" and {len(self.positions) - 10} more" if len(self.positions) > 10 else ""
        return f"texts[{named}]{more}: {self.message}" if named else self.message


class TextTypeError(TextError, TypeError):
    """A text is not a `str`."""


class TextEncodingError(TextError, ValueError):
    """A text holds a lone surrogate, so no tokenizer can read it."""


class TextTooLongError(TextError, ValueError):
    """A text has more tokens than the model's context and ``overflow="error"``."""


class TextRefusedError(TextError, ValueError):
    """The server refuses a text, or fails on it, although it embeds others.

    A text that is too long raises `TextTooLongError` instead.
    """


class InvalidVectorError(TextError, ValueError):
    """An engine returned NaN, infinity or zeros for a text. Such a vector is never returned."""


class TextsFailedError(TextError, ValueError):
    """Some texts cannot be embedded. With ``on_error="finish"`` all others were embedded first.

    Attributes:
        errors: one error for each kind of failure, with its positions.
    """

    errors: tuple[TextError, ...] = ()

    @classmethod
    def of(cls, failures: Iterable[TextError]) -> Self:
        """Return one error for all failures of a call."""
        kinds: dict[type[TextError], TextError] = {}
        for failure in failures:
            known = kinds.get(type(failure), failure)
            kinds[type(failure)] = known.at((*known.positions, *failure.positions))
        errors = sorted(kinds.values(), key=lambda error: error.positions)
        message = " ".join(f"{len(error.positions)} × {error.message}" for error in errors)
        whole = cls(message, sorted(i for error in errors for i in error.positions))
        whole.errors = tuple(errors)
        return whole


class EngineError(Qwen3EmbeddingsError):
    """The engine or server failed."""


class EngineStartError(EngineError, RuntimeError):
    """The engine in this process could not start."""


class EngineDeadError(EngineError, RuntimeError):
    """The engine in this process died during the call. The next call starts a new one."""


class EngineClosedError(EngineError, RuntimeError):
    """The embedder was closed before or during the call."""


class ServerError(EngineError):
    """The server could not be used.

    Attributes:
        status: HTTP status, or None if there was no response.
        answered: what the server did, without advice; empty if the message alone says it.
    """

    answered = ""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type, tuple[str, int | None], dict[str, object]]:
        return type(self), (self.args[0], self.status), vars(self)


class ServerConnectionError(ServerError, ConnectionError):
    """No server answers at `base_url`, or the connection broke more often than retries allow.

    Attributes:
        down: whether the server may be restarting.
    """

    down = False


class ServerTimeoutError(ServerError, TimeoutError):
    """The server did not answer within `timeout`."""


class AuthenticationError(ServerError, PermissionError):
    """The server refused the key (401 or 403), or a proxy its own (407)."""


class ModelNotFoundError(ServerError, LookupError):
    """The server does not serve `model`."""


class ServerRefusedError(ServerError, ValueError):
    """The server understood the request and refused it (another 4xx)."""


class ServerBusyError(ServerError):
    """The server stayed overloaded or failing (408, 429, or 5xx except 501) through all retries."""


class ServerResponseError(ServerError, ValueError):
    """The server's response is not an embeddings response, or has the wrong shape."""
