"""Error paths that fail themselves: whatever raises, every caller gets an answer.

Each wait has a time limit, so a caller that nobody answers fails the test.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import pytest

from qwen3_embeddings import (
    Embedder,
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    event_loop,
    telemetry,
)
from qwen3_embeddings.engines import faults, registry, stepping
from qwen3_embeddings.engines.jobs import Job
from qwen3_embeddings.engines.sentence_transformers import ReferenceEngine
from qwen3_embeddings.engines.torch import lifecycle as torch_lifecycle
from qwen3_embeddings.engines.vllm import lifecycle as vllm_lifecycle
from qwen3_embeddings.engines.vllm.engine import VLLMEngine

SECONDS = 60
Kind = Literal["vllm", "torch"]
BACKENDS: dict[str, Any] = {"vllm": vllm_lifecycle, "torch": torch_lifecycle}


@pytest.fixture(params=BACKENDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """The engines of this process that share a thread's code."""
    name: Kind = request.param
    return name


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("injected into the error path")


class FailingFilter(logging.Filter):
    """A filter of the user's that raises, and with it every call of the logger."""

    filter = fail


class UnprintableError(Exception):
    """An error that cannot be turned into a string."""

    __str__ = fail


@pytest.fixture
def failing_logger() -> Iterator[None]:
    broken = FailingFilter()
    for module in (stepping, faults):
        module.logger.addFilter(broken)
    yield
    for module in (stepping, faults):
        module.logger.removeFilter(broken)


def answers(embedder: Embedder, count: int = 4) -> list[BaseException | None]:
    """What concurrent callers get, each within the time limit."""
    pool = ThreadPoolExecutor(count)
    calls = [pool.submit(embedder.encode_document, [f"text {i}"]) for i in range(count)]
    try:
        return [call.exception(timeout=SECONDS) for call in calls]
    finally:
        pool.shutdown(wait=False)


def circle() -> BaseException:
    """Two errors, each the cause of the other."""
    one, two = OSError("one"), OSError("two")
    one.__cause__, two.__cause__ = two, one
    return one


@pytest.mark.parametrize(
    "error", [OSError("broken"), MemoryError(), UnprintableError(), SystemExit(1), circle()]
)
@pytest.mark.parametrize("function", ["free_memory", "forget_frames", "explain", "nothing"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_start_whose_cleanup_fails_answers_every_caller(
    error: BaseException,
    function: str,
    kind: Kind,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    failing_logger: None,
) -> None:
    def build(*_: object) -> Any:
        raise error

    monkeypatch.setattr(BACKENDS[kind], "start", build)
    if function == "explain":
        monkeypatch.setattr(BACKENDS[kind], "explain", fail)
    elif function != "nothing":
        monkeypatch.setattr(faults, function, fail)
    with Embedder(checkpoint, engine=kind, engine_kwargs={"max_num_seqs": 12}) as embedder:
        for given in answers(embedder):
            assert isinstance(given, EngineError), given


@pytest.mark.parametrize("function", ["free_memory", "_shut_down", "forget_frames", "nothing"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_death_whose_cleanup_fails_answers_every_caller(
    function: str,
    kind: Kind,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    failing_logger: None,
) -> None:
    few = {"max_num_seqs": 12}
    embedder = Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=few)
    embedder.start()
    thread: Any = embedder._lease.engine._thread  # type: ignore[attr-defined]

    def die(*_: object) -> None:
        """Fail once all callers are there: a later one would start another engine."""
        deadline = time.monotonic() + SECONDS
        while len(thread._jobs) + thread._inbox.qsize() < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        fail()

    with monkeypatch.context() as broken:
        broken.setattr(thread, "_collect", die)
        if function != "nothing":
            module = stepping if function == "_shut_down" else faults
            broken.setattr(module, function, fail)
        for given in answers(embedder):
            assert isinstance(given, EngineDeadError), given
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert embedder.encode_document(["the next call starts another"]).shape == (1, 128)
    embedder.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_close_whose_cleanup_fails_returns_and_answers_every_caller(
    kind: Kind, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"max_num_seqs": 12}
    embedder = Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=few)
    embedder.start()
    thread: Any = embedder._lease.engine._thread  # type: ignore[attr-defined]
    monkeypatch.setattr(stepping, "_shut_down", fail)
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(embedder.encode_document, ["slow " * 300] * 2000)
        while not thread._jobs:
            assert not call.done()
        pool.submit(embedder.close).result(timeout=SECONDS)
        assert isinstance(call.exception(timeout=SECONDS), EngineClosedError)


def test_core_dropped_without_a_shutdown_leaves_other_engines_working(
    checkpoint: str, embedder: Embedder
) -> None:
    """vLLM's own finalizer destroys the process groups that all cores share."""
    embedder.start()
    vllm_lifecycle.load()
    core, *_ = vllm_lifecycle.start(checkpoint, "float32", {"max_num_seqs": 12})
    del core
    gc.unfreeze()
    gc.collect()
    assert embedder.encode_document(["still works"]).shape == (1, 128)


@pytest.mark.parametrize("engine", ["embedder", "torch_embedder"])
def test_job_of_a_closed_loop_keeps_the_engine_alive(
    engine: str, checkpoint: str, request: pytest.FixtureRequest
) -> None:
    """Such as a loop that ends while its engine call is in progress."""
    embedder = request.getfixturevalue(engine)
    embedder.start()
    thread: Any = embedder._lease.engine._thread  # type: ignore[attr-defined]
    loop = asyncio.new_event_loop()
    job = Job([[1, 2, 3]], None, False, loop, loop.create_future())
    loop.close()
    thread.submit(job)
    assert embedder.encode_document(["behind it"]).shape == (1, 128)
    assert thread.is_alive()


@pytest.mark.engine
def test_process_without_more_threads_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", refuse)
        engine = VLLMEngine("Qwen/Qwen3-Embedding-0.6B")
        with pytest.raises(EngineStartError, match="ulimit"):
            asyncio.run(engine.start())
        broken.setattr(event_loop, "_loop", None)

        async def nothing() -> None: ...

        with pytest.raises(EngineStartError, match="ulimit"):
            event_loop.run(nothing())
    event_loop.run(nothing())


def test_engine_that_does_not_close_at_exit_keeps_no_other_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed = []

    class Engine:
        def __init__(self, error: BaseException | None) -> None:
            self.error = error

        async def close(self) -> None:
            if self.error is not None:
                raise self.error
            closed.append(self)

    errors = [OSError("broken"), None, asyncio.CancelledError(), None, SystemExit(1), None]
    monkeypatch.setattr(registry, "_engines", {str(i): Engine(e) for i, e in enumerate(errors)})
    monkeypatch.setattr(registry, "_leases", {})
    registry._close_all()
    assert len(closed) == 3
    assert caplog.text.count("did not close") == 3


async def test_reference_load_is_shared_and_its_failure_answers_every_caller(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the caller that began the load gives up."""
    loads, proceed = [], threading.Event()
    engine = ReferenceEngine(checkpoint)

    def load() -> Any:
        loads.append(1)
        assert proceed.wait(SECONDS)
        raise MemoryError("while loading")

    with monkeypatch.context() as broken:
        broken.setattr(engine, "_load", load)
        calls = [asyncio.create_task(engine.start()) for _ in range(4)]
        await asyncio.sleep(0.05)
        calls[0].cancel()
        await asyncio.sleep(0.05)
        proceed.set()
        given = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), SECONDS)
    assert [type(error) for error in given] == [asyncio.CancelledError] + [MemoryError] * 3
    assert len(loads) == 1
    assert (await engine.start()).native == 128
    await engine.close()
    with pytest.raises(EngineClosedError):
        await engine.start()


def answer(request: httpx.Request) -> httpx.Response:
    """A server with vectors of 4 dimensions."""
    if request.method == "GET":
        return httpx.Response(200, json={"data": [{"id": "served", "max_model_len": 64}]})
    texts = json.loads(request.content)["input"]
    rows = [
        {"index": i, "embedding": [1.0, 0.0, 0.0, 0.0]}
        for i in range(1 if isinstance(texts, str) else len(texts))
    ]
    return httpx.Response(200, json={"data": rows, "model": "served"})


@pytest.mark.parametrize("error", [ImportError("no metrics"), SystemExit(1), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["telemetry", "transport"])
def test_hook_that_raises_during_a_request_answers_every_caller(
    where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a tracing provider, or a transport of the caller's own HTTP client."""
    broken = threading.Event()

    def handle(request: httpx.Request) -> httpx.Response:
        if where == "transport" and broken.is_set():
            raise error
        return answer(request)

    def waited(*_: object) -> None:
        if where == "telemetry" and broken.is_set():
            raise error

    monkeypatch.setattr(telemetry, "waited", waited)
    client = httpx.AsyncClient(transport=httpx.MockTransport(handle))
    url, given_up = "http://server.test/v1", {"max_retries": 0, "restart_timeout": 0}
    with Embedder(base_url=url, http_client=client, **given_up) as embedder:
        assert embedder.encode_document(["before"]).shape == (1, 4)
        broken.set()
        for given in answers(embedder):
            assert isinstance(given, type(error) | EngineError), given
        broken.clear()
        assert embedder.encode_document(["after"]).shape == (1, 4)


FIRST_OF_A_PROCESS = """
import gc, sys, weakref
from importlib import import_module
from qwen3_embeddings import Embedder

checkpoint, kind = sys.argv[1:]
lifecycle = import_module(f"qwen3_embeddings.engines.{kind}.lifecycle")
start, cores = lifecycle.start, []

def remember(*settings):
    result = start(*settings)
    cores.append(weakref.ref(result[0]))
    return result

lifecycle.start = remember
with Embedder(checkpoint, dtype="float32", engine=kind) as embedder:
    embedder.start()
    thread = embedder._lease.engine._thread
thread.join(60)
gc.collect()
print("alive" if cores[0]() else "freed")
"""


def test_close_of_the_first_engine_of_a_process_frees_its_core(kind: Kind, checkpoint: str) -> None:
    """A library keeps an exception of its import, and the exception keeps frames with variables."""
    command = [sys.executable, "-c", FIRST_OF_A_PROCESS, checkpoint, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout.split()[-1:] == ["freed"], done.stderr
