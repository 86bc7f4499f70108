"""Servers that are almost OpenAI-compatible, and addresses that are almost right."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import trustme
from requests.utils import should_bypass_proxies

from qwen3_embeddings import (
    AuthenticationError,
    Embedder,
    ModelNotFoundError,
    ServerBusyError,
    ServerConnectionError,
    ServerError,
    ServerRefusedError,
    ServerResponseError,
    TextRefusedError,
    TextTooLongError,
)
from qwen3_embeddings.engines.openai import wire
from qwen3_embeddings.engines.openai.addresses import environment_proxy, normal_url

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import FaultyServer, Request

Connect = Callable[..., Embedder]


@pytest.fixture
def connect(faulty: FaultyServer) -> Iterator[Connect]:
    """Make embedders of the faulty server."""
    made: list[Embedder] = []

    def make(**arguments: Any) -> Embedder:
        made.append(Embedder(**{"base_url": faulty.base_url, "max_retries": 1} | arguments))
        return made[-1]

    yield make
    for embedder in made:
        embedder.close()


def indices(faulty: FaultyServer, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Let the server change the items of its answers."""

    def respond(request: Request) -> tuple[int, Any] | None:
        status, answer = faulty.answer(request)
        if "usage" in answer:
            change(answer["data"])
        return status, answer

    faulty.respond = respond


def without_zero(items: list[dict[str, Any]]) -> None:
    """As Gemini's endpoint does."""
    for item in items:
        if item["index"] == 0:
            del item["index"]
    items.reverse()


def without_any(items: list[dict[str, Any]]) -> None:
    for item in items:
        del item["index"]


def null(items: list[dict[str, Any]]) -> None:
    for item in items:
        item["index"] = None


@pytest.mark.parametrize("change", [without_zero, without_any, null])
@pytest.mark.parametrize("texts", [["a"], ["a", "b", "c"]], ids=["one", "three"])
def test_encode_document_missing_index_without_doubt_is_filled_in(
    faulty: FaultyServer,
    connect: Connect,
    change: Callable[[list[dict[str, Any]]], None],
    texts: list[str],
) -> None:
    indices(faulty, change)
    rows = connect().encode_document(texts)
    np.testing.assert_allclose(rows, [faulty.vector(text) for text in texts], atol=1e-6)


def test_encode_document_ambiguous_indices_embeds_texts_one_by_one(
    faulty: FaultyServer, connect: Connect
) -> None:
    embedder = connect()
    embedder.start()
    indices(faulty, lambda items: [item.pop("index") for item in items[:2] if len(items) > 2])
    rows = embedder.encode_document(["a", "b", "c"])
    np.testing.assert_allclose(rows, [faulty.vector(text) for text in "abc"], atol=1e-6)
    assert [len(texts) for texts in faulty.inputs[-2:]] == [1, 2]


def test_read_ambiguous_indices_are_refused() -> None:
    body = b'{"data": [{"embedding": [1]}, {"embedding": [1]}, {"index": 0, "embedding": [1]}]}'
    with pytest.raises(ServerResponseError, match="cannot be matched"):
        wire.read(body, "application/json", 3)


ERRORS: list[tuple[Any, type[Exception], int]] = [
    ({"error": {"message": "quota of the tenant", "code": 403}}, AuthenticationError, 1),
    ({"error": {"message": "model is overloaded", "type": "x"}}, ServerBusyError, 2),
    ({"error": "Rate limit reached for requests"}, ServerBusyError, 2),
    ({"error": {"message": "bad things", "code": "503"}}, ServerBusyError, 2),
    ({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "m"}}, ServerBusyError, 2),
    ({"error": {"message": "the input is not allowed"}}, ServerRefusedError, 1),
    ({"error": {"message": "bad", "code": "invalid_request"}, "data": None}, ServerRefusedError, 1),
]


@pytest.mark.parametrize(("answer", "kind", "attempts"), ERRORS)
def test_start_status_200_with_error_says_its_words(
    faulty: FaultyServer, connect: Connect, answer: Any, kind: type[Exception], attempts: int
) -> None:
    faulty.respond = lambda _: (200, answer)
    error = answer["error"]
    words = error["message"] if isinstance(error, dict) else error
    with pytest.raises(kind, match=words):
        connect().start()
    assert len(faulty.requests) == attempts


def test_encode_document_status_200_with_error_that_passes_is_retried(
    faulty: FaultyServer, connect: Connect
) -> None:
    embedder = connect()
    embedder.start()
    busy = iter([{"error": {"message": "Overloaded"}}])
    faulty.respond = lambda request: (200, next(busy, None) or faulty.embed(request.body))
    np.testing.assert_allclose(embedder.encode_document(["a"]), [faulty.vector("a")], atol=1e-6)


def test_encode_document_status_200_with_error_of_one_text_names_it(
    faulty: FaultyServer, connect: Connect
) -> None:
    embedder = connect()
    embedder.start()

    def respond(request: Request) -> tuple[int, Any] | None:
        texts = request.body["input"]
        if "bad" in texts:
            return 200, {"error": {"message": "content policy", "code": 400}}
        if "long" in texts:
            return 200, {"error": "input is too long"}
        return faulty.answer(request)

    faulty.respond = respond
    with pytest.raises(TextRefusedError, match="200 with an error: content policy") as refused:
        embedder.encode_document(["a", "bad", "b"])
    assert refused.value.positions == (1,)
    with pytest.raises(TextTooLongError) as long:
        embedder.encode_document(["a", "b", "long"])
    assert long.value.positions == (2,)


@pytest.mark.parametrize(
    "body",
    [b'{"error": null, "data": []}', b'{"error": {"code": 400}, "data": [1]}', b'["error"]', b"{"],
)
def test_read_error_other_bodies_are_no_error(body: bytes) -> None:
    assert wire.read_error(body) is None


def test_start_no_models_route_asks_for_model(faulty: FaultyServer, connect: Connect) -> None:
    def respond(request: Request) -> tuple[int, Any] | None:
        return (404, b"") if request.path == "/v1/models" else faulty.answer(request)

    faulty.respond = respond
    with pytest.raises(ServerResponseError, match="model=") as caught:
        connect().start()
    assert caught.value.status == 404
    assert connect(model="named").start().model == "named"


LISTINGS: list[tuple[int, Any]] = [
    *((code, {"error": {"message": "no"}}) for code in (302, 400, 401, 403, 404, 500, 501)),
    (404, {"error": {"message": "no route /v1/models"}}),
    *((200, body) for body in (b"<html>", {"error": "no list"}, {"data": None}, {"data": []}, [])),
]


@pytest.mark.parametrize("answer", [x for x in LISTINGS if x[0] != 401])
def test_start_unusable_models_route_without_model_asks_for_it(
    faulty: FaultyServer, connect: Connect, answer: tuple[int, Any]
) -> None:
    faulty.respond = lambda r: answer if r.path == "/v1/models" else faulty.answer(r)
    with pytest.raises(ServerError, match=r"Pass the (name of the model|model's name) as model="):
        connect(max_retries=0).start()


@pytest.mark.parametrize("answer", LISTINGS)
def test_start_unusable_models_route_with_model_given_works(
    faulty: FaultyServer, connect: Connect, answer: tuple[int, Any]
) -> None:
    faulty.respond = lambda r: answer if r.path == "/v1/models" else faulty.answer(r)
    assert connect(model="named").start().model == "named"


def test_start_model_refused_by_probe_lists_the_served_ones(
    faulty: FaultyServer, connect: Connect
) -> None:
    def respond(request: Request) -> tuple[int, Any] | None:
        if request.method == "POST":
            return 404, {"error": {"message": "The model `other` does not exist."}}
        return faulty.answer(request)

    faulty.respond = respond
    with pytest.raises(ModelNotFoundError, match="'faulty'"):
        connect(model="other").start()


@pytest.mark.parametrize(
    "end",
    ["", "/", "/v1", "/v1/", "/v1/embeddings", "/v1/embeddings/", "/embeddings", "/v1/models"],
)
def test_base_url_with_a_route_at_the_end_reaches_the_root(
    faulty: FaultyServer, connect: Connect, end: str
) -> None:
    root = faulty.base_url.removesuffix("/v1")
    rows = connect(base_url=root + end).encode_document(["a"])
    np.testing.assert_allclose(rows, [faulty.vector("a")], atol=1e-6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://h/openai/v1/embeddings", "https://h/openai/v1"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("https://h/v1/chat/completions", "https://h/v1"),
        ("https://h/embeddings-service/v1", "https://h/embeddings-service/v1"),
    ],
)
def test_normal_url_keeps_other_paths(given: str, expected: str) -> None:
    assert normal_url(given) == expected


# Whose white space.


def stripping(
    faulty: FaultyServer, ids: Callable[[str], list[int]] | None
) -> Callable[[Request], Any]:
    """A server whose vectors ignore outer whitespace, with a tokenizer that tells ids, or none."""

    def respond(request: Request) -> Any:
        if request.path == "/tokenize" and ids is not None:
            return 200, {"tokens": [*ids(request.body["prompt"]), 0]}
        if "input" in request.body:
            request.body["input"] = [text.strip() for text in request.body["input"]]
        return faulty.answer(request)

    return respond


def kept(text: str) -> list[int]:
    return list(text.encode())


def stripped(text: str) -> list[int]:
    return list(text.strip().encode())


@pytest.mark.parametrize(
    ("model", "ids", "strips"),
    [
        ("faulty", kept, True),
        ("faulty", stripped, False),
        ("faulty", None, False),
        ("Qwen/Qwen3-Embedding-0.6B", stripped, False),
        ("Qwen/Qwen3-Embedding-0.6B", None, True),
    ],
)
def test_start_outer_whitespace_accuses_only_what_the_tokenizer_keeps(
    faulty: FaultyServer,
    connect: Connect,
    model: str,
    ids: Callable[[str], list[int]] | None,
    strips: bool,
) -> None:
    faulty.respond = stripping(faulty, ids)
    assert connect(model=model).start().strips is strips


def test_start_outer_whitespace_of_a_server_known_to_strip_is_accused(
    faulty: FaultyServer, connect: Connect
) -> None:
    faulty.respond = stripping(faulty, None)
    answer = faulty.respond

    def respond(request: Request) -> Any:
        if request.path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "owned_by": "infinity"}]}
        return answer(request)

    faulty.respond = respond
    assert connect().start().strips


def test_encode_document_tokenizer_that_strips_accepts_texts_ending_in_newlines(
    faulty: FaultyServer, connect: Connect
) -> None:
    faulty.respond = stripping(faulty, stripped)
    rows = connect().encode_document(["a\n", "  b\n"])
    np.testing.assert_allclose(rows, [faulty.vector("a"), faulty.vector("b")], atol=1e-6)


# Proxies.

WORDED: list[tuple[Any, type[Exception]]] = [
    ({"object": "error", "message": "the words", "code": 400}, ServerRefusedError),
    ({"object": "error", "message": "the words: rate limit"}, ServerBusyError),
    ({"detail": "the words"}, ServerRefusedError),
    ({"errors": [{"status": "403", "detail": "the words"}]}, AuthenticationError),
    ({"errors": ["the words"]}, ServerRefusedError),
    ([{"error": {"code": 429, "message": "the words"}}], ServerBusyError),
    ({"error": True, "message": "the words"}, ServerRefusedError),
]


@pytest.mark.parametrize(("answer", "kind"), WORDED)
def test_start_status_200_with_error_of_another_shape_says_its_words(
    faulty: FaultyServer, connect: Connect, answer: Any, kind: type[Exception]
) -> None:
    faulty.respond = lambda r: (200, answer) if r.method == "POST" else faulty.answer(r)
    with pytest.raises(kind, match="200 with an error: the words") as caught:
        connect(max_retries=0).start()
    assert "base_url" not in str(caught.value)


@pytest.mark.parametrize(
    "body", [b'{"tokens": [1], "message": "m"}', b'{"data": [], "detail": "d"}', b'["message"]']
)
def test_read_error_words_next_to_a_result_are_no_error(body: bytes) -> None:
    assert wire.read_error(body) is None


NO_PROXY = [
    *("", "*", "example.com", ".example.com", "example.com:8000", "sub.example.com:80"),
    *("10.0.0.0/8", "10.1.2.3/32", "192.168.0.0/16, 10.0.0.0/8", "10.1.2.3"),
    *("localhost", "localhost:8000", "127.0.0.0/8", "a.com,example.com", "10.0.0.0/33"),
    *("not/cidr", "::1", " example.com ", "other.com"),
]
URLS = [
    *("http://example.com/v1", "http://example.com:8000/v1", "http://sub.example.com/v1"),
    *("http://sub.example.com:80/v1", "http://notexample.com/v1", "http://10.1.2.3/v1"),
    *("http://10.1.2.3:8000/v1", "http://localhost:8000/v1", "http://127.0.0.1:8000/v1"),
    "http://[::1]:8000/v1",
]


def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_environment_proxy_reads_no_proxy_as_requests_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_proxies(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:1")
    wrong = []
    for value, url in itertools.product(NO_PROXY, URLS):
        monkeypatch.setenv("NO_PROXY", value)
        bypassed = environment_proxy(url) is None
        if bypassed != bool(should_bypass_proxies(url, os.environ["NO_PROXY"])):
            wrong.append((value, url, bypassed))
    assert not wrong
    monkeypatch.setenv("NO_PROXY", "fd00::/8")  # curl reads ranges of IPv6 too
    assert environment_proxy("http://[fd00::1]/v1") is None


@pytest.mark.parametrize(
    ("value", "url", "bypassed"),
    [
        ("other.com example.com", "http://example.com/v1", True),
        ("other.com\t10.0.0.0/8", "http://10.1.2.3/v1", True),
        ("other.com example.org", "http://example.com/v1", False),
        ("10.1.2.3:8000", "http://10.1.2.3:8000/v1", True),
        ("10.1.2.3:8000", "http://10.1.2.3:8001/v1", False),
        ("10.1.2.3:8000", "http://10.1.2.3/v1", False),
        ("[::1]:8000", "http://[::1]:8000/v1", True),
        ("[::1]:8000", "http://[::1]:8001/v1", False),
        ("[::1]", "http://[::1]/v1", True),
        ("[::1]", "http://[::1]:8000/v1", True),
    ],
)
def test_environment_proxy_reads_spaces_and_addresses_with_ports(
    value: str, url: str, bypassed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_proxies(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:1")
    monkeypatch.setenv("NO_PROXY", value)
    assert (environment_proxy(url) is None) is bypassed


def test_embedder_no_proxy_set_after_a_failure_is_followed(
    faulty: FaultyServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_proxies(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    failing = connect(max_retries=0)
    with pytest.raises(ServerConnectionError, match="NO_PROXY"):
        failing.encode_document(["a"])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert connect(max_retries=0).encode_document(["a"]).shape == (1, 32)


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_embedder_ca_of_the_environment_is_part_of_the_engine(
    connect: Connect, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(name, raising=False)
    first, same = connect(), connect()
    (tmp_path / "ca.pem").write_bytes(trustme.CA().cert_pem.bytes())
    monkeypatch.setenv(name, str(tmp_path / "ca.pem" if name == "SSL_CERT_FILE" else tmp_path))
    changed = connect()
    assert first._lease.engine is same._lease.engine
    assert first._lease.engine is not changed._lease.engine
    assert first == changed, "the settings are the same"


@pytest.mark.parametrize("value", ["127.0.0.0/8", "127.0.0.1"])
def test_embedder_no_proxy_range_goes_around_the_proxy(
    faulty: FaultyServer, connect: Connect, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_proxies(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", value)
    assert connect().encode_document(["a"]).shape == (1, 32)


def test_embedder_proxy_of_the_environment_is_used(
    faulty: FaultyServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_proxies(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{faulty.port}")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,localhost")

    def respond(request: Request) -> Any:
        path = request.path.removeprefix("http://embeddings.test")
        return faulty.answer(type(request)(request.method, path, request.headers, request.body))

    faulty.respond = respond
    assert connect(base_url="http://embeddings.test/v1").encode_document(["a"]).shape == (1, 32)
    assert {r.path.split("/v1")[0] for r in faulty.requests} == {"http://embeddings.test"}
