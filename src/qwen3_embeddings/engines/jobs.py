"""Calls that wait for an engine in this process: their texts, vectors and answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from qwen3_embeddings.vectors import Vectors


@dataclass(eq=False)
class Job:
    """Prompts of one call, and the vectors that have been computed for them.

    Attributes:
        prompts: token ids of each prompt.
        dimensions: size of the vectors; None for the native size.
        urgent: True for queries, which have priority over documents.
        loop: the caller's event loop.
        answer: what the caller awaits on that loop.
        rows: the vectors, one row per prompt; None before the first one.
        done: number of prompts that have their vector.
        requests: ids of the prompts that the core holds, by index of the prompt.
    """

    prompts: list[list[int]]
    dimensions: int | None
    urgent: bool
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Vectors]
    rows: Vectors | None = None
    done: int = 0
    requests: dict[int, str] = field(default_factory=dict)

    def store(self, indices: list[int], rows: list[int], step: Vectors) -> None:
        """Store the vectors of some prompts.

        Args:
            indices: indices of the prompts.
            rows: row of each of them in `step`.
            step: vectors of a step, float32 (texts, native).
        """
        self.done += len(indices)
        if len(self.prompts) == 1:  # most calls: a copy would cost more than all the rest
            self.rows = step[rows[0] : rows[0] + 1, : self.dimensions]
            return
        if self.rows is None:
            size = self.dimensions or step.shape[1]
            self.rows = np.empty((len(self.prompts), size), dtype=np.float32)
        self.rows[indices] = step[rows, : self.dimensions]

    def settle(self, error: BaseException | None) -> None:
        """Set the answer, unless the caller has cancelled it; runs on the caller's loop."""
        if self.answer.done():
            return
        if error is not None:
            self.answer.set_exception(error)
        else:
            assert self.rows is not None
            self.answer.set_result(self.rows)


def deliver(jobs: Iterable[Job], error: BaseException | None = None) -> None:
    """Answer calls on their own event loops, each with its vectors or all with one error.

    A loop is woken once for all of its calls. Each wake-up is a system call that releases the
    interpreter's lock, and this thread can wait milliseconds to acquire it again.
    """

    def settle(theirs: list[Job]) -> None:
        for job in theirs:
            job.settle(error)

    by_loop: dict[asyncio.AbstractEventLoop, list[Job]] = {}
    for job in jobs:
        by_loop.setdefault(job.loop, []).append(job)
    for loop, theirs in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed
            loop.call_soon_threadsafe(settle, theirs)
