"""Bodies on the wire of ``/v1/embeddings``: what to ask for, and reading the answer.

Every reader takes a whole batch at once and checks its shape; bytes that are not an embeddings
response raise `ServerResponseError`, whatever they are.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import reprlib
from typing import Any

import numpy as np

from qwen3_embeddings.errors import ServerResponseError
from qwen3_embeddings.vectors import Vectors

FORMATS = ("bytes_only", "base64", "float")
"""Wire formats, most compact first: raw float32 rows (vLLM only), base64 in JSON, numbers in JSON.

vLLM's fourth, ``bytes``, puts its metadata into a response header that outgrows what HTTP clients
accept."""


def ask(form: str) -> dict[str, str]:
    """The fields that ask a server for `form`, in float32."""
    if form == "bytes_only":
        return {"encoding_format": form, "embed_dtype": "float32", "endianness": "little"}
    return {"encoding_format": form}


def read(body: bytes, content_type: str, rows: int) -> tuple[str, Vectors]:
    """The format a response came in, and its vectors.

    Args:
        body: response body.
        content_type: its ``Content-Type`` header.
        rows: number of texts in the request.

    Returns:
        One of `FORMATS`, and a float32 array (rows, d).

    Raises:
        ServerResponseError: not an embeddings response for `rows` texts.
    """
    if content_type.startswith("application/octet-stream"):
        return "bytes_only", _read_bytes(body, rows)
    return _read_json(body, rows)


def _read_bytes(body: bytes, rows: int) -> Vectors:
    if not body or len(body) % (4 * rows):
        raise ServerResponseError(
            f"{len(body)} bytes are not {rows} float32 vectors of one size. Check what stands "
            "between this client and the server: something altered the body."
        )
    return np.frombuffer(body, dtype="<f4").reshape(rows, -1)


def _read_json(body: bytes, rows: int) -> tuple[str, Vectors]:
    try:
        data = _parse(body)["data"]
        order = [item["index"] for item in data]
        cells = [item["embedding"] for item in data]
    except (TypeError, KeyError):
        raise ServerResponseError(
            f"the answer is not an embeddings response: {_kind(body)}. Check that base_url "
            "is the server's OpenAI-compatible root, usually ending in /v1."
        ) from None
    if not all(type(index) is int for index in order) or sorted(order) != list(range(rows)):
        raise ServerResponseError(
            f"the server answered {len(order)} vectors with indices {reprlib.repr(order)} to "
            f"{rows} texts. They cannot be matched: report it to whoever runs the server."
        )
    by_index: list[Any] = [None] * rows
    for index, cell in zip(order, cells, strict=True):
        by_index[index] = cell
    if all(isinstance(cell, str) for cell in by_index):
        return "base64", _read_base64(by_index, rows)
    return "float", _read_floats(by_index)


def _read_base64(cells: list[str], rows: int) -> Vectors:
    try:
        raw = [base64.b64decode(cell, validate=True) for cell in cells]
    except (binascii.Error, ValueError) as error:
        raise ServerResponseError(
            f"a vector is not base64 ({error}). Report it to whoever runs the server."
        ) from error
    if len({len(row) for row in raw}) > 1:
        raise ServerResponseError("the server answered vectors of different sizes to one request.")
    return _read_bytes(b"".join(raw), rows)


def _read_floats(cells: list[Any]) -> Vectors:
    try:
        with np.errstate(over="ignore"):  # infinity is refused where rows are normalised
            vectors = np.array(cells, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        raise ServerResponseError(
            "the vectors are not lists of numbers of one size. Report it to whoever runs the "
            "server."
        ) from None  # which may quote what it could not read
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise ServerResponseError(
            f"the answer has shape {vectors.shape} instead of one vector a text: the server pools "
            "nothing, or by another rule. Start it with --runner pooling --convert embed."
        )
    return vectors


def read_models(body: bytes) -> list[dict[str, Any]]:
    """The rows of a ``/models`` answer, each with an ``id`` and perhaps a ``root``.

    Raises:
        ServerResponseError: not a list of models.
    """
    try:
        rows: list[dict[str, Any]] = _parse(body)["data"]
        if not isinstance(rows, list):
            raise TypeError("no list")
        for row in rows:
            for name in (row["id"], row.get("root") or ""):
                name.encode()  # a name, and one that can be sent
    except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
        raise ServerResponseError(
            f"/models does not answer a list of models: {_kind(body)}. Check that base_url is "
            "the server's OpenAI-compatible root, usually ending in /v1."
        ) from None
    return rows


def read_tokens(body: bytes) -> list[int]:
    """The token ids of a ``/tokenize`` answer, at least the end token.

    Raises:
        ServerResponseError: no token ids.
    """
    try:
        ids: list[int] = _parse(body)["tokens"]
        if not ids or not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise TypeError("no integers")
    except (TypeError, KeyError):
        raise ServerResponseError(
            f"/tokenize does not answer token ids as vLLM's does: {_kind(body)}."
        ) from None
    return ids


def read_version(body: bytes) -> tuple[int, int]:
    """The first two numbers of a ``/version`` answer; (0, 0) of any other answer."""
    value = _parse(body)
    said = value.get("version") if isinstance(value, dict) else None
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", said) if isinstance(said, str) else None
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _parse(body: bytes) -> Any:
    """The JSON value, or None: the parser's own error would keep the body."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _kind(body: bytes) -> str:
    """What a body is, too little of it to quote a text."""
    value = _parse(body)
    if value is None:
        return f"{len(body)} bytes that begin with {excerpt(body)[:16]!r}"
    if isinstance(value, dict):
        return f"a JSON object of {', '.join(repr(name[:16]) for name in list(value)[:6])}"
    return f"a JSON {type(value).__name__}"


def excerpt(body: bytes) -> str:
    """The beginning of a body, for an error message."""
    return body[:200].decode("utf-8", "replace")
