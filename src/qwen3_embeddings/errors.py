"""What can go wrong, one class for each way out.

Everything this package raises on purpose derives from `Qwen3EmbeddingsError`; where a built-in says
the same (`TypeError`, `ValueError`, `ConnectionError` …), the class derives from that too, so code
that catches it keeps working. Every message ends with what to do.
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
    """What a call had computed when it failed.

    Attributes:
        positions: (k,) indices into the list the caller passed, rising.
        vectors: float32 (k, dimensions), the unit vectors of these texts.
        total: number of texts in the call.
    """

    positions: NDArray[np.intp]
    vectors: NDArray[np.float32]
    total: int

    @classmethod
    def of(
        cls, pieces: Iterable[tuple[Sequence[int], NDArray[np.float32]]], total: int
    ) -> Computed | None:
        """What pieces hold together, each rows and their positions; None when there are none."""
        held = list(pieces)
        if not held:
            return None
        positions = np.concatenate([np.asarray(where, dtype=np.intp) for where, _ in held])
        order = np.argsort(positions)
        return cls(positions[order], np.concatenate([rows for _, rows in held])[order], total)

    @property
    def missing(self) -> list[int]:
        """Positions of the texts without a vector, rising: what is left to embed."""
        there = np.zeros(self.total, dtype=bool)
        there[self.positions] = True
        rest: list[int] = np.flatnonzero(~there).tolist()
        return rest


class Qwen3EmbeddingsError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        computed: what the call had computed before it failed, None when nothing. It is pickled
            with the error, so that a worker process loses nothing either.
    """

    computed: Computed | None = None

    def carrying(self, computed: Computed | None) -> Self:
        """A copy with what one call had computed: calls that share an engine share its errors."""
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
    """A constructor or setting has a value that cannot work."""


class MissingDependencyError(Qwen3EmbeddingsError, ImportError):
    """An optional dependency is not installed; the message holds the ``pip install`` line."""


class UnknownModelError(Qwen3EmbeddingsError, ValueError):
    """`model` names no known, local or reachable checkpoint, or one of another shape."""


class UnknownTaskError(Qwen3EmbeddingsError, ValueError):
    """`task` is not the name of a preset."""


class DimensionsError(Qwen3EmbeddingsError, ValueError):
    """The embedding size is outside what the model was trained for."""


class TextError(Qwen3EmbeddingsError):
    """Some texts of a call cannot be embedded.

    Attributes:
        positions: indices into the list the caller passed, in rising order.
    """

    def __init__(self, message: str, positions: Iterable[int] = ()) -> None:
        self.message = message
        self.positions = tuple(positions)
        super().__init__(message, self.positions)

    def at(self, positions: Iterable[int]) -> Self:
        """The same error about other positions, where a caller counts differently.

        It carries nothing: `computed` counted as the old positions did.
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
    """An engine returned NaN, infinity or a zero row; it is never passed on."""


class TextsFailedError(TextError, ValueError):
    """Some texts cannot be embedded; ``on_error="finish"`` has embedded all others.

    Attributes:
        errors: what is wrong with them, one error for each kind, with its positions.
    """

    errors: tuple[TextError, ...] = ()

    @classmethod
    def of(cls, failures: Iterable[TextError]) -> Self:
        """One error for all failures of a call."""
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
    """The engine could not do its work."""


class EngineStartError(EngineError, RuntimeError):
    """The engine in this process could not start."""


class EngineDeadError(EngineError, RuntimeError):
    """The engine in this process died during the call; the next call starts a new one."""


class EngineClosedError(EngineError, RuntimeError):
    """The embedder was closed before or during the call."""


class ServerError(EngineError):
    """The server could not be used.

    Attributes:
        status: the HTTP status, or None when there was no answer.
    """

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
    """The server stayed overloaded or broken (408, 429, or 5xx but 501) through every retry."""


class ServerResponseError(ServerError, ValueError):
    """The server's answer is not an embeddings response, or not one of the right shape."""
