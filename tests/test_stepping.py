"""The thread that steps a core."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen3_embeddings.engines import faults
from qwen3_embeddings.engines.base import Served
from qwen3_embeddings.engines.scheduling import Limits
from qwen3_embeddings.engines.stepping import SteppingEngine
from qwen3_embeddings.vectors import Vectors

SECONDS = 60


class TwoSteps:
    """A core with two steps in progress; while it computes the first one, `wait` blocks."""

    limits = Limits(100, 10, 2, 100)
    context = 100

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []  # what happened to how many texts
        self.waits, self.may_go = threading.Event(), threading.Event()
        self._waiting: list[str] = []
        self._in_progress: list[list[str]] = []

    def add(self, request_id: str, ids: list[int]) -> None:
        self._waiting.append(request_id)

    def abort(self, request_ids: list[str]) -> None:
        raise AssertionError("nothing was cancelled")

    def wait(self) -> None:
        if self._in_progress:
            self.waits.set()
            assert self.may_go.wait(SECONDS)

    def step(self) -> tuple[list[str], Vectors]:
        started, self._waiting = self._waiting, []
        if started:
            self.events.append(("start", len(started)))
            self._in_progress.append(started)
            if len(self._in_progress) < self.limits.steps:
                return [], np.empty((0, 0), dtype=np.float32)
        finished = self._in_progress.pop(0)
        self.events.append(("finish", len(finished)))
        return finished, np.ones((len(finished), 4), dtype=np.float32)

    def prepare(self) -> bool:
        return False

    def shut_down(self) -> None:
        pass


def engine_of(core: TwoSteps) -> SteppingEngine:
    """An engine that steps a core; texts are passed to it as token ids."""

    class Engine(SteppingEngine):
        backend: Any = SimpleNamespace(
            NAME="test",
            load=lambda: None,
            start=lambda *_: (core, None, Served("test", "model", 4, 4, 100)),
        )

    return Engine("model", "float32", None)


async def test_texts_that_arrive_while_the_core_waits_share_its_next_step() -> None:
    core = TwoSteps()
    engine = engine_of(core)
    calls = [asyncio.create_task(engine.embed([[1]], None, urgent=True))]
    assert await asyncio.to_thread(core.waits.wait, SECONDS)
    calls += [asyncio.create_task(engine.embed([[1]], None, urgent=True)) for _ in range(3)]
    await asyncio.sleep(0)  # they submit their texts
    core.may_go.set()
    rows = await asyncio.wait_for(asyncio.gather(*calls), SECONDS)
    assert [row.shape for row in rows] == [(1, 4)] * 4
    assert core.events == [("start", 1), ("start", 3), ("finish", 1), ("finish", 3)]
    await engine.close()


async def test_documents_without_queries_start_their_steps_at_once() -> None:
    core = TwoSteps()
    engine = engine_of(core)
    texts = [[1] * 50 for _ in range(8)]
    rows = await asyncio.wait_for(engine.embed([*texts], None, urgent=False), SECONDS)
    assert rows.shape == (8, 4)
    assert not core.waits.is_set(), "no query can come into the next step"
    await engine.close()


@pytest.mark.parametrize(
    ("said", "advised"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: no kernel image is available", False),
    ],
)
def test_death_of_an_engine_advises_smaller_steps_only_without_memory(
    said: str, advised: bool
) -> None:
    error = faults.death_error(RuntimeError(said), "PyTorch")
    assert said in str(error)
    assert "The next call starts a new one." in str(error)
    assert ("Lower max_num_batched_tokens" in str(error)) == advised
