"""Request fields and response bodies of ``/v1/embeddings``, ``/models`` and ``/tokenize``.

Every reader checks the shape of a whole response. Bytes that are not such a response raise
`ServerResponseError`, whatever they are.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import reprlib
from typing import Any, NamedTuple

import numpy as np

from qwen3_embeddings.errors import ServerResponseError
from qwen3_embeddings.vectors import Vectors

FORMATS = ("bytes_only", "base64", "float")
"""Wire formats, most compact first: raw float32 rows, base64 in JSON, numbers in JSON.

vLLM's fourth format, ``bytes``, puts its metadata into a response header that exceeds the header
limits of HTTP clients."""
VLLM_FORMATS = frozenset({"bytes_only"})
"""Formats that only vLLM implements. A server that speaks one also understands ``priority``."""
_CHECK_ROOT = "Check that base_url is the server's OpenAI-compatible root, usually ending in /v1."
_REPORT = "Report it to whoever runs the server."
_SMALL = 65536  # bytes; an answer with vectors is not searched for an error
_MAY_BE_AN_ERROR = re.compile(rb'"(errors?|message|detail)"')
_WORDS = ("message", "detail")  # fields of an error that say what happened
_RESULTS = {"data", "tokens", "version"}  # fields of the answers that are read here
_BUSY = re.compile(
    r"overload|unavailable|try again|temporar|exhausted|at capacity|busy|tim(ed?|e) ?out|loading",
    re.IGNORECASE,
)
_RATE = re.compile(r"rate.?limit|too many requests", re.IGNORECASE)


class Embeddings(NamedTuple):
    """The contents of an embeddings response.

    Attributes:
        form: the format it came in, one of `FORMATS`.
        vectors: float32 array (rows, d).
        tokens: number of tokens in all texts together; None when the server does not report it.
    """

    form: str
    vectors: Vectors
    tokens: int | None


def ask(form: str) -> dict[str, str]:
    """Return the request fields that ask for the format `form`, in float32."""
    if form == "bytes_only":
        return {"encoding_format": form, "embed_dtype": "float32", "endianness": "little"}
    return {"encoding_format": form}


def read(body: bytes, content_type: str, rows: int) -> Embeddings:
    """Read an embeddings response.

    Args:
        body: response body.
        content_type: its ``Content-Type`` header.
        rows: number of texts in the request.

    Raises:
        ServerResponseError: `body` is not an embeddings response for `rows` texts.
    """
    if content_type.startswith("application/octet-stream"):
        return Embeddings("bytes_only", _read_bytes(body, rows), None)
    return _read_json(body, rows)


def _read_bytes(body: bytes, rows: int) -> Vectors:
    if not body or len(body) % (4 * rows):
        raise _unreadable(
            f"{len(body)} bytes are not {rows} float32 vectors of one size",
            "Check what stands between this client and the server: something altered the body.",
        )
    return np.frombuffer(body, dtype="<f4").reshape(rows, -1)


def _read_json(body: bytes, rows: int) -> Embeddings:
    answer = parse(body)
    try:
        data = answer["data"]
        cells = [item["embedding"] for item in data]
        order = _order([item.get("index") for item in data])
    except (TypeError, KeyError, AttributeError):
        raise _unreadable(
            f"the answer is not an embeddings response: {_kind(body)}", _CHECK_ROOT
        ) from None
    if not all(type(index) is int for index in order) or sorted(order) != list(range(rows)):
        raise _unreadable(
            f"the server answered {len(order)} vectors with indices {reprlib.repr(order)} to "
            f"{rows} texts",
            f"They cannot be matched. {_REPORT}",
        )
    by_index: list[Any] = [None] * rows
    for index, cell in zip(order, cells, strict=True):
        by_index[index] = cell
    tokens = _tokens(answer)
    if missing := sum(not cell for cell in by_index):
        raise _unreadable(f"the server answered no vector for {missing} of {rows} texts", _REPORT)
    if all(isinstance(cell, str) for cell in by_index):
        return Embeddings("base64", _read_base64(by_index, rows), tokens)
    return Embeddings("float", _read_floats(by_index), tokens)


def _order(indices: list[Any]) -> list[Any]:
    """Fill in missing indices where there is no doubt.

    Without any index the vectors are in the order of the texts. A single missing index is 0:
    servers that write protobuf as JSON (Gemini's) omit it.
    """
    if all(index is None for index in indices):
        return list(range(len(indices)))
    if indices.count(None) == 1:
        return [0 if index is None else index for index in indices]
    return indices


def _tokens(answer: dict[str, Any]) -> int | None:
    """Return the number of tokens that an answer reports; 0 counts as not reported."""
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    for name in ("prompt_tokens", "total_tokens"):
        if type(usage.get(name)) is int and usage[name] > 0:
            tokens: int = usage[name]
            return tokens
    return None


def read_error(body: bytes) -> int | None:
    """Return the status that the error in the body of a 200 response stands for.

    Some gateways answer 200 with an error in one of the shapes of `error_in`. The error's own code
    decides. Without a code its words do: 429 or 503 if the request may succeed later, else 400.

    Returns:
        A status from 400 to 599, or None if the body is not an error.
    """
    if len(body) > _SMALL or not _MAY_BE_AN_ERROR.search(body):
        return None
    answer = parse(body)
    error = error_in(answer)
    if error is None:
        return None
    if isinstance(answer, list):
        answer = answer[0]
    for holder in (error, answer):
        for name in ("code", "status") if isinstance(holder, dict) else ():
            said = str(holder.get(name))[:4]
            if re.fullmatch(r"[45]\d\d", said, re.ASCII):
                return int(said)
    words = json.dumps(error)
    if _RATE.search(words):
        return 429
    return 503 if _BUSY.search(words) else 400


def error_in(answer: Any) -> Any:
    """Return what a JSON value says went wrong, or None if it is not an error.

    Servers write ``{"error": …}``, ``{"errors": [{…}]}``, ``{"detail": …}``, ``{"message": …}``,
    and a list of one of these (Google's).
    """
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        answer = answer[0]
    if not isinstance(answer, dict) or answer.get("data"):
        return None
    names = ("error", "errors") if answer.keys() & _RESULTS else ("error", "errors", *_WORDS)
    error = next((answer[name] for name in names if answer.get(name)), None)
    if isinstance(error, list) and "errors" in answer:
        error = error[0]
    # The words may stand next to {"error": true} or a mere name.
    return answer if error is True else error


def words_of(error: Any) -> str:
    """Return the words of an error, which `error_in` returned."""
    if isinstance(error, dict):
        error = next((error[name] for name in _WORDS if error.get(name)), error)
    return str(error)


def _read_base64(cells: list[str], rows: int) -> Vectors:
    try:
        raw = [base64.b64decode(cell, validate=True) for cell in cells]
    except (binascii.Error, ValueError) as error:
        raise _unreadable(f"a vector is not base64 ({error})", _REPORT) from error
    if len({len(row) for row in raw}) > 1:
        raise _unreadable("the server answered vectors of different sizes to one request", _REPORT)
    return _read_bytes(b"".join(raw), rows)


def _read_floats(cells: list[Any]) -> Vectors:
    try:
        with np.errstate(over="ignore"):  # infinity is refused where rows are normalised
            vectors = np.array(cells, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        raise _unreadable(
            "the vectors are not lists of numbers of one size", _REPORT
        ) from None  # which may quote what it could not read
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise _unreadable(
            f"the answer has shape {vectors.shape} instead of one vector per text",
            "The server does not pool, or pools by another rule. Start it with --runner pooling "
            "--convert embed.",
        )
    return vectors


def read_models(body: bytes) -> list[dict[str, Any]]:
    """Return the rows of a ``/models`` answer, each with an ``id`` and perhaps a ``root``.

    Raises:
        ServerResponseError: the answer is not a list of models.
    """
    try:
        rows: list[dict[str, Any]] = parse(body)["data"]
        if not isinstance(rows, list):
            raise TypeError("not a list")
        for row in rows:
            for name in (row["id"], row.get("root") or ""):
                name.encode()  # a string without lone surrogates
    except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
        raise _unreadable(
            f"/models does not answer a list of models: {_kind(body)}", _CHECK_ROOT
        ) from None
    return rows


def read_tokens(body: bytes) -> list[int]:
    """Return the token ids of a ``/tokenize`` answer, at least the end token.

    Raises:
        ServerResponseError: the answer holds no token ids.
    """
    try:
        ids: list[int] = parse(body)["tokens"]
        if not ids or not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise TypeError("no integers")
    except (TypeError, KeyError):
        raise _unreadable(
            f"/tokenize does not answer token ids as vLLM's does: {_kind(body)}", _REPORT
        ) from None
    return ids


def read_version(body: bytes) -> tuple[int, int]:
    """Return the first two numbers of a ``/version`` answer, or (0, 0) of any other answer."""
    value = parse(body)
    said = value.get("version") if isinstance(value, dict) else None
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", said) if isinstance(said, str) else None
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def parse(body: bytes) -> Any:
    """Return the JSON value, or None. The parser's own error would hold the body."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _unreadable(what: str, advice: str) -> ServerResponseError:
    error = ServerResponseError(f"{what}. {advice}")
    error.answered = what
    return error


def _kind(body: bytes) -> str:
    """Describe a body without quoting a text."""
    value = parse(body)
    if value is None:
        return f"{len(body)} bytes that begin with {excerpt(body)[:16]!r}"
    if isinstance(value, dict):
        return f"a JSON object of {', '.join(repr(name[:16]) for name in list(value)[:6])}"
    return f"a JSON {type(value).__name__}"


def excerpt(body: bytes) -> str:
    """Return the beginning of a body, for an error message."""
    return body[:200].decode("utf-8", "replace")
