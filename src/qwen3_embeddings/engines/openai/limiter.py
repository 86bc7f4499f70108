"""How many requests are under way at once: up to a limit, and no more than the server takes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator

from qwen3_embeddings.engines.base import MIXED_SECONDS

ANSWERS_A_SLOT = 8
"""Answers for one more request after a refusal; for the next half as many, and so on until one is
refused. docs/performance.md compares 8, 16 and 32."""


class Slots:
    """Room for requests: the limit while the server takes them, else as many as it took.

    A server or gateway that takes only so many at once refuses the others (429). Each of these
    loses its slot, so what is left is what the server took. Answers bring slots back, one by one,
    while all that are left are in use. The next free one is for queries, and for a while after one
    documents leave one free. Documents of which none is under way take turns with queries.

    Args:
        most: requests under way at once where none is refused, for queries and for documents each.

    Attributes:
        count: requests that may be under way now, of both together, from 1 to twice `most`.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 2 * most
        self._taken = {True: 0, False: 0}  # queries' and documents', as everywhere below
        self._lines: dict[bool, deque[asyncio.Future[None]]] = {True: deque(), False: deque()}
        self._last = False  # whose the slot given out last is
        self._mixed_until = 0.0
        self._resting = 0  # documents' that are taken, but back off
        self._answers = 0
        self._needed = ANSWERS_A_SLOT

    @contextlib.asynccontextmanager
    async def one(self, urgent: bool) -> AsyncIterator[Slot]:
        """A slot for one request, when one is free; a request may lose it, and take another."""
        slot = Slot(self, urgent)
        try:
            await slot.take()
            yield slot
        finally:
            slot.leave()

    @property
    def _under_way(self) -> int:
        return sum(self._taken.values()) - self._resting

    @property
    def _full(self) -> bool:
        """Whether documents can take no more."""
        kept = self.count > 1 and time.monotonic() < self._mixed_until
        return self._taken[False] + max(self._taken[True], int(kept)) >= self.count

    def _hand_out(self) -> None:
        """Give the free slots to those that wait."""
        while self._under_way < self.count and (urgent := self._next()) is not None:
            place = self._lines[urgent].popleft()
            if not place.done():  # or who waited gave up
                place.set_result(None)
                self._taken[urgent] += 1
                self._last = urgent

    def _next(self) -> bool | None:
        """Whose the next free slot is; None when nobody can take it."""
        queries, documents = (
            bool(self._lines[urgent]) and self._taken[urgent] < self.most
            for urgent in (True, False)
        )
        documents = documents and not self._full
        if queries and documents:
            return self._taken[False] > 0 or not self._last
        return queries if queries or documents else None


class Slot:
    """One request's place among `Slots`."""

    def __init__(self, slots: Slots, urgent: bool) -> None:
        self._slots, self._urgent = slots, urgent
        self._held = self._rests = False
        self._sent = self._alone = False  # whether ever sent, and last with no other under way

    async def take(self) -> None:
        """Wait until the request may be sent; again, before those that never were."""
        slots = self._slots
        if not self._held or self._rests:
            if self._urgent:
                slots._mixed_until = time.monotonic() + MIXED_SECONDS
            place = asyncio.get_running_loop().create_future()
            line = slots._lines[self._urgent]
            (line.appendleft if self._sent else line.append)(place)
            self.leave()  # one that rests is taken anew
            try:
                await place
            finally:  # who gives up may just have been given one
                self._held = place.done() and not place.cancelled()
        self._sent = True
        self._alone = slots._under_way == 1

    def leave(self) -> None:
        """Give the slot to the next request, if this still has it."""
        slots = self._slots
        slots._taken[self._urgent] -= self._held
        slots._resting -= self._rests
        self._held = self._rests = False
        slots._hand_out()

    def rest(self) -> None:
        """Let queries have the slot while this backs off: somebody waits for them.

        Documents wait for one of theirs that does, or each would use up its retries.
        """
        if self._urgent:
            self.leave()
        elif self._held:
            self._rests = True
            self._slots._resting += 1
            self._slots._hand_out()

    def answered(self) -> None:
        """Count an answer: enough of them bring a lost slot back, and the next one sooner."""
        slots = self._slots
        if slots.count == 2 * slots.most or not slots._full:
            return
        slots._answers += 1
        if slots._answers >= slots._needed:
            slots._answers = 0
            slots._needed = max(1, slots._needed // 2)
            slots.count += 1
            slots._hand_out()

    def refused(self) -> bool:
        """Lose the slot, and those nobody uses: the server takes no more than the others.

        False where there are no others, nor were when it was sent: so it was not for their number,
        it keeps the slot, and the next answer brings another.
        """
        slots = self._slots
        others = slots._under_way - 1
        lost = others > 0 or not self._alone
        slots.count = max(1, others)
        slots._answers = 0
        slots._needed = ANSWERS_A_SLOT if lost else 1
        if lost:
            self.leave()
        return lost
