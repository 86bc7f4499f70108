"""One text for equal settings, whatever types they were passed as."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from qwen3_embeddings.redaction import Secret


def canonical(value: Any) -> str:
    """Return a text that is the same for equal settings of one process.

    It holds the values of secrets, so it is hashed or compared, and never shown.
    """
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """Return a form for JSON of a value that JSON cannot hold."""
    if isinstance(value, Secret):
        return value.get_secret_value()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, set | frozenset):  # their order differs between equal sets
        return sorted(map(canonical, value))
    if isinstance(value, Mapping):
        return dict(value)
    return f"{type(value).__qualname__}@{id(value)}"  # such as a TLS context
