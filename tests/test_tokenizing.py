"""How the texts of concurrent calls are tokenized."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from qwen3_embeddings.engines.tokenizing import SHARED, SHORT, Tokenizing

LONG = "x" * (SHORT + 1)


class Tokenizer:
    """Returns the length of each text, and stops in a thread until it is let go."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.may_go = threading.Event()

    def __call__(self, texts: list[str]) -> list[list[int]]:
        self.calls.append(texts)
        if threading.current_thread() is not threading.main_thread():
            self.may_go.wait(30)
        if "bad" in "".join(texts):
            raise ValueError("bad text")
        return [[len(text)] for text in texts]


@pytest.fixture
def tokenizer() -> Iterator[Tokenizer]:
    """A tokenizer, whose threads end with the test."""
    made = Tokenizer()
    yield made
    made.may_go.set()


async def start(shared: Tokenizing, *calls: list[str]) -> list[asyncio.Task[list[list[int]]]]:
    """Start calls, until all of them wait."""
    tasks = [asyncio.create_task(shared.ids(texts)) for texts in calls]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_ids_concurrent_calls_share_a_thread(tokenizer: Tokenizer) -> None:
    texts = [LONG + "y" * i for i in range(100)]
    tasks = await start(Tokenizing(tokenizer), *([text] for text in texts))
    tokenizer.may_go.set()
    assert await asyncio.gather(*tasks) == [[[len(text)]] for text in texts]
    assert list(map(len, tokenizer.calls)) == [1, 99]


async def test_ids_a_bad_text_fails_its_own_call_only(tokenizer: Tokenizer) -> None:
    texts = [[LONG], [LONG, "good"], ["bad" + LONG], [LONG + "y"]]
    tasks = await start(Tokenizing(tokenizer), *texts)
    tokenizer.may_go.set()
    *_, bad, _ = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(bad, ValueError)
    assert [await tasks[i] for i in (0, 1, 3)] == [[[257]], [[257], [4]], [[258]]]


async def test_ids_neither_short_texts_nor_a_cancelled_call_wait(tokenizer: Tokenizer) -> None:
    shared = Tokenizing(tokenizer)
    first, second = await start(shared, ["x" * (SHARED + 1)], [LONG])
    assert await shared.ids(["short"]) == [[5]]
    assert await shared.ids([]) == []
    assert len(tokenizer.calls) == 3, "a call of few texts waited for one of many"
    third, fourth = await start(shared, [LONG], [LONG + "y"])
    third.cancel()
    tokenizer.may_go.set()
    assert [await first, await second, await fourth] == [[[SHARED + 1]], [[257]], [[258]]]
    with pytest.raises(asyncio.CancelledError):
        await third


async def test_ids_of_many_empty_texts_do_not_stop_the_event_loop(tokenizer: Tokenizer) -> None:
    (task,) = await start(Tokenizing(tokenizer), [""] * 1000)
    assert not task.done()
    tokenizer.may_go.set()
    assert await task == [[0]] * 1000


def test_ids_of_several_event_loops_are_right(tokenizer: Tokenizer) -> None:
    shared = Tokenizing(tokenizer)
    tokenizer.may_go.set()
    for _ in range(2):  # the second loop begins after the first one was closed
        assert asyncio.run(shared.ids([LONG])) == [[257]]

    async def both() -> list[list[list[int]]]:
        own = asyncio.create_task(shared.ids([LONG + "y"]))
        other = await asyncio.to_thread(asyncio.run, shared.ids([LONG]))
        return [await own, other]

    assert asyncio.run(both()) == [[[258]], [[257]]]
