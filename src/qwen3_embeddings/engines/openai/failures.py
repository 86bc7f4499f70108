"""What went wrong with a request: the typed error, and whether another attempt may succeed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from qwen3_embeddings.engines.openai import wire
from qwen3_embeddings.errors import (
    AuthenticationError,
    ConfigurationError,
    ModelNotFoundError,
    Qwen3EmbeddingsError,
    ServerBusyError,
    ServerConnectionError,
    ServerRefusedError,
    ServerResponseError,
    ServerTimeoutError,
    TextTooLongError,
)

SIZE_REFUSED = re.compile(r"matryoshka|dimension", re.IGNORECASE)
"""The words of a server that does not offer the size asked for."""
DOWN = frozenset({502, 503, 504})
"""Statuses of a proxy while the server behind it restarts."""
TLS_SECONDS = 2.0
"""How long a handshake may take that finds out whether a port speaks TLS."""

Reason = Literal[
    "refused",
    "connect",
    "broken",
    "timeout",
    "name",
    "proxy",
    "certificate",
    "wrong name",
    "no TLS",
    "needs TLS",
    "event loop",
    "unusable",
]
_AWAY = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}
_PROXY = "the proxy named in HTTP_PROXY/HTTPS_PROXY"
_TOO_LONG = re.compile(
    r"maximum context length|max_model_len|too long|too large|longer than the max|input_tokens"
    r"|exceed",
    re.IGNORECASE,
)
_NEEDS_TLS = re.compile(
    r"plain HTTP|HTTP request to an HTTPS|HTTPS port|SSL-enabled", re.IGNORECASE
)


class Response(Protocol):
    """The parts of an HTTP response that are read: those of httpx and httpx2."""

    @property
    def status_code(self) -> int:
        """The HTTP status."""

    @property
    def content(self) -> bytes:
        """The whole body."""

    @property
    def headers(self) -> Any:
        """The headers; names are case-insensitive."""


@dataclass(frozen=True)
class Failure:
    """A request that got no response.

    Attributes:
        reason: what kind of failure it was.
        said: what the HTTP library said; it may quote a header.
    """

    reason: Reason
    said: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Classify an exception of httpx, httpx2, aiohttp, openai or asyncio.

        Classes are distinguished by name, so that none of these libraries has to be imported.
        """
        links = list(_chain(error))
        names = {base.__name__ for link in links for base in type(link).__mro__}
        words = " ".join(map(str, links))
        return cls(_reason(links, names, words), _innermost(links))

    @property
    def down(self) -> bool:
        """Whether the server may be restarting."""
        return self.reason in {"refused", "broken", "connect", "name"}

    @property
    def passing(self) -> bool:
        """Whether another attempt may succeed."""
        return self.down or self.reason == "timeout"


def _reason(links: list[BaseException], names: set[str], words: str) -> Reason:
    if names & {"ClientProxyConnectionError", "ClientHttpProxyError", "ProxyError"}:
        return "proxy"
    if "CERTIFICATE_VERIFY_FAILED" in words:
        return "wrong name" if re.search("(Hostname|IP address) mismatch", words) else "certificate"
    if any(isinstance(link, ssl.SSLError) for link in links) or "ClientConnectorSSLError" in names:
        no_tls = re.search("WRONG_VERSION_NUMBER|RECORD_LAYER|UNKNOWN_PROTOCOL|HTTP_REQUEST", words)
        return "no TLS" if no_tls else "broken"
    if "RuntimeError" in names and "event loop" in words.lower():
        return "event loop"
    if any(isinstance(link, socket.gaierror) for link in links):
        return "name"
    numbers = {getattr(link, "errno", None) for link in links}
    if errno.ECONNREFUSED in numbers:
        return "refused"
    # httpx-aiohttp reports every connection error of aiohttp as a ConnectTimeout.
    httpx_names = set() if "ClientError" in names else names
    if "ConnectionTimeoutError" in names or "ConnectTimeout" in httpx_names or numbers & _AWAY:
        return "connect"
    late = {"TimeoutError", "TimeoutException"} & httpx_names
    if late or names & {"ServerTimeoutError", "APITimeoutError"}:
        return "timeout"
    if names & {"LocalProtocolError", "UnsupportedProtocol", "InvalidUrlClientError"}:
        return "unusable"
    if names & {"TransportError", "ClientError", "APIConnectionError", "OSError"}:
        return "broken"
    return "unusable"


def _innermost(links: list[BaseException]) -> str:
    """Return the words of the system's own error, else of the HTTP library's.

    httpx-aiohttp calls every connection error a ConnectTimeout, and aiohttp's own words for one end
    in "ssl:default".
    """
    wrappers = ("os_error", "certificate_error")
    own = [link for link in links if isinstance(link, OSError) and str(link)]
    own = [link for link in own if not any(hasattr(link, name) for name in wrappers)]
    if own:
        return str(own[-1])
    aiohttp = [link for link in links if type(link).__module__.startswith("aiohttp") and str(link)]
    link = aiohttp[-1] if aiohttp else links[0]
    return f"{type(link).__name__}: {link}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that led to it."""
    seen = 0
    while error is not None and seen < 20:
        seen += 1
        yield error
        if isinstance(error, BaseExceptionGroup):
            yield from error.exceptions
        os_error = getattr(error, "os_error", None)  # aiohttp's connector errors
        if isinstance(os_error, OSError):
            yield os_error
        error = error.__cause__ or error.__context__


def connection_error(
    failure: Failure, base_url: str, timeout: float, attempts: int, batch_parameter: str | None
) -> Qwen3EmbeddingsError:
    """Return the typed error of a request without a response.

    Args:
        failure: what happened, with nothing secret in `failure.said`.
        base_url: root of the server's API.
        timeout: seconds that the request was given.
        attempts: how often it was sent.
        batch_parameter: name of the caller's argument for the texts per request, if there is one.
    """
    parts = urlsplit(base_url)
    place, said = parts.netloc, failure.said
    if failure.reason == "timeout":
        fewer = f", or lower {batch_parameter}" if batch_parameter else ""
        times = f", in {attempts} attempts" if attempts > 1 else ""
        late = ServerTimeoutError(
            f"{base_url} did not answer within {timeout:g} s{times}. Raise timeout{fewer}."
        )
        late.answered = f"it did not answer within {timeout:g} s{times}"
        return late
    if failure.reason == "event loop":
        return ConfigurationError(
            f"the async client that was passed is in use on another event loop ({said}). Pass one "
            "that nothing else uses, or a sync client, which works from any thread."
        )
    sentences = {
        "refused": f"nothing listens at {place} (connection refused). Start the server, or correct "
        "host and port in base_url.",
        "name": f"cannot reach {base_url}: the host name {parts.hostname!r} does not resolve "
        f"({said}). Correct base_url.",
        "unusable": f"cannot send requests to {base_url} ({said}). Check base_url.",
        "certificate": f"the certificate of {place} is not trusted ({said}). Pass "
        "verify='/path/to/ca.pem' with the authority that signed it.",
        "wrong name": f"the host name {parts.hostname!r} does not match the certificate of {place} "
        f"({said}). Write a name that the certificate holds in base_url, or issue a certificate "
        "for this one.",
        "no TLS": f"{place} does not speak TLS ({said}). Write http:// instead of https:// in "
        "base_url.",
        "needs TLS": f"{place} speaks TLS only. Write https:// instead of http:// in base_url.",
        "proxy": f"cannot reach {base_url} ({said}). Check {_PROXY}, or set NO_PROXY for the host.",
        "connect": f"no connection to {place} ({said}). Check base_url, and firewalls in between.",
        "broken": f"the connection to {base_url} broke ({said}). Check base_url, and the logs of "
        "the server and of any proxy in front of it.",
    }
    error = ServerConnectionError(sentences[failure.reason])
    error.down = failure.down
    error.answered = f"no answer: {said}"
    return error


async def speaks_tls(base_url: str) -> bool:
    """Whether the port of an ``http://`` URL answers a TLS handshake."""
    parts = urlsplit(base_url)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    with contextlib.suppress(OSError, TimeoutError, UnicodeError):
        async with asyncio.timeout(TLS_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, ssl=context)
            writer.transport.abort()
            return True
    return False


def passes(status: int) -> bool:
    """Whether the same request may succeed later. 501 says that it never will."""
    return status in {408, 429} or (status >= 500 and status != 501)


def status_error(status: int, label: str, url: str, said: str, shown: str) -> Qwen3EmbeddingsError:
    """Return the typed error of a response that is no success.

    Args:
        status: the HTTP status, or what an error in a 200 response stands for.
        label: the status as the message names it.
        url: where the request went.
        said: what the server said.
        shown: the same without keys and texts.
    """
    if status in {401, 403, 407}:
        return _authentication_error(status, label, url, shown)
    if status == 404 and "model" in said.lower():
        return ModelNotFoundError(f"{url}: {shown} Leave model out to use the served one.", status)
    if status == 400 and _NEEDS_TLS.search(said):
        return ServerConnectionError(
            f"{urlsplit(url).netloc} speaks TLS only ({label}: {shown}). Write https:// instead of "
            "http:// in base_url.",
            status,
        )
    if status in {400, 413, 422} and _TOO_LONG.search(said) and not SIZE_REFUSED.search(said):
        return TextTooLongError(
            f"over the server's context ({shown}). Pass overflow='truncate' or overflow='mean', or "
            "split the text."
        )
    if status in {404, 405, 501} or 300 <= status < 400:
        return ServerResponseError(
            f"{url} is not an embeddings route ({label}: {shown}). Check that base_url is the "
            "server's OpenAI-compatible root, usually ending in /v1; redirects are not followed.",
            status,
        )
    if passes(status):
        return ServerBusyError(
            f"{url} stayed unavailable through every retry ({label}: {shown}). Try later, lower "
            "max_concurrency, or look into the server's log.",
            status,
        )
    return ServerRefusedError(
        f"{url} refused the request ({label}: {shown}). Change what it names, or look into the "
        "server's log.",
        status,
    )


def _authentication_error(status: int, label: str, url: str, shown: str) -> AuthenticationError:
    if status == 407:
        return AuthenticationError(
            f"{_PROXY} refused the request ({label}: {shown}). Write its user and password there, "
            "http://user:password@host:port, or set NO_PROXY for the server's host.",
            status,
        )
    return AuthenticationError(
        f"{url} refused the key ({label}: {shown}). Pass api_key=… or set "
        "QWEN3_EMBEDDINGS_API_KEY; a pickle or dump holds neither key nor secret headers.",
        status,
    )


def message_of(body: bytes) -> str:
    """Return what an error body says, in any of the shapes servers use, at most 500 characters."""
    answer = wire.parse(body)
    if answer is None:
        return wire.excerpt(body)
    words = wire.words_of(wire.error_in(answer) or answer)
    return words[:500].encode("utf-8", "replace").decode()  # JSON can hold half a character
