"""The one event loop all work of this package runs on.

A daemon thread of this process owns it. Sync callers wait for a coroutine on it, async callers
await one, so there is one implementation, any thread and any event loop may call, and closing a
caller's loop breaks nothing here.

Waking a loop of another thread costs more than a query's other work in Python. So coroutines that
one loop awaits in the same turn wake this loop once, and answers given in the same turn wake theirs
once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_Call = tuple[Callable[..., object], tuple[Any, ...]]

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_abandoned: list[asyncio.AbstractEventLoop | None] = []
_calls: dict[tuple[asyncio.AbstractEventLoop, asyncio.AbstractEventLoop], list[_Call]] = {}
"""By the loop that calls and the loop to call."""


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Start `coroutine` on the background loop; cancelling the future cancels it."""
    return asyncio.run_coroutine_threadsafe(coroutine, _running_loop())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Wait for `coroutine`. Ctrl-C, or whatever else ends the wait, cancels it.

    Raises:
        RuntimeError: called on the background loop itself, which would wait for ever.
    """
    if _on_background_loop():
        coroutine.close()
        raise RuntimeError(
            "a synchronous method was called from inside a callback of this package, which "
            "would wait for itself. Call the method from your own thread instead."
        )
    future = submit(coroutine)
    try:
        return future.result()
    finally:
        future.cancel()


async def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await `coroutine` from any event loop; cancelling this await cancels it."""
    answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future: Future[T] = Future()
    future.add_done_callback(lambda done: _hand_over(answer, done))
    _call(_running_loop(), _begin, coroutine, future)
    try:
        return await answer
    finally:
        future.cancel()


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; the first error ends the other coroutines and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """A blocking function's result, from a thread while there are any.

    Python closes its pools when the main thread ends, before it waits for the other threads.
    """
    try:
        future = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
    except RuntimeError:
        return function(*arguments)
    return await future


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *given: Any) -> None:
    """Call a function on another loop from this one, with all that this turn has for it."""
    here = asyncio.get_running_loop()
    calls = _calls.setdefault((here, loop), [])
    if not calls:
        here.call_soon(_pass_on, here, loop)
    calls.append((function, given))


def _pass_on(here: asyncio.AbstractEventLoop, loop: asyncio.AbstractEventLoop) -> None:
    calls = _calls.pop((here, loop))
    with contextlib.suppress(RuntimeError):  # it was closed: nobody waits there
        loop.call_soon_threadsafe(_take, calls)


def _take(calls: list[_Call]) -> None:
    for function, given in calls:
        asyncio.get_running_loop().call_soon(function, *given)


def _begin(coroutine: Coroutine[Any, Any, T], future: Future[T]) -> None:
    """Start a coroutine for a future; cancelling the one cancels the other."""
    if future.cancelled():
        return coroutine.close()
    task = asyncio.create_task(coroutine)
    task.add_done_callback(lambda _: _finish(task, future))
    loop = asyncio.get_running_loop()
    future.add_done_callback(
        lambda done: done.cancelled() and loop.call_soon_threadsafe(task.cancel)
    )


def _finish(task: asyncio.Task[T], future: Future[T]) -> None:
    if task.cancelled():
        future.cancel()
    error = None if task.cancelled() else task.exception()
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(task.result())
    else:
        future.set_exception(error)


def _hand_over(answer: asyncio.Future[T], future: Future[T]) -> None:
    """Bring an outcome to the loop that awaits it, unless that loop gave up."""
    if _on_background_loop():
        _call(answer.get_loop(), _settle, answer, future)


def _settle(answer: asyncio.Future[T], future: Future[T]) -> None:
    if answer.done():
        return
    if future.cancelled():
        answer.cancel()
    elif (error := future.exception()) is not None:
        answer.set_exception(error)
    else:
        answer.set_result(future.result())


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None:
            loop = asyncio.new_event_loop()
            name = "qwen3-embeddings"
            threading.Thread(target=loop.run_forever, name=name, daemon=True).start()
            _loop = loop  # not before the thread runs: without it every call would wait for ever
        return _loop


def _on_background_loop() -> bool:
    try:
        return asyncio.get_running_loop() is _loop
    except RuntimeError:
        return False


def _forget_loop() -> None:
    """The thread did not come along into a forked child: start another there at first use."""
    global _loop, _lock
    _lock = threading.Lock()
    _abandoned.append(_loop)  # its destructor would close what the parent still listens on
    _loop = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loop)
