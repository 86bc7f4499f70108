"""Engines in this process: one thread owns a core and steps it for every caller.

Callers never use the core: they put jobs into an inbox. Between two steps the thread reads the
inbox and adds the texts of the next step to the core. It answers each finished job on the event
loop of its caller. No vector is serialized.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from qwen3_embeddings import event_loop
from qwen3_embeddings.engines import faults
from qwen3_embeddings.engines.backend import Backend, Core
from qwen3_embeddings.engines.base import Prompt, Served, Usage, check_lengths, closed_error
from qwen3_embeddings.engines.jobs import Job, deliver
from qwen3_embeddings.engines.scheduling import Schedule
from qwen3_embeddings.engines.tokenizing import Tokenizing
from qwen3_embeddings.errors import EngineDeadError
from qwen3_embeddings.vectors import Vectors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")

# vLLM keeps the state of a forward pass in module globals: engines of one process take turns.
_turn = threading.Lock()


def _forget_turn() -> None:
    """Replace the lock in a forked child, which has none of the parent's threads."""
    global _turn
    _turn = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_turn)


class SteppingEngine:
    """An engine whose core one thread steps.

    Args:
        model: hub id or folder.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32".
        engine_kwargs: arguments of the core that override the defaults.
    """

    backend: ClassVar[Backend]
    chunk_texts = 1024
    chunk_tokens = 65536
    chunks_in_flight = 8

    def __init__(self, model: str, dtype: str, engine_kwargs: dict[str, Any] | None) -> None:
        self.model = model
        self.dtype = dtype
        self.engine_kwargs = dict(engine_kwargs or {})
        self._thread: _EngineThread | None = None
        self._closed = False

    async def start(self) -> Served:
        """Start the engine's thread, or another one after a death; return what it serves."""
        ready = self._running().ready
        if not ready.done():  # awaiting a finished future would wake the loop once more per call
            await asyncio.shield(asyncio.wrap_future(ready))
        return ready.result()

    async def tokenize(self, texts: list[str], urgent: bool = False) -> list[list[int]]:
        """Return the token ids of each text, end token included, even over the context."""
        thread = self._running()
        await self.start()
        return await thread.tokenizing.ids(texts)

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        """Return one vector per prompt, in order; cancelling drops the prompts from the core.

        Args:
            prompts: texts, or their token ids with the end token.
            dimensions: size of the vectors; None for the native size.
            urgent: True for queries, which have priority over documents.
            usage: totals to which the prompts are added.

        Returns:
            float32 (n, dimensions), truncated and not normalized again.

        Raises:
            TextTooLongError: a prompt is longer than the context.
            EngineError: the engine does not start, died, or was closed.
        """
        thread = self._running()
        served = await self.start()
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        tokenized = iter(await thread.tokenizing.ids(texts))
        ids = [next(tokenized) if isinstance(prompt, str) else prompt for prompt in prompts]
        check_lengths(ids, served.context)
        loop = asyncio.get_running_loop()
        job = Job(ids, dimensions, urgent, loop, loop.create_future())
        thread.submit(job)
        try:
            vectors = await job.answer
        except asyncio.CancelledError:
            thread.abort(job)
            raise
        if usage is not None:
            usage.add(len(ids), sum(map(len, ids)))
        return vectors

    async def close(self) -> None:
        """Stop the thread and free the device; a start in progress is not waited for."""
        self._closed = True
        thread, self._thread = self._thread, None
        if thread is not None and thread.stop():
            await asyncio.shield(asyncio.wrap_future(thread.over))

    def _running(self) -> _EngineThread:
        """Return the thread for new calls; start one if there is none."""
        if self._closed:
            raise closed_error()
        if self._thread is None or not self._thread.usable:
            settings = (self.model, self.dtype, self.engine_kwargs)
            thread = _EngineThread(self.backend, settings)
            event_loop.start_thread(thread)
            self._thread = thread
        return self._thread


class _EngineThread(threading.Thread):
    """Starts a core, steps it, and ends it. No other code uses the core.

    Args:
        backend: the module that starts the core.
        settings: model, dtype and engine_kwargs, as for `Backend.start`.

    Attributes:
        ready: what the core serves, or the error of its start.
        over: done once the thread has ended and the memory is free.
        tokenizing: tokenizes texts; usable once the core is ready.
    """

    def __init__(self, backend: Backend, settings: tuple[str, str, dict[str, Any]]) -> None:
        super().__init__(name=f"qwen3-embeddings-{backend.NAME.lower()}", daemon=True)
        self.ready: Future[Served] = Future()
        self.over: Future[None] = Future()
        self.tokenizing = Tokenizing(self._tokenize)
        self._backend, self._settings = backend, settings
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: set[Job] = set()  # read from the inbox and not answered
        self._owners: dict[str, tuple[Job, int]] = {}  # job and index of its prompt, by request id
        self._ids = itertools.count()
        self._gate = threading.Lock()  # no job enters the inbox after the last reading of it
        self._refusal: Exception | None = None  # the error of calls after the engine's end
        self._tokenizer: Tokenizer
        self._schedule: Schedule[Job]

    # Called from other threads.

    @property
    def usable(self) -> bool:
        """Whether calls may still be submitted, or a start may still succeed."""
        return self.is_alive() and self._refusal is None

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def submit(self, job: Job) -> None:
        """Add the prompts of a job; it is refused at once if the engine has ended."""
        with self._gate:
            if self._refusal is None:
                self._inbox.put(("add", job))
                return
        deliver([job], self._refusal)

    def abort(self, job: Job) -> None:
        """Drop a job, which then gets no answer."""
        self._inbox.put(("abort", job))

    def stop(self) -> bool:
        """Ask the thread to end; return False if it is still starting and will end later."""
        self._inbox.put(("stop", None))
        started = self.ready.done()
        _settle(self.ready, error=closed_error())
        return started

    # Runs in this thread.

    def run(self) -> None:
        """Do all work of the thread. Every caller gets an answer, whatever the work raises."""
        with contextlib.ExitStack() as endings:  # each callback runs, even if another one raises
            endings.callback(_settle, self.over, None)
            endings.callback(self._refuse_all)
            self._live()

    def _live(self) -> None:
        """Start the core, serve, and clean up."""
        try:
            with _turn:
                self._backend.load()
                core, self._tokenizer, served = self._backend.start(*self._settings)
        except BaseException as error:
            with _turn:
                self._refusal = self._start_error(error)
            return
        self._schedule = Schedule(core.limits)
        _settle(self.ready, served)
        refusal: Exception = closed_error()
        try:
            self._serve(core)
        except BaseException as error:
            refusal = faults.death_error(error, self._backend.NAME)
            faults.forget_frames(error)
            logger.exception("the %s engine died", self._backend.NAME)
        finally:
            self._refuse(refusal)
            with _turn:  # the next engine starts when the memory of this one is free
                self._refuse_all()  # before a clean-up that may fail, or wait for a dead process
                _shut_down(core)
                del core
                faults.free_memory()

    def _start_error(self, error: BaseException) -> Exception:
        """Return what callers get for an error of the start."""

        def explain(said: str) -> str | None:
            return self._backend.explain(said, *self._settings)

        return faults.start_error(error, self._backend.NAME, self._settings[0], explain)

    def _serve(self, core: Core) -> None:
        """Step the core until asked to stop, adding and aborting texts between steps."""
        while True:
            if self._schedule.expects_query(time.monotonic()):
                core.wait()
            if not self._read_inbox(core):
                return
            if self._jobs:
                self._fill(core)
                with _turn:
                    request_ids, rows = core.step()
                self._collect(request_ids, rows)

    def _read_inbox(self, core: Core) -> bool:
        """Read the whole inbox, and wait if there is nothing else to do; return False to stop."""
        idle = not self._jobs and not self._prepare(core)
        while True:
            try:
                what, job = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if what == "stop":
                return False
            assert job is not None
            if what == "abort":
                self._drop(core, job)
            elif not job.answer.cancelled():
                self._jobs.add(job)
                lengths = [len(ids) for ids in job.prompts]
                self._schedule.add(job, lengths, job.urgent, time.monotonic())

    def _prepare(self, core: Core) -> bool:
        with _turn:
            return core.prepare()

    def _fill(self, core: Core) -> None:
        """Add the texts of the next step to the core."""
        for job, index in self._schedule.fill(time.monotonic()):
            request_id = str(next(self._ids))
            self._owners[request_id] = (job, index)
            job.requests[index] = request_id
            core.add(request_id, job.prompts[index])

    def _drop(self, core: Core, job: Job) -> None:
        """Forget a job that was aborted, and drop its texts from the core."""
        self._jobs.discard(job)
        self._schedule.drop(job)
        for index, request_id in job.requests.items():
            del self._owners[request_id]
            self._schedule.answered(job.urgent, len(job.prompts[index]))
        core.abort(list(job.requests.values()))
        job.requests.clear()

    def _collect(self, request_ids: list[str], rows: Vectors) -> None:
        """Store the vectors of a step, and answer the calls that it completes."""
        found: dict[Job, tuple[list[int], list[int]]] = {}  # indices of prompts, and their rows
        for row, request_id in enumerate(request_ids):
            job, index = self._owners.pop(request_id, (None, 0))
            if job is None:  # aborted during the step
                continue
            del job.requests[index]
            self._schedule.answered(job.urgent, len(job.prompts[index]))
            indices, its_rows = found.setdefault(job, ([], []))
            indices.append(index)
            its_rows.append(row)
        for job, (indices, its_rows) in found.items():
            job.store(indices, its_rows, rows)
        complete = [job for job in found if job.done == len(job.prompts)]
        self._jobs.difference_update(complete)
        deliver(complete)

    def _refuse(self, refusal: Exception) -> None:
        """Refuse all later calls. The first error that was passed here is the one they get."""
        with self._gate:
            self._refusal = self._refusal or refusal

    def _refuse_all(self) -> None:
        """Refuse the calls that wait, and all later ones."""
        self._refuse(EngineDeadError("the engine's thread ended. The next call starts one."))
        assert self._refusal is not None
        _settle(self.ready, error=self._refusal)
        while not self._inbox.empty():
            what, job = self._inbox.get()
            if what == "add" and job is not None:
                self._jobs.add(job)
        deliver(self._jobs, self._refusal)
        self._jobs.clear()
        self._owners.clear()


def _settle(future: Future[T], result: T | None = None, error: Exception | None = None) -> None:
    """Set the outcome of a future, unless it has one."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)


def _shut_down(core: Core) -> None:
    try:
        core.shut_down()
    except Exception:
        logger.exception("the engine did not shut down cleanly")
