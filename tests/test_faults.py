"""Faults between the client and a server: a proxy in front of a real one, and servers that die.

Each ends in the vectors the server returns directly, or in a typed error that carries what was
computed: never in a hang, never in part of an answer passed off as the whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import trustme

from conftest import RunningServer, free_port
from qwen3_embeddings import (
    Embedder,
    InvalidVectorError,
    Qwen3EmbeddingsError,
    ServerBusyError,
    ServerConnectionError,
    ServerRefusedError,
    ServerResponseError,
    ServerTimeoutError,
    TextRefusedError,
    TextsFailedError,
)

TEXTS = [f"text number {i}" for i in range(40)]
AT_ONCE = 8

# A proxy that speaks just enough HTTP to break it.


class Exchange:
    """One embeddings request, and the means to damage its answer."""

    def __init__(self, proxy: Proxy, head: bytes, body: bytes, writer: asyncio.StreamWriter):
        self.proxy, self.head, self.body, self.writer = proxy, head, body, writer
        self.json: dict[str, Any] = json.loads(body)

    async def forward(self, **changes: Any) -> tuple[bytes, bytes]:
        """Return the server's answer, head and body, to the request with some fields changed."""
        head, body = self.head, self.body
        if changes:
            body = json.dumps(self.json | changes).encode()
            head = with_length(head, len(body))
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.server_port)
        with contextlib.closing(writer.transport):
            writer.write(head + body)
            answer = await read_message(reader)
        assert answer is not None
        return answer

    async def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))
        await self.writer.drain()

    async def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join(lines).encode(), b"\r\n\r\n", body)

    def reset(self) -> None:
        """Reset the connection, as a crashed machine or a firewall does."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Fault = Callable[[Exchange], Awaitable[None]]


class Proxy:
    """A proxy in front of one server. `faults` decide what happens to the next embeddings requests.

    Each applies to one request. When none is left, `lasting` applies to all, or they pass.
    """

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.faults: list[Fault | None] = []
        self.lasting: Fault | None = None
        self.seen: list[dict[str, Any]] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broken = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*broken), contextlib.closing(writer.transport):
            while (message := await read_message(reader)) and not writer.is_closing():
                exchange = Exchange(self, *message, writer) if message[1] else None
                fault = None
                if exchange and b" /v1/embeddings" in message[0]:
                    self.seen.append(exchange.json)
                    fault = self.faults.pop(0) if self.faults else self.lasting
                if exchange and fault:
                    await fault(exchange)
                else:
                    passing = exchange or Exchange(self, message[0], b"{}", writer)
                    passing.body = message[1]
                    await passing.send(*await passing.forward())


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes] | None:
    """Return head and body of a message, or None at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    if b"chunked" not in fields.get(b"transfer-encoding", b""):
        return head, await reader.readexactly(int(fields.get(b"content-length", 0)))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    return with_length(head, len(body)), body


def with_length(head: bytes, length: int) -> bytes:
    """Return a head with another content length."""
    others = (b"content-length", b"transfer-encoding")
    lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith(others)]
    return b"\r\n".join([*lines, b"content-length: %d" % length, b"", b""])


@contextlib.contextmanager
def running(proxy: Proxy) -> Iterator[Proxy]:
    """Run the proxy in a thread of its own."""
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        over = asyncio.Event()
        server = await asyncio.start_server(proxy.handle, "127.0.0.1", proxy.port, limit=1 << 24)
        ready.set_result((asyncio.get_running_loop(), over))
        await over.wait()
        server.close()

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    loop, over = ready.result(timeout=60)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


@pytest.fixture
def proxy(server: RunningServer) -> Iterator[Proxy]:
    """Return a proxy in front of the session's real vLLM server."""
    port = int(server.base_url.split(":")[-1].removesuffix("/v1"))
    with running(Proxy(port)) as proxy:
        yield proxy


@pytest.fixture
def connect(proxy: Proxy, server: RunningServer) -> Iterator[Callable[..., Embedder]]:
    """Make started embedders behind the proxy that send one request of eight texts at a time."""
    made: list[Embedder] = []

    def make(**arguments: Any) -> Embedder:
        usual = {"batch_size": AT_ONCE, "max_concurrency": 1, "timeout": 20, "restart_timeout": 0}
        usual |= {"base_url": proxy.url, "api_key": server.api_key, "max_retries": 2}
        made.append(Embedder(**usual | arguments))
        made[-1].start()
        proxy.seen.clear()
        return made[-1]

    yield make
    for embedder in made:
        embedder.close()


@pytest.fixture(scope="module")
def expected(remote: Embedder) -> np.ndarray:
    """Return what the server answers without the proxy."""
    return remote.encode_document(TEXTS)


def encode(embedder: Embedder, texts: list[Any] = TEXTS, way: str = "sync") -> np.ndarray:
    """Embed in a thread. The test fails after two minutes."""

    def work() -> np.ndarray:
        if way == "sync":
            return embedder.encode_document(texts)
        return asyncio.run(embedder.aencode_document(texts))

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=120)


def check_carried(error: Qwen3EmbeddingsError, expected: np.ndarray, positions: list[int]) -> None:
    """Check that the error carries exactly these rows, and says how many."""
    assert error.computed is not None
    assert error.computed.positions.tolist() == positions
    np.testing.assert_allclose(error.computed.vectors, expected[positions], atol=2e-6)
    assert f"{len(positions)} of {len(expected)} texts" in str(error)


# Faults.


async def reset(exchange: Exchange) -> None:
    exchange.reset()


async def reset_mid_body(exchange: Exchange) -> None:
    head, body = await exchange.forward()
    await exchange.send(head, body[: len(body) // 2])
    exchange.reset()


async def truncated(exchange: Exchange) -> None:
    head, body = await exchange.forward()
    await exchange.send(head, body[: len(body) // 2])
    exchange.writer.close()


async def slow_first_byte(exchange: Exchange) -> None:
    answer = await exchange.forward()
    await asyncio.sleep(0.5)
    await exchange.send(*answer)


async def trickling(exchange: Exchange) -> None:
    head, body = await exchange.forward()
    await exchange.send(head)
    for start in range(0, len(body), 64):
        await exchange.send(body[start : start + 64])
        await asyncio.sleep(0.02)


async def never(exchange: Exchange) -> None:
    await asyncio.sleep(600)


async def trickling_for_ever(exchange: Exchange) -> None:
    head, body = await exchange.forward()
    await exchange.send(head)
    for start in range(len(body)):
        await exchange.send(body[start : start + 1])
        await asyncio.sleep(0.2)


async def half_as_whole(exchange: Exchange) -> None:
    """Half an answer with a matching length, which looks like rows of half the size."""
    head, body = await exchange.forward()
    await exchange.send(with_length(head, len(body) // 2), body[: len(body) // 2])


async def a_row_too_few(exchange: Exchange) -> None:
    await exchange.send(*await exchange.forward(input=exchange.json["input"][1:]))


async def another_size(exchange: Exchange) -> None:
    await exchange.send(*await exchange.forward(dimensions=64))


async def html(exchange: Exchange) -> None:
    await exchange.answer(200, b"<html>Welcome to our WiFi</html>", content_type="text/html")


def status(code: int, said: str = "no", **headers: str) -> Fault:
    async def fault(exchange: Exchange) -> None:
        body = json.dumps({"error": {"message": said}}).encode()
        await exchange.answer(code, body, content_type="application/json", **headers)

    return fault


def in_two_seconds() -> str:
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
    return format_datetime(moment, usegmt=True)


PASSING: dict[str, list[Fault | None]] = {
    "reset": [reset, reset],
    "reset mid-body": [reset_mid_body],
    "truncated body": [truncated, truncated],
    "slow first byte": [slow_first_byte] * 3,
    "trickling body": [trickling],
    "429 with Retry-After": [status(429, retry_after="1")],
    "503 without": [status(503), status(503)],
    "500": [status(500), status(500)],
}
LASTING: dict[str, tuple[Fault, type[Qwen3EmbeddingsError], dict[str, Any]]] = {
    "reset": (reset, ServerConnectionError, {"max_retries": 1}),
    "reset mid-body": (reset_mid_body, ServerConnectionError, {"max_retries": 1}),
    "truncated body": (truncated, ServerConnectionError, {"max_retries": 1}),
    "no first byte": (never, ServerTimeoutError, {"timeout": 3, "max_retries": 1}),
    "trickling body": (trickling_for_ever, ServerTimeoutError, {"timeout": 3, "max_retries": 0}),
    "429": (status(429, retry_after="0"), ServerBusyError, {"max_retries": 1}),
    "503": (status(503), ServerBusyError, {"max_retries": 1}),
    "500": (status(500), ServerBusyError, {"max_retries": 1}),
    "501": (status(501), ServerResponseError, {}),
    "everything refused": (status(400), ServerRefusedError, {}),
    "half as whole": (half_as_whole, ServerResponseError, {}),
    "a row too few": (a_row_too_few, ServerResponseError, {}),
    "another size": (another_size, ServerResponseError, {}),
    "HTML": (html, ServerResponseError, {}),
}


@pytest.mark.parametrize("name", PASSING)
def test_encode_document_transient_fault_returns_all_vectors(
    proxy: Proxy, connect: Callable[..., Embedder], expected: np.ndarray, name: str
) -> None:
    embedder = connect()
    proxy.faults = [None, *PASSING[name]]
    np.testing.assert_allclose(encode(embedder), expected, atol=2e-6)
    assert not proxy.faults


@pytest.mark.parametrize("on_error", ["stop", "finish"])
@pytest.mark.parametrize("name", LASTING)
def test_encode_document_lasting_fault_keeps_computed_vectors(
    proxy: Proxy,
    connect: Callable[..., Embedder],
    expected: np.ndarray,
    name: str,
    on_error: str,
) -> None:
    fault, kind, arguments = LASTING[name]
    embedder = connect(on_error=on_error, **arguments)
    proxy.faults, proxy.lasting = [None, None], fault
    with pytest.raises(kind) as caught:
        encode(embedder, way="sync" if on_error == "stop" else "async")
    check_carried(caught.value, expected, list(range(2 * AT_ONCE)))
    proxy.lasting = None
    rest = caught.value.computed.missing  # type: ignore[union-attr]
    rows = encode(embedder, [TEXTS[i] for i in rest])
    np.testing.assert_allclose(rows, expected[rest], atol=2e-6)


def test_encode_document_another_size_is_not_truncated(
    proxy: Proxy, connect: Callable[..., Embedder]
) -> None:
    """Truncation on this side would bring rows of another model to the right size."""
    embedder = connect(dimensions=32)
    proxy.faults = [status(400, "dimensions: model has no matryoshka"), None]
    proxy.lasting = another_size
    with pytest.raises(ServerResponseError, match="another model") as caught:
        encode(embedder)
    assert caught.value.computed is not None
    assert len(caught.value.computed.positions) == AT_ONCE


def test_encode_document_date_in_retry_after_is_waited_for(
    proxy: Proxy, connect: Callable[..., Embedder], expected: np.ndarray
) -> None:
    embedder = connect(max_retries=1)
    times: list[float] = []

    async def busy(exchange: Exchange) -> None:
        times.append(time.monotonic())
        await status(429, retry_after=in_two_seconds())(exchange)

    async def note(exchange: Exchange) -> None:
        times.append(time.monotonic())
        await exchange.send(*await exchange.forward())

    proxy.faults = [busy, note]
    np.testing.assert_allclose(encode(embedder), expected, atol=2e-6)
    assert times[1] - times[0] >= 0.9  # a date counts whole seconds


def test_encode_document_shuffled_rows_are_sorted(
    proxy: Proxy, connect: Callable[..., Embedder], expected: np.ndarray
) -> None:
    async def shuffled(exchange: Exchange) -> None:
        head, body = await exchange.forward(encoding_format="base64")
        answer = json.loads(body)
        answer["data"] = answer["data"][::-1]
        body = json.dumps(answer).encode()
        await exchange.send(with_length(head, len(body)), body)

    embedder = connect()
    proxy.lasting = shuffled
    np.testing.assert_allclose(encode(embedder), expected, atol=2e-6)


# Errors of single texts.


def poisoned(spoil: Callable[[Exchange], Awaitable[None]]) -> Fault:
    """Return a fault of the requests that hold a certain text."""

    async def fault(exchange: Exchange) -> None:
        if any("poison" in text for text in exchange.json["input"]):
            await spoil(exchange)
        else:
            await exchange.send(*await exchange.forward())

    return fault


def nan(value: float) -> Fault:
    async def fault(exchange: Exchange) -> None:
        head, body = await exchange.forward()
        rows = np.frombuffer(body, "<f4").reshape(len(exchange.json["input"]), -1).copy()
        for i, text in enumerate(exchange.json["input"]):
            if "poison" in text:
                rows[i, 5] = value
        await exchange.send(head, rows.tobytes())

    return fault


OF_A_TEXT: dict[str, tuple[Fault, type[Qwen3EmbeddingsError]]] = {
    "refused": (poisoned(status(400, "this text is not allowed")), TextRefusedError),
    "unprocessable": (poisoned(status(422, "cannot read it")), TextRefusedError),
    "NaN": (nan(np.nan), InvalidVectorError),
    "Inf": (nan(-np.inf), InvalidVectorError),
}


@pytest.mark.parametrize("name", OF_A_TEXT)
def test_encode_document_bad_text_fails_alone(
    proxy: Proxy, connect: Callable[..., Embedder], expected: np.ndarray, name: str
) -> None:
    fault, kind = OF_A_TEXT[name]
    texts = [f"poison {i}" if i in {13, 30} else text for i, text in enumerate(TEXTS)]
    proxy.lasting = fault
    with pytest.raises(kind) as stopped:
        encode(connect(), texts)
    assert stopped.value.positions == (13,)  # type: ignore[attr-defined]
    check_carried(stopped.value, expected, [*range(13), 14, 15])
    for way in ("sync", "async"):
        with pytest.raises(TextsFailedError) as finished:
            encode(connect(on_error="finish"), texts, way)
        assert finished.value.positions == (13, 30)
        assert [type(error) for error in finished.value.errors] == [kind]
        good = [i for i in range(40) if i not in {13, 30}]
        check_carried(finished.value, expected, good)


def test_encode_document_all_kinds_of_bad_texts_are_named(
    proxy: Proxy, connect: Callable[..., Embedder], expected: np.ndarray
) -> None:
    """Over-long, refused, missing and torn texts in one call."""
    texts: list[Any] = [*TEXTS]
    texts[3], texts[4], texts[5], texts[6] = "long " * 3000, "poison", None, "torn \ud83d"
    proxy.lasting = poisoned(status(400, "this text is not allowed"))
    with pytest.raises(TextsFailedError) as caught:
        encode(connect(on_error="finish"), texts)
    assert caught.value.positions == (3, 4, 5, 6)
    assert len(caught.value.errors) == 4
    check_carried(caught.value, expected, [i for i in range(40) if not 3 <= i <= 6])


def test_encode_document_text_in_pieces_counts_only_when_complete(
    proxy: Proxy, connect: Callable[..., Embedder], remote: Embedder
) -> None:
    texts = ["a", "b", "long " * 6000, "c", "other " * 6000, "d"]
    whole = connect(overflow="mean", batch_size=2).encode_document(texts)
    proxy.seen.clear()
    proxy.faults, proxy.lasting = [None] * 3, status(503)
    with pytest.raises(ServerBusyError) as caught:
        encode(connect(overflow="mean", batch_size=2, max_retries=0), texts)
    done = caught.value.computed
    assert done is not None
    assert 0 < len(done.positions) < len(texts)
    sent = sum(len(body["input"]) for body in proxy.seen[:3])
    assert len(done.positions) < sent, "a piece counted as a text"
    np.testing.assert_allclose(done.vectors, whole[done.positions], atol=2e-6)


# Destinations.


def test_redirect_is_refused_and_gets_no_key(
    proxy: Proxy, connect: Callable[..., Embedder], server: RunningServer, expected: np.ndarray
) -> None:
    with running(Proxy(proxy.server_port)) as elsewhere:
        connections: list[Any] = []
        handle = elsewhere.handle

        async def noted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(writer.get_extra_info("peername"))
            await handle(reader, writer)

        elsewhere.handle = noted  # type: ignore[method-assign]
        embedder = connect()
        there = elsewhere.url.replace("127.0.0.1", "localhost") + "/embeddings"
        proxy.faults, proxy.lasting = [None], status(307, location=there)
        with pytest.raises(ServerResponseError, match="redirects are not followed") as caught:
            encode(embedder)
        check_carried(caught.value, expected, list(range(AT_ONCE)))
        assert not connections
        assert server.api_key not in str(caught.value)


def test_expired_certificate_is_refused_without_retries() -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    authority = trustme.CA()
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", not_after=past).configure_cert(context)
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    url = f"https://localhost:{server.server_port}/v1"
    try:
        with (
            pytest.raises(ServerConnectionError, match="expired"),
            Embedder(base_url=url, verify=trusted, max_retries=1000) as embedder,
        ):
            encode(embedder, ["a"])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert not asked


def test_start_unknown_host_is_named() -> None:
    with (
        pytest.raises(ServerConnectionError, match=r"no-such-host\.invalid.*base_url"),
        Embedder(base_url="http://no-such-host.invalid/v1", max_retries=1) as embedder,
    ):
        encode(embedder, ["a"])


# A server in a process of its own that kills itself in the middle of an answer.

LIGHT_SERVER = """
    import json, os, random, sys
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    port, size, lives = map(int, sys.argv[1:])  # dies at request number `lives`
    served = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            self.answer({"data": [{"id": "light", "max_model_len": 512}]})

        def do_POST(self):
            global served
            served += 1
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            rows = [[random.Random(t).gauss() for _ in range(size)] for t in body["input"]]
            self.answer({"data": [{"index": i, "embedding": r} for i, r in enumerate(rows)]})

        def answer(self, content):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if 0 < served == lives:
                self.wfile.write(body[:len(body) // 2])
                self.wfile.flush()
                os.kill(os.getpid(), 9)
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    ThreadingHTTPServer.allow_reuse_address = True
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class LightServer:
    """A server process on a port, and its successors."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, size: int = 64, lives: int = 0) -> subprocess.Popen[bytes]:
        arguments = [str(self.port), str(size), str(lives)]
        command = [sys.executable, "-c", textwrap.dedent(LIGHT_SERVER), *arguments]
        self.processes.append(subprocess.Popen(command))
        return self.processes[-1]

    def wait_until_up(self) -> None:
        for _ in range(6000):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            time.sleep(0.01)
        raise RuntimeError("the light server did not start")

    def follow(self, process: subprocess.Popen[bytes], size: int) -> threading.Thread:
        """Start the next one a while after this one has died."""

        def work() -> None:
            process.wait(timeout=60)
            time.sleep(0.5)
            self.start(size)

        thread = threading.Thread(target=work)
        thread.start()
        return thread


@pytest.fixture
def light(short_backoff: None) -> Iterator[LightServer]:
    server = LightServer()
    yield server
    for process in server.processes:
        process.kill()
        process.wait()


def direct(light: LightServer, lives: int, **arguments: Any) -> tuple[Embedder, np.ndarray, Any]:
    """Return an embedder, all vectors, and a server that dies during its answer number `lives`."""
    first = light.start()
    light.wait_until_up()
    usual = {"batch_size": AT_ONCE, "max_concurrency": 1, "max_retries": 1}
    embedder = Embedder(**{"base_url": light.url} | usual | arguments)
    expected = encode(embedder)
    first.kill()
    first.wait()
    process = light.start(lives=lives)
    light.wait_until_up()
    return embedder, expected, process


@pytest.mark.parametrize("way", ["sync", "async"])
def test_encode_document_server_restart_returns_all_vectors(light: LightServer, way: str) -> None:
    embedder, expected, process = direct(light, lives=3, restart_timeout=60)
    with embedder:
        follower = light.follow(process, 64)
        np.testing.assert_allclose(encode(embedder, TEXTS, way), expected, atol=1e-6)
        follower.join()
    assert process.returncode == -9


def test_encode_document_server_stays_down_keeps_computed_vectors(light: LightServer) -> None:
    embedder, expected, process = direct(light, lives=3, restart_timeout=0.5)
    with embedder, pytest.raises(ServerConnectionError) as caught:
        encode(embedder)
    check_carried(caught.value, expected, list(range(2 * AT_ONCE)))
    assert process.wait(timeout=10) == -9


def test_encode_query_does_not_wait_for_a_restart(light: LightServer) -> None:
    embedder, _, process = direct(light, lives=1, restart_timeout=3600, max_retries=0)
    with embedder, pytest.raises(ServerConnectionError), ThreadPoolExecutor(1) as pool:
        pool.submit(embedder.encode_query, ["a"]).result(timeout=60)
    assert process.wait(timeout=10) == -9


def test_encode_document_another_model_after_restart_is_refused(light: LightServer) -> None:
    embedder, expected, process = direct(light, lives=3, restart_timeout=60)
    with embedder:
        follower = light.follow(process, 96)
        with pytest.raises(ServerResponseError, match="another model") as caught:
            encode(embedder)
        check_carried(caught.value, expected, list(range(2 * AT_ONCE)))
        follower.join()
