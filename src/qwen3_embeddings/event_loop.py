"""The one event loop all work of this package runs on.

A daemon thread of this process owns it. Sync callers wait for a coroutine on it, async callers
await one, so there is one implementation, any thread and any event loop may call, and closing a
caller's loop breaks nothing here.

Waking another thread's loop costs more than a query's other work in Python. So what comes before
this loop has heard the last wake adds none, and answers of one turn wake a caller's loop once.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from qwen3_embeddings.errors import EngineStartError

T = TypeVar("T")


@dataclass
class _Wake:
    """One wake of the background loop, heard once that loop looks at what has come."""

    heard: bool = False


_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_wake = _Wake(heard=True)
_coming: deque[tuple[Coroutine[Any, Any, Any], Future[Any], contextvars.Context]] = deque()
_going: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Future[Any]]]] = {}
_abandoned: list[Any] = []


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Start `coroutine` on the background loop; cancelling the future cancels it."""
    future: Future[T] = Future()
    _send(coroutine, future)
    return future


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
    future.add_done_callback(functools.partial(_hand_over, answer))  # before it can be done
    try:
        _send(coroutine, future)
        return await answer
    finally:
        future.cancel()
        del answer, future  # an error they hold would hold this frame


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


def _send(coroutine: Coroutine[Any, Any, T], future: Future[T]) -> None:
    """Have a coroutine started for a future, in the caller's context."""
    global _wake
    try:
        loop = _running_loop()
    except BaseException:
        coroutine.close()
        raise
    _coming.append((coroutine, future, contextvars.copy_context()))
    if _wake.heard:
        wake = _Wake()
        loop.call_soon_threadsafe(_start_all, wake)
        _wake = wake  # last: after a Ctrl-C before it the next call wakes again


def _start_all(wake: _Wake) -> None:
    wake.heard = True  # first: what comes from now on wakes again
    while _coming:
        coroutine, future, context = _coming.popleft()
        if future.cancelled():
            coroutine.close()
            continue
        task = asyncio.get_running_loop().create_task(coroutine, context=context)
        task.add_done_callback(functools.partial(_finish, future))
        future.add_done_callback(functools.partial(_give_up, task))


def _give_up(task: asyncio.Task[T], future: Future[T]) -> None:
    """Cancel the task of a future that is cancelled, in whatever thread."""
    if future.cancelled() and not task.done():
        task.get_loop().call_soon_threadsafe(task.cancel)


def _finish(future: Future[T], task: asyncio.Task[T]) -> None:
    error = None
    if task.cancelled():
        future.cancel()
    else:
        error = task.exception()
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(task.result())
    else:
        future.set_exception(error)


def _hand_over(answer: asyncio.Future[T], future: Future[T]) -> None:
    """Bring an outcome to the loop that awaits it; one that gave up waits no more."""
    if not _on_background_loop():
        return
    loop = answer.get_loop()
    outcomes = _going.setdefault(loop, [])
    if not outcomes:
        asyncio.get_running_loop().call_soon(_bring_all, loop)
    outcomes.append((answer, future))


def _bring_all(loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(RuntimeError):  # closed: nobody waits there
        loop.call_soon_threadsafe(_settle_all, _going.pop(loop))


def _settle_all(outcomes: list[tuple[asyncio.Future[Any], Future[Any]]]) -> None:
    for answer, future in outcomes:
        if answer.done():
            continue
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
            try:
                start_thread(threading.Thread(target=_run, args=(loop,), name=name, daemon=True))
            except EngineStartError:
                loop.close()
                raise
            _loop = loop  # not before the thread runs: without it every call would wait for ever
        return _loop


def start_thread(thread: threading.Thread) -> None:
    """Start a thread, or say why there is none.

    Raises:
        EngineStartError: the system allows no more threads.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise EngineStartError(
            f"this process cannot start the thread {thread.name!r} ({error}). The system allows "
            "no more: raise its limit (ulimit -u, or the container's limit of processes)."
        ) from error


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop on after an exit inside a coroutine, which that coroutine's caller is given."""
    process = os.getpid()
    while os.getpid() == process:  # in a child forked by a coroutine it is the child that exits
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


def _on_background_loop() -> bool:
    try:
        return asyncio.get_running_loop() is _loop
    except RuntimeError:
        return False


def _forget_loop() -> None:
    """The thread did not come along into a forked child: start another there at first use."""
    global _loop, _lock, _wake, _coming, _going
    _lock = threading.Lock()
    # The loop's destructor would close what the parent still listens on.
    _abandoned.append((_loop, _coming, _going))
    _loop, _wake, _coming, _going = None, _Wake(heard=True), deque(), {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loop)
