"""What an error says when the server cannot be reached, and how soon."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import trustme

from conftest import free_port
from qwen3_embeddings import (
    Embedder,
    ServerConnectionError,
    ServerTimeoutError,
)
from qwen3_embeddings.engines.openai.client import ServerEngine

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import FaultyServer, Request


def error_of(base_url: str, **arguments: Any) -> str:
    """What an embedder of a URL says when it starts."""
    with (
        Embedder(base_url=base_url, **arguments) as embedder,
        pytest.raises(ServerConnectionError) as caught,
    ):
        embedder.encode_query(["a"])
    return str(caught.value)


def plain(said: str) -> None:
    """Check that a message quotes none of the HTTP libraries' misleading words."""
    assert "ConnectTimeout" not in said
    assert "ssl:default" not in said


@pytest.fixture
def tls_port() -> Iterator[int]:
    """A port on which a server speaks TLS only."""
    with tls_server(trustme.CA(), "localhost") as port:
        yield port


@contextlib.contextmanager
def tls_server(authority: trustme.CA, host: str) -> Iterator[int]:
    """Run a server with a certificate for `host`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_start_refused_connection_says_so_after_one_retry(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qwen3_embeddings")
    port = free_port()
    said = error_of(f"http://{host}:{port}/v1")
    assert f"nothing listens at {host}:{port} (connection refused)" in said
    assert "base_url" in said
    assert "ssl" not in said.lower()
    assert "verify" not in said
    assert sum("again in" in record.message for record in caplog.records) == 1


def test_start_https_to_an_http_port_names_the_scheme(faulty: FaultyServer) -> None:
    said = error_of(f"https://127.0.0.1:{faulty.port}/v1", max_retries=0)
    assert "does not speak TLS" in said
    plain(said)
    assert "http:// instead of https://" in said
    assert "verify" not in said


def test_start_http_to_an_https_port_names_the_scheme(tls_port: int) -> None:
    said = error_of(f"http://127.0.0.1:{tls_port}/v1", max_retries=0)
    assert "speaks TLS only" in said
    assert "https:// instead of http://" in said


@pytest.mark.parametrize(
    "page",
    [
        b"Client sent an HTTP request to an HTTPS server.\n",
        b"<html>The plain HTTP request was sent to HTTPS port</html>",
    ],
)
def test_start_http_to_an_https_port_that_answers_400_names_the_scheme(
    faulty: FaultyServer, page: bytes
) -> None:
    faulty.respond = lambda _: (400, page)
    assert "https:// instead of http://" in error_of(faulty.base_url)


def test_start_connection_closed_without_tls_is_no_scheme_error(faulty: FaultyServer) -> None:
    faulty.respond = lambda _: None
    said = error_of(faulty.base_url, max_retries=0)
    assert "broke" in said
    assert "TLS" not in said


def test_start_untrusted_certificate_names_verify(tls_port: int) -> None:
    said = error_of(f"https://localhost:{tls_port}/v1", max_retries=0)
    assert "not trusted" in said
    plain(said)
    assert "verify=" in said


def test_start_certificate_of_another_host_says_that_the_name_does_not_match(
    tmp_path: Path,
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for issued in ("example.org", "10.0.0.1"):
        with tls_server(authority, issued) as port:
            for host in ("localhost", "127.0.0.1"):
                said = error_of(
                    f"https://{host}:{port}/v1", verify=str(tmp_path / "ca.pem"), max_retries=0
                )
                assert f"the host name {host!r} does not match the certificate" in said
                assert "verify=" not in said
                plain(said)


def test_start_reset_connection_is_called_by_its_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reset_all() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                connection.recv(1)
                linger = struct.pack("ii", 1, 0)  # close with a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.close()

        threading.Thread(target=reset_all, daemon=True).start()
        said = error_of(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", max_retries=0)
        listener.shutdown(socket.SHUT_RDWR)
    assert "[Errno 104]" in said
    plain(said)


def test_start_proxy_that_is_away_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    said = error_of("http://embeddings.test/v1", max_retries=0)
    assert "HTTP_PROXY" in said
    plain(said)


def test_start_unknown_host_names_it() -> None:
    said = error_of("http://no-such-host.invalid/v1")
    plain(said)
    assert "'no-such-host.invalid' does not resolve" in said
    assert "verify" not in said


@pytest.mark.usefixtures("short_backoff")
def test_start_server_that_starts_late_is_retried(caplog: pytest.LogCaptureFixture) -> None:
    """A port that accepts and closes is a server on its way up, not a wrong address."""
    caplog.set_level(logging.INFO, "qwen3_embeddings")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def close_all() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=close_all, daemon=True).start()
        error_of(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", max_retries=2)
        listener.shutdown(socket.SHUT_RDWR)
    assert sum("again in" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize(
    ("parameter", "advice"),
    [
        ("batch_size", "Raise timeout, or lower batch_size."),
        ("chunk_size", "Raise timeout, or lower chunk_size."),
        (None, "Raise timeout."),
    ],
)
async def test_start_time_out_names_the_callers_parameter(
    faulty: FaultyServer, parameter: str | None, advice: str
) -> None:
    def late(_: Request) -> None:
        time.sleep(0.6)

    faulty.respond = late
    engine = ServerEngine(faulty.base_url, timeout=0.2, max_retries=1, batch_parameter=parameter)
    with pytest.raises(ServerTimeoutError) as caught:
        await engine.start()
    await engine.close()
    assert str(caught.value).endswith(f"within 0.2 s, in 2 attempts. {advice}")


def test_requests_are_logged_by_httpx_at_debug_only(
    faulty: FaultyServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Embedder(base_url=faulty.base_url) as embedder:
        embedder.encode_document(["a"])
        assert not [r for r in caplog.records if r.name.startswith("httpx")]
        httpx.get(faulty.base_url + "/models")
        levels = [r.levelname for r in caplog.records if r.name == "httpx"]
        assert levels == ["INFO"], "the application's own requests are logged as before"
        caplog.clear()
        caplog.set_level(logging.DEBUG)
        embedder.encode_document(["b"])
    ours = [r for r in caplog.records if r.name == "httpx" and "HTTP Request" in r.message]
    assert {r.levelname for r in ours} == {"DEBUG"}
