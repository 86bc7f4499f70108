"""How many requests are under way at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from qwen3_embeddings.engines.slots import ANSWERS_A_SLOT, Slot, Slots


@contextlib.asynccontextmanager
async def taken(slots: Slots, number: int) -> AsyncIterator[list[Slot]]:
    """Slots of so many requests under way."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(slots.one()) for _ in range(number)]


async def takes(slots: Slots) -> int:
    """How many requests can be under way at once."""
    async with contextlib.AsyncExitStack() as stack:
        for number in range(slots.most + 1):
            try:
                async with asyncio.timeout(0.01):
                    await stack.enter_async_context(slots.one())
            except TimeoutError:
                return number
        return slots.most + 1


@pytest.mark.parametrize("refused", [1, 3, 6])
async def test_what_is_left_is_what_the_server_took(refused: int) -> None:
    slots = Slots(8)
    async with taken(slots, 7) as held:  # the eighth is lost with the first, unused
        for slot in held[:refused]:
            assert await slot.refused(patient=True)
    assert slots.count == await takes(slots) == 7 - refused


@pytest.mark.parametrize("patient", [True, False])
async def test_the_last_slot_stays(patient: bool) -> None:
    slots = Slots(4)
    async with taken(slots, 1) as [slot]:
        assert not await slot.refused(patient)
        assert slots.count == 1
        assert await takes(slots) == (0 if patient else 1), "a query's is left to the next"
        await slot.take()
        assert await takes(slots) == 0
    assert await takes(slots) == 1


async def test_answers_bring_slots_back_each_sooner_than_the_one_before() -> None:
    slots = Slots(8)
    async with taken(slots, 8) as held:
        for slot in held[1:]:
            await slot.refused(patient=True)
    counts = []
    for _ in range(4 * ANSWERS_A_SLOT):
        async with taken(slots, slots.count) as held:
            held[0].answered()
        counts.append(slots.count)
    steps = [ANSWERS_A_SLOT, ANSWERS_A_SLOT // 2, ANSWERS_A_SLOT // 4, 1, 1, 1, 1]
    ends = [sum(steps[: i + 1]) for i in range(7)]
    assert counts == [1 + sum(answers >= end for end in ends) for answers in range(1, 33)]
    assert await takes(slots) == 8, "and never more"


async def test_after_the_last_one_was_refused_the_next_answer_brings_one() -> None:
    slots = Slots(4)
    async with taken(slots, 1) as [slot]:
        await slot.refused(patient=True)
        slot.answered()
    assert await takes(slots) == 2


async def test_answers_bring_none_while_slots_are_free() -> None:
    slots = Slots(4)
    async with taken(slots, 3) as held:
        await held[0].refused(patient=True)
        held[1].leave()
        for _ in range(100):
            held[2].answered()
    assert await takes(slots) == 2
