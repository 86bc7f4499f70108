"""Engines in this process: one thread owns a core and steps it for every caller.

Callers never touch the core: they put jobs into an inbox. Between two steps the thread reads the
inbox and adds the texts of the next step to the core. It answers each finished job on the
background loop. No vector is serialized.
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
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from qwen3_embeddings import event_loop
from qwen3_embeddings.engines import faults
from qwen3_embeddings.engines.base import Prompt, Served, Usage, check_lengths, closed_error
from qwen3_embeddings.engines.scheduling import Limits, Schedule
from qwen3_embeddings.engines.tokenizing import Tokenizing
from qwen3_embeddings.errors import EngineDeadError
from qwen3_embeddings.vectors import Vectors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")

# vLLM keeps the state of a forward pass in module globals: engines of one process take turns.
_turn = threading.Lock()


class Core(Protocol):
    """What computes vectors. One thread at a time uses it.

    Attributes:
        limits: what it computes at once.
        context: longest input in tokens.
    """

    limits: Limits
    context: int

    def add(self, request_id: str, ids: list[int]) -> None:
        """Add a text, as token ids, to those that the next steps compute."""

    def abort(self, request_ids: list[str]) -> None:
        """Drop texts that were added and not answered."""

    def step(self) -> tuple[list[str], Vectors]:
        """Compute one step; return the texts that it finished, and their vectors in that order.

        The vectors are float32 (texts, hidden) and nobody writes to them afterwards.
        """

    def prepare(self) -> bool:
        """Do a piece of work that can wait for an idle moment; return whether more is left."""

    def shut_down(self) -> None:
        """Stop. The memory is freed with the last reference to the core."""


class Backend(Protocol):
    """The module of an engine that starts its core.

    Attributes:
        NAME: name of the engine, for messages.
    """

    NAME: str

    def load(self, engine_kwargs: dict[str, Any], /) -> None:
        """Import the libraries of the engine.

        A library may keep an exception of its own import, and with it the frames of all callers.
        No frame that calls this may hold the core, which could then never be freed.
        """

    def start(
        self, name: str, dtype: str, engine_kwargs: dict[str, Any]
    ) -> tuple[Core, Tokenizer, Served]:
        """Start a core; also return the model's tokenizer, and what the core serves."""

    def explain(
        self, said: str, name: str, dtype: str, engine_kwargs: dict[str, Any]
    ) -> str | None:
        """Return why a start failed and what to do; None if what the error said is unknown."""


@dataclass(eq=False)
class _Job:
    """Prompts of one call, and the vectors that have been computed for them."""

    prompts: list[list[int]]
    dimensions: int | None
    urgent: bool
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Vectors]
    rows: Vectors | None = None  # one per prompt
    done: int = 0  # number of prompts that have their vector
    requests: dict[int, str] = field(default_factory=dict)  # in the core, by index of the prompt

    def put(self, indices: list[int], rows: list[int], step: Vectors) -> None:
        """Store the vectors of some prompts, which are rows of a step's vectors."""
        self.done += len(indices)
        if len(self.prompts) == 1:  # most calls: a copy would cost more than all the rest
            self.rows = step[rows[0] : rows[0] + 1, : self.dimensions]
            return
        if self.rows is None:
            size = self.dimensions or step.shape[1]
            self.rows = np.empty((len(self.prompts), size), dtype=np.float32)
        self.rows[indices] = step[rows, : self.dimensions]

    def settle(self, error: BaseException | None) -> None:
        """Answer with the error or the vectors, on the caller's loop, if the caller still waits."""
        if self.answer.done():
            return
        if error is not None:
            self.answer.set_exception(error)
        else:
            assert self.rows is not None
            self.answer.set_result(self.rows)


def _answer(jobs: Iterable[_Job], error: BaseException | None = None) -> None:
    """Answer calls, each on its own loop.

    A loop is woken once for all of its calls. Each wake-up is a system call during which this
    thread lets go of the interpreter, and can wait milliseconds to get it back.
    """

    def settle(theirs: list[_Job]) -> None:
        for job in theirs:
            job.settle(error)

    by_loop: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
    for job in jobs:
        by_loop.setdefault(job.loop, []).append(job)
    for loop, theirs in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed
            loop.call_soon_threadsafe(settle, theirs)


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
        if not ready.done():  # to await one that is done would wake the loop once more per call
            await asyncio.shield(asyncio.wrap_future(ready))
        return ready.result()

    async def tokenize(self, texts: list[str], urgent: bool = False) -> list[list[int]]:
        """Return the token ids of each text, end token included."""
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
        """Return one vector per prompt, in order; cancelling drops the prompts from the engine."""
        thread = self._running()
        served = await self.start()
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        tokenized = iter(await thread.tokenizing.ids(texts))
        ids = [next(tokenized) if isinstance(prompt, str) else prompt for prompt in prompts]
        check_lengths(ids, served.context)
        loop = asyncio.get_running_loop()
        job = _Job(ids, dimensions, urgent, loop, loop.create_future())
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
    """The only code that uses the engine core."""

    def __init__(self, backend: Backend, settings: tuple[str, str, dict[str, Any]]) -> None:
        super().__init__(name=f"qwen3-embeddings-{backend.NAME.lower()}", daemon=True)
        self.ready: Future[Served] = Future()
        self.over: Future[None] = Future()
        self.tokenizing = Tokenizing(self._tokenize)
        self._backend, self._settings = backend, settings
        self._inbox: queue.SimpleQueue[tuple[str, _Job | None]] = queue.SimpleQueue()
        self._jobs: set[_Job] = set()  # read from the inbox and not answered
        self._owners: dict[str, tuple[_Job, int]] = {}  # whose vector a request computes
        self._ids = itertools.count()
        self._gate = threading.Lock()
        self._refusal: Exception | None = None  # what calls get once the engine has ended
        self._tokenizer: Tokenizer
        self._schedule: Schedule[_Job]

    # Called from other threads.

    @property
    def usable(self) -> bool:
        """Whether calls may still be submitted, or a start may still succeed."""
        return self.is_alive() and self._refusal is None

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def submit(self, job: _Job) -> None:
        with self._gate:
            if self._refusal is None:
                self._inbox.put(("add", job))
                return
        _answer([job], self._refusal)

    def abort(self, job: _Job) -> None:
        self._inbox.put(("abort", job))

    def stop(self) -> bool:
        """Ask the thread to end; return False if it is still starting and will end later."""
        self._inbox.put(("stop", None))
        started = self.ready.done()
        _settle(self.ready, error=closed_error())
        return started

    # Runs in this thread.

    def run(self) -> None:
        with contextlib.ExitStack() as endings:  # each runs, whatever the work or another raises
            endings.callback(_settle, self.over, None)
            endings.callback(self._answer_all)
            self._live()

    def _live(self) -> None:
        """Start the core, serve, and clean up."""
        try:
            with _turn:
                self._backend.load(self._settings[2])
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
            refusal = EngineDeadError(
                f"the {self._backend.NAME} engine died ({faults.message(error)}). The next call "
                "starts a new one; if it dies again, lower max_num_batched_tokens in "
                "engine_kwargs."
            )
            faults.forget_frames(error)
            logger.exception("the %s engine died", self._backend.NAME)
        finally:
            self._refuse(refusal)
            with _turn:  # the next engine starts when the memory of this one is free
                self._answer_all()  # before a clean-up that may fail, or wait for a dead process
                _shut_down(core)
                del core
                faults.free_memory()

    def _start_error(self, error: BaseException) -> Exception:
        def explain(said: str) -> str | None:
            return self._backend.explain(said, *self._settings)

        return faults.start_error(error, self._backend.NAME, self._settings[0], explain)

    def _serve(self, core: Core) -> None:
        """Step the core until asked to stop, adding and aborting texts between steps."""
        while self._read_inbox(core):
            if self._jobs:
                self._fill(core)
                with _turn:
                    names, rows = core.step()
                self._collect(names, rows)

    def _read_inbox(self, core: Core) -> bool:
        """Read all that is in the inbox; with nothing to step or prepare, wait for more."""
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
        """Give the core the texts of its next step."""
        for job, index in self._schedule.fill(time.monotonic()):
            request_id = str(next(self._ids))
            self._owners[request_id] = (job, index)
            job.requests[index] = request_id
            core.add(request_id, job.prompts[index])

    def _drop(self, core: Core, job: _Job) -> None:
        self._jobs.discard(job)
        self._schedule.drop(job)
        for index, request_id in job.requests.items():
            del self._owners[request_id]
            self._schedule.answered(job.urgent, len(job.prompts[index]))
        core.abort(list(job.requests.values()))
        job.requests.clear()

    def _collect(self, names: list[str], rows: Vectors) -> None:
        """Store the vectors of a step, and answer the calls that it completes."""
        found: dict[_Job, tuple[list[int], list[int]]] = {}  # indices of prompts, and their rows
        for row, name in enumerate(names):
            job, index = self._owners.pop(name, (None, 0))
            if job is None:
                continue
            del job.requests[index]
            self._schedule.answered(job.urgent, len(job.prompts[index]))
            indices, its_rows = found.setdefault(job, ([], []))
            indices.append(index)
            its_rows.append(row)
        for job, (indices, its_rows) in found.items():
            job.put(indices, its_rows, rows)
        complete = [job for job in found if job.done == len(job.prompts)]
        self._jobs.difference_update(complete)
        _answer(complete)

    def _refuse(self, refusal: Exception) -> None:
        """Refuse the calls that come from now on, with the first reason given."""
        with self._gate:
            self._refusal = self._refusal or refusal

    def _answer_all(self) -> None:
        """Refuse the calls that wait, and those that come from now on."""
        self._refuse(EngineDeadError("the engine's thread ended. The next call starts one."))
        assert self._refusal is not None
        _settle(self.ready, error=self._refusal)
        while not self._inbox.empty():
            what, job = self._inbox.get()
            if what == "add" and job is not None:
                self._jobs.add(job)
        _answer(self._jobs, self._refusal)
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
