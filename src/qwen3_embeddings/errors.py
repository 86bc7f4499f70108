"""What can go wrong, one class for each way out.

Everything this package raises on purpose derives from `Qwen3EmbeddingsError`; where a built-in says
the same (`TypeError`, `ValueError`, `ConnectionError` …), the class derives from that too, so code
that catches it keeps working. Every message ends with what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self


class Qwen3EmbeddingsError(Exception):
    """Base of every error this package raises on purpose."""


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
        """The same error about other positions, where a caller counts differently."""
        return type(self)(self.message, sorted(set(positions)))

    def __str__(self) -> str:
        named = ", ".join(map(str, self.positions[:10]))
        more = f" and {len(self.positions) - 10} more" if len(self.positions) > 10 else ""
        return f"texts[{named}]{more}: {self.message}" if named else self.message


class TextTypeError(TextError, TypeError):
    """A text is not a `str`."""


class TextEncodingError(TextError, ValueError):
    """A text holds a lone surrogate, so no tokenizer can read it."""


class TextTooLongError(TextError, ValueError):
    """A text has more tokens than the model's context and ``overflow="error"``."""


class InvalidVectorError(TextError, ValueError):
    """An engine returned NaN, infinity or a zero row; it is never passed on."""


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

    def __reduce__(self) -> tuple[type, tuple[str, int | None]]:
        return type(self), (str(self), self.status)


class ServerConnectionError(ServerError, ConnectionError):
    """No server answers at `base_url`, or the connection broke more often than retries allow."""


class ServerTimeoutError(ServerError, TimeoutError):
    """The server did not answer within `timeout`."""


class AuthenticationError(ServerError, PermissionError):
    """The server refused the key (401 or 403)."""


class ModelNotFoundError(ServerError, LookupError):
    """The server does not serve `model`."""


class ServerRefusedError(ServerError, ValueError):
    """The server understood the request and refused it (another 4xx)."""


class ServerBusyError(ServerError):
    """The server stayed overloaded or broken (429 or 5xx) through every retry."""


class ServerResponseError(ServerError, ValueError):
    """The server's answer is not an embeddings response, or not one of the right shape."""
