"""The engine that calls an OpenAI-compatible embeddings server, vLLM's or any other."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import ssl
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any, TypeVar

from qwen3_embeddings import event_loop
from qwen3_embeddings.engines.base import Prompt, Served, Usage, closed_error
from qwen3_embeddings.engines.openai import capabilities
from qwen3_embeddings.engines.openai.addresses import Environment
from qwen3_embeddings.engines.openai.batching import Batcher, Kind
from qwen3_embeddings.engines.openai.endpoint import Endpoint, composed
from qwen3_embeddings.engines.openai.isolation import (
    may_be_a_text,
    outlast,
    was_not_retried,
    what_it_did,
)
from qwen3_embeddings.engines.openai.limiter import Slots
from qwen3_embeddings.engines.openai.retry import Connection
from qwen3_embeddings.errors import (
    Computed,
    Qwen3EmbeddingsError,
    ServerError,
    TextError,
    TextRefusedError,
    TextTooLongError,
)
from qwen3_embeddings.redaction import Secret
from qwen3_embeddings.vectors import Vectors

T = TypeVar("T")


class ServerEngine:
    """Client of one server.

    What the server can do (wire format, `dimensions`) is learned once and logged. Chunks of all
    callers that arrive within a millisecond, while others are in flight, share requests. Queries
    and documents do not share them.

    Args:
        base_url: root of the OpenAI-compatible API, e.g. ``http://localhost:8000/v1``. None means
            the one of `client` or `http_client`.
        model: name of the model on the server; None asks ``/v1/models``.
        api_key: the server's key. Not used with `client`, which has its own.
        timeout: seconds a request may take.
        max_retries: number of retries after transient failures.
        restart_timeout: seconds documents wait for a server that answered before and is down.
        default_headers: sent with every request.
        verify: TLS verification of this package's own HTTP client.
        max_concurrency: maximum number of requests in flight, for queries and for documents each.
            Lowered while the server answers 429.
        batch_size: maximum number of texts per request.
        batch_parameter: name of the caller's argument for `batch_size`, for messages; None if it
            has no such argument.
        client: an `openai.OpenAI`, `AsyncOpenAI`, `AzureOpenAI` or `AsyncAzureOpenAI`. Its base
            URL, key, headers, query parameters, proxies and instrumentation are used; its retries
            are not. It is never closed here. An async one must not be used elsewhere, since it runs
            on this package's event loop.
        http_client: an httpx client, sync or async, used in the same way. Key and headers are
            added to its requests.
        environment: proxy and CAs of this package's own HTTP client; None reads them from the
            environment now.

    Attributes:
        connection: sends single requests to the server.
        base_url: root of the API.
    """

    chunk_tokens = 32768

    def __init__(
        self,
        base_url: str | None = None,
        *,
        model: str | None = None,
        api_key: Secret | None = None,
        timeout: float = 60.0,
        max_retries: int = 4,
        restart_timeout: float = 180.0,
        default_headers: Mapping[str, str | Secret] | None = None,
        verify: bool | str | ssl.SSLContext = True,
        max_concurrency: int = 16,
        batch_size: int = 64,
        batch_parameter: str | None = "batch_size",
        client: Any = None,
        http_client: Any = None,
        environment: Environment | None = None,
    ) -> None:
        self.connection = Connection(
            base_url,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
            default_headers=default_headers or {},
            verify=verify,
            client=client,
            http_client=http_client,
            threads=2 * max_concurrency,
            batch_parameter=batch_parameter,
            environment=environment,
        )
        self.base_url = self.connection.base_url
        self.model = model
        self.chunks_in_flight = max_concurrency
        self.endpoint = Endpoint(self.connection)
        self._restart_timeout = restart_timeout
        self._learning: asyncio.Task[Served] | None = None
        self._slots = Slots(max_concurrency)
        self._batcher = Batcher(
            self.endpoint, self._slots, batch_size, restart_timeout, self._spawn
        )
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def chunk_texts(self) -> int:
        """Prompts the embedder should pass at once."""
        return self._batcher.most

    @property
    def cuts_itself(self) -> bool:
        """Whether the server returns smaller sizes, as far as it was asked."""
        return self.endpoint.cuts_itself

    async def start(self) -> Served:
        """Reach the server once and learn what it serves and speaks."""
        if self.connection.closed:
            raise closed_error()
        if self.endpoint.served is None:
            if self._learning is None or self._learning.done():
                self._learning = self._spawn(self._learn(), contextvars.Context())
            # One attempt for all that wait, which outlives the first of them.
            return await self._until_closed(asyncio.shield(self._learning))
        return self.endpoint.served

    async def tokenize(self, texts: list[str], urgent: bool = False) -> list[list[int]]:
        """Return token ids from ``/tokenize``.

        Raises:
            TextRefusedError: the server does not tokenize some texts, although it does others.
            ServerError: the server has no such route, or fails.
        """
        served = await self.start()
        refused: dict[int, Qwen3EmbeddingsError] = {}

        async def one(position: int, text: str) -> list[int]:
            async with self._slots.one(urgent) as slot:
                ask = functools.partial(self.endpoint.tokenize, served.model, slot=slot)
                for last in (False, True):
                    try:
                        return await ask(text)
                    except (ServerError, TextTooLongError) as error:
                        if not may_be_a_text(error):
                            raise
                        probe = functools.partial(ask, "probe", retries=0)
                        patience = 0.0 if urgent else self._restart_timeout
                        was_down = await outlast(error, probe, slot, patience)
                        if last or not (was_down or was_not_retried(error)):
                            refused[position] = error
                            break
            return []

        async def every() -> list[list[int]]:
            ids = await event_loop.gather(itertools.starmap(one, enumerate(texts)))
            if refused:
                raise _not_tokenized(refused)
            return ids

        return await self._until_closed(self._spawn(every()))

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        """Return one vector per prompt, in order.

        Tokens are added to `usage` as the server reports them. A request of one call is counted
        exactly. One that several calls share is divided in proportion to the length of their
        prompts; the sum is exact. vLLM's compact format (``bytes_only``) carries no token count,
        so its texts are `uncounted`; prompts of token ids are counted here.
        """
        served = await self.start()
        if dimensions == served.dimensions:
            dimensions = None  # servers without is_matryoshka refuse even their own size
        prompts = [composed(prompt) for prompt in prompts]
        texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
        others = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        kinds = [(Kind(dimensions, kind is texts, urgent), kind) for kind in (texts, others)]
        if texts and others:
            return await self._embed_kinds(prompts, kinds, usage)
        return await self._batcher.embed(kinds[0 if texts else 1][0], prompts, usage)

    async def _embed_kinds(
        self, prompts: list[Prompt], kinds: list[tuple[Kind, list[int]]], usage: Usage | None
    ) -> Vectors:
        """Embed prompts of two kinds, each at its positions: a request holds one kind."""
        pieces: list[tuple[list[int], Vectors]] = []
        errors: list[Qwen3EmbeddingsError] = []

        async def part(kind: Kind, group: list[int]) -> None:
            try:
                rows = await self._batcher.embed(kind, [prompts[i] for i in group], usage)
                pieces.append((group, rows))
            except Qwen3EmbeddingsError as error:
                if error.computed is not None:
                    there = [group[i] for i in error.computed.positions]
                    pieces.append((there, error.computed.vectors))
                if isinstance(error, TextError):
                    error = error.at(group[i] for i in error.positions)
                errors.append(error)

        await asyncio.gather(*itertools.starmap(part, kinds))
        computed = Computed.of(pieces, len(prompts))
        if errors:
            raise errors[0].carrying(computed)
        assert computed is not None
        return computed.vectors

    async def close(self) -> None:
        """Fail what waits, and close the connections."""
        await self.connection.close()
        self._batcher.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _learn(self) -> Served:
        self.endpoint.served = await capabilities.learn(self.endpoint, self._slots, self.model)
        return self.endpoint.served

    async def _until_closed(self, work: Awaitable[T]) -> T:
        """Return the result of `work`, or raise `EngineClosedError` if `close` cancelled it."""
        try:
            return await work
        except asyncio.CancelledError:
            if self.connection.closed:
                raise closed_error() from None
            raise

    def _spawn(
        self, coroutine: Coroutine[Any, Any, Any], context: contextvars.Context | None = None
    ) -> asyncio.Task[Any]:
        """Start a task that `close` cancels, and whose error counts as seen."""
        task = asyncio.get_running_loop().create_task(coroutine, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task


def _not_tokenized(refused: Mapping[int, Qwen3EmbeddingsError]) -> TextRefusedError:
    error = next(iter(refused.values()))
    said = "too long" if isinstance(error, TextTooLongError) else what_it_did(error)
    return TextRefusedError(
        f"the server does not tokenize it, so it cannot be cut to the context ({said}). Split it "
        "yourself, or raise the limit of the server or of the proxy in front of it.",
        sorted(refused),
    )
