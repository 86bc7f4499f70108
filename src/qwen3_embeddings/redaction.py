"""Redaction: keys, secret headers and texts never appear in messages, dumps or pickles."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, Self

from qwen3_embeddings.errors import ConfigurationError

RUN = 20
"""Consecutive characters that count as a quote of a text. Fewer may be chance, except where they
are the whole text."""


class SupportsSecret(Protocol):
    """What pydantic's SecretStr and similar classes offer."""

    def get_secret_value(self) -> str:
        """Return the secret."""


class Secret:
    """A secret whose value only `get_secret_value` returns, as with pydantic's SecretStr."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    @classmethod
    def of(cls, value: Any) -> Self | None:
        """Return a secret for a string or another library's secret; None for nothing."""
        if hasattr(value, "get_secret_value"):
            value = value.get_secret_value()
        if value is not None and not isinstance(value, str):
            raise ConfigurationError(f"api_key is {type(value).__name__}. Pass str or SecretStr.")
        return cls(value) if value else None

    def get_secret_value(self) -> str:
        """Return the secret."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Secret('**********')"

    def __reduce__(self) -> Any:
        raise TypeError("a key is not pickled: set QWEN3_EMBEDDINGS_API_KEY where it is needed")


_TELLING = re.compile("auth|cookie|key|token|secret|passw|credential|signature", re.IGNORECASE)


def hide(headers: Mapping[str, Any], kind: Callable[[str], Any] = Secret) -> dict[str, Any]:
    """Return HTTP headers with secret values wrapped in `kind`.

    A value is secret if it is a secret object, or if the header's name says so. A value that is
    neither secret nor `str` is kept, and refused where headers are checked.

    Args:
        headers: values by name.
        kind: class that holds a secret.
    """
    hidden = dict(headers)
    for name, value in headers.items():
        if hasattr(value, "get_secret_value"):
            hidden[name] = kind(value.get_secret_value())
        elif isinstance(value, str) and _TELLING.search(str(name)):
            hidden[name] = kind(value)
    return hidden


def shown(headers: Mapping[str, Any]) -> dict[str, str]:
    """Return HTTP headers without the secret ones, for pickles and dumps."""
    hidden = hide(headers)
    return {name: value for name, value in hidden.items() if not isinstance(value, Secret)}


def fits_header(value: str) -> bool:
    """Whether every HTTP client can send a value in a header, and nothing on the way changes it."""
    return value.isascii() and value.isprintable() and value == value.strip()


def hide_texts(said: str, texts: Iterable[str]) -> str:
    """Return `said` with "…" for every quoted piece of a text, plain or escaped as JSON or Python.

    A piece has at least `RUN` characters, or is a whole text of at least 8.
    """
    for text in texts:
        escaped = {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
        for form in (text, repr(text)[1:-1], *escaped):
            said = _hide_text(said, form)
    return said


def _hide_text(said: str, text: str) -> str:
    least = min(RUN, len(text))
    step = least // 2  # every run of `least` characters holds a whole block of half as many
    reach = len(said)
    for start in range(0, len(text) - step + 1, step) if least >= 8 else ():
        block = text[start : start + step]
        at = said.find(block)
        while at >= 0:
            first = at - _shared(said[:at][::-1], text[max(start - reach, 0) : start][::-1])
            last = at + _shared(said[at:], text[start : start + reach])
            if last - first >= least:
                said = f"{said[:first]}…{said[last:]}"
                last = first
            at = said.find(block, last)
    return said


def _shared(one: str, other: str) -> int:
    """Return how many leading characters two strings share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
