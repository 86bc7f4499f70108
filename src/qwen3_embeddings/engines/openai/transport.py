"""HTTP clients that carry the requests: this package's own, or one of the caller's."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import os
import ssl
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from qwen3_embeddings.engines.openai.addresses import Environment, normal_url
from qwen3_embeddings.engines.openai.failures import Response
from qwen3_embeddings.errors import ConfigurationError, MissingDependencyError
from qwen3_embeddings.redaction import Secret, fits_header

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0
"""How long a connection may take to be made; `timeout` if that is shorter."""
_RAW = {"X-Stainless-Raw-Response": "true"}  # makes the openai package return the HTTP response
_EMBEDDING_FIELDS = frozenset({"model", "input", "encoding_format", "dimensions"})
_owners: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # clients' processes
_sending: contextvars.ContextVar[bool] = contextvars.ContextVar("sending", default=False)


class Transport(Protocol):
    """Sends one request and returns its response, whatever the status."""

    async def send(self, method: str, url: str, body: dict[str, Any] | None) -> Response:
        """Send a request. Any exception means that there is no response."""

    async def close(self) -> None:
        """Close what this package opened."""


class OwnTransport:
    """A client of this package: httpx over aiohttp's connections.

    httpx's own connections need two to three times the processor time per request
    (benchmarks/notes/client.md). Redirects are not followed: the key must not reach another host.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        timeout: float,
        verify: bool | str | ssl.SSLContext,
        environment: Environment,
    ) -> None:
        self.client = own_client(headers, timeout, verify, environment)

    async def send(self, method: str, url: str, body: dict[str, Any] | None) -> Response:
        """Send a request."""
        return await self.client.request(method, url, json=body)

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()


class ForeignTransport:
    """A client of the caller's: httpx's, httpx2's or the openai package's, sync or async.

    It is never closed here. A sync client runs in threads. An async client runs on the event loop
    of this package.
    """

    def __init__(self, call: Callable[..., Any], asynchronous: bool, threads: int) -> None:
        self._call = call
        self._pool: ThreadPoolExecutor | None = None
        if not asynchronous:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="qwen3-embeddings-http")

    async def send(self, method: str, url: str, body: dict[str, Any] | None) -> Response:
        """Send a request."""
        if self._pool is None:
            answer: Response = await self._call(method, url, body)
            return answer
        # Tracing reads context variables, which threads do not inherit.
        run = contextvars.copy_context().run
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, run, self._call, method, url, body)

    async def close(self) -> None:
        """End the threads once their requests have ended."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)


def client_root(base_url: str | None, client: Any, http_client: Any) -> str:
    """Return the base URL that was passed, or that of the caller's client.

    Raises:
        ConfigurationError: there is none, or the arguments contradict each other.
    """
    if client is not None and http_client is not None:
        raise ConfigurationError("client and http_client exclude each other. Pass one of them.")
    if client is not None and not (hasattr(client, "embeddings") and hasattr(client, "base_url")):
        raise ConfigurationError(
            f"client is {type(client).__name__}. Pass an openai.OpenAI, AsyncOpenAI, AzureOpenAI "
            "or AsyncAzureOpenAI. Pass an httpx client as http_client."
        )
    if http_client is not None and not hasattr(http_client, "build_request"):
        raise ConfigurationError(
            f"http_client is {type(http_client).__name__}. Pass an httpx.Client or "
            "httpx.AsyncClient."
        )
    passed = client if client is not None else http_client
    if passed is not None and _owners.setdefault(passed, os.getpid()) != os.getpid():
        raise ConfigurationError(
            "this client was passed before the process forked, and the connections of both "
            "processes would mix. Create a client in the child, and an embedder with it."
        )
    own = str(getattr(passed, "base_url", ""))
    if client is not None and base_url and normal_url(base_url) != normal_url(own):
        raise ConfigurationError("client has a base_url of its own. Leave base_url out.")
    if not (base_url or own):
        raise ConfigurationError("no base_url. Write http://host:port/v1 or https://…")
    return normal_url(base_url or own)


def http_transport(
    client: Any, headers: Mapping[str, str], timeout: float, threads: int
) -> ForeignTransport:
    """Return the transport of an httpx client of the caller's."""

    def call(method: str, url: str, body: dict[str, Any] | None) -> Any:
        return client.request(
            *(method, url), json=body, headers=headers, timeout=timeout, follow_redirects=False
        )

    return ForeignTransport(call, inspect.iscoroutinefunction(client.request), threads)


def openai_transport(
    client: Any, headers: Mapping[str, str], timeout: float, threads: int
) -> ForeignTransport:
    """Return the transport of an `openai.OpenAI` client or one of its kind.

    The openai package adds base URL, key, headers and query parameters. Embeddings go through
    `client.embeddings.create`, where tracing packages hook in. It retries nothing.
    """
    once = client.with_options(max_retries=0)
    root = str(client.base_url).rstrip("/")
    asynchronous = inspect.iscoroutinefunction(client.post)

    def start(method: str, url: str, body: dict[str, Any] | None) -> Any:
        path = url.removeprefix(root)
        if path == "/embeddings" and body is not None:
            known = {name: value for name, value in body.items() if name in _EMBEDDING_FIELDS}
            extra = {name: value for name, value in body.items() if name not in _EMBEDDING_FIELDS}
            return once.embeddings.with_raw_response.create(
                **known, extra_body=extra or None, extra_headers=dict(headers), timeout=timeout
            )
        options = {"headers": {**headers, **_RAW}, "timeout": timeout}
        if method == "GET":
            return once.get(path, cast_to=object, options=options)
        return once.post(path, cast_to=object, body=body, options=options)

    def call(*arguments: Any) -> Any:
        try:
            return start(*arguments).http_response
        except Exception as error:
            return _response_of(error)

    async def acall(*arguments: Any) -> Any:
        try:
            return (await start(*arguments)).http_response
        except Exception as error:
            return _response_of(error)

    return ForeignTransport(acall if asynchronous else call, asynchronous, threads)


def _response_of(error: Exception) -> Response:
    """Return the response of an `openai.APIStatusError`; raise any other error."""
    response: Response | None = getattr(error, "response", None)
    if response is None:
        raise error
    return response


def all_headers(
    api_key: Secret | None, default_headers: Mapping[str, str | Secret]
) -> dict[str, str]:
    """Return all headers, checked here because HTTP libraries quote a bad one in their errors.

    Raises:
        ConfigurationError: a header cannot be sent.
    """
    key = api_key.get_secret_value() if api_key else ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for name, value in default_headers.items():
        headers[name] = value.get_secret_value() if isinstance(value, Secret) else value
    for name, value in headers.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise ConfigurationError("default_headers are names and values, both str.")
        mine = name not in default_headers
        bare = key if mine else value
        if not name.isascii() or not fits_header(bare):
            what = "api_key" if mine else f"default_headers[{name!r}]"
            raise ConfigurationError(
                f"{what} holds a character no HTTP header can, or space around it. Copy it again."
            )
    return headers


def own_client(
    headers: Mapping[str, str],
    timeout: float,
    verify: bool | str | ssl.SSLContext,
    environment: Environment,
) -> httpx.AsyncClient:
    """Return an httpx client over aiohttp's connections.

    Raises:
        ConfigurationError: `verify`, SSL_CERT_FILE or a proxy variable cannot be used.
        MissingDependencyError: httpx-aiohttp is not installed.
    """
    try:
        import httpx
        from httpx_aiohttp import HttpxAiohttpClient
    except ImportError as error:
        raise MissingDependencyError(
            f"httpx-aiohttp cannot be imported ({error}). Run pip install "
            "'qwen3-embeddings[server]'."
        ) from error
    try:
        return HttpxAiohttpClient(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS), pool=None),
            verify=_authorities(verify, environment),
            limits=httpx.Limits(max_connections=0),
            proxy=environment.proxy,
            trust_env=False,  # httpx understands neither ranges nor ports in NO_PROXY
        )
    except ValueError as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used ({error}). Write "
            "http://host:port, or unset it."
        ) from error


def _authorities(
    verify: bool | str | ssl.SSLContext, environment: Environment
) -> bool | ssl.SSLContext:
    """Return what to check certificates against: the variables' authorities, or certifi's.

    Files are read for each client, because they may have changed meanwhile.
    """
    if not (verify is True or isinstance(verify, str)):
        return verify
    file = verify if isinstance(verify, str) else environment.ca_file
    folder = None if isinstance(verify, str) else environment.ca_folder
    if not (file or folder):
        return _default_context()
    try:
        return ssl.create_default_context(cafile=file or None, capath=folder or None)
    except (OSError, ValueError) as error:
        name = "verify" if isinstance(verify, str) else "SSL_CERT_FILE"
        raise ConfigurationError(
            f"{name}={file!r} cannot be read as CA certificates ({error}). It is the path of a PEM "
            "file; without SSL_CERT_FILE, verify=True uses certifi's."
        ) from error


@functools.cache
def _default_context() -> ssl.SSLContext:
    """Return a TLS context with certifi's authorities, made once: reading them lasts 30 ms."""
    import httpx

    return httpx.create_ssl_context(trust_env=False)


# httpx logs every request at INFO. An application that logs at INFO does not want a line per
# request of this package, so these records become DEBUG.


def demote_request_logs() -> None:
    """Turn the INFO records that httpx makes for this package's requests into DEBUG."""
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).addFilter(_demote)  # adding it again changes nothing


def _demote(record: logging.LogRecord) -> bool:
    if record.levelno != logging.INFO or not _sending.get():
        return True
    record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


@contextlib.contextmanager
def sending() -> Iterator[None]:
    """Mark the log records of this block as those of a request of this package."""
    token = _sending.set(True)
    try:
        yield
    finally:
        _sending.reset(token)


def secret_values(
    headers: Mapping[str, str], plain: Iterable[str], client: Any = None
) -> list[str]:
    """Return the values that no log or error may hold.

    Args:
        headers: all headers that are sent.
        plain: names of the headers whose values are not secret.
        client: the caller's openai client, if any.
    """
    shown = set(plain)
    values = [
        value.removeprefix("Bearer ")
        for name, value in headers.items()
        if name not in shown or len(value) >= 8  # shorter ones are parts of words
    ]
    key = getattr(client, "api_key", None)
    return [value for value in (*values, key) if isinstance(value, str) and value]
