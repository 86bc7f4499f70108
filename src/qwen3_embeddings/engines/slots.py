"""How many requests are under way at once: up to a limit, and no more than the server takes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

ANSWERS_A_SLOT = 8
"""Answers for one more request after a refusal; for the next half as many, and so on until one is
refused. docs/performance.md compares 8, 16 and 32."""


class Slots:
    """Room for requests: the limit while the server takes them, else as many as it took.

    A server or gateway that takes only so many at once refuses the others (429). Each of these
    loses its slot, so what is left is what the server took. Answers bring slots back, one by one,
    while all that are left are in use.

    Args:
        most: requests under way at once where none is refused.

    Attributes:
        count: requests that may be under way now, from 1 to `most`.
    """

    def __init__(self, most: int) -> None:
        self.most = self.count = most
        self._free = asyncio.Semaphore(most)  # holds `count`, less what is taken
        self._answers = 0
        self._needed = ANSWERS_A_SLOT

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[Slot]:
        """A slot for one request, when one is free; a request may lose it, and take another."""
        slot = Slot(self)
        await slot.take()
        try:
            yield slot
        finally:
            slot.leave()


class Slot:
    """One request's place among `Slots`."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._held = False

    async def take(self) -> None:
        """Wait for a free slot, unless this is one."""
        if not self._held:
            await self._slots._free.acquire()
            self._held = True

    def leave(self) -> None:
        """Give the slot to the next request, if this still holds it."""
        if self._held:
            self._held = False
            self._slots._free.release()

    def answered(self) -> None:
        """Count an answer: enough of them bring a lost slot back, and the next one sooner."""
        slots = self._slots
        if slots.count == slots.most or not slots._free.locked():
            return
        slots._answers += 1
        if slots._answers >= slots._needed:
            slots._answers = 0
            slots._needed = max(1, slots._needed // 2)
            slots.count += 1
            slots._free.release()

    async def refused(self, patient: bool) -> bool:
        """Lose the slot, and those nobody uses: the server takes no more than the others.

        False where there are no others: so it was not for their number, and the next answer brings
        a slot back. A patient request keeps the last one, any other leaves it to the next.
        """
        slots = self._slots
        while not slots._free.locked():
            await slots._free.acquire()
            slots.count -= 1
        if slots.count == 1:
            slots._needed = 1
            if not patient:
                self.leave()
            return False
        slots._needed = ANSWERS_A_SLOT
        slots.count -= 1
        self._held = False
        return True
