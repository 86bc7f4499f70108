"""The event loop that all work of this package runs on.

A daemon thread owns it. Sync callers wait for a coroutine on it, and async callers await one. So
there is one implementation, any thread and any event loop may call, and closing a caller's loop
breaks nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from qwen3_embeddings.errors import EngineStartError

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_abandoned: list[Any] = []  # a parent's loops, kept from destructors that would close its sockets


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Start `coroutine` on the background loop; cancelling the future cancels it.

    Raises:
        EngineStartError: the system allows no more threads.
    """
    future: Future[T] = Future()
    try:
        _running_loop().call_soon_threadsafe(_begin, coroutine, future)
    except BaseException:
        coroutine.close()
        raise
    return future


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Wait for `coroutine`. Ctrl-C, or whatever else ends the wait, cancels it.

    Raises:
        RuntimeError: called on the background loop itself, which would wait forever.
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
    return await asyncio.wrap_future(submit(coroutine))


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results, in order; the first error ends the other coroutines and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Return the result of a blocking function, called in a thread while there are any.

    Python closes its pools when the main thread ends, before it waits for the other threads. Then
    the function is called here.
    """
    try:
        future = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
    except RuntimeError:
        return function(*arguments)
    return await future


def start_thread(thread: threading.Thread) -> None:
    """Start a thread.

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


def _begin(coroutine: Coroutine[Any, Any, T], future: Future[T]) -> None:
    """Start a coroutine for a future; one that was given up meanwhile begins nothing.

    `asyncio.run_coroutine_threadsafe` would run it up to its first await.
    """
    if future.cancelled():
        coroutine.close()
        return
    task = asyncio.get_running_loop().create_task(coroutine)
    task.add_done_callback(functools.partial(_finish, future))
    future.add_done_callback(functools.partial(_give_up, task))


def _give_up(task: asyncio.Task[T], future: Future[T]) -> None:
    """Cancel the task of a future that is cancelled, in whatever thread."""
    if future.cancelled() and not task.done():
        task.get_loop().call_soon_threadsafe(task.cancel)


def _finish(future: Future[T], task: asyncio.Task[T]) -> None:
    """Give a future the outcome of its task."""
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
            _loop = loop  # once the thread runs: without it every call would wait forever
        return _loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop, and go on after a coroutine that exits; its caller gets the exit."""
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
    """Start another loop at first use in a forked child, which lacks the thread."""
    global _loop, _lock
    _lock = threading.Lock()
    _abandoned.append(_loop)
    _loop = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loop)
