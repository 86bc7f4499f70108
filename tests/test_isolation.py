"""One text on which a server fails costs no other text its vector."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qwen3_embeddings import (
    Embedder,
    Qwen3EmbeddingsError,
    ServerBusyError,
    ServerConnectionError,
    ServerError,
    ServerTimeoutError,
    TextRefusedError,
    TextsFailedError,
)

if TYPE_CHECKING:
    from tests.conftest import FaultyServer, Request

TEXTS = [f"text {i}" for i in range(10)]
BAD = TEXTS[4]
Fault = Callable[["Request"], tuple[int, Any] | None]
Connect = Callable[..., Embedder]


@pytest.fixture
def connect(faulty: FaultyServer) -> Iterator[Connect]:
    """Make started embedders of the faulty server."""
    made: list[Embedder] = []

    def make(**arguments: Any) -> Embedder:
        usual = {"base_url": faulty.base_url, "max_retries": 1, "restart_timeout": 30}
        made.append(Embedder(**usual | arguments))
        made[-1].start()
        faulty.requests.clear()
        return made[-1]

    yield make
    for embedder in made:
        embedder.close()


def on(faulty: FaultyServer, texts: set[str], fault: Fault) -> Fault:
    """Fail requests that hold one of some texts."""

    def respond(request: Request) -> tuple[int, Any] | None:
        if texts & set(request.body.get("input", [])):
            return fault(request)
        return faulty.answer(request)

    return respond


def status(code: int) -> Fault:
    return lambda _: (code, {"error": {"message": "unsupported value: NaN"}})


def vectors(
    faulty: FaultyServer, texts: set[str], change: Callable[[dict[str, Any]], Any]
) -> Fault:
    """Change the items of some texts in the answers."""

    def respond(request: Request) -> tuple[int, Any]:
        code, answer = faulty.answer(request)
        sent = request.body.get("input", [])
        if "usage" in answer:
            changed = [
                change(item) if text in texts else item
                for text, item in zip(sent, answer["data"], strict=True)
            ]
            answer["data"] = [item for item in changed if item]
        return code, answer

    return respond


FAULTS: dict[str, Fault] = {
    **{f"status {code}": status(code) for code in (408, 500, 502, 503, 504)},
    "connection closed": lambda _: None,
}
UNRETRIED: dict[str, Fault] = {
    **{f"status {code}": status(code) for code in (302, 403, 404, 405, 501)},
    "unknown model": lambda _: (404, {"error": {"message": "no model for this input"}}),
    "HTML": lambda _: (200, b"<html>blocked</html>"),
    "nothing": lambda _: (200, b""),
    "no list": lambda _: (200, {"data": None}),
}
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "null": lambda item: item | {"embedding": None},
    "empty": lambda item: item | {"embedding": []},
    "empty base64": lambda item: item | {"embedding": ""},
    "vector per token": lambda item: item | {"embedding": [item["embedding"]]},
    "no embedding": lambda item: {"index": item["index"]},
    "omitted": lambda _: None,
}


def carried(error: Qwen3EmbeddingsError, positions: list[int]) -> None:
    assert error.computed is not None
    assert error.computed.positions.tolist() == positions


@pytest.mark.parametrize("name", FAULTS)
def test_encode_document_server_fails_on_one_text_names_it_and_keeps_others(
    faulty: FaultyServer, connect: Connect, name: str
) -> None:
    embedder = connect()
    faulty.respond = on(faulty, {BAD}, FAULTS[name])
    with pytest.raises(TextRefusedError, match="fails on this text") as caught:
        embedder.encode_document(TEXTS)
    assert caught.value.positions == (4,)
    carried(caught.value, [0, 1, 2, 3, 5, 6, 7, 8, 9])
    assert caught.value.computed is not None
    expected = [faulty.vector(text) for text in TEXTS if text != BAD]
    np.testing.assert_allclose(caught.value.computed.vectors, expected, atol=1e-6)
    assert len(faulty.inputs) < 20


def only_about_the_text(error: Exception) -> None:
    said = str(error)
    assert "Leave it out, or change it." in said
    assert not re.search("base_url|api_key|max_concurrency|Try later|pooling|Report|Check", said)


@pytest.mark.parametrize("on_error", ["stop", "finish"])
@pytest.mark.parametrize("name", [*UNRETRIED, *CHANGES])
def test_encode_document_answer_to_one_text_is_unusable_names_it_and_keeps_others(
    faulty: FaultyServer, connect: Connect, name: str, on_error: str
) -> None:
    embedder = connect(on_error=on_error)
    faulty.respond = (
        on(faulty, {BAD}, UNRETRIED[name])
        if name in UNRETRIED
        else vectors(faulty, {BAD}, CHANGES[name])
    )
    with pytest.raises(TextRefusedError if on_error == "stop" else TextsFailedError) as caught:
        embedder.encode_document(TEXTS)
    assert caught.value.positions == (4,)
    carried(caught.value, [0, 1, 2, 3, 5, 6, 7, 8, 9])
    only_about_the_text(caught.value)
    assert len(faulty.inputs) < 20


@pytest.mark.parametrize("on_error", ["stop", "finish"])
@pytest.mark.parametrize("name", [*UNRETRIED, *CHANGES])
def test_encode_document_every_answer_is_unusable_stops_after_few_requests(
    faulty: FaultyServer, connect: Connect, name: str, on_error: str
) -> None:
    embedder = connect(on_error=on_error)
    everything = {*TEXTS, "probe"}
    fault = UNRETRIED.get(name) or vectors(faulty, everything, CHANGES[name])
    faulty.respond = fault
    with pytest.raises(ServerError) as caught:
        embedder.encode_document(TEXTS)
    assert not isinstance(caught.value, TextRefusedError)
    assert len(faulty.requests) == 2, "one attempt and a harmless text"


def test_encode_document_unusable_answer_by_chance_blames_no_text(
    faulty: FaultyServer, connect: Connect
) -> None:
    """A text whose request is answered with a page twice, then once alone, has a vector."""
    embedder = connect()
    pages = iter(range(4))  # of the request, its half, its quarter and the text alone
    page: Fault = lambda _: (200, b"<html>")  # noqa: E731
    bad = on(faulty, {TEXTS[0]}, page)

    def respond(request: Request) -> tuple[int, Any] | None:
        if TEXTS[0] in request.body["input"] and next(pages, None) is None:
            return faulty.answer(request)
        return bad(request)

    faulty.respond = respond
    rows = embedder.encode_document(TEXTS)
    np.testing.assert_allclose(rows, [faulty.vector(text) for text in TEXTS], atol=1e-6)


@pytest.mark.parametrize("name", ["status 500", "status 400", "connection closed"])
def test_encode_document_blamed_text_message_has_no_advice_about_the_server(
    faulty: FaultyServer, connect: Connect, name: str
) -> None:
    embedder = connect(max_retries=0)
    faulty.respond = on(faulty, {BAD}, FAULTS.get(name) or status(400))
    with pytest.raises(TextRefusedError) as caught:
        embedder.encode_document(TEXTS)
    only_about_the_text(caught.value)
    if name != "connection closed":
        assert "unsupported value: NaN" in str(caught.value)


@pytest.mark.parametrize("name", ["status 500", "connection closed"])
def test_encode_document_on_error_finish_names_every_failing_text(
    faulty: FaultyServer, connect: Connect, name: str
) -> None:
    embedder = connect(on_error="finish", batch_size=4)
    faulty.respond = on(faulty, {TEXTS[1], TEXTS[2], TEXTS[9]}, FAULTS[name])
    with pytest.raises(TextsFailedError) as caught:
        embedder.encode_document(TEXTS)
    assert caught.value.positions == (1, 2, 9)
    assert {type(error) for error in caught.value.errors} == {TextRefusedError}
    carried(caught.value, [0, 3, 4, 5, 6, 7, 8])


def test_encode_document_one_text_times_out_names_it(
    faulty: FaultyServer, connect: Connect
) -> None:
    import time

    embedder = connect(timeout=1, max_retries=0)

    def late(_: Request) -> None:
        time.sleep(1.5)

    faulty.respond = on(faulty, {TEXTS[0]}, late)
    with pytest.raises(TextRefusedError, match="did not answer within 1 s") as caught:
        embedder.encode_document(TEXTS[:2])
    assert caught.value.positions == (0,)
    carried(caught.value, [1])


@pytest.mark.parametrize("on_error", ["stop", "finish"])
@pytest.mark.parametrize("name", FAULTS)
def test_encode_document_server_fails_on_everything_stops_after_few_requests(
    faulty: FaultyServer, connect: Connect, name: str, on_error: str
) -> None:
    embedder = connect(on_error=on_error, restart_timeout=0)
    faulty.respond = FAULTS[name]
    closed = name == "connection closed"
    with pytest.raises(ServerConnectionError if closed else ServerBusyError):
        embedder.encode_document(TEXTS)
    assert len(faulty.requests) == 3, "two attempts and a harmless text"


def test_encode_query_shared_request_fails_only_the_caller_of_the_bad_text(
    faulty: FaultyServer, connect: Connect
) -> None:
    embedder = connect(query_instruction="", max_retries=0)
    faulty.respond = on(faulty, {"bad"}, status(500))

    async def calls() -> list[Any]:
        texts = [["a", "bad", "c"], ["d"], ["e", "f"]]
        return await asyncio.gather(*map(embedder.aencode_query, texts), return_exceptions=True)

    refused, *others = asyncio.run(calls())
    assert max(map(len, faulty.inputs)) > 3, "they did not share a request"
    assert isinstance(refused, TextRefusedError)
    assert refused.positions == (1,)
    carried(refused, [0, 2])
    for rows, texts in zip(others, (["d"], ["e", "f"]), strict=True):
        np.testing.assert_allclose(rows, [faulty.vector(text) for text in texts], atol=1e-6)


def test_encode_document_server_dies_during_the_search_keeps_what_was_computed(
    faulty: FaultyServer, connect: Connect
) -> None:
    embedder = connect(max_retries=0, restart_timeout=0)
    poisoned = on(faulty, {TEXTS[9]}, status(500))

    def respond(request: Request) -> tuple[int, Any] | None:
        if request.body.get("input") == TEXTS[:5]:
            faulty.respond = status(500)
        return poisoned(request)

    faulty.respond = respond
    with pytest.raises(ServerBusyError) as caught:
        embedder.encode_document(TEXTS)
    carried(caught.value, [0, 1, 2, 3, 4])


def test_encode_document_server_restarts_waits_and_blames_no_text(
    faulty: FaultyServer, connect: Connect
) -> None:
    embedder = connect(batch_size=3, max_retries=0)
    down = iter([503] * 6)

    def respond(request: Request) -> tuple[int, Any] | None:
        code = next(down, None)
        return (code, {}) if code else faulty.answer(request)

    faulty.respond = respond
    rows = embedder.encode_document(TEXTS)
    np.testing.assert_allclose(rows, [faulty.vector(text) for text in TEXTS], atol=1e-6)


def test_encode_query_server_down_does_not_wait_for_restart(
    faulty: FaultyServer, connect: Connect
) -> None:
    embedder = connect(max_retries=0, restart_timeout=3600)
    faulty.respond = status(503)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ServerBusyError):
        pool.submit(embedder.encode_query, ["a"]).result(timeout=60)


def test_encode_document_everything_times_out_raises_server_timeout(
    faulty: FaultyServer, connect: Connect
) -> None:
    import time

    embedder = connect(timeout=0.5, max_retries=0)

    def late(_: Request) -> None:
        time.sleep(1)

    faulty.respond = late
    with pytest.raises(ServerTimeoutError):
        embedder.encode_document(TEXTS)


@pytest.mark.parametrize("name", ["status 500", "connection closed", "status 403", "HTML"])
def test_tokenize_server_fails_on_one_text_names_it(
    faulty: FaultyServer, connect: Connect, name: str
) -> None:
    embedder = connect(overflow="truncate", on_error="finish", max_retries=0)
    texts = ["x" * 600, "bad" * 300, "y" * 600, "short"]

    def respond(request: Request) -> tuple[int, Any] | None:
        if request.path != "/tokenize":
            return faulty.answer(request)
        if request.body["prompt"].startswith("bad"):
            return (FAULTS | UNRETRIED)[name](request)
        return 200, {"tokens": [1] * (1 + len(request.body["prompt"]))}

    faulty.respond = respond
    with pytest.raises(TextsFailedError) as caught:
        embedder.encode_document(texts)
    assert caught.value.positions == (1,)
    carried(caught.value, [0, 2, 3])


def test_tokenize_server_fails_on_everything_raises_its_error(
    faulty: FaultyServer, connect: Connect
) -> None:
    embedder = connect(overflow="truncate", max_retries=0, restart_timeout=0)
    faulty.respond = status(500)
    with pytest.raises(ServerBusyError):
        embedder.encode_document(["x" * 600] * 30)
    assert len(faulty.requests) <= 64, "each of the texts in flight, and a harmless one"
