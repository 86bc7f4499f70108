"""How many requests are in flight at once: up to a maximum, and no more than the server accepts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator

from qwen3_embeddings.engines.base import MIXED_SECONDS

ANSWERS_PER_SLOT = 2
"""Successful answers that raise the limit by one. A server that accepts few requests at once then
refuses a quarter to a third of them. With three answers it refuses a fifth, at the same throughput.
A server that refuses every fifth request for another reason then answers about 2,000 documents/s.
With three answers it answers about 900 (benchmarks/notes/client.md)."""


class Slots:
    """An adaptive limit of requests in flight.

    The first HTTP 429 lowers the limit to the number of other requests in flight, each further one
    by one. `ANSWERS_PER_SLOT` successful answers raise it by one while all slots are in use.
    Queries go first. For `MIXED_SECONDS` after a query, documents leave one slot free for the next
    one. If no document is in flight, queries and documents alternate.

    Args:
        most: maximum number of requests in flight, for queries and for documents each.

    Attributes:
        count: the limit for queries and documents together, from 1 to twice `most`.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 2 * most
        self._held = {True: 0, False: 0}  # by urgent: queries', documents'
        self._lines: dict[bool, deque[asyncio.Future[None]]] = {True: deque(), False: deque()}
        self._resting = 0  # documents that hold a slot and back off
        self._last = False  # whether the slot granted last went to a query
        self._mixed_until = 0.0
        self._answers = 0

    @contextlib.asynccontextmanager
    async def one(self, urgent: bool) -> AsyncIterator[Slot]:
        """Hold a slot for one request, as soon as one is free."""
        slot = Slot(self, urgent)
        try:
            await slot.take()
            yield slot
        finally:
            slot.leave()

    @property
    def in_flight(self) -> int:
        """Number of requests in flight."""
        return self._held[True] + self._held[False] - self._resting

    def used(self, urgent: bool) -> int:
        """Return the number of slots that queries (urgent) or documents hold."""
        return self._held[urgent]

    @property
    def full(self) -> bool:
        """Whether documents can get no further slot."""
        kept = self.count > 1 and time.monotonic() < self._mixed_until
        return self._held[False] + max(self._held[True], int(kept)) >= self.count

    def grant(self) -> None:
        """Give the free slots to those that wait."""
        while self.in_flight < self.count and (urgent := self._next()) is not None:
            place = self._lines[urgent].popleft()
            if not place.done():  # else it was cancelled
                place.set_result(None)
                self._held[urgent] += 1
                self._last = urgent

    def _next(self) -> bool | None:
        """Whether the next free slot goes to a query; None if nobody can have it."""
        query = bool(self._lines[True]) and self._held[True] < self.most
        document = bool(self._lines[False]) and self._held[False] < self.most and not self.full
        if query and document:
            return self._held[False] > 0 or not self._last
        return query if query or document else None


class Slot:
    """One request's place among `Slots`."""

    def __init__(self, slots: Slots, urgent: bool) -> None:
        self._slots, self._urgent = slots, urgent
        self._held = self._rests = False
        self._sent = self._alone = False  # ever sent; sent last with no other in flight

    async def take(self) -> None:
        """Wait for a slot, unless the request holds one. One that was sent before goes first."""
        slots = self._slots
        if not self._held or self._rests:
            if self._urgent:
                slots._mixed_until = time.monotonic() + MIXED_SECONDS
            place = asyncio.get_running_loop().create_future()
            line = slots._lines[self._urgent]
            (line.appendleft if self._sent else line.append)(place)
            self.leave()  # a resting one is granted anew
            try:
                await place
            finally:  # a cancelled wait may just have been granted
                self._held = place.done() and not place.cancelled()
        self._sent = True
        self._alone = slots.in_flight == 1

    def leave(self) -> None:
        """Release the slot, if the request holds one."""
        slots = self._slots
        slots._held[self._urgent] -= self._held
        slots._resting -= self._rests
        self._held = self._rests = False
        slots.grant()

    def rest(self) -> None:
        """Lend the slot to queries while the request backs off.

        Other documents wait meanwhile: they would use up their retries on the same server.
        """
        if self._urgent:
            self.leave()
        elif self._held:
            self._rests = True
            self._slots._resting += 1
            self._slots.grant()

    def answered(self) -> None:
        """Count a successful answer; enough of them raise the limit while it is used up."""
        slots = self._slots
        if slots.count == 2 * slots.most or not slots.full:
            return
        slots._answers += 1
        if slots._answers >= ANSWERS_PER_SLOT:
            slots._answers = 0
            slots.count += 1
            slots.grant()

    def refused(self) -> bool:
        """Lower the limit: first to the other requests in flight, then by one per refusal.

        Returns:
            True if the request lost its slot. False if it was the only one in flight: then the
            limit was not the reason, the request keeps its slot, and the next answer raises the
            limit.
        """
        slots = self._slots
        others = slots.in_flight - 1
        lost = others > 0 or not self._alone
        unused = slots.count == 2 * slots.most
        slots.count = max(1, others if unused else slots.count - 1)
        if lost:
            self.leave()
        else:
            slots._answers = ANSWERS_PER_SLOT - 1
        return lost
