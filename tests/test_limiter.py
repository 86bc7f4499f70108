"""How many requests are in flight at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from qwen3_embeddings.engines.openai import limiter as slots_module
from qwen3_embeddings.engines.openai.limiter import ANSWERS_PER_SLOT, Slot, Slots

QUERY, DOCUMENT = True, False


@pytest.fixture(autouse=True)
def long_after_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep no slot for the next query, except in the test of that."""
    monkeypatch.setattr(slots_module, "MIXED_SECONDS", 0)


@contextlib.asynccontextmanager
async def taken(slots: Slots, number: int, urgent: bool = DOCUMENT) -> AsyncIterator[list[Slot]]:
    """Hold the slots of `number` requests in flight."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(slots.one(urgent)) for _ in range(number)]


async def takes(slots: Slots, urgent: bool = DOCUMENT) -> int:
    """Return how many more requests can be in flight."""
    async with contextlib.AsyncExitStack() as stack:
        for number in range(2 * slots.most + 1):
            try:
                async with asyncio.timeout(0.01):
                    await stack.enter_async_context(slots.one(urgent))
            except TimeoutError:
                return number
        return 2 * slots.most + 1


class Line:
    """Requests that wait for a slot, in the order in which they are granted one."""

    def __init__(self, slots: Slots) -> None:
        self.slots, self.got = slots, list[str]()
        self.in_flight: dict[str, asyncio.Event] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def join(self, name: str) -> None:
        """Add a request, a query or a document by its first letter."""

        async def one() -> None:
            async with self.slots.one(name[0] == "q"):
                self.got.append(name)
                self.in_flight[name] = asyncio.Event()
                await self.in_flight[name].wait()

        self.tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(0)

    async def answer(self, name: str) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        self.in_flight.pop(name).set()
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.mark.parametrize("refused", [1, 3, 6])
async def test_refused_requests_lower_the_limit_to_those_accepted(refused: int) -> None:
    slots = Slots(8)
    async with taken(slots, 7) as held:  # unused slots go with the first refusal
        for slot in held[:refused]:
            assert slot.refused()
    assert slots.count == await takes(slots) == 7 - refused


async def test_limit_lowered_is_shared_by_queries_and_documents() -> None:
    slots = Slots(4)
    async with taken(slots, 4) as documents, taken(slots, 4, QUERY) as queries:
        assert (await takes(slots), await takes(slots, QUERY)) == (0, 0)
        for slot in [*documents[:2], *queries[:3]]:
            assert slot.refused()
        assert slots.count == 3
    assert await takes(slots) == await takes(slots, QUERY) == 3


@pytest.mark.parametrize("urgent", [QUERY, DOCUMENT])
async def test_refused_alone_keeps_the_slot_and_lends_it_to_queries(urgent: bool) -> None:
    slots = Slots(4)
    async with taken(slots, 1, urgent) as [slot]:
        assert not slot.refused()
        assert slots.count == 1
        slot.rest()
        assert await takes(slots, QUERY) == 1, "a request that backs off keeps no query waiting"
        assert await takes(slots, DOCUMENT) == (1 if urgent else 0), "but documents wait"
        await slot.take()
        assert await takes(slots, QUERY) == await takes(slots, DOCUMENT) == 0
    assert await takes(slots, QUERY) == await takes(slots, DOCUMENT) == 1


async def test_resting_document_cancelled_frees_its_slot() -> None:
    slots = Slots(4)
    async with taken(slots, 1) as [slot]:
        assert not slot.refused()
        slot.rest()
    assert await takes(slots) == 1


async def test_resting_documents_hold_back_documents_but_no_query() -> None:
    """They may back off for minutes while a server is down."""
    slots = Slots(4)
    async with taken(slots, 4) as held:
        held[0].refused()
        for slot in held[1:]:
            slot.rest()
        assert await takes(slots) == 0
        async with taken(slots, 2, QUERY):
            assert await takes(slots, QUERY) == 1
            again = [asyncio.create_task(slot.take()) for slot in held[1:]]
            await asyncio.sleep(0)
            assert sum(task.done() for task in again) == 1
        await asyncio.gather(*again)
        assert await takes(slots, QUERY) == 0
    assert await takes(slots) == 3


async def test_refused_after_the_others_were_answered_still_loses_the_slot() -> None:
    slots = Slots(4)
    async with taken(slots, 2) as [first, second]:
        first.leave()
        assert second.refused(), "another was in flight when it was sent"
        await second.take()
        assert not second.refused()


async def test_answered_while_full_raises_the_limit_by_one_per_few_answers() -> None:
    slots = Slots(4)
    async with taken(slots, 4) as documents, taken(slots, 4, QUERY) as queries:
        for slot in [*documents[1:], *queries]:
            slot.refused()
    counts = []
    for _ in range(8 * ANSWERS_PER_SLOT):
        few = slots.count // 2
        async with taken(slots, few, QUERY), taken(slots, slots.count - few) as held:
            held[0].answered()
        counts.append(slots.count)
    assert counts == [min(8, 1 + n // ANSWERS_PER_SLOT) for n in range(1, len(counts) + 1)]
    assert counts[-1] == 8, "and never more"


async def test_refused_at_random_keeps_most_of_the_limit() -> None:
    """A server that refuses one request of five for another reason than their number."""
    chance = random.Random(1)
    slots = Slots(8)
    counts = []
    async with contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(slots.one(DOCUMENT)) for _ in range(8)]
        for _ in range(2000):
            slot = chance.choice(held)
            if chance.random() < 0.2 and slot.refused():
                held.remove(slot)
            else:
                slot.answered()
            while len(held) < min(8, slots.count):
                held.append(await stack.enter_async_context(slots.one(DOCUMENT)))
            counts.append(min(8, slots.count))
    assert sum(counts) / len(counts) > 5


async def test_answered_after_a_refusal_alone_raises_the_limit_at_once() -> None:
    slots = Slots(4)
    async with taken(slots, 1) as [slot]:
        slot.refused()
        await slot.take()
        slot.answered()
    assert await takes(slots) == 2


async def test_answered_while_slots_are_free_leaves_the_limit() -> None:
    slots = Slots(4)
    async with taken(slots, 3) as held:
        held[0].refused()
        held[1].leave()
        for _ in range(100):
            held[2].answered()
    assert await takes(slots) == 2


async def test_grant_prefers_queries_but_keeps_one_document_in_flight() -> None:
    slots = Slots(3)
    async with taken(slots, 3, QUERY), taken(slots, 1) as [document]:
        document.refused()
    line = Line(slots)
    for name in ("d1", "d2", "d3", "d4", "d5", "q1", "q2", "q3", "q4"):
        await line.join(name)
    assert line.got == ["d1", "d2", "d3"]
    for name in ("d1", "d2"):
        await line.answer(name)
    assert line.got[3:] == ["q1", "q2"]
    await line.answer("q1")
    assert line.got[5:] == ["q3"], "a document is in flight"
    await line.answer("d3")
    assert line.got[6:] == ["d4"], "none is"
    for name in ("q2", "q3", "d4", "q4", "d5"):
        await line.answer(name)
    assert line.got[7:] == ["q4", "d5"]
    await asyncio.gather(*line.tasks)


async def test_documents_leave_a_slot_for_the_next_query(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots = Slots(4)
    async with taken(slots, 4) as documents:
        documents[0].refused()
    monkeypatch.setattr(slots_module, "MIXED_SECONDS", 60)
    async with taken(slots, 1, QUERY):
        assert await takes(slots) == 2
    assert await takes(slots) == 2
    async with taken(slots, 2) as held:
        assert await takes(slots, QUERY) == 1
        held[0].refused()
        assert await takes(slots) == 0, "the other is kept for a query"
        before = slots.count
        for _ in range(ANSWERS_PER_SLOT):
            held[1].answered()
        assert slots.count == before + 1, "the kept one counts as in use"
    monkeypatch.setattr(slots_module, "MIXED_SECONDS", 0)
    async with taken(slots, 1, QUERY):
        pass
    assert await takes(slots) == slots.count


async def test_take_after_a_lost_slot_goes_before_new_requests() -> None:
    slots = Slots(2)
    line = Line(slots)
    async with taken(slots, 1) as [slot]:
        for name in ("d1", "d2"):
            await line.join(name)
        assert slot.refused()
        taking = asyncio.create_task(slot.take())
        await line.answer("d1")
        assert taking.done()
        assert line.got == ["d1"]
        await taking
    await line.answer("d2")
    await asyncio.gather(*line.tasks)


async def test_free_slot_is_granted_to_a_waiting_request() -> None:
    slots = Slots(2)
    line = Line(slots)
    async with taken(slots, 2, QUERY) as [first, second]:
        first.refused()
        await line.join("d1")
        for _ in range(ANSWERS_PER_SLOT):
            second.answered()
        await asyncio.sleep(0)
        assert line.got == ["d1"], "the one that an answer added"
        await line.answer("d1")
        assert second.refused(), "sent beside the first"
        await second.take()
        await line.join("d2")
        assert not second.refused()
        second.rest()
        await asyncio.sleep(0)
        assert line.got == ["d1", "d2"], "and that of a query that backs off"
        taking = asyncio.create_task(second.take())
        await line.join("q1")
        assert not taking.done()
        await line.answer("d2")
        await taking
    await asyncio.sleep(0)
    await line.answer("q1")
    await asyncio.gather(*line.tasks)


async def test_refused_counts_others_at_the_last_attempt() -> None:
    slots = Slots(2)
    async with taken(slots, 1) as [first]:
        async with taken(slots, 1):
            await first.take()
        assert first.refused(), "sent again beside another, whose answer was heard first"


@pytest.mark.parametrize("mixed_seconds", [0, 60])
async def test_only_slot_alternates_between_queries_and_documents(
    mixed_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "MIXED_SECONDS", mixed_seconds)
    slots = Slots(4)
    async with taken(slots, 1) as [slot]:
        slot.refused()
    line = Line(slots)
    for name in ("d1", "d2", "d3", "q1", "q2", "q3"):
        await line.join(name)
    for name in ("d1", "q1", "d2", "q2", "d3", "q3"):
        assert list(line.in_flight) == [name]
        await line.answer(name)
    await line.join("d4")
    await line.answer("d4")
    await asyncio.gather(*line.tasks)


# `make test-fast` runs a few of them.
SEEDS = [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 20))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_random_requests_lose_and_invent_no_slot(seed: int) -> None:
    """Requests of both kinds are refused, answered and cancelled at any moment."""
    chance = random.Random(seed)
    slots = Slots(chance.randint(1, 6))
    limit = chance.randint(0, 2 * slots.most)
    in_flight = Counter[bool]()

    async def request(urgent: bool) -> None:
        async with slots.one(urgent) as slot:
            for _ in range(5):
                in_flight[urgent] += 1
                assert in_flight[urgent] <= slots.most
                assert in_flight.total() <= slots.count <= 2 * slots.most
                fits = in_flight.total() <= limit
                try:
                    await asyncio.sleep(chance.choice([0, 0, 0.001]))
                finally:
                    in_flight[urgent] -= 1
                if fits and chance.random() < 0.9:
                    return slot.answered()
                if fits:  # an error of another kind
                    slot.rest()
                    await asyncio.sleep(chance.choice([0, 0.001]))
                    await slot.take()
                    continue
                if not slot.refused() or chance.random() < 0.1:
                    slot.rest()
                    await asyncio.sleep(chance.choice([0, 0.001]))
                assert slots.count >= 1
                await slot.take()

    tasks = []
    for _ in range(300):
        tasks.append(asyncio.create_task(request(chance.random() < 0.5)))
        if chance.random() < 0.3:
            await asyncio.sleep(chance.choice([0, 0.001]))
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
    async with asyncio.timeout(30):
        done = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(one) for one in done} <= {type(None), asyncio.CancelledError}
    count = slots.count
    assert await takes(slots) == await takes(slots, QUERY) == min(count, slots.most)
