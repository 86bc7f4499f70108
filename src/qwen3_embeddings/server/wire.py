"""Request and response bodies of the server, in OpenAI's form and with vLLM's extensions."""

from __future__ import annotations

import asyncio
import binascii
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from qwen3_embeddings.engines.base import Prompt, Served
from qwen3_embeddings.errors import DimensionsError, TextError, TextTooLongError
from qwen3_embeddings.vectors import Vectors, check_dimensions

FORMATS = ("float", "base64", "bytes_only")
"""Values of ``encoding_format``: OpenAI's two, and vLLM's raw float32 rows."""
BLOCK = 65536
"""Most values of vectors that are serialized at once. As JSON floats they cost 1.5 to 3 ms. In one
piece, 2,048 vectors of 1,024 dimensions would stop the event loop for 90 ms."""
MOST_TEXTS = 2048
"""Most texts of one request, as at OpenAI (API reference, "Create embeddings")."""
FIXED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "embed_dtype": ("float32",),
    "endianness": ("little", "native"),
    "messages": (),
    "normalize": (True,),
    "padding": ("do_not_pad",),
    "truncate_prompt_tokens": (),
    "use_activation": (True,),
}
"""Fields of vLLM that change the vectors, and the values that agree with this server. Other values
are refused, because the client would get other vectors than it expects. Fields that are not listed
are ignored, as by OpenAI and vLLM."""


class RequestError(Exception):
    """A request that is refused.

    Args:
        message: what is wrong, and what to do.
        status: HTTP status.
        param: the field that is wrong.
        code: OpenAI's name of the error.
    """

    def __init__(
        self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code


@dataclass(frozen=True)
class Texts:
    """An embeddings request.

    Attributes:
        prompts: the texts, or their token ids.
        form: one of `FORMATS`.
        dimensions: size of the vectors.
        urgent: True for queries, which have priority over documents.
    """

    prompts: list[Prompt]
    form: str
    dimensions: int
    urgent: bool


def decompress(body: bytes, encoding: str, most: int) -> bytes:
    """Return a body without its ``Content-Encoding``, or one byte more than `most` of a longer one.

    Raises:
        RequestError: the encoding is not known here.
        ValueError: the body is not of this encoding, or incomplete.
    """
    if encoding not in {"gzip", "deflate"}:
        raise RequestError("the content encoding is not gzip or deflate.", 415)
    packed = zlib.decompressobj(zlib.MAX_WBITS | 32)  # reads the headers of both
    try:
        plain = packed.decompress(body, most + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(plain) <= most and (not packed.eof or packed.unused_data):
        raise ValueError("incomplete, or followed by something else")
    return plain


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        RequestError: the body is not a JSON object.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:  # its message may quote a text
        raise RequestError("the body is not valid JSON in UTF-8.") from None
    if not isinstance(value, dict):
        raise RequestError("the body is not a JSON object.")
    return value


def read_texts(fields: dict[str, Any], served: Served, default: int | None) -> Texts:
    """Read an embeddings request.

    Args:
        fields: the request's fields.
        served: what the engine serves.
        default: size of the vectors for a request without `dimensions`.

    Raises:
        RequestError: a field is missing or has a value that cannot work.
    """
    check_fixed(fields)
    form = fields.get("encoding_format") or "float"
    if form not in FORMATS:
        raise RequestError(
            f"encoding_format is not one of {', '.join(FORMATS)}.", param="encoding_format"
        )
    priority = fields.get("priority") or 0
    if type(priority) is not int:
        raise RequestError("priority is not an integer.", param="priority")
    dimensions = fields.get("dimensions")
    try:
        size = check_dimensions(dimensions, served.native) if dimensions is not None else default
    except DimensionsError as error:
        raise RequestError(str(error), param="dimensions") from None
    prompts = _prompts(fields.get("input"), served.vocabulary)
    # As in vLLM the lowest priority goes first, and 0 is the default.
    return Texts(prompts, form, size or served.native, priority <= 0)


def check_fixed(fields: dict[str, Any]) -> None:
    """Refuse fields that ask for vectors or tokens that this server does not compute.

    Raises:
        RequestError: there is one.
    """
    for name in fields.keys() & FIXED.keys():
        if fields[name] is not None and fields[name] not in FIXED[name]:
            raise RequestError(
                f"{name} is not supported with this value. Leave it out.", param=name
            )


def check_model(fields: dict[str, Any], names: Sequence[str]) -> None:
    """Check the model that a request names. A request without a name means the served model.

    Raises:
        RequestError: it is not served here.
    """
    name = fields.get("model")
    if name and name not in names:
        raise RequestError(
            f"the model does not exist here. Served: {', '.join(names)}.",
            404,
            param="model",
            code="model_not_found",
        )


def _prompts(value: Any, vocabulary: int | None) -> list[Prompt]:
    """Return the prompts of `input`: a text, texts, token ids, or lists of token ids."""
    if isinstance(value, str):
        return [value]
    kinds = set(map(type, value)) if isinstance(value, list) else set()
    prompts = [value] if kinds == {int} else value
    if kinds not in ({str}, {int}, {list}):
        raise RequestError(
            "input is not a text, a list of texts, a list of token ids or a list of those, or it "
            "is empty.",
            param="input",
        )
    if len(prompts) > MOST_TEXTS:
        raise RequestError(
            f"input has {len(prompts)} texts. Send at most {MOST_TEXTS} per request.", param="input"
        )
    if kinds != {str}:
        for position, ids in enumerate(prompts):
            _check_ids(position, ids, vocabulary)
    return prompts


def _check_ids(position: int, ids: list[Any], vocabulary: int | None) -> None:
    """Refuse ids that the model has no embedding for. On a GPU they would end the engine."""
    if set(map(type, ids)) != {int}:
        raise RequestError(f"input[{position}] is not a list of token ids.", param="input")
    if min(ids) < 0 or (vocabulary is not None and max(ids) >= vocabulary):
        raise RequestError(
            f"input[{position}] has a token id that is out of range: 0 to "
            f"{vocabulary - 1 if vocabulary else '…'}.",
            param="input",
        )


def text_error(error: TextError, context: int | None) -> RequestError:
    """Return the error of a request whose texts the engine refused.

    Args:
        error: the engine's error.
        context: longest input in tokens.
    """
    named = ", ".join(map(str, error.positions[:10]))
    if isinstance(error, TextTooLongError):
        return RequestError(
            f"input[{named}] is longer than this model's maximum context length of {context} "
            "tokens. Shorten or split it.",
            param="input",
            code="context_length_exceeded",
        )
    return RequestError(f"input[{named}]: {error.message}", 422, param="input")


async def answer(rows: Vectors, form: str, model: str, tokens: int) -> tuple[list[bytes], str]:
    """Write the body of an embeddings response.

    The event loop serves other requests between two blocks. A thread would not help, because orjson
    holds the interpreter's lock.

    Args:
        rows: the vectors (n, dimensions), n at least 1.
        form: one of `FORMATS`.
        model: name of the model.
        tokens: number of tokens in all texts.

    Returns:
        The body in blocks, and its content type.
    """
    rows = np.ascontiguousarray(rows, dtype="<f4")
    size = max(1, BLOCK // rows.shape[1])
    blocks = []
    for start in range(0, len(rows), size):
        if start:
            await asyncio.sleep(0)
        some = rows[start : start + size]
        blocks.append(some.tobytes() if form == "bytes_only" else _cells(some, start, form))
    if form == "bytes_only":
        return blocks, "application/octet-stream"
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    blocks[0] = b'{"object":"list","data":[' + blocks[0]
    blocks[-1] += b"]," + orjson.dumps({"model": model, "usage": usage})[1:]
    return blocks, "application/json"


def _cells(rows: Vectors, start: int, form: str) -> bytes:
    """Return consecutive elements of ``data``, of which the first has the index `start`."""
    cells: Iterable[Any] = rows
    if form == "base64":
        cells = (binascii.b2a_base64(row, newline=False).decode() for row in rows)
    numbered = enumerate(cells, start)
    data = [{"object": "embedding", "index": i, "embedding": cell} for i, cell in numbered]
    # json would need 38 ms instead of 1.5 for 64 vectors of 1,024 floats.
    written = orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
    return b"," + written if start else written


def error_body(error: RequestError) -> bytes:
    """Return an error in OpenAI's form."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    said = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return orjson.dumps({"error": said})
