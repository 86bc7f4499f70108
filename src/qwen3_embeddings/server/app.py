"""The routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CONTENT_TYPE_LATEST

from qwen3_embeddings import __version__
from qwen3_embeddings.engines.base import Engine, Served, Usage
from qwen3_embeddings.errors import Qwen3EmbeddingsError, TextError
from qwen3_embeddings.event_loop import in_thread
from qwen3_embeddings.redaction import Secret
from qwen3_embeddings.server import wire
from qwen3_embeddings.server.metrics import Metrics
from qwen3_embeddings.server.wire import RequestError
from qwen3_embeddings.vectors import normalize

logger = logging.getLogger(__name__)

MOST_BYTES = 64 << 20
"""Largest request body, decompressed: 2,048 texts of 32 KiB each."""
HEALTH_SECONDS = 1.0
"""How long ``/health`` waits for an engine that is starting."""
CANCELLED = 499
"""Status in the metrics of a request whose client closed the connection (nginx's)."""


class Server:
    """The server over one engine.

    Args:
        engine: a started engine; all calls are made on the server's event loop.
        served: what it serves.
        names: names of the model in ``GET /v1/models``; the first one is in the responses. Clients
            may also use the name in `served`.
        dimensions: size of the vectors for clients that ask for none; None means native.
        key: key that every request must send, if there is one.
    """

    def __init__(
        self,
        engine: Engine,
        served: Served,
        names: Sequence[str],
        *,
        dimensions: int | None = None,
        key: Secret | None = None,
    ) -> None:
        self._engine, self._served, self._dimensions = engine, served, dimensions
        self._listed = list(names)
        self._names = list(dict.fromkeys([*names, served.model]))
        self._key = key
        self._metrics = Metrics(names[0])
        self._since = int(time.time())
        self._requests = 0  # in progress
        self._stopping = False
        self._idle = asyncio.Event()

    def app(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[self._count], client_max_size=MOST_BYTES)
        app.router.add_post("/v1/embeddings", self.embeddings)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_get("/health", self.health)
        app.router.add_get("/version", self.version)
        app.router.add_get("/metrics", self.metrics)
        return app

    async def finish(self, seconds: float) -> None:
        """Wait for the requests in progress. From now on each response closes its connection.

        Args:
            seconds: how long to wait at most.
        """
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._requests:
                    self._idle.clear()
                    await self._idle.wait()

    # Routes.

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """Embed texts."""
        fields = await _fields(request)
        wire.check_model(fields, self._names)
        texts = wire.read_texts(fields, self._served, self._dimensions)
        usage = Usage()
        with self._metrics.in_progress(len(texts.prompts)):
            rows = await self._engine.embed(texts.prompts, texts.dimensions, texts.urgent, usage)
        # NumPy releases the interpreter's lock, so many rows do not stop the event loop.
        unit = await in_thread(normalize, rows) if rows.size > wire.BLOCK else normalize(rows)
        blocks, kind = await wire.answer(unit, texts.form, self._listed[0], usage.tokens)
        self._metrics.embedded(usage)
        if len(blocks) == 1:
            return web.Response(body=blocks[0], content_type=kind)
        return await _send(request, blocks, kind)

    async def models(self, _: web.Request) -> web.Response:
        """List the model, once per name."""
        shared = {"object": "model", "created": self._since, "owned_by": "qwen3-embeddings"}
        shared |= {"root": self._served.model, "max_model_len": self._served.context}
        return _json({"object": "list", "data": [{"id": name} | shared for name in self._listed]})

    async def tokenize(self, request: web.Request) -> web.Response:
        """Return the token ids of a text, as vLLM does."""
        fields = await _fields(request)
        wire.check_model(fields, self._names)
        wire.check_fixed(fields)
        if not isinstance(fields.get("prompt"), str):
            raise RequestError("prompt is not a text.", param="prompt")
        (ids,) = await self._engine.tokenize([fields["prompt"]])
        return _json({"count": len(ids), "max_model_len": self._served.context, "tokens": ids})

    async def health(self, _: web.Request) -> web.Response:
        """Answer 200 while the engine runs. Restart one that died, and answer 503 until it runs."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await self._engine.start()
        except TimeoutError:
            raise RequestError("the engine is starting.", 503) from None
        return web.Response()

    async def version(self, _: web.Request) -> web.Response:
        """Return this package's version."""
        return _json({"version": __version__})

    async def metrics(self, _: web.Request) -> web.Response:
        """Return the metrics in Prometheus' format."""
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    # What all routes share.

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer a request and count it."""
        started = time.perf_counter()
        status = CANCELLED
        self._requests += 1
        try:
            response = await self._answer(request, handler)
            status = response.status
            if self._stopping:
                response.force_close()
            return response
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()
            resource = request.match_info.route.resource
            route = resource.canonical if resource else "other"
            self._metrics.answered(route, status, time.perf_counter() - started)

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer a request; turn every error except a closed connection into a response."""
        try:
            if not self._authorized(request):
                return _refuse(_UNAUTHORIZED, {"WWW-Authenticate": "Bearer"})
            return await handler(request)
        except RequestError as error:
            return _refuse(error)
        except TextError as error:
            return _refuse(wire.text_error(error, self._served.context))
        except Qwen3EmbeddingsError as error:
            logger.error("%s", error)
            return _refuse(_ENGINE_FAILED)
        except web.HTTPException as error:
            allowed = {n: v for n, v in error.headers.items() if n == "Allow"}
            return _refuse(
                RequestError(_HTTP.get(error.status, error.reason), error.status), allowed
            )
        except web.RequestPayloadError:
            # aiohttp closes the connection, so the client must not use it for its next request.
            return _refuse(_UNREADABLE, {"Connection": "close"})
        except ConnectionError:  # the client has gone
            raise
        except Exception:
            logger.exception("a request to %s failed", request.path)
            return _refuse(RequestError("the server failed. Look into its log.", 500))

    def _authorized(self, request: web.Request) -> bool:
        """Whether a request has the key. /health needs it too, because probes can send it."""
        if self._key is None:
            return True
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        key = self._key.get_secret_value().encode()
        return hmac.compare_digest(sent.strip().encode(errors="replace"), key) and (
            scheme.lower() == "bearer"
        )


_UNAUTHORIZED = RequestError(
    "the key is missing or wrong. Send it as Authorization: Bearer KEY.",
    401,
    code="invalid_api_key",
)
_ENGINE_FAILED = RequestError(
    "the engine failed, and is started again by the next request. Look into the server's log.", 503
)
_UNREADABLE = RequestError("the body does not match its Content-Encoding or Transfer-Encoding.")
_HTTP = {
    404: "there is no such route. The API's root is /v1.",
    405: "this route does not have this method.",
    413: f"the body has more than {MOST_BYTES >> 20} MiB. Send fewer texts per request.",
}
"""Messages of errors that aiohttp raises, by status."""


async def _fields(request: web.Request) -> dict[str, Any]:
    """Return the fields of a request's JSON object.

    Other content types are refused. With some of them, a browser lets any web page send the body to
    a server on loopback. For JSON it asks the server first (CORS preflight).

    Raises:
        RequestError: the content type or the body is not JSON.
    """
    if request.content_type != "application/json":
        raise RequestError("the content type is not application/json.", 415)
    body = await request.read()
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        try:
            body = await in_thread(wire.decompress, body, encoding, MOST_BYTES)
        except ValueError as error:
            raise web.RequestPayloadError(str(error)) from error
        if len(body) > MOST_BYTES:
            raise web.HTTPRequestEntityTooLarge(MOST_BYTES, len(body))
    return wire.read_object(body)


async def _send(request: web.Request, blocks: list[bytes], kind: str) -> web.StreamResponse:
    """Send a large body block by block. aiohttp would copy a whole one on the event loop."""
    response = web.StreamResponse()
    response.content_type = kind
    response.content_length = sum(map(len, blocks))
    await response.prepare(request)
    for block in blocks:
        await response.write(block)
    return response


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")


def _refuse(error: RequestError, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=error.status,
        body=wire.error_body(error),
        content_type="application/json",
        headers=headers,
    )
