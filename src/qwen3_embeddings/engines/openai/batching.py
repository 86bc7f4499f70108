"""Requests that several calls share: chunks wait in line, and one sender per line sends them."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qwen3_embeddings import telemetry
from qwen3_embeddings.engines.base import Prompt, Usage, closed_error
from qwen3_embeddings.engines.openai.endpoint import Endpoint
from qwen3_embeddings.engines.openai.isolation import Isolation, Outcome
from qwen3_embeddings.engines.openai.limiter import Slot, Slots
from qwen3_embeddings.engines.openai.wire import Embeddings
from qwen3_embeddings.errors import (
    Qwen3EmbeddingsError,
    ServerError,
    ServerRefusedError,
    TextTooLongError,
)
from qwen3_embeddings.vectors import Vectors

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.001
"""How long a chunk waits for others to share its request, if requests of its role are in flight.
Without any, the wait would add 1.2 ms to the 1.6 ms of a lone caller, with a server that answers at
once (benchmarks/notes/client.md)."""
QUERIES_PER_REQUEST = 4
"""Queries of several callers in one request; more when more wait than all requests in flight hold.
An HTTP process of vLLM needs one to three milliseconds per text, less in larger requests, and
several processes share several requests. Of 1, 2, 4, 8 and 16 this was the fastest for 64 callers
on an H100 (benchmarks/notes)."""


class Kind(NamedTuple):
    """What requests must have in common for prompts to share one.

    Attributes:
        dimensions: size to ask for; None for the server's own.
        texts: whether the prompts are texts, not token ids.
        urgent: whether they are queries.
    """

    dimensions: int | None
    texts: bool
    urgent: bool


@dataclass(eq=False)
class Chunk:
    """One call's prompts, waiting for a request.

    Attributes:
        prompts: all of one kind.
        usage: the call's token counter, if it has one.
        answer: the vectors, or the error.
        context: the call's context variables.
        since: when it began to wait (`time.monotonic`).
    """

    prompts: list[Prompt]
    usage: Usage | None
    answer: asyncio.Future[Vectors]
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    since: float = field(default_factory=time.monotonic)

    def settle(self, vectors: Vectors | None, error: BaseException | None) -> None:
        """Answer the call, unless it has given up."""
        if self.answer.done():
            return
        if error is not None:
            self.answer.set_exception(error)
        elif vectors is not None:
            self.answer.set_result(vectors)


class Batcher:
    """Gathers chunks of all callers into requests.

    Each kind of chunk has a line. A line that is not empty has one sender. It removes the head of
    the line when a slot is free, and starts the next sender.

    Args:
        endpoint: where requests go.
        slots: limits the requests in flight.
        most: maximum number of texts per request; lowered if the server refuses so many.
        patience: seconds that documents wait for a server that is down.
        spawn: starts a task that ends with the engine, in a context.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        slots: Slots,
        most: int,
        patience: float,
        spawn: Callable[..., asyncio.Task[Any]],
    ) -> None:
        self._endpoint = endpoint
        self._slots = slots
        self.most = most
        self._patience = patience
        self._spawn = spawn
        self._lines: dict[Kind, list[Chunk]] = defaultdict(list)
        self._gathering: set[Kind] = set()

    async def embed(self, kind: Kind, prompts: list[Prompt], usage: Usage | None) -> Vectors:
        """Return the vectors of prompts of one kind, in order."""
        chunk = Chunk(prompts, usage, asyncio.get_running_loop().create_future())
        self._lines[kind].append(chunk)
        self._call_sender(kind, GATHER_SECONDS if self._slots.used(kind.urgent) else 0.0)
        return await chunk.answer

    def close(self) -> None:
        """Fail what waits."""
        for line in self._lines.values():
            for chunk in line:
                chunk.settle(None, closed_error())
            line.clear()

    def _call_sender(self, kind: Kind, delay: float) -> None:
        if self._lines[kind] and kind not in self._gathering:
            self._gathering.add(kind)
            # In no caller's context: its variables would leak into requests of other callers.
            self._spawn(self._send_next(kind, delay), contextvars.Context())

    async def _send_next(self, kind: Kind, delay: float) -> None:
        """Send the head of a line, as much as a request holds."""
        await asyncio.sleep(delay)
        async with self._slots.one(kind.urgent) as slot:
            group = _take(self._lines[kind], self._request_size(kind))
            self._gathering.discard(kind)
            self._call_sender(kind, 0.0)  # what is left has waited
            if group:
                await self._send(group, kind, slot)

    def _request_size(self, kind: Kind) -> int:
        """Maximum number of texts for the next request of this kind."""
        if not kind.urgent:
            return self.most
        waiting = sum(len(chunk.prompts) for chunk in self._lines[kind])
        share = math.ceil(waiting / min(self._slots.count, self._slots.most))
        return min(self.most, max(QUERIES_PER_REQUEST, share))

    async def _send(self, group: list[Chunk], kind: Kind, slot: Slot) -> None:
        """Send one request for a group of chunks and answer them, whatever fails."""
        try:
            await self._request_for(group, kind, slot)
        except asyncio.CancelledError:
            for chunk in group:
                chunk.settle(None, closed_error())
        except BaseException as error:  # a caller's hook may raise anything
            for chunk in group:
                chunk.settle(None, error)

    async def _request_for(self, group: list[Chunk], kind: Kind, slot: Slot) -> None:
        """Send one request for a group of chunks. Its callers may give up meanwhile."""
        for chunk in group:
            seconds = time.monotonic() - chunk.since
            chunk.context.run(telemetry.waited, seconds, len(chunk.prompts))
        # A request of one caller belongs to its trace; a shared one belongs to none.
        context = group[0].context if len(group) == 1 else contextvars.Context()
        request = asyncio.create_task(self._deliver(group, kind, slot), context=context)

        def gave_up(_: asyncio.Future[Vectors]) -> None:
            if all(chunk.answer.cancelled() for chunk in group):
                request.cancel()

        for chunk in group:
            chunk.answer.add_done_callback(gave_up)
        try:
            await request
        except asyncio.CancelledError:
            request.cancel()
            raise

    async def _deliver(self, group: list[Chunk], kind: Kind, slot: Slot) -> None:
        """Embed the prompts of a group. If that fails, embed all except those to blame."""
        prompts = [prompt for chunk in group for prompt in chunk.prompts]
        ends = list(itertools.accumulate(len(chunk.prompts) for chunk in group))
        parts = [range(end - len(c.prompts), end) for c, end in zip(group, ends, strict=True)]

        async def send(part: range, retries: int | None) -> Embeddings:
            mine = prompts[part.start : part.stop]
            answer = await self._request(mine, kind, slot, retries)
            _count(group, parts, part, mine, answer.tokens)
            return answer

        try:
            vectors = (await send(range(len(prompts)), None)).vectors
        except (TextTooLongError, ServerError) as error:
            outcome = await self._isolate(send, len(prompts), error, kind, slot)
            for chunk, part in zip(group, parts, strict=True):
                chunk.settle(*outcome.of(part))
        else:
            for chunk, part in zip(group, parts, strict=True):
                chunk.settle(vectors[part.start : part.stop], None)

    async def _isolate(
        self,
        send: Callable[[range, int | None], Coroutine[Any, Any, Embeddings]],
        total: int,
        error: Qwen3EmbeddingsError,
        kind: Kind,
        slot: Slot,
    ) -> Outcome:
        async def probe() -> Embeddings:
            return await self._request(["probe"], kind, slot, 0)

        patience = 0.0 if kind.urgent else self._patience
        outcome = await Isolation(send, probe, slot, patience).search(total, error)
        if isinstance(error, ServerRefusedError) and not (outcome.blamed or outcome.stopped):
            # All texts passed, so their number was refused. Remembering it: 64 texts take 40 ms
            # instead of 390 on a server that accepts 10 per request and answers in 20 ms.
            self.most = min(self.most, max(len(part) for part, _ in outcome.pieces))
            logger.info("%s does not accept %d texts per request", self._endpoint.base_url, total)
        return outcome

    async def _request(
        self, prompts: list[Prompt], kind: Kind, slot: Slot, retries: int | None
    ) -> Embeddings:
        assert self._endpoint.served is not None
        name = self._endpoint.served.model
        return await self._endpoint.embed(
            name, prompts, kind.dimensions, kind.urgent, slot, retries
        )


def _take(line: list[Chunk], most: int) -> list[Chunk]:
    """Take what fits one request from the head of a line, at least one, without cancelled ones."""
    group: list[Chunk] = []
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


def _count(
    group: list[Chunk], parts: list[range], sent: range, prompts: list[Prompt], tokens: int | None
) -> None:
    """Add a request's tokens to the counters of the calls that share it.

    A request of one call is counted exactly. A shared one is divided in proportion to the length
    of the prompts, so that the sum over all calls is exact.
    """
    if all(chunk.usage is None for chunk in group):
        return
    lengths = [len(prompt) + 1 for prompt in prompts]
    if tokens is None and not isinstance(prompts[0], str):
        tokens, lengths = sum(map(len, prompts)), [len(prompt) for prompt in prompts]
    whole, before = sum(lengths), 0
    for chunk, part in zip(group, parts, strict=True):
        mine = lengths[max(part.start - sent.start, 0) : max(part.stop - sent.start, 0)]
        after = before + sum(mine)
        if chunk.usage is not None and mine:
            share = None
            if tokens is not None:
                share = round(tokens * after / whole) - round(tokens * before / whole)
            chunk.usage.add(len(mine), share)
        before = after
