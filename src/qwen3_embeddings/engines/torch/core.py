"""The core of the PyTorch engine: texts wait, and each step computes some of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwen3_embeddings.engines.scheduling import Limits
from qwen3_embeddings.engines.torch import batches
from qwen3_embeddings.engines.torch.graphs import Graphs
from qwen3_embeddings.engines.torch.model import Qwen3
from qwen3_embeddings.engines.torch.settings import Settings
from qwen3_embeddings.vectors import Vectors

STEPS = {"cpu": 1, "cuda": 2}
"""Steps in flight, by type of device."""


@dataclass(frozen=True)
class _Flight:
    """A step that the device computes.

    Attributes:
        names: its texts.
        rows: their vectors on the host, once `done` has passed.
        done: the event behind the copy of the vectors; None if they are there.
        source: the tensor the device copies the texts from, which must not be freed before.
    """

    names: list[str]
    rows: torch.Tensor
    done: Any
    source: torch.Tensor


class Core:
    """Computes vectors, step by step. One thread uses it.

    On a GPU two steps are in flight: the host prepares one while the device computes the other.

    Args:
        model: the loaded model.
        settings: what was asked for.
    """

    def __init__(self, model: Qwen3, settings: Settings) -> None:
        self._model, self._settings = model, settings
        steps = STEPS[settings.device.type]
        self.limits = Limits(settings.max_num_batched_tokens, settings.max_num_seqs, steps)
        self.context = settings.max_model_len
        self._waiting: dict[str, list[int]] = {}
        self._flights: deque[_Flight] = deque()
        self._graphs: Graphs | None = None
        if settings.gpu:
            torch.cuda.set_device(settings.device)
            if not settings.enforce_eager and settings.dtype == torch.bfloat16:
                self._graphs = Graphs(model, settings.max_num_batched_tokens, settings.device)

    def add(self, request_id: str, ids: list[int]) -> None:
        """Add a text, as token ids, to those that the next steps compute."""
        self._waiting[request_id] = ids

    def abort(self, request_ids: list[str]) -> None:
        """Drop texts that were added and not answered; those in flight are computed for nobody."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)

    def step(self) -> tuple[list[str], Vectors]:
        """Start a step, and return the vectors of the oldest one when no more may be in flight."""
        with torch.inference_mode():
            if self._graphs:
                self._graphs.capture_wanted()
            names = batches.take(self._waiting, self.limits)
            if names:
                self._flights.append(self._launch(names))
            if not self._flights or (names and len(self._flights) < self.limits.steps):
                return [], np.empty((0, 0), dtype=np.float32)
            flight = self._flights.popleft()
            if flight.done is not None:
                flight.done.synchronize()
            return flight.names, flight.rows.numpy()

    def prepare(self) -> bool:
        """Capture the next CUDA graph; return whether more are left."""
        with torch.inference_mode():
            return self._graphs is not None and self._graphs.capture_next()

    def shut_down(self) -> None:
        """Let go of model and graphs, once the device computes nothing more."""
        if self._settings.gpu:
            torch.cuda.synchronize(self._settings.device)
        self._flights.clear()
        self._waiting.clear()
        del self._model, self._graphs

    def _launch(self, names: list[str]) -> _Flight:
        texts = [self._waiting.pop(name) for name in names]
        size = batches.size_of(texts)
        padded = self._graphs.find(size) if self._graphs else None
        source = batches.pack(texts, padded or size, pin=self._settings.gpu)
        if padded and self._graphs:
            rows = self._graphs.replay(padded, source)[: size.texts]
        else:
            there = source.to(self._settings.device, non_blocking=True)
            rows = self._model.forward(batches.unpack(there, size, map(len, texts)))
        if not self._settings.gpu:
            return _Flight(names, rows, None, source)
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return _Flight(names, host, done, source)
