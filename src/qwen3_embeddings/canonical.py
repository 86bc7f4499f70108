"""One text for equal settings, whatever types they were passed as."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from qwen3_embeddings.redaction import Secret


def _identity(value: Any) -> Any:
    """Return a name for one object of this process, such as a TLS context."""
    return f"{type(value).__qualname__}@{id(value)}"


def canonical(value: Any, other: Callable[[Any], Any] = _identity) -> str:
    """Return a text that is the same for equal settings.

    It holds the values of secrets, so it is hashed or compared, and never shown.

    Args:
        value: the settings.
        other: returns a form for JSON of an object of any other type. Default: its identity, which
            is valid in one process only.
    """

    def plain(item: Any) -> Any:
        if isinstance(item, Secret):
            return item.get_secret_value()
        if isinstance(item, os.PathLike):
            return os.fspath(item)
        if isinstance(item, set | frozenset):  # their order differs between equal sets
            return sorted(canonical(member, other) for member in item)
        if isinstance(item, Mapping):
            return dict(item)
        return other(item)

    return json.dumps(value, sort_keys=True, default=plain)
