"""Any OpenAI-compatible embeddings server: vLLM first, others as far as they speak.

What the server can do (wire format, `dimensions`) is learned once and said in the log. Chunks of
all callers that arrive within a millisecond share requests, queries apart from documents.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import ssl
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3_embeddings import matryoshka, models
from qwen3_embeddings.engines import wire
from qwen3_embeddings.engines.base import Prompt, Served
from qwen3_embeddings.errors import (
    AuthenticationError,
    ConfigurationError,
    DimensionsError,
    EngineClosedError,
    MissingDependencyError,
    ModelNotFoundError,
    ServerBusyError,
    ServerConnectionError,
    ServerError,
    ServerRefusedError,
    ServerResponseError,
    ServerTimeoutError,
    TextTooLongError,
)
from qwen3_embeddings.matryoshka import Vectors
from qwen3_embeddings.secret import Secret

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.001
"""How long a chunk waits for others to share its request."""

_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_TOO_LONG = re.compile(
    r"maximum context length|max_model_len|too long|too large|longer than the max|input_tokens"
    r"|exceed",
    re.IGNORECASE,
)


@dataclass(eq=False)
class _Waiting:
    """One caller's prompts, waiting for a request to share."""

    prompts: list[Prompt]
    answer: asyncio.Future[Vectors]


class ServerEngine:
    """Client of one server.

    Args:
        base_url: root of the OpenAI-compatible API, e.g. ``http://localhost:8000/v1``; a URL
            without a path gets ``/v1``.
        model: name the server knows the model by; None asks ``/v1/models``.
        api_key: sent as ``Authorization: Bearer``; in no log, repr or error.
        timeout: seconds a request may take, connecting included.
        max_retries: further attempts after what may pass: broken connections, 408, 429, 5xx.
        default_headers: sent with every request.
        verify: False, a CA file, or an `ssl.SSLContext`; True checks against the system's CAs.
        max_concurrency: requests under way at once, for queries and for documents each.
        batch_size: most texts a request holds.
    """

    chunk_tokens = 32768

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: Secret | None = None,
        timeout: float = 60.0,
        max_retries: int = 4,
        default_headers: Mapping[str, str] | None = None,
        verify: bool | str | ssl.SSLContext = True,
        max_concurrency: int = 16,
        batch_size: int = 64,
    ) -> None:
        self.base_url = _normal_url(base_url)
        self.model = model
        self.max_retries = max_retries
        self.chunk_texts = batch_size
        self.chunks_in_flight = max_concurrency
        self._client = _client(api_key, timeout, default_headers, verify)
        self._starting = asyncio.Lock()
        self._served: Served | None = None
        self._form = 0
        self._cuts_itself = True
        self._waiting: dict[Any, list[_Waiting]] = defaultdict(list)
        self._slots = {urgent: asyncio.Semaphore(max_concurrency) for urgent in (True, False)}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> Served:
        """Reach the server once and learn what it serves and speaks."""
        async with self._starting:
            if self._client.is_closed:
                raise _closed()
            if self._served is None:
                self._served = await self._learn()
                logger.info("%s speaks %s: %s", self.base_url, self._wire, self._served)
            return self._served

    @property
    def _wire(self) -> str:
        return wire.FORMATS[self._form]

    async def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids from vLLM's ``/tokenize``, which stands beside the API root."""
        served = await self.start()
        url = self.base_url.removesuffix("/v1") + "/tokenize"

        free = asyncio.Semaphore(self.chunks_in_flight)

        async def one(text: str) -> list[int]:
            body = {"model": served.model, "prompt": text, "add_special_tokens": True}
            async with free:
                answer = await self._post(url, body)
            try:
                ids = answer.json()["tokens"]
                if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                    raise TypeError("tokens are not integers")
            except (ValueError, TypeError, KeyError) as error:
                raise ServerResponseError(f"/tokenize did not answer token ids: {error}") from error
            return ids

        return list(await asyncio.gather(*map(one, texts)))

    async def embed(self, prompts: list[Prompt], dimensions: int | None, urgent: bool) -> Vectors:
        """One vector a prompt, in order."""
        served = await self.start()
        if dimensions == served.dimensions:
            dimensions = None  # servers without is_matryoshka refuse even their own size
        texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
        others = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        groups = [group for group in (texts, others) if group]  # one request holds one kind
        answers = await asyncio.gather(
            *(
                self._gather([prompts[i] for i in group], dimensions, group is texts, urgent)
                for group in groups
            )
        )
        rows = np.empty((len(prompts), answers[0].shape[1]), dtype=np.float32)
        for group, answer in zip(groups, answers, strict=True):
            rows[group] = answer
        return rows

    async def close(self) -> None:
        """Fail what waits, and close the connections."""
        for line in self._waiting.values():
            _fail(line, _closed())
            line.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    # Gathering: chunks wait in a line for each kind of request; a sender takes a line's head.

    async def _gather(self, prompts: list[Prompt], *kind: Any) -> Vectors:
        waiting = _Waiting(prompts, asyncio.get_running_loop().create_future())
        line = self._waiting[kind]
        line.append(waiting)
        task = asyncio.create_task(self._send_next(*kind))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await waiting.answer

    async def _send_next(self, dimensions: int | None, texts: bool, urgent: bool) -> None:
        """Send what waits in one line, as much as a request holds, and hand the rows out."""
        line = self._waiting[dimensions, texts, urgent]
        await asyncio.sleep(GATHER_SECONDS)
        async with self._slots[urgent]:
            group = _take(line, self.chunk_texts)
            if not group:
                return
            request = asyncio.create_task(self._deliver(group, dimensions, urgent))
            for waiting in group:  # a caller that gives up lets the others go on
                waiting.answer.add_done_callback(
                    lambda _: all(other.answer.cancelled() for other in group) and request.cancel()
                )
            try:
                await request
            except asyncio.CancelledError:
                request.cancel()
                _fail(group, _closed())
            except Exception as error:
                _fail(group, error)

    async def _deliver(self, group: list[_Waiting], dimensions: int | None, urgent: bool) -> None:
        prompts = [prompt for waiting in group for prompt in waiting.prompts]
        try:
            rows = await self._request(prompts, dimensions)
        except (ServerRefusedError, TextTooLongError):
            if len(group) == 1:
                raise await self._blame(prompts, dimensions) from None
            for waiting in group:  # the refused one must not take the others with it
                try:
                    await self._deliver([waiting], dimensions, urgent)
                except ServerError as error:
                    _fail([waiting], error)
                except TextTooLongError as error:
                    _fail([waiting], error)
            return
        start = 0
        for waiting in group:
            end = start + len(waiting.prompts)
            if not waiting.answer.done():
                waiting.answer.set_result(rows[start:end])
            start = end

    async def _blame(self, prompts: list[Prompt], dimensions: int | None) -> Exception:
        """The error of a refused request, naming the texts the server refuses one by one."""
        refused: list[int] = []
        error: Exception = ServerRefusedError("the server refuses these texts together only.")
        for position, prompt in enumerate(prompts):
            try:
                await self._request([prompt], dimensions)
            except (ServerRefusedError, TextTooLongError) as one:
                refused.append(position)
                error = one
        if isinstance(error, TextTooLongError):
            return TextTooLongError(str(error), refused)
        return error

    # Requests.

    async def _learn(self) -> Served:
        """Ask the server what it serves and how it likes to be asked."""
        name, root, context = await self._find_model()
        self._served = Served("server", name, 0, 0, context)
        size = (await self._request(["probe"], None)).shape[1]
        known = models.MODELS.get(name) or models.MODELS.get(root)
        if known:
            context = context or known.context
        native = max(known.dimensions if known else 0, size)
        return Served("server", name, size, native, context)

    async def _find_model(self) -> tuple[str, str, int | None]:
        """The served model: its name, what it was loaded from, and its context if told."""
        answer = await self._send("GET", self.base_url + "/models")
        if answer.status_code in {404, 405, 501} and self.model:
            return self.model, self.model, None
        _raise_for_status(answer)
        try:
            rows = {row["id"]: row for row in answer.json()["data"]}
        except (ValueError, TypeError, KeyError) as error:
            raise ServerResponseError(
                f"{self.base_url}/models does not answer a list of models: "
                f"{wire.excerpt(answer.content)!r}. Check that base_url is the server's "
                "OpenAI-compatible root, usually ending in /v1."
            ) from error
        matches = [row for row in rows.values() if self.model in (None, row["id"], row.get("root"))]
        if len(matches) != 1:
            raise ModelNotFoundError(
                f"the server at {self.base_url} serves {', '.join(map(repr, rows)) or 'nothing'}"
                + (f", not {self.model!r}" if self.model else "")
                + ". Pass one of its names as model."
            )
        row = matches[0]
        context = row.get("max_model_len")
        root = row.get("root")
        return row["id"], str(root or row["id"]), context if isinstance(context, int) else None

    async def _request(self, prompts: list[Prompt], dimensions: int | None) -> Vectors:
        """One request's vectors; falls back where the server turns out not to speak a feature."""
        assert self._served is not None
        body: dict[str, Any] = {"model": self._served.model, "input": prompts}
        body |= wire.ask(self._wire)
        ask_size = dimensions is not None and self._cuts_itself
        if ask_size:
            body["dimensions"] = dimensions
        form = self._form
        try:
            answer = await self._post(self.base_url + "/embeddings", body)
        except ServerRefusedError as error:
            if ask_size and re.search("matryoshka|dimension", str(error), re.IGNORECASE):
                self._cut_here(str(error))
            elif form + 1 < len(wire.FORMATS) and not self._served.dimensions:
                self._form = max(self._form, form + 1)
            else:
                raise
            return await self._request(prompts, dimensions)
        content_type = answer.headers.get("content-type", "")
        spoken, vectors = wire.read(answer.content, content_type, len(prompts))
        self._form = max(self._form, wire.FORMATS.index(spoken))
        return vectors if dimensions is None else self._fit(vectors, dimensions)

    def _fit(self, vectors: Vectors, dimensions: int) -> Vectors:
        """Vectors of the size asked for, cut here when the server did not."""
        size = vectors.shape[1]
        if size == dimensions:
            return vectors
        if size < dimensions:
            raise DimensionsError(
                f"the server gives {size} numbers a text and cannot give dimensions={dimensions}. "
                "Ask for at most that, or start the server without a smaller default size."
            )
        self._cut_here(f"it answered {size} numbers to dimensions={dimensions}")
        return matryoshka.truncate(vectors, dimensions)

    def _cut_here(self, why: str) -> None:
        if self._cuts_itself:
            logger.info("%s does not cut vectors itself, done here: %s", self.base_url, why)
        self._cuts_itself = False

    async def _post(self, url: str, body: dict[str, Any]) -> httpx.Response:
        answer = await self._send("POST", url, body)
        _raise_for_status(answer)
        return answer

    async def _send(
        self, method: str, url: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        """The answer to a request, the last one when retries are used up."""
        import httpx

        for attempt in range(self.max_retries + 1):
            last = attempt == self.max_retries
            try:
                answer = await self._client.request(method, url, json=body)
            except (httpx.TimeoutException, httpx.TransportError) as error:
                if last or isinstance(error, (httpx.UnsupportedProtocol, httpx.ProxyError)):
                    raise self._connection_error(error) from error
                delay = _backoff(attempt)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise self._connection_error(error) from error
            else:
                if answer.status_code not in _RETRIED or last:
                    return answer
                delay = _retry_after(answer) or _backoff(attempt)
                logger.info("%s: %d, again in %.1f s", self.base_url, answer.status_code, delay)
            await asyncio.sleep(delay)
        raise AssertionError("unreachable")

    def _connection_error(self, error: Exception) -> ServerError:
        import httpx

        if isinstance(error, httpx.TimeoutException) and not isinstance(
            error, httpx.ConnectTimeout
        ):
            return ServerTimeoutError(
                f"{self.base_url} did not answer in time ({type(error).__name__}), "
                f"{self.max_retries + 1} times. Raise timeout, or lower batch_size."
            )
        return ServerConnectionError(
            f"cannot reach {self.base_url} ({type(error).__name__}: {error}). Check base_url, that "
            "the server runs, and for TLS pass verify='/path/to/ca.pem'."
        )


def _normal_url(base_url: str) -> str:
    url = base_url.strip().rstrip("/")
    scheme, _, rest = url.partition("://")
    if scheme not in {"http", "https"} or not rest:
        raise ConfigurationError(
            f"base_url={base_url!r} is not a URL. Write http://host:port/v1 or https://…"
        )
    if "@" in rest.partition("/")[0]:
        raise ConfigurationError(
            "base_url holds a user or password, which would show in logs. Pass "
            "default_headers={'Authorization': 'Basic …'} instead."
        )
    return url if "/" in rest else f"{url}/v1"


def _client(
    api_key: Secret | None,
    timeout: float,
    headers: Mapping[str, str] | None,
    verify: bool | str | ssl.SSLContext,
) -> httpx.AsyncClient:
    try:
        import httpx
    except ImportError as error:
        raise MissingDependencyError(
            f"httpx cannot be imported ({error}). Run pip install 'qwen3-embeddings[server]'."
        ) from error
    if isinstance(verify, str):
        try:
            verify = ssl.create_default_context(cafile=verify)
        except OSError as error:
            raise ConfigurationError(
                f"verify={verify!r} cannot be read as CA certificates ({error}). Pass the path of "
                "a PEM file, or True for the system's."
            ) from error
    sent = {"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}
    if api_key and not api_key.get_secret_value().isascii():
        raise ConfigurationError("api_key holds a character no HTTP header can. Copy it again.")
    # Redirects are not followed: the key must not travel to a host nobody named.
    return httpx.AsyncClient(
        headers=sent | dict(headers or {}),
        timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
        verify=verify,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
    )


def _take(line: list[_Waiting], most: int) -> list[_Waiting]:
    """Take from the head of a line what fits one request, at least one, without the given-up."""
    group: list[_Waiting] = []
    texts = 0
    while line:
        if line[0].answer.cancelled():
            line.pop(0)
            continue
        texts += len(line[0].prompts)
        if group and texts > most:
            break
        group.append(line.pop(0))
    return group


def _fail(group: list[_Waiting], error: Exception) -> None:
    for waiting in group:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)


def _closed() -> EngineClosedError:
    return EngineClosedError("the embedder was closed. Make a new one, or close it later.")


def _backoff(attempt: int) -> float:
    """Seconds before the next attempt: doubling from a quarter, at most 8, half of it random."""
    delay: float = min(0.25 * 2**attempt, 8.0)
    return delay * random.uniform(0.5, 1.0)


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds the server asks to wait, at most 60; dates are left to `_backoff`."""
    try:
        return min(max(float(answer.headers["retry-after"]), 0.0), 60.0)
    except (KeyError, ValueError):
        return None


def _raise_for_status(answer: httpx.Response) -> None:
    """The typed error of a status other than 200."""
    status, url = answer.status_code, answer.request.url
    if status == 200:
        return
    said = _message(answer)
    if status in {401, 403}:
        raise AuthenticationError(
            f"{url} refused the key ({status}: {said}). Pass api_key=… or set "
            "QWEN3_EMBEDDINGS_API_KEY.",
            status,
        )
    if status == 404 and "model" in said.lower():
        raise ModelNotFoundError(f"{url}: {said} Leave model out to use the served one.", status)
    if status in {400, 413, 422} and _TOO_LONG.search(said):
        raise TextTooLongError(
            f"a text is longer than the server's context ({said}). Pass overflow='truncate' or "
            "overflow='mean', or split the text."
        )
    if status in _RETRIED or status >= 500:
        raise ServerBusyError(
            f"{url} stayed unavailable through every retry ({status}: {said}). Try later, lower "
            "max_concurrency, or look into the server's log.",
            status,
        )
    if status in {404, 405} or 300 <= status < 400:
        raise ServerResponseError(
            f"{url} is not an embeddings route ({status}: {said}). Check that base_url is the "
            "server's OpenAI-compatible root, usually ending in /v1; redirects are not followed.",
            status,
        )
    raise ServerRefusedError(f"{url} refused the request ({status}: {said}).", status)


def _message(answer: httpx.Response) -> str:
    """What an error body says, in any of the shapes servers use."""
    try:
        body = answer.json()
    except ValueError:
        return wire.excerpt(answer.content)
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)[:500]
