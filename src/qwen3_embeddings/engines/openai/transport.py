"""The connection to one server: its one layer of retries, its time limit, its typed errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import re
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from qwen3_embeddings.engines.base import closed_error
from qwen3_embeddings.engines.openai import wire
from qwen3_embeddings.engines.openai.limiter import Slot
from qwen3_embeddings.errors import (
    AuthenticationError,
    ConfigurationError,
    MissingDependencyError,
    ModelNotFoundError,
    Qwen3EmbeddingsError,
    ServerBusyError,
    ServerConnectionError,
    ServerError,
    ServerRefusedError,
    ServerResponseError,
    ServerTimeoutError,
    TextTooLongError,
)
from qwen3_embeddings.redaction import Secret, hide_texts, shown

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""How long a start waits for a route that a server need not have."""
_DOWN = frozenset({502, 503, 504})  # what a proxy says while the server behind it restarts
_Outlook = Literal["final", "passing", "down"]
_PROXY = "the proxy named in HTTP_PROXY/HTTPS_PROXY"
SIZE_REFUSED = re.compile(r"matryoshka|dimension", re.IGNORECASE)
"""What a server says that does not give the size asked for."""
_TOO_LONG = re.compile(
    r"maximum context length|max_model_len|too long|too large|longer than the max|input_tokens"
    r"|exceed",
    re.IGNORECASE,
)


class Connection:
    """Sends requests to one server, again where that may help, and says what went wrong.

    Args:
        base_url: root of the API; without a path, ``/v1`` is added.
        api_key: sent as ``Authorization: Bearer``; in no log, repr or error.
        timeout: seconds a request may take from sending to the last byte of its answer.
        max_retries: further attempts after what may pass: broken connections, 408, 429 (but to one
            request too many), and 5xx but 501.
        restart_timeout: seconds a patient request waits for a server that answered before and is
            down now; these attempts are not counted.
        default_headers: sent with every request; secret values, and others of 8 characters and
            more, are in no log or error either.
        verify: False, a CA file, or an `ssl.SSLContext`; True checks against certifi's CAs.

    Raises:
        ConfigurationError: an argument cannot work.
        MissingDependencyError: httpx is not installed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: Secret | None,
        timeout: float,
        max_retries: int,
        restart_timeout: float,
        default_headers: Mapping[str, str | Secret],
        verify: bool | str | ssl.SSLContext,
    ) -> None:
        self.base_url = _normal_url(base_url)
        self.timeout = timeout
        self.max_retries = max_retries
        self.restart_timeout = restart_timeout
        self._answered = False
        headers = _headers(api_key, default_headers)
        self.has_credentials = bool(headers)
        """Whether requests carry a key, or headers of the user's."""
        plain = shown(default_headers)
        self._hidden = [
            value.removeprefix("Bearer ")
            for name, value in headers.items()
            if name not in plain or len(value) >= 8  # shorter ones are parts of words
        ]
        self._client = _client(self.base_url, headers, timeout, verify)
        self._verify = verify

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._client.is_closed

    async def close(self) -> None:
        """Close the connections; requests under way fail with `EngineClosedError`."""
        await self._client.aclose()

    async def post(
        self, url: str, body: dict[str, Any], patient: bool = False, slot: Slot | None = None
    ) -> httpx.Response:
        """The answer to a POST, when its status is 200.

        Raises:
            TextTooLongError: the server says a text is over its context.
            ServerError: anything else; the subclass says what.
            EngineClosedError: the connection was closed.
        """
        answer = await self.send("POST", url, body, patient, slot)
        self.check(answer, body)
        return answer

    async def send(
        self,
        method: str,
        url: str,
        body: dict[str, Any] | None = None,
        patient: bool = False,
        slot: Slot | None = None,
    ) -> httpx.Response:
        """The answer to a request, whatever its status; the last one when retries are used up.

        A request in a `slot` that was one too many waits for another, which counts no retry.
        """
        waits = self.restart_timeout if patient and self._answered else 0.0
        down_since = math.inf
        attempt = counted = 0
        while True:
            if slot:
                await slot.take()
            answer, outlook = await self._attempt(method, url, body)
            lost = slot is not None and _lost(slot, answer)
            now = time.monotonic()
            down_since = min(down_since, now) if outlook == "down" else math.inf
            waiting = down_since <= now < down_since + waits
            counted += not (waiting or lost)
            if outlook == "final" or counted > self.max_retries:
                break
            said, delay = type(answer).__name__, 0.0 if lost else _backoff(attempt)
            if not isinstance(answer, ServerError):
                said, delay = str(answer.status_code), _retry_after(answer) or delay
            level = logging.WARNING if waiting and not attempt else logging.INFO
            then = " when another is answered" if lost else ""
            logger.log(level, "%s: %s, again in %.1f s%s", url, said, delay, then)
            if slot:
                slot.rest()
            await asyncio.sleep(delay)
            attempt += not lost
        if isinstance(answer, ServerError):
            raise answer
        return answer

    async def look(self, url: str) -> bytes | None:
        """What an optional route answers to one GET in `LOOK_SECONDS`; None when it does not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                answer, _ = await self._attempt("GET", url, None)
                if not isinstance(answer, ServerError) and answer.status_code == 200:
                    return answer.content
        return None

    async def answers_strangers(self, url: str, body: dict[str, Any] | None) -> bool:
        """Whether `url` lets a request without key or headers through: a POST, or a GET.

        A refusal of the body (400, 422) counts: it came from behind the door.
        """
        import aiohttp
        import httpx

        async with _client(self.base_url, {}, self.timeout, self._verify) as stranger:
            method = "GET" if body is None else "POST"
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await stranger.request(method, url, json=body)
            except (TimeoutError, httpx.HTTPError, aiohttp.ClientError):
                return False
            return answer.status_code in {200, 400, 422}

    def check(self, answer: httpx.Response, body: Mapping[str, Any] | None = None) -> None:
        """Raise the typed error of a status other than 200, without the texts of the `body`."""
        if answer.status_code != 200:
            raise self._refusal(answer, body or {})

    def _refusal(self, answer: httpx.Response, body: Mapping[str, Any]) -> Qwen3EmbeddingsError:
        """Made apart from where it is raised: what was said is no variable of the traceback."""
        said = _message(answer)
        sent = body.get("input") or [body.get("prompt")]
        quoted = [text for text in sent if isinstance(text, str)]
        told = hide_texts(self._hide(said), quoted)
        return _status_error(answer.status_code, str(answer.request.url), said, told)

    async def _attempt(
        self, method: str, url: str, body: dict[str, Any] | None
    ) -> tuple[httpx.Response | ServerError, _Outlook]:
        """One attempt's answer or error, and whether another may do."""
        import aiohttp
        import httpx

        if self.closed:
            raise closed_error()
        try:
            async with asyncio.timeout(self.timeout):  # httpx counts each read by itself
                answer = await self._client.request(method, url, json=body)
        # Of aiohttp's errors httpx-aiohttp passes on those it has no name for, as for bad HTTP.
        except (
            *(TimeoutError, httpx.HTTPError, httpx.InvalidURL, RuntimeError, UnicodeError),
            aiohttp.ClientError,
        ) as error:
            if self.closed:
                raise closed_error() from None
            # Raised by the caller, without its cause, which may quote a header.
            return self._connection_error(error), _outlook(error)
        self._answered = self._answered or answer.status_code == 200
        if answer.status_code in _DOWN:
            return answer, "down"
        return answer, "passing" if _passes(answer.status_code) else "final"

    def _connection_error(self, error: Exception) -> ServerError:
        import aiohttp
        import httpx

        late = (TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout)
        if isinstance(error, late):
            return ServerTimeoutError(
                f"{self.base_url} did not answer within {self.timeout:g} s, "
                f"{self.max_retries + 1} times. Raise timeout, or lower batch_size."
            )
        way_out = "base_url, that the server runs, and for TLS pass verify='/path/to/ca.pem'."
        proxy = (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError)
        if isinstance(error.__cause__, proxy):  # one of them has another's name in httpx
            way_out = f"{_PROXY}, or set NO_PROXY for the host."
        return ServerConnectionError(
            f"cannot reach {self.base_url} ({type(error).__name__}: {self._hide(str(error))}). "
            f"Check {way_out}"
        )

    def _hide(self, text: str) -> str:
        """`text` without the key and header values a server or library may have quoted."""
        for value in self._hidden:
            text = text.replace(value, "***") if value else text
        return text


def _passes(status: int) -> bool:
    """Whether the same request may succeed later; 501 says that it never will."""
    return status in {408, 429} or (status >= 500 and status != 501)


def _lost(slot: Slot, answer: httpx.Response | ServerError) -> bool:
    """Tell the slot what came of its request; whether it is lost."""
    status = None if isinstance(answer, ServerError) else answer.status_code
    if status == 200:
        slot.answered()
    return status == 429 and slot.refused()


def _outlook(error: Exception) -> _Outlook:
    """Whether another attempt may do where one found no answer."""
    import aiohttp
    import httpx

    lasting = (httpx.UnsupportedProtocol, httpx.ProxyError, httpx.LocalProtocolError)
    if isinstance(error, lasting) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "final"
    broken = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
    if isinstance(error, (*broken, aiohttp.ClientError)):
        return "down"
    return "passing" if isinstance(error, (TimeoutError, httpx.TransportError)) else "final"


def _normal_url(base_url: str) -> str:
    url = base_url.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        usable = usable and not any(character.isspace() for character in url)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigurationError("base_url is not a URL. Write http://host:port/v1 or https://…")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigurationError(
            "base_url holds a user, a query or a fragment, which would show in logs. Pass "
            "api_key, or default_headers={'Authorization': 'Basic …'}, instead."
        )
    return url if parts.path else f"{url}/v1"


def _headers(api_key: Secret | None, default_headers: Mapping[str, str | Secret]) -> dict[str, str]:
    """All headers, checked here because HTTP libraries quote a bad one in their errors."""
    key = api_key.get_secret_value() if api_key else ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for name, value in default_headers.items():
        headers[name] = value.get_secret_value() if isinstance(value, Secret) else value
    for name, value in headers.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise ConfigurationError("default_headers are names and values, both str.")
        mine = name not in default_headers
        bare = key if mine else value
        if not (name + value).isascii() or not value.isprintable() or bare != bare.strip():
            what = "api_key" if mine else f"default_headers[{name!r}]"
            raise ConfigurationError(
                f"{what} holds a character no HTTP header can, or space around it. Copy it again."
            )
    return headers


def _mounts(base_url: str) -> dict[str, None]:
    """What keeps httpx from a SOCKS proxy that NO_PROXY excludes; without it one is refused.

    httpx-aiohttp speaks to it as to an HTTP proxy and sends it the key in plain text.
    """
    parts, proxies = urlsplit(base_url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    if not proxy.lower().startswith("socks"):
        return {}
    if not proxy_bypass(parts.hostname or ""):
        raise ConfigurationError(
            "SOCKS proxies are not supported, and HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names one. "
            "Set NO_PROXY for the host or use an HTTP proxy."
        )
    # httpx reads NO_PROXY otherwise: for it ".example.com" leaves out example.com.
    return dict.fromkeys(("http://", "https://", "all://"))


def _client(
    base_url: str, headers: dict[str, str], timeout: float, verify: bool | str | ssl.SSLContext
) -> httpx.AsyncClient:
    try:
        import httpx
        from httpx_aiohttp import HttpxAiohttpClient
    except ImportError as error:
        raise MissingDependencyError(
            f"httpx-aiohttp cannot be imported ({error}). Run pip install "
            "'qwen3-embeddings[server]'."
        ) from error
    mounts = _mounts(base_url)
    authorities = verify
    if verify is True:
        authorities = os.environ.get("SSL_CERT_FILE") or True
    if isinstance(authorities, str):
        try:
            verify = ssl.create_default_context(cafile=authorities)
        except OSError as error:
            name = "SSL_CERT_FILE" if verify is True else "verify"
            raise ConfigurationError(
                f"{name}={authorities!r} cannot be read as CA certificates ({error}). It is the "
                "path of a PEM file; without SSL_CERT_FILE, verify=True takes certifi's."
            ) from error
    # httpx over aiohttp's connections: httpx's own take two to three times the processor time a
    # request (docs/performance.md).
    # Redirects are not followed: the key must not travel to a host nobody named.
    try:
        return HttpxAiohttpClient(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            verify=verify,
            limits=httpx.Limits(max_connections=0),
            mounts=mounts,
        )
    except ValueError as error:
        raise ConfigurationError(
            f"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used ({error}). Write "
            "http://host:port, or unset it."
        ) from error


def _backoff(attempt: int) -> float:
    """Seconds before the next attempt: doubling from a quarter, at most 8, half of it random."""
    delay: float = min(0.25 * 2 ** min(attempt, 5), 8.0)
    return delay * random.uniform(0.5, 1.0)


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds the server asks to wait, given as such or as a date; at most 60."""
    said = answer.headers.get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), 60.0) if math.isfinite(seconds) else None


def _status_error(status: int, url: str, said: str, told: str) -> Qwen3EmbeddingsError:
    """The typed error of a status other than 200, by what was said, with what may be told."""
    if status == 407:
        return AuthenticationError(
            f"{_PROXY} refused the request ({status}: {told}). Write its user and password there, "
            "http://user:password@host:port, or set NO_PROXY for the server's host.",
            status,
        )
    if status in {401, 403}:
        return AuthenticationError(
            f"{url} refused the key ({status}: {told}). Pass api_key=… or set "
            "QWEN3_EMBEDDINGS_API_KEY; a pickle or dump holds neither key nor secret headers.",
            status,
        )
    if status == 404 and "model" in said.lower():
        return ModelNotFoundError(f"{url}: {told} Leave model out to use the served one.", status)
    if status in {400, 413, 422} and _TOO_LONG.search(said) and not SIZE_REFUSED.search(said):
        return TextTooLongError(
            f"over the server's context ({told}). Pass overflow='truncate' or overflow='mean', or "
            "split the text."
        )
    if status in {404, 405, 501} or 300 <= status < 400:
        return ServerResponseError(
            f"{url} is not an embeddings route ({status}: {told}). Check that base_url is the "
            "server's OpenAI-compatible root, usually ending in /v1; redirects are not followed.",
            status,
        )
    if _passes(status):
        return ServerBusyError(
            f"{url} stayed unavailable through every retry ({status}: {told}). Try later, lower "
            "max_concurrency, or look into the server's log.",
            status,
        )
    return ServerRefusedError(
        f"{url} refused the request ({status}: {told}). Change what it names, or look into the "
        "server's log.",
        status,
    )


def _message(answer: httpx.Response) -> str:
    """What an error body says, in any of the shapes servers use, at most 500 characters."""
    try:
        body = answer.json()
        error = body.get("error", body) if isinstance(body, dict) else body
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail") or error
        said = str(error)[:500]
    except (ValueError, RecursionError):
        return wire.excerpt(answer.content)
    return said.encode("utf-8", "replace").decode()  # JSON can hold half a character
