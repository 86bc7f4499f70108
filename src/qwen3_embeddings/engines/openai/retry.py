"""The connection to one server: time limit, the one layer of retries, typed errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from qwen3_embeddings import telemetry
from qwen3_embeddings.engines.base import closed_error
from qwen3_embeddings.engines.openai import failures, transport, wire
from qwen3_embeddings.engines.openai.addresses import Environment
from qwen3_embeddings.engines.openai.failures import Failure, Response
from qwen3_embeddings.engines.openai.limiter import Slot
from qwen3_embeddings.errors import Qwen3EmbeddingsError, ServerError
from qwen3_embeddings.redaction import Secret, hide_texts, shown

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""How long a start waits for a route that a server need not have."""
FIRST_CONTACT_RETRIES = 1
"""Retries while a server that never answered refuses connections or cannot be found: it is more
likely not running, or elsewhere, than restarting."""


class Connection:
    """Sends requests to one server, and again where that may help.

    Args:
        base_url: root of the API; None means the one of `client` or `http_client`.
        api_key: sent as ``Authorization: Bearer``. It appears in no log, repr or error.
        timeout: seconds a request may take from sending to the last byte of its response.
        max_retries: number of retries after transient failures: broken connections, time-outs,
            408, 429 and 5xx (except 501). A 429 to one request too many is not counted.
        default_headers: sent with every request. Secret values, and others of 8 characters and
            more, appear in no log or error either.
        verify: False, a CA file, or an `ssl.SSLContext`; True checks against certifi's CAs.
        client: an `openai.OpenAI` of the caller's, or one of its kind.
        http_client: an httpx client of the caller's.
        threads: threads for a sync client of the caller's.
        batch_parameter: name of the caller's argument for the texts per request, for messages.
        environment: proxy and CAs; None reads them from the environment now.

    Raises:
        ConfigurationError: an argument cannot work.
        MissingDependencyError: httpx is not installed.
    """

    def __init__(
        self,
        base_url: str | None,
        *,
        api_key: Secret | None,
        timeout: float,
        max_retries: int,
        default_headers: Mapping[str, str | Secret],
        verify: bool | str | ssl.SSLContext,
        client: Any = None,
        http_client: Any = None,
        threads: int = 1,
        batch_parameter: str | None = "batch_size",
        environment: Environment | None = None,
    ) -> None:
        self.base_url = transport.client_root(base_url, client, http_client)
        self.timeout = timeout
        self.max_retries = max_retries
        self.closed = False
        """Whether `close` was called."""
        self._batch_parameter = batch_parameter
        self._answered = False
        self._verify = verify
        headers = transport.all_headers(None if client else api_key, default_headers)
        self.has_credentials = bool(headers or client)
        """Whether requests carry a key, or headers of the user's."""
        self._hidden = transport.secret_values(headers, shown(default_headers), client)
        transport.demote_request_logs()
        self._transport: transport.Transport
        if client is not None:
            self._transport = transport.openai_transport(client, headers, timeout, threads)
        elif http_client is not None:
            self._transport = transport.http_transport(http_client, headers, timeout, threads)
        else:
            self._environment = environment or Environment.read(self.base_url)
            own = transport.OwnTransport(headers, timeout, verify, self._environment)
            self._transport, self._client = own, own.client

    async def close(self) -> None:
        """Close the connections. Requests in flight fail with `EngineClosedError`."""
        self.closed = True
        await self._transport.close()

    async def post(
        self,
        url: str,
        body: dict[str, Any],
        slot: Slot | None = None,
        retries: int | None = None,
    ) -> Response:
        """Return the response to a POST if it is a success.

        Args:
            url: the route.
            body: the JSON object to send.
            slot: place of the request among those in flight.
            retries: number of retries after anything but a 429; None means `max_retries`.

        Raises:
            TextTooLongError: the server says that a text is over its context.
            ServerError: anything else; the subclass says what.
            EngineClosedError: the connection was closed.
        """
        answer = await self.send("POST", url, body, slot, retries)
        self.check(answer, body)
        return answer

    async def send(
        self,
        method: str,
        url: str,
        body: dict[str, Any] | None = None,
        slot: Slot | None = None,
        retries: int | None = None,
    ) -> Response:
        """Return the response to a request, whatever its status: the last one after all retries.

        A request that was one too many (429) waits for another slot, which counts no retry.
        """
        limit = self.max_retries if retries is None else retries
        attempt = 0
        while True:
            if slot:
                await slot.take()
            answer = await self._attempt(method, url, body)
            lost = slot is not None and _lost(slot, answer)
            attempt += not lost
            if attempt > self._most_retries(answer, limit):
                break
            delay = 0.0 if lost else backoff(attempt - 1)
            if not isinstance(answer, Failure):
                delay = _retry_after(answer) or delay
            said = answer.reason if isinstance(answer, Failure) else status_of(answer)
            logger.info("%s: %s, again in %.1f s", url, said, delay)
            telemetry.retried(str(said))
            if slot:
                slot.rest()
            await asyncio.sleep(delay)
        if isinstance(answer, Failure):
            raise await self._error(answer, attempt)
        return answer

    def _most_retries(self, answer: Response | Failure, limit: int) -> int:
        """How many retries an outcome is worth."""
        if not isinstance(answer, Failure):
            status = status_of(answer)
            if status == 429:
                return self.max_retries  # the request itself is not the cause
            return limit if failures.passes(status) else 0
        if answer.reason in {"refused", "name"} and not self._answered:
            return min(limit, FIRST_CONTACT_RETRIES)
        return limit if answer.passing else 0

    async def look(self, url: str) -> bytes | None:
        """Return what an optional route answers to one GET in `LOOK_SECONDS`, or None."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                answer = await self._attempt("GET", url, None)
                if not isinstance(answer, Failure) and status_of(answer) == 200:
                    return answer.content
        return None

    async def answers_without_key(self, url: str, body: dict[str, Any] | None) -> bool:
        """Whether `url` answers a request without key or headers: a POST, or a GET.

        A rejected body (400, 422) counts, since the request had passed the authentication.
        """
        environment = Environment.read(self.base_url)
        keyless = transport.OwnTransport({}, self.timeout, self._verify, environment)
        try:
            async with asyncio.timeout(self.timeout):
                answer = await keyless.send("GET" if body is None else "POST", url, body)
        except Exception:
            return False
        finally:
            await keyless.close()
        return answer.status_code in {200, 400, 422}

    def check(self, answer: Response, body: Mapping[str, Any] | None = None) -> None:
        """Raise the typed error of a response that is no success, without the texts of `body`."""
        if status_of(answer) != 200:
            raise self._status_error(answer, body or {})

    def _status_error(self, answer: Response, body: Mapping[str, Any]) -> Qwen3EmbeddingsError:
        """Return the error apart from where it is raised, so that no traceback holds what was said.

        Local variables of the raising frame can be part of a report.
        """
        status = status_of(answer)
        said = failures.message_of(answer.content)
        sent = body.get("input") or [body.get("prompt")]
        quoted = [text for text in sent if isinstance(text, str)]
        label = f"{status}" if status == answer.status_code else "200 with an error"
        url = str(getattr(answer, "url", self.base_url))
        quotable = hide_texts(self._hide(said), quoted)
        error = failures.status_error(status, label, url, said, quotable)
        if isinstance(error, ServerError):
            error.answered = f"{label}: {quotable}"
        return error

    async def _attempt(
        self, method: str, url: str, body: dict[str, Any] | None
    ) -> Response | Failure:
        """Return one attempt's response or failure."""
        if self.closed:
            raise closed_error()
        try:
            with transport.sending():
                async with asyncio.timeout(self.timeout):  # httpx limits each read by itself
                    answer = await self._transport.send(method, url, body)
        except Exception as error:
            if self.closed:
                raise closed_error() from None
            # Its cause may quote a header, so it is not kept.
            failure = Failure.of(error)
            return Failure(failure.reason, self._hide(failure.said))
        self._answered = self._answered or status_of(answer) == 200
        return answer

    async def _error(self, failure: Failure, attempts: int) -> Qwen3EmbeddingsError:
        first = failure.reason == "broken" and not self._answered
        if first and self._direct and await failures.speaks_tls(self.base_url):
            failure = Failure("needs TLS", failure.said)
        return failures.connection_error(
            failure, self.base_url, self.timeout, attempts, self._batch_parameter
        )

    @property
    def _direct(self) -> bool:
        """Whether requests go to an ``http://`` server without a proxy."""
        own = isinstance(self._transport, transport.OwnTransport)
        plain = self.base_url.startswith("http://")
        return own and plain and self._environment.proxy is None

    def _hide(self, text: str) -> str:
        """Return `text` without the key and header values a server or library may have quoted."""
        for value in self._hidden:
            text = text.replace(value, "***")
        return text


def status_of(answer: Response) -> int:
    """Return the HTTP status, or what the error in a 200 response stands for."""
    if answer.status_code != 200:
        return answer.status_code
    return wire.read_error(answer.content) or 200


def _lost(slot: Slot, answer: Response | Failure) -> bool:
    """Tell the slot what came of its request. Return whether the slot is lost."""
    status = None if isinstance(answer, Failure) else status_of(answer)
    if status == 200:
        slot.answered()
    return status == 429 and slot.refused()


def backoff(attempt: int) -> float:
    """Return the seconds before the next attempt.

    They double from a quarter of a second to at most 8, and half of it is random.
    """
    delay: float = min(0.25 * 2 ** min(attempt, 5), 8.0)
    return delay * random.uniform(0.5, 1.0)


def _retry_after(answer: Response) -> float | None:
    """Return the seconds that the server asks to wait, at most 60, or None.

    ``Retry-After`` is a number of seconds or a date.
    """
    said = answer.headers.get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), 60.0) if math.isfinite(seconds) else None
