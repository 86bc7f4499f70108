"""Any bytes a server may answer give vectors, or a typed error: a coverage-guided fuzzer.

    make fuzz                     # ten minutes
    make fuzz FUZZ_SECONDS=3600

The first byte of an input chooses the reader and the number of texts. The rest is the body, or in
half of the cases the parts that JSON is composed of. What breaks the promise is written to
``build/fuzz/crash-…``; pass that file as argument to run it again. tests/test_security.py holds the
same promise with hypothesis.
"""

from __future__ import annotations

import base64
import sys

import atheris

with atheris.instrument_imports(include=["qwen3_embeddings.engines", "json"]):
    import json

    import numpy as np

    from qwen3_embeddings.engines.openai import failures, wire
    from qwen3_embeddings.errors import ServerResponseError

KINDS = ("application/octet-stream", "application/json")


def read_vectors(body: bytes, rows: int, content_type: str) -> None:
    """Check an embeddings response."""
    form, vectors, tokens = wire.read(body, content_type, rows)
    assert tokens is None or tokens > 0
    assert form in wire.FORMATS
    assert vectors.dtype == np.float32
    assert vectors.ndim == 2
    assert vectors.shape[0] == rows
    assert vectors.shape[1] >= 1


def read_models(body: bytes) -> None:
    """Check a list of models."""
    for row in wire.read_models(body):
        assert isinstance(row, dict)
        row["id"].encode()


def read_tokens(body: bytes) -> None:
    """Token ids."""
    ids = wire.read_tokens(body)
    assert ids
    assert all(type(token) is int for token in ids)


def read_message(body: bytes) -> None:
    """Check that the text of an error can be printed."""
    status = wire.read_error(body)
    assert status is None or 400 <= status < 600
    said = failures.message_of(body)
    assert len(said) <= 500
    said.encode()


NAMES = [
    "usage",
    "prompt_tokens",
    "code",
    "data",
    "index",
    "embedding",
    "id",
    "root",
    "tokens",
    "error",
    "message",
    "detail",
]


def grow(source: atheris.FuzzedDataProvider, depth: int = 0) -> object:
    """Return a JSON value with the names and shapes of servers' responses."""
    match source.ConsumeIntInRange(0, 9 if depth < 6 else 6):
        case 0:
            return source.ConsumeInt(source.ConsumeIntInRange(1, 40))
        case 1:
            return source.ConsumeFloat()
        case 2:
            return source.ConsumeUnicode(8)
        case 3:
            return base64.b64encode(source.ConsumeBytes(16)).decode()
        case 4 | 5 as number:
            return source.ConsumeIntInRange(0, number - 3)
        case 6:
            return source.PickValueInList([None, True, False, "", [], {}])
        case 7 | 8:
            return [grow(source, depth + 1) for _ in range(source.ConsumeIntInRange(0, 4))]
        case _:
            names = [source.PickValueInList(NAMES) for _ in range(source.ConsumeIntInRange(1, 3))]
            return {name: grow(source, depth + 1) for name in names}


def one_input(data: bytes) -> None:
    """One body, through the reader its first byte names."""
    choice, body = data[:1], data[1:]
    reader, rows = divmod(choice[0] if choice else 0, 8)
    rows += 1
    if reader >= 16:
        source = atheris.FuzzedDataProvider(body)
        value = grow(source)
        if reader % 2:
            value = {"data": [{"index": i, "embedding": grow(source)} for i in range(rows)]}
        body = json.dumps(value).encode()
    try:
        match reader % 5:
            case 0 | 1 as kind:
                read_vectors(body, rows, KINDS[kind])
            case 2:
                read_models(body)
            case 3:
                read_tokens(body)
            case _:
                read_message(body)
    except ServerResponseError as error:
        str(error).encode()  # can be printed


if __name__ == "__main__":
    np.seterr(all="raise")  # a warning is an error too: `python -W error` must not change a type
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
