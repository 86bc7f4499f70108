"""The background loop: what threads and other loops await on it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qwen3_embeddings import event_loop


async def same(value: int) -> int:
    """Done in its first turn, often before its caller goes on."""
    return value


async def nothing() -> None:
    """Start the loop."""


@contextlib.contextmanager
def held_loop() -> Iterator[None]:
    """Hold the background loop in one turn."""
    held, free = threading.Event(), threading.Event()

    async def hold() -> None:
        held.set()
        free.wait(10)

    event_loop.submit(hold())
    assert held.wait(10)
    try:
        yield
    finally:
        free.set()


def test_wait_in_many_loops_returns_each_its_own_answers() -> None:
    """Threads that interrupt each other as often as Python lets them lose none."""

    def caller(start: int) -> list[int]:
        async def ask() -> list[int]:
            got = []
            for first in range(start, start + 1000, 50):
                waits = (event_loop.wait(same(i)) for i in range(first, first + 50))
                got += await asyncio.gather(*waits)
                got.append(await event_loop.wait(same(-first)))
            return got

        return asyncio.run(asyncio.wait_for(ask(), 60))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(caller, range(0, 4000, 1000)))
    finally:
        sys.setswitchinterval(interval)
    for start, got in zip(range(0, 4000, 1000), answers, strict=True):
        assert [x for x in got if x > 0] == [x for x in range(start, start + 1000) if x]
        assert [-x for x in got if x < 0] == [x for x in range(start, start + 1000, 50) if x]


def test_wait_runs_the_coroutine_in_its_callers_context() -> None:
    """Tracing and logging tell callers apart by them."""
    caller: contextvars.ContextVar[int] = contextvars.ContextVar("caller")

    async def see() -> int:
        return caller.get()

    async def ask(number: int) -> int:
        caller.set(number)
        return await event_loop.wait(see())

    async def together() -> list[int]:
        return await asyncio.gather(*map(ask, range(10)))

    assert asyncio.run(together()) == list(range(10))


def test_run_interrupted_while_submitting_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    event_loop.run(nothing())
    loop = event_loop._loop
    assert loop is not None

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            event_loop.run(same(1))
    assert event_loop.submit(same(2)).result(10) == 2


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_exit_inside_a_coroutine_ends_its_own_call_only(error: type[BaseException]) -> None:
    """Such as one a callback of the caller's raises."""

    async def leave() -> None:
        raise error

    async def slow() -> int:
        await asyncio.sleep(0.05)
        return 1

    other = event_loop.submit(slow())
    with pytest.raises(error):
        event_loop.submit(leave()).result(10)
    assert other.result(10) == 1
    assert event_loop.submit(same(2)).result(10) == 2


def test_child_forked_by_a_coroutine_exits() -> None:
    """It has a copy of the parent's loop, which must not run on."""
    script = """
import os, sys
from qwen3_embeddings import event_loop

async def fork():
    if not (child := os.fork()):
        sys.exit()
    return child

async def same(value):
    return value

for number in range(5):
    os.waitpid(event_loop.run(fork()), 0)
    assert event_loop.submit(same(number)).result(10) == number
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_wait_in_the_last_iteration_of_a_loop_is_run() -> None:
    """Such as an `aclose` that nobody awaits."""
    done = threading.Event()

    async def close() -> None:
        done.set()

    loop = asyncio.new_event_loop()

    async def last() -> None:
        await asyncio.sleep(0)
        kept.append(loop.create_task(event_loop.wait(close())))

    kept: list[Any] = []
    loop.run_until_complete(last())
    loop.close()
    assert done.wait(10)


def test_error_of_a_wait_is_freed() -> None:
    """Its traceback holds the frames it passed, and they not it."""

    class FailedError(Exception):
        """One that a weak reference can be made of."""

    async def fail() -> None:
        raise FailedError

    async def ask() -> weakref.ref[FailedError]:
        try:
            await event_loop.wait(fail())
        except FailedError as error:
            return weakref.ref(error)
        raise AssertionError

    gc.collect()
    gc.disable()
    try:
        seen = asyncio.run(ask())
        event_loop.run(nothing())  # the background loop's turn with the error is over
        assert seen() is None
    finally:
        gc.enable()


def test_error_reaches_its_own_caller_only() -> None:
    async def fail() -> int:
        raise KeyError("mine")

    async def both() -> list[Any]:
        waits = event_loop.wait(fail()), event_loop.wait(same(1))
        return await asyncio.gather(*waits, return_exceptions=True)

    failed, fine = asyncio.run(both())
    assert isinstance(failed, KeyError)
    assert fine == 1


def test_wait_cancelled_before_it_began_runs_nothing() -> None:
    begun = []

    async def note() -> None:
        begun.append(True)

    async def give_up() -> None:
        with held_loop(), pytest.raises(TimeoutError):
            await asyncio.wait_for(event_loop.wait(note()), 0.05)
        await event_loop.wait(nothing())

    asyncio.run(give_up())
    assert not begun


def test_cancelled_wait_cancels_its_coroutine() -> None:
    ended = threading.Event()

    async def long() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(event_loop.wait(long()), 0.05)

    asyncio.run(give_up())
    assert ended.wait(10)


def test_cancelled_coroutine_cancels_the_wait() -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    async def ask() -> None:
        with pytest.raises(asyncio.CancelledError):
            await event_loop.wait(cancelled())

    asyncio.run(ask())
