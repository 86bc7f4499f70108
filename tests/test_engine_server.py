"""The client against real servers, and against answers that one does not give on demand."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import respx
import trustme

from conftest import RunningServer, free_port
from qwen3_embeddings import (
    AuthenticationError,
    ConfigurationError,
    DimensionsError,
    Embedder,
    EngineClosedError,
    InvalidVectorError,
    ModelNotFoundError,
    ServerBusyError,
    ServerConnectionError,
    ServerRefusedError,
    ServerResponseError,
    TextRefusedError,
    TextsFailedError,
    TextTooLongError,
    truncate,
)
from qwen3_embeddings.engines.openai import batching
from qwen3_embeddings.engines.openai.batching import QUERIES_PER_REQUEST
from qwen3_embeddings.engines.openai.limiter import ANSWERS_PER_SLOT
from qwen3_embeddings.engines.openai.wire import FORMATS
from qwen3_embeddings.models import END_TOKEN
from qwen3_embeddings.prompts import instruct

# Real servers: vLLM's, and this package's own.


def connect(server: RunningServer, **arguments: Any) -> Embedder:
    return Embedder(**{"base_url": server.base_url, "api_key": server.api_key} | arguments)


def spoken(embedder: Embedder) -> str:
    """Return the wire format that was learned."""
    return embedder._lease.engine.endpoint.wire_format  # type: ignore[attr-defined,no-any-return]


def test_start_real_server_learns_model_sizes_and_wire_format(
    any_server: RunningServer, any_remote: Embedder
) -> None:
    served = any_remote.start()
    assert (served.engine, served.model) == ("server", "tiny")
    assert (served.dimensions, served.native, served.context) == (128, 128, 2048)
    assert spoken(any_remote) == "bytes_only"


def test_encode_document_every_wire_format_returns_equal_vectors(
    any_server: RunningServer, any_remote: Embedder, texts: list[str]
) -> None:
    """A decoder that mistakes one format for another returns garbage."""
    expected = any_remote.encode_document(texts)
    for wire in FORMATS:
        embedder = connect(any_server, default_headers={"X-Wire": wire})
        embedder.start()
        embedder._lease.engine.endpoint.wire_format = wire  # type: ignore[attr-defined]
        np.testing.assert_allclose(embedder.encode_document(texts), expected, atol=2e-6)
        assert spoken(embedder) == wire


def test_start_model_given_by_path_of_weights_is_found(
    any_server: RunningServer, checkpoint: str
) -> None:
    assert connect(any_server, model=checkpoint).start().model == "tiny"


def test_errors_of_a_real_server_name_the_fix(any_server: RunningServer) -> None:
    with pytest.raises(AuthenticationError, match="QWEN3_EMBEDDINGS_API_KEY"):
        connect(any_server, api_key="wrong").encode_query(["x"])
    with pytest.raises(ModelNotFoundError, match="'tiny'"):
        connect(any_server, model="other").encode_query(["x"])
    with pytest.raises(ServerConnectionError, match="base_url"):
        Embedder(base_url=f"http://127.0.0.1:{free_port()}", max_retries=0).encode_query(["x"])
    for host in ("xn--", "a" * 300):  # not host names, which shows only at the look-up
        with pytest.raises(ServerConnectionError, match="base_url"):
            Embedder(base_url=f"http://{host}", max_retries=0).encode_query(["x"])
    with pytest.raises(ConfigurationError, match="not a URL"):
        Embedder(base_url="http://local host")
    with pytest.raises(ServerResponseError, match="/v1"):
        connect(any_server, base_url=any_server.base_url + "/chat").encode_query(["x"])
    with pytest.raises(DimensionsError, match="32 to 128"):
        connect(any_server, dimensions=512).encode_query(["x"])


def test_encode_document_text_over_the_context_is_named(any_remote: Embedder) -> None:
    with pytest.raises(TextTooLongError) as caught:
        any_remote.encode_document(["fine"] * 100 + ["long " * 3000])
    assert caught.value.positions == (100,)


def test_encode_query_threads_and_coroutines_return_equal_vectors(any_remote: Embedder) -> None:
    expected = any_remote.encode_query([f"text {i}" for i in range(200)])
    with ThreadPoolExecutor(32) as pool:
        rows = list(pool.map(lambda i: any_remote.encode_query([f"text {i}"])[0], range(32)))
    np.testing.assert_allclose(rows, expected[:32], atol=2e-6)

    async def burst() -> np.ndarray:
        calls = (any_remote.aencode_query([f"text {i}"]) for i in range(200))
        return np.concatenate(await asyncio.gather(*calls))

    for _ in range(5):
        np.testing.assert_allclose(asyncio.run(burst()), expected, atol=2e-6)


def test_encode_document_server_without_matryoshka_truncates_here(
    wrong_server: RunningServer, reference: Embedder, texts: list[str]
) -> None:
    """This server appends no end token, so each text carries it."""
    embedder = connect(wrong_server, model="tiny", dimensions=64)
    expected = truncate(reference.encode_document(texts), 64)
    cosines = (embedder.encode_document([text + END_TOKEN for text in texts]) * expected).sum(
        axis=1
    )
    assert np.abs(cosines - 1).max() <= 1e-6
    assert not embedder._lease.engine.cuts_itself  # type: ignore[attr-defined]
    whole = connect(wrong_server, model="tiny", dimensions=128)
    assert whole.encode_query(["x"]).shape == (1, 128)


# A real TLS server.


class _Handler(BaseHTTPRequestHandler):
    """The smallest embeddings server."""

    def do_GET(self) -> None:
        self._send({"data": [{"id": "tls"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rows = [FakeServer.vector(text) for text in body["input"]]
        self._send({"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]})

    def _send(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Return the URL of a server whose certificate no system trusts, and that certificate."""
    authority = trustme.CA()
    certificate = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    server = ThreadingHTTPServer(("localhost", 0), _Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"https://localhost:{server.server_port}/v1", certificate
    server.shutdown()
    server.server_close()
    thread.join()


def test_start_tls_certificate_is_verified(tls_server: tuple[str, Path]) -> None:
    url, certificate = tls_server
    with pytest.raises(ServerConnectionError, match="verify="):
        Embedder(base_url=url, max_retries=0).encode_query(["x"])
    context = ssl.create_default_context(cafile=str(certificate))
    for verify in (str(certificate), context, False):
        with Embedder(base_url=url, verify=verify) as embedder:
            rows = embedder.encode_document(["a"])
        np.testing.assert_allclose(rows, [FakeServer.vector("a")], atol=1e-6)


def test_start_ca_file_replaced_meanwhile_is_read_again(
    tls_server: tuple[str, Path], tmp_path: Path
) -> None:
    url, certificate = tls_server
    file = tmp_path / "authorities.pem"
    file.write_bytes(trustme.CA().cert_pem.bytes())
    for _ in range(2):
        with (
            Embedder(base_url=url, verify=str(file), max_retries=0) as embedder,
            pytest.raises(ServerConnectionError, match="verify="),
        ):
            embedder.start()
    file.write_bytes(certificate.read_bytes())
    os.utime(file, (1, 1))  # some file systems count whole seconds
    with Embedder(base_url=url, verify=str(file), max_retries=0) as embedder:
        assert embedder.start().model == "tls"


@pytest.mark.parametrize("path", ["no-such-file.pem", ".", "a\0b"])
def test_start_unreadable_ca_file_is_named(path: str) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"^verify='.*' cannot be read as CA certificates"),
        Embedder(base_url="https://localhost:1/v1", verify=path, max_retries=0) as embedder,
    ):
        embedder.start()


FORK = """
    import os, sys
    import numpy as np
    from qwen3_embeddings import Embedder
    embedder = Embedder(base_url=sys.argv[1], api_key=sys.argv[2])
    names = [[f"{who} {i}" for i in range(20)] for who in ("parent", "child")]
    expected = [embedder.encode_document(texts) for texts in names]
    for _ in range(4):
        pid = os.fork()
        mine = 0 if pid else 1
        for _ in range(5):
            rows = embedder.encode_document(names[mine])
            right = np.abs(rows - expected[mine]).max() < 2e-6
            if not right:
                print("wrong vectors in", "parent" if pid else "child", flush=True)
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
    print("done")
"""


def test_forked_child_shares_no_connection(any_server: RunningServer) -> None:
    """With a shared connection both sides would read each other's answers."""
    script = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORK)]
    command = [*script, any_server.base_url, any_server.api_key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


# Fake answers.

URL = "http://embeddings.test/v1"
PATIENCE = {"timeout": 5, "restart_timeout": 0}
Answer = Callable[[dict[str, Any]], httpx.Response]


class FakeServer:
    """Routes of an OpenAI-compatible server whose embeddings route a test replaces."""

    def __init__(self, router: respx.MockRouter) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answer: Answer = self.floats
        listing = {"data": [{"id": "fake", "max_model_len": 512}]}
        router.get(f"{URL}/models").respond(json=listing)
        router.post(f"{URL}/embeddings").mock(side_effect=self._embeddings)
        self.router = router

    def _embeddings(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        return self.answer(body)

    @staticmethod
    def vector(text: str, size: int = 64) -> list[float]:
        row = np.random.default_rng(list(text.encode()) or [0]).standard_normal(size)
        return [float(x) for x in (row / np.linalg.norm(row)).astype(np.float32)]

    @classmethod
    def floats(cls, body: dict[str, Any]) -> httpx.Response:
        rows = [cls.vector(str(text)) for text in body["input"]]
        return cls.data([{"index": i, "embedding": row} for i, row in enumerate(rows)])

    @staticmethod
    def data(items: list[Any]) -> httpx.Response:
        return httpx.Response(200, content=json.dumps({"object": "list", "data": items}))


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with respx.mock(assert_all_called=False, using="httpx") as router:
        yield FakeServer(router)


def embedder_of(fake: FakeServer, **arguments: Any) -> Embedder:
    """Return a started embedder, whose probe was answered in plain floats."""
    made = Embedder(**{**PATIENCE, "base_url": URL, "max_retries": 2} | arguments)
    made.start()
    fake.bodies.clear()
    return made


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close the engines of fake servers, which tests must not share."""
    yield
    from qwen3_embeddings import event_loop
    from qwen3_embeddings.engines import registry

    made_up = {k: e for k, e in registry._engines.items() if getattr(e, "base_url", "") == URL}
    for key, engine in made_up.items():
        event_loop.run(engine.close())
        del registry._engines[key], registry._leases[key]


def refuse(status: int, message: str, **headers: str) -> httpx.Response:
    body = {"error": {"message": message, "type": "BadRequestError"}}
    return httpx.Response(status, json=body, headers=headers)


def test_start_server_refuses_formats_uses_the_next_one(fake: FakeServer) -> None:
    texts = ["a", "b", "c"]
    expected = np.array([fake.vector(text) for text in texts])

    def packed(body: dict[str, Any]) -> httpx.Response:
        rows = [np.array(fake.vector(text), dtype="<f4").tobytes() for text in body["input"]]
        if body["encoding_format"] == "bytes_only":
            headers = {"content-type": "application/octet-stream"}
            return httpx.Response(200, content=b"".join(rows), headers=headers)
        cells = [base64.b64encode(row).decode() for row in rows]
        return fake.data([{"index": i, "embedding": cell} for i, cell in enumerate(cells)])

    def only_base64(body: dict[str, Any]) -> httpx.Response:
        if body["encoding_format"] == "bytes_only":
            return refuse(400, "encoding_format: Input should be 'float' or 'base64'")
        return packed(body)

    def only_floats(body: dict[str, Any]) -> httpx.Response:
        if body["encoding_format"] != "float":
            return httpx.Response(422, json={"detail": "encoding_format not supported"})
        return fake.floats(body)

    for answer, wire in ((packed, "bytes_only"), (only_base64, "base64"), (only_floats, "float")):
        fake.answer = answer
        embedder = embedder_of(fake, default_headers={"x-test": wire})
        np.testing.assert_allclose(embedder.encode_document(texts), expected, atol=1e-6)
        assert spoken(embedder) == wire
        assert [body["encoding_format"] for body in fake.bodies] == [wire], "learned once"


@pytest.mark.parametrize(
    "wording",
    [
        'Model "m" does not support matryoshka representation, changing output dimensions will…',
        "Model does not support Matryoshka embeddings. Please set `is_matryoshka`",
        "dimensions is currently not supported",
    ],
)
def test_encode_document_size_refused_truncates_here(fake: FakeServer, wording: str) -> None:
    fake.answer = lambda body: refuse(400, wording) if "dimensions" in body else fake.floats(body)
    rows = embedder_of(fake, dimensions=32).encode_document(["a"])
    np.testing.assert_allclose(rows, truncate([fake.vector("a")], 32), atol=1e-6)
    assert ["dimensions" in body for body in fake.bodies] == [True, False]


def test_encode_document_size_ignored_truncates_here(fake: FakeServer) -> None:
    embedder = embedder_of(fake, dimensions=32)
    expected = truncate([fake.vector("a")], 32)
    for _ in range(2):
        np.testing.assert_allclose(embedder.encode_document(["a"]), expected, atol=1e-6)
    assert ["dimensions" in body for body in fake.bodies] == [True, False]


def test_encode_document_long_vectors_are_normalised(fake: FakeServer) -> None:
    def long(body: dict[str, Any]) -> httpx.Response:
        return fake.data(
            [
                {"index": i, "embedding": [7 * x for x in fake.vector(text)]}
                for i, text in enumerate(body["input"])
            ]
        )

    fake.answer = long
    rows = embedder_of(fake).encode_document(["a"])
    np.testing.assert_allclose(rows, [fake.vector("a")], atol=1e-6)


NONSENSE: list[tuple[str, bytes, str]] = [
    ("html", b"<html>It works!</html>", "text/html"),
    ("empty", b"", "application/json"),
    ("no data", b'{"object": "list"}', "application/json"),
    ("a list", b"[1, 2]", "application/json"),
    ("too few rows", b'{"data": [{"index": 0, "embedding": [1, 0]}]}', "application/json"),
    (
        "an index twice",
        b'{"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]}',
        "application/json",
    ),
    (
        "ragged rows",
        b'{"data": [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [1, 0]}]}',
        "application/json",
    ),
    (
        "a vector a token",
        b'{"data": [{"index": 0, "embedding": [[1]]}, {"index": 1, "embedding": [[1]]}]}',
        "application/json",
    ),
    (
        "no base64",
        b'{"data": [{"index": 0, "embedding": "?"}, {"index": 1, "embedding": "?"}]}',
        "application/json",
    ),
    ("torn bytes", b"\0" * 13, "application/octet-stream"),
    ("no bytes", b"", "application/octet-stream"),
    ("another size", b"\1" * 16, "application/octet-stream"),
]


@pytest.mark.parametrize(("name", "content", "kind"), NONSENSE, ids=[n[0] for n in NONSENSE])
def test_encode_document_invalid_answer_is_a_typed_error(
    fake: FakeServer, name: str, content: bytes, kind: str
) -> None:
    embedder = embedder_of(fake)
    headers = {"content-type": kind}
    fake.answer = lambda _: httpx.Response(200, content=content, headers=headers)
    with pytest.raises((ServerResponseError, DimensionsError)):
        embedder.encode_document(["a", "b"])


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity", "null"])
def test_encode_document_nan_row_is_refused(fake: FakeServer, bad: str) -> None:
    embedder = embedder_of(fake)

    def answer(body: dict[str, Any]) -> httpx.Response:
        cells = [f"[{', '.join(map(str, fake.vector(text)))}]" for text in body["input"]]
        cells[1] = f"[{', '.join([bad] * 64)}]"
        items = ", ".join(f'{{"index": {i}, "embedding": {c}}}' for i, c in enumerate(cells))
        return httpx.Response(200, content=f'{{"data": [{items}]}}')

    fake.answer = answer
    with pytest.raises(InvalidVectorError) as caught:
        embedder.encode_document(["a", "b", "c"])
    assert caught.value.positions == (1,)


@pytest.mark.usefixtures("short_backoff")
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 520])
def test_encode_document_lasting_failure_stops_after_max_retries(
    fake: FakeServer, status: int
) -> None:
    embedder = embedder_of(fake, max_retries=1)
    fake.answer = lambda _: refuse(status, "no", **{"Retry-After": "0"})
    with pytest.raises(ServerBusyError) as caught:
        embedder.encode_document(["a"])
    assert caught.value.status == status
    sent = [body["input"] for body in fake.bodies]
    harmless = [] if status == 429 else [["probe"]]  # no text causes a 429
    assert sent == [["a"], ["a"], *harmless]


@pytest.mark.parametrize("status", [400, 402, 409, 422])
def test_encode_document_refusal_is_not_retried(fake: FakeServer, status: int) -> None:
    embedder = embedder_of(fake)
    fake.answer = lambda _: refuse(status, "never")
    with pytest.raises(ServerRefusedError, match="never"):
        embedder.encode_document(["a"])
    assert len(fake.bodies) <= 2


def test_encode_query_sends_headers_and_key(fake: FakeServer) -> None:
    embedder_of(fake, api_key="sk-1", default_headers={"X-Tenant": "blue"}).encode_query(["a"])
    request = fake.router.calls.last.request
    assert request.headers["authorization"] == "Bearer sk-1"
    assert request.headers["x-tenant"] == "blue"


def test_start_two_served_models_asks_for_the_name(fake: FakeServer) -> None:
    fake.router.get(f"{URL}/models").respond(json={"data": [{"id": "one"}, {"id": "two"}]})
    with pytest.raises(ModelNotFoundError, match="'one', 'two'"):
        Embedder(base_url=URL).start()
    assert Embedder(base_url=URL, model="two").start().model == "two"


def test_start_without_model_list_uses_the_given_name(fake: FakeServer) -> None:
    fake.router.get(f"{URL}/models").respond(404)
    assert Embedder(base_url=URL, model="given").start().model == "given"


@pytest.mark.parametrize(
    ("version", "context"),
    [
        ({"json": {"version": "0.31.0"}}, 511),
        ({"json": {"version": "0.32.0+cpu"}}, 512),
        ({"json": {"version": "1.0"}}, 512),
        ({"json": {"version": 32}}, 511),
        ({"content": b"\xff"}, 511),
        ({"status_code": 404, "json": {"version": "2.0"}}, 511),
        ({"status_code": 502}, 511),
    ],
)
def test_start_vllm_before_0_32_leaves_one_token_of_the_context(
    fake: FakeServer, version: dict[str, Any], context: int
) -> None:
    """Before 0.32 the last token can hang (tests/other_servers.py); unknown versions too."""
    listing = {"data": [{"id": "m", "max_model_len": 512, "owned_by": "vllm"}]}
    fake.router.get(f"{URL}/models").respond(json=listing)
    asked = fake.router.get("http://embeddings.test/version").respond(**version)
    embedder = embedder_of(fake, max_retries=3)
    assert embedder.start().context == context
    assert asked.call_count == 1, "a start does not retry it"
    tokens = {"tokens": list(range(512))}
    fake.router.post("http://embeddings.test/tokenize").respond(json=tokens)
    if context == 512:
        embedder.encode_document(["a" * 600])
    else:
        with pytest.raises(TextTooLongError, match="over the context of 511"):
            embedder.encode_document(["a" * 600])


def test_encode_query_smaller_default_size_of_the_server_asks_for_native(fake: FakeServer) -> None:
    """No size means the native one on every engine."""
    listing = {"data": [{"id": "m", "root": "Qwen/Qwen3-Embedding-0.6B", "max_model_len": 600}]}
    fake.router.get(f"{URL}/models").respond(json=listing)
    assert embedder_of(fake, dimensions=64).encode_query(["a"]).shape == (1, 64)
    assert embedder_of(fake, dimensions=32).encode_query(["a"]).shape == (1, 32)
    with pytest.raises(DimensionsError, match="64"):
        embedder_of(fake).encode_query(["a"])

    def sized(body: dict[str, Any]) -> httpx.Response:
        rows = [fake.vector(str(text), body.get("dimensions", 64)) for text in body["input"]]
        return fake.data([{"index": i, "embedding": row} for i, row in enumerate(rows)])

    fake.answer = sized
    assert embedder_of(fake, timeout=6).encode_query(["a"]).shape == (1, 1024)


@pytest.mark.parametrize("each", [1, 5])
def test_encode_query_backlog_makes_requests_larger(fake: FakeServer, each: int) -> None:
    embedder = embedder_of(fake, max_concurrency=2, batch_size=20)
    texts = [f"query {i}" for i in range(100)]
    calls = [texts[i : i + each] for i in range(0, 100, each)]

    async def burst() -> list[np.ndarray]:
        return await asyncio.gather(*map(embedder.aencode_query, calls))

    rows = np.concatenate(asyncio.run(burst()))
    expected = [fake.vector(instruct(embedder.task.instruction, text)) for text in texts]
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    sizes = [len(body["input"]) for body in fake.bodies]
    assert max(sizes) == 20, "as many as a request may hold"
    assert len(sizes) < min(100 / QUERIES_PER_REQUEST, len(calls))


@pytest.mark.parametrize("method", ["aencode_query", "aencode_document"])
async def test_encode_one_call_at_a_time_does_not_wait_for_others(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(batching, "GATHER_SECONDS", 3600)
    embed = getattr(embedder_of(fake), method)
    for text in ("first", "second"):
        assert (await asyncio.wait_for(embed([text]), 30)).shape == (1, 64)


def test_encode_query_single_queries_share_requests(fake: FakeServer) -> None:
    embedder = embedder_of(fake)
    texts = [f"query {i}" for i in range(60)]

    async def burst() -> list[np.ndarray]:
        return await asyncio.gather(*(embedder.aencode_query([text]) for text in texts))

    rows = np.concatenate(asyncio.run(burst()))
    prompts = [text for body in fake.bodies for text in body["input"]]
    expected = [fake.vector(embedder.task.instruction and prompt) for prompt in sorted(prompts)]
    order = sorted(range(60), key=lambda i: f"query {i}")
    np.testing.assert_allclose(rows[order], expected, atol=1e-6)
    assert len(fake.bodies) <= 2 * 60 / QUERIES_PER_REQUEST, "they did not share"
    assert max(len(body["input"]) for body in fake.bodies) <= QUERIES_PER_REQUEST


def test_encode_document_refused_text_fails_only_its_caller(fake: FakeServer) -> None:
    embedder = embedder_of(fake)

    def answer(body: dict[str, Any]) -> httpx.Response:
        if any("poison" in text for text in body["input"]):
            return refuse(400, "this text is not allowed")
        return fake.floats(body)

    fake.answer = answer

    async def burst() -> list[Any]:
        texts = ["a", "poison", "b"]
        calls = (embedder.aencode_document([text]) for text in texts)
        return await asyncio.gather(*calls, return_exceptions=True)

    first, refused, last = asyncio.run(burst())
    assert isinstance(refused, TextRefusedError)
    assert (refused.positions, refused.computed) == ((0,), None)
    np.testing.assert_allclose([first[0], last[0]], [fake.vector("a"), fake.vector("b")], atol=1e-6)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (httpx.Response(500), TextRefusedError),
        (httpx.Response(200, content=b"[]"), TextRefusedError),
    ],
)
def test_encode_query_text_that_breaks_the_server_fails_only_its_caller(
    fake: FakeServer, answer: httpx.Response, kind: type[Exception]
) -> None:
    embedder = embedder_of(fake, max_retries=0)
    fake.answer = lambda body: answer if "poison" in body["input"] else fake.floats(body)

    async def burst() -> list[Any]:
        calls = (embedder.aencode_query([text]) for text in ["a", "poison", "b"])
        return await asyncio.gather(*calls, return_exceptions=True)

    embedder = embedder.with_task(query_instruction="")
    first, broken, last = asyncio.run(burst())
    assert type(broken) is kind
    np.testing.assert_allclose([first[0], last[0]], [fake.vector("a"), fake.vector("b")], atol=1e-6)


def test_encode_document_long_text_without_tokenize_route_is_named(fake: FakeServer) -> None:
    fake.router.post("http://embeddings.test/tokenize").respond(404)
    embedder = embedder_of(fake)

    def answer(body: dict[str, Any]) -> httpx.Response:
        if any(len(text) > 600 for text in body["input"]):
            return refuse(400, "This model's maximum context length is 512 tokens.")
        return fake.floats(body)

    fake.answer = answer
    with pytest.raises(TextTooLongError) as caught:
        embedder.encode_document(["a", "b", "c" * 700, "d"])
    assert caught.value.positions == (2,)
    with pytest.raises(ConfigurationError, match="/tokenize"):
        embedder_of(fake, overflow="mean").encode_document(["c" * 700])


@pytest.mark.parametrize("status", [413, 400])
def test_encode_document_text_refused_by_tokenizer_fails_alone(
    fake: FakeServer, status: int
) -> None:
    """A proxy that limits the size of a body does this."""
    url = "http://embeddings.test/tokenize"

    def tokens(request: httpx.Request) -> httpx.Response:
        text = json.loads(request.content)["prompt"]
        if len(text) > 2000:
            return refuse(status, "request body too large" if status == 413 else "not this one")
        return httpx.Response(200, json={"tokens": [1] * (1 + len(text))})

    route = fake.router.post(url).mock(side_effect=tokens)
    texts = ["a", "b", "c" * 5000, "d" * 700, "e"]
    for overflow in ("truncate", "mean"):
        embedder = embedder_of(fake, overflow=overflow, on_error="finish")
        with pytest.raises(TextsFailedError) as caught:
            embedder.encode_document(texts)
        assert caught.value.positions == (2,)
        assert isinstance(caught.value.errors[0], TextRefusedError)
        assert caught.value.computed is not None
        assert caught.value.computed.positions.tolist() == [0, 1, 3, 4]
        with pytest.raises(TextRefusedError, match="does not tokenize") as stopped:
            embedder_of(fake, overflow=overflow).encode_document(texts)
        assert stopped.value.positions == (2,)
    asked = route.call_count
    time.sleep(0.2)
    assert route.call_count == asked, "requests went on after the error"


def test_encode_document_refused_size_is_no_long_text(fake: FakeServer) -> None:
    def answer(body: dict[str, Any]) -> httpx.Response:
        if "dimensions" in body:
            return refuse(400, "dimensions must not exceed nothing: this model has one size")
        return fake.floats(body)

    fake.answer = answer
    expected = truncate(np.array([fake.vector("a")], np.float32), 32)
    vectors = embedder_of(fake, dimensions=32).encode_document(["a"])
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_encode_document_limit_of_texts_per_request_is_learned(fake: FakeServer) -> None:
    embedder = embedder_of(fake)

    def limited(body: dict[str, Any]) -> httpx.Response:
        few = len(body["input"]) <= 20
        return fake.floats(body) if few else refuse(422, "batch size > maximum allowed 20")

    fake.answer = limited
    texts = [f"text {i}" for i in range(64)]
    expected = [fake.vector(text) for text in texts]
    np.testing.assert_allclose(embedder.encode_document(texts), expected, atol=1e-6)
    assert len(fake.bodies) == 7
    fake.bodies.clear()
    np.testing.assert_allclose(embedder.encode_document(texts), expected, atol=1e-6)
    assert len(fake.bodies) == 4, "forgot the limit"


def test_start_after_a_failed_start_works(fake: FakeServer) -> None:
    embedder = Embedder(base_url=URL, max_retries=0)
    fake.answer = lambda _: refuse(503, "still loading")
    for _ in range(2):
        with pytest.raises(ServerBusyError, match="still loading"):
            embedder.encode_document(["a"])
    fake.answer = fake.floats
    np.testing.assert_allclose(embedder.encode_document(["a"]), [fake.vector("a")], atol=1e-6)


async def test_start_after_a_cancelled_start_works(fake: FakeServer) -> None:
    embedder = Embedder(base_url=URL, max_retries=0)

    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.3)
        return fake.floats(json.loads(request.content))

    fake.router.post(f"{URL}/embeddings").mock(side_effect=slow)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(embedder.aencode_document(["a"]), 0.1)
    rows = await embedder.aencode_document(["a"])
    np.testing.assert_allclose(rows, [fake.vector("a")], atol=1e-6)


async def test_start_concurrent_calls_share_one_attempt(fake: FakeServer) -> None:
    embedder = Embedder(base_url=URL, max_retries=1)
    fake.answer = lambda _: refuse(503, "down", **{"Retry-After": "0.1"})
    calls = (embedder.aencode_query(["a"]) for _ in range(20))
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error, ServerBusyError) for error in errors)
    assert len(fake.bodies) == 2, "each call retried by itself"


def test_encode_document_nan_row_fails_only_its_caller(fake: FakeServer) -> None:
    embedder = embedder_of(fake, dimensions=32)

    def answer(body: dict[str, Any]) -> httpx.Response:
        items = json.loads(fake.floats(body).content)["data"]
        for item, text in zip(items, body["input"], strict=True):
            item["embedding"] = [float("nan")] * 64 if text == "bad" else item["embedding"]
        return fake.data(items)

    fake.answer = answer

    async def burst() -> list[Any]:
        calls = (embedder.aencode_document([text]) for text in ("a", "bad", "b"))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, bad, last = asyncio.run(burst())
    assert isinstance(bad, InvalidVectorError)
    assert bad.positions == (0,)
    expected = truncate([fake.vector("a"), fake.vector("b")], 32)
    np.testing.assert_allclose([first[0], last[0]], expected, atol=1e-6)


def test_errors_never_quote_the_key(fake: FakeServer) -> None:
    for key in ("sk-file\n", " sk-file", "sk-\x07file"):
        with pytest.raises(ConfigurationError, match="api_key") as caught:
            Embedder(base_url=URL, api_key=key)
        assert "file" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="X-Key") as caught:
        Embedder(base_url=URL, default_headers={"X-Key": "hid\nden"})
    assert "den" not in str(caught.value)
    embedder = embedder_of(fake, api_key="sk-echoed", default_headers={"X-Key": "hidden"})
    fake.answer = lambda _: refuse(401, "Received Bearer sk-echoed and hidden, expected another")
    with pytest.raises(AuthenticationError, match="expected another") as refused:
        embedder.encode_query(["a"])
    assert "sk-echoed" not in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_error_kind_is_read_before_headers_are_hidden(fake: FakeServer) -> None:
    tenant = {"X-Tenant": "a", "X-Api-Key": "m", "X-Team": "blue-team"}
    embedder = embedder_of(fake, default_headers=tenant)
    fake.answer = lambda _: refuse(400, "over the maximum context length of blue-team")
    with pytest.raises(TextTooLongError, match=r"over the \*+axi\*+u\*+ ") as caught:
        embedder.encode_query(["a"])
    assert "blue-team" not in str(caught.value)


def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("HTTP_PROXY", "http://h.test/v1"),
        ("HTTPS_PROXY", "https://h.test/v1"),
        ("ALL_PROXY", "https://h.test/v1"),
    ],
)
def test_embedder_socks_proxy_is_refused(
    variable: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_proxies(monkeypatch)
    monkeypatch.setenv(variable, "socks5://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match="NO_PROXY"):
        Embedder(base_url=url)
    monkeypatch.setenv("NO_PROXY", ".h.test")  # httpx would not exclude h.test itself
    with Embedder(base_url=url, max_retries=0) as embedder:
        with pytest.raises(ServerConnectionError) as caught:
            embedder.start()
        assert "ProxyError" not in str(caught.value)


def test_embedder_proxy_of_unknown_scheme_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    no_proxies(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", "ftp://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match="HTTP_PROXY"):
        Embedder(base_url=URL)


def test_encode_query_status_407_names_the_proxy(
    fake: FakeServer,
) -> None:
    embedder = embedder_of(fake)
    fake.answer = lambda _: httpx.Response(407, text="who are you?")
    with pytest.raises(AuthenticationError, match="the proxy named in HTTP_PROXY/HTTPS_PROXY"):
        embedder.encode_query(["a"])


def test_start_unreachable_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    no_proxies(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with (
        Embedder(base_url=URL, max_retries=0) as embedder,
        pytest.raises(ServerConnectionError, match="the proxy named in HTTP_PROXY/HTTPS_PROXY"),
    ):
        embedder.start()


def test_embedder_unreadable_ca_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    with pytest.raises(ConfigurationError, match="SSL_CERT_FILE='/nonexistent'"):
        Embedder(base_url=URL)


@pytest.mark.parametrize("url", ["http://h:99999/v1", "http://h/v1?key=sk-1", "http://u:pw@h/v1"])
def test_embedder_unusable_or_secret_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Embedder(base_url=url)
    assert "sk-1" not in str(caught.value)
    assert "pw" not in str(caught.value)


def test_start_two_names_of_one_model_need_no_choice(fake: FakeServer) -> None:
    root = "Qwen/Qwen3-Embedding-0.6B"
    listing = {"data": [{"id": root, "root": root}, {"id": "emb", "root": root}]}
    fake.router.get(f"{URL}/models").respond(json=listing)
    names = [Embedder(base_url=URL, model=name).start().model for name in (root, "emb", None)]
    assert names == [root, "emb", root]


def test_start_unlisted_name_is_tried(fake: FakeServer) -> None:
    assert Embedder(base_url=URL, model="unlisted").start().model == "unlisted"


def test_start_deeply_nested_json_is_a_typed_error(fake: FakeServer) -> None:
    fake.router.get(f"{URL}/models").respond(content=b"[" * 200_000)
    with pytest.raises(ServerResponseError):
        Embedder(base_url=URL).start()


def test_encode_document_stays_within_batch_size_and_concurrency(fake: FakeServer) -> None:
    embedder = embedder_of(fake, batch_size=8, max_concurrency=3)
    under_way, most = 0, 0
    lock = threading.Lock()

    async def slow(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        await asyncio.sleep(0.02)
        with lock:
            under_way -= 1
        fake.bodies.append(json.loads(request.content))
        return fake.floats(fake.bodies[-1])

    fake.router.post(f"{URL}/embeddings").mock(side_effect=slow)
    texts = [f"text {i}" for i in range(100)]
    expected = [fake.vector(text) for text in texts]
    np.testing.assert_allclose(embedder.encode_document(texts), expected, atol=1e-6)
    assert most == 3
    assert max(len(body["input"]) for body in fake.bodies) == 8


class Crowded:
    """A route that accepts `limit` requests at once and answers 429 to all others."""

    seconds = 0.02

    def __init__(self, fake: FakeServer, limit: int, **headers: str) -> None:
        self.answer, self.limit, self.headers = fake.answer, limit, headers
        self.under_way = self.most = 0
        self.refused: list[float] = []
        self.taken: list[float] = []
        fake.router.post(f"{URL}/embeddings").mock(side_effect=self)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.under_way >= self.limit:
            self.refused.append(time.monotonic())
            return refuse(429, "too many requests at once", **self.headers)
        self.taken.append(time.monotonic())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.under_way -= 1
        return self.answer(json.loads(request.content))

    def free(self) -> None:
        """Accept any number from now on."""
        self.limit, self.most, self.refused = 1000, 0, []


def same(rows: Any, texts: list[str]) -> None:
    np.testing.assert_allclose(rows, [FakeServer.vector(text) for text in texts], atol=1e-6)


def together(embedder: Embedder, texts: list[str]) -> list[Any]:
    """Return what concurrent callers of one query each get, or their errors."""

    async def callers() -> list[Any]:
        calls = [embedder.aencode_query([text]) for text in texts]
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(callers())


def test_encode_document_limited_server_gets_no_more_than_it_accepts(fake: FakeServer) -> None:
    embedder = embedder_of(fake, batch_size=2, max_retries=0)
    crowded = Crowded(fake, limit=2)
    texts = [f"text {i}" for i in range(200)]
    same(embedder.encode_document(texts), texts)
    answers = len(texts) // 2
    raised = answers // ANSWERS_PER_SLOT  # times that the limit rose, each of them refused
    assert 0 < len(crowded.refused) <= 14 + raised, "the first fourteen, and those"


def test_encode_document_limited_server_that_accepts_more_gets_full_concurrency(
    fake: FakeServer,
) -> None:
    embedder = embedder_of(fake, batch_size=2, max_retries=0)
    crowded = Crowded(fake, limit=2)
    texts = [f"text {i}" for i in range(400)]
    same(embedder.encode_document(texts[:40]), texts[:40])
    assert crowded.refused

    crowded.free()
    crowded.seconds = 0.3  # long enough for all to overlap
    same(embedder.encode_document(texts), texts)  # enough for the limit to recover
    assert (crowded.most, crowded.refused) == (16, [])


def test_encode_query_limited_server_answers_all(fake: FakeServer) -> None:
    embedder = embedder_of(fake, max_retries=1)
    crowded = Crowded(fake, limit=2)
    texts = [f"query {i}" for i in range(64)]
    expected = [instruct(embedder.task.instruction, text) for text in texts]
    for _ in range(5):
        same(np.concatenate(together(embedder, texts)), expected)
    assert 0 < len(crowded.refused) < 30
    assert len(crowded.taken) < 50, "fewer requests hold more queries each"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_encode_query_during_documents_on_limited_server_goes_first(
    fake: FakeServer, limit: int
) -> None:
    embedder = embedder_of(fake, batch_size=2, max_retries=0)
    crowded = Crowded(fake, limit)
    answer, first_texts = crowded.answer, list[str]()

    def note(body: dict[str, Any]) -> httpx.Response:
        first_texts.append(body["input"][0])
        return answer(body)

    crowded.answer = note
    documents = [f"text {i}" for i in range(400)]
    queries = [f"query {i}" for i in range(4)]
    expected = [instruct(embedder.task.instruction, text) for text in queries]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(embedder.encode_document, documents)
        while len(first_texts) < 10 and not call.done():
            time.sleep(0.01)
        for _ in range(10):
            before = len(first_texts)
            same(np.concatenate(together(embedder, queries)), expected)
            between = [text.startswith("text") for text in first_texts[before:]]
            assert between.count(True) < 10 + limit, "each query waits for few of 200"
        assert not call.done()
        crowded.seconds = 0
        same(call.result(timeout=60), documents)


def test_encode_document_status_429_waits_for_retry_after(fake: FakeServer) -> None:
    embedder = embedder_of(fake, batch_size=1, max_concurrency=2)
    crowded = Crowded(fake, limit=1, **{"Retry-After": "0.5"})
    crowded.seconds = 0.2
    same(embedder.encode_document(["a", "b"]), ["a", "b"])
    assert len(crowded.refused) == 1
    assert crowded.taken[1] - crowded.refused[0] >= 0.45


def test_encode_query_status_429_for_all_fails_every_query_soon(fake: FakeServer) -> None:
    """One after the other through the last slot they would need half a minute."""
    embedder = embedder_of(fake, max_retries=2, batch_size=4)
    Crowded(fake, limit=0)
    begun = time.monotonic()
    answers = together(embedder, [f"query {i}" for i in range(128)])
    assert {type(answer) for answer in answers} == {ServerBusyError}
    assert time.monotonic() - begun < 10


@pytest.mark.usefixtures("short_backoff")
def test_encode_document_after_downtime_uses_full_concurrency(fake: FakeServer) -> None:
    embedder = embedder_of(fake, batch_size=1, restart_timeout=60)
    crowded = Crowded(fake, limit=1000)
    up, crowded.answer = crowded.answer, lambda _: refuse(503, "starting")
    timer = threading.Timer(0.2, lambda: setattr(crowded, "answer", up))
    timer.start()
    texts = [f"text {i}" for i in range(16)]
    same(embedder.encode_document(texts[:4]), texts[:4])
    timer.join()
    assert len(crowded.taken) > 4
    crowded.seconds = 0.5  # long enough for all to overlap
    same(embedder.encode_document(texts), texts)
    assert crowded.most == 16


def test_tokenize_limited_server_gets_no_more_than_it_accepts(fake: FakeServer) -> None:
    embedder = embedder_of(fake, overflow="mean", max_retries=0)
    crowded = Crowded(fake, limit=2)
    crowded.answer = lambda body: httpx.Response(
        200, json={"tokens": [*body["prompt"].encode(), 0]}
    )
    fake.router.post("http://embeddings.test/tokenize").mock(side_effect=crowded)
    fake.router.post(f"{URL}/embeddings").mock(side_effect=fake._embeddings)
    assert embedder.encode_document([f"{i} " * 300 for i in range(60)]).shape == (60, 64)
    assert crowded.most == 2
    assert 0 < len(crowded.refused) < 30


def test_encode_query_during_tokenize_on_limited_server_is_answered(fake: FakeServer) -> None:
    embedder = embedder_of(fake, overflow="mean", max_retries=0)
    crowded = Crowded(fake, limit=2)
    embeddings = crowded.answer

    def answer(body: dict[str, Any]) -> httpx.Response:
        if "prompt" not in body:
            return embeddings(body)
        return httpx.Response(200, json={"tokens": [*body["prompt"].encode(), 0]})

    crowded.answer = answer
    fake.router.post("http://embeddings.test/tokenize").mock(side_effect=crowded)
    queries = [f"query {i}" for i in range(4)]
    expected = [instruct(embedder.task.instruction, text) for text in queries]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(embedder.encode_document, [f"{i} " * 300 for i in range(60)])
        while len(crowded.taken) < 10 and not call.done():
            time.sleep(0.01)
        for _ in range(5):
            same(np.concatenate(together(embedder, queries)), expected)
        assert call.result(timeout=60).shape == (60, 64)
    assert crowded.most == 2


@pytest.mark.usefixtures("short_backoff")
def test_encode_query_while_documents_wait_for_a_restart_fails_soon(fake: FakeServer) -> None:
    embedder = embedder_of(fake, batch_size=2, max_retries=1, restart_timeout=60)
    crowded = Crowded(fake, limit=2)
    texts = [f"text {i}" for i in range(200)]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(embedder.encode_document, texts)
        while len(crowded.taken) < 10 and not call.done():
            time.sleep(0.01)
        up, crowded.answer = crowded.answer, lambda _: refuse(503, "starting")
        time.sleep(0.2)
        begun = time.monotonic()
        with pytest.raises(ServerBusyError):
            embedder.encode_query(["now"])
        assert time.monotonic() - begun < 20
        crowded.answer, crowded.seconds = up, 0
        same(call.result(timeout=60), texts)


def test_cancelled_calls_lose_no_slot(fake: FakeServer) -> None:
    embedder = embedder_of(fake, batch_size=1, max_concurrency=4)
    crowded = Crowded(fake, limit=1)
    texts = [f"text {i}" for i in range(40)]

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await embedder.aencode_document(texts)

    for _ in range(5):
        asyncio.run(give_up())
    crowded.free()
    same(embedder.encode_document(texts * 3), texts * 3)
    assert (crowded.most, crowded.refused) == (4, [])


@pytest.mark.parametrize("most", [1, 2])
def test_isolation_stays_within_concurrency(fake: FakeServer, most: int) -> None:
    embedder = embedder_of(fake, max_concurrency=most)

    def picky(body: dict[str, Any]) -> httpx.Response:
        bad = any("query 3" in text for text in body["input"])
        return refuse(400, "not this") if bad else fake.floats(body)

    fake.answer = picky
    crowded = Crowded(fake, limit=1000)
    answers = together(embedder, [f"query {i}" for i in range(8)])
    assert [isinstance(answer, TextRefusedError) for answer in answers] == [
        i == 3 for i in range(8)
    ]
    assert crowded.most == most


def test_close_fails_waiting_calls(fake: FakeServer) -> None:
    embedder = embedder_of(fake)
    begun = threading.Event()

    async def never(_: httpx.Request) -> httpx.Response:
        begun.set()
        await asyncio.sleep(60)
        raise AssertionError

    fake.router.post(f"{URL}/embeddings").mock(side_effect=never)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(embedder.encode_document, [text]) for text in ("a", "b")]
        assert begun.wait(5)
        embedder.close()
        for call in calls:
            with pytest.raises(EngineClosedError):
                call.result(timeout=5)
    with pytest.raises(EngineClosedError):
        embedder.encode_document(["late"])


async def test_cancel_one_of_two_callers_answers_the_other(fake: FakeServer) -> None:
    embedder = embedder_of(fake)
    first, second = (asyncio.create_task(embedder.aencode_document([t])) for t in ("a", "b"))
    await asyncio.sleep(0)
    first.cancel()
    np.testing.assert_allclose(await second, [fake.vector("b")], atol=1e-6)
    assert first.cancelled() or first.done()
