"""The core of the PyTorch engine: texts wait, and each step computes some of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from qwen3_embeddings.engines.scheduling import Limits, mixed_tokens
from qwen3_embeddings.engines.torch import batches
from qwen3_embeddings.engines.torch.graphs import Graphs, largest_graph
from qwen3_embeddings.engines.torch.model import Qwen3
from qwen3_embeddings.engines.torch.settings import Settings
from qwen3_embeddings.vectors import Vectors

STEPS = {"cpu": 1, "cuda": 2}
"""Steps in flight, by type of device. A GPU computes one while the host prepares the next."""
QUERY_TOKENS = 4000
"""Most tokens of queries in one step on a GPU. While the GPU computes some of the waiting queries,
the host answers others. On an H100 with the 0.6B model and one step for all, 64 callers of single
texts got 2,610 texts/s and 256 callers 2,590. With this limit they got 2,860 and 3,160. 8,192
queries in one call got 6 % less (benchmarks/notes/torch-engine.md). The last text may exceed the
limit, so the limit is below the 4,096 tokens of a CUDA graph of small models."""


@dataclass(frozen=True)
class _Flight:
    """A step that the device computes.

    Attributes:
        request_ids: its texts.
        rows: their vectors on the host, float32 (texts, hidden); complete after `done`.
        halfway: event that follows half of the layers; None on a CPU.
        done: event that follows the copy of the vectors to the host; None on a CPU.
        source: the packed texts, which the device may still be copying.
    """

    request_ids: list[str]
    rows: torch.Tensor
    halfway: torch.cuda.Event | None
    done: torch.cuda.Event | None
    source: torch.Tensor


class Core:
    """Computes vectors, step by step. One thread uses it.

    Args:
        model: the loaded model.
        settings: device, precision and limits.
        parameters: number of the model's parameters.
    """

    def __init__(self, model: Qwen3, settings: Settings, parameters: int) -> None:
        self._model, self._settings = model, settings
        steps = STEPS[settings.device.type]
        tokens = settings.max_num_batched_tokens
        queries = min(tokens, QUERY_TOKENS) if settings.gpu else tokens
        mixed = mixed_tokens(parameters)
        self.limits = Limits(tokens, settings.max_num_seqs, steps, queries, mixed)
        self.context = settings.max_model_len
        self._waiting: dict[str, list[int]] = {}
        self._flights: deque[_Flight] = deque()
        self._graphs: Graphs | None = None
        if settings.gpu:
            torch.cuda.set_device(settings.device)
            if not settings.enforce_eager and settings.dtype == torch.bfloat16:
                most = min(tokens, largest_graph(parameters))
                self._graphs = Graphs(model, most, settings.device)

    def warm_up(self) -> None:
        """Compute one text. If a kernel does not run on this device, the start then fails."""
        if self._settings.gpu:
            # PyTorch would place cuBLAS's workspace, which is never freed, in a block that loading
            # the weights has left. The whole block, 298 MiB for 0.6B, would stay allocated.
            torch.cuda.empty_cache()
        # For one token, FlashAttention and cuBLAS have other kernels than for most texts. So the
        # text is as long as a short query.
        text = [[0] * min(32, self.context)]
        size = batches.size_of(text)
        with torch.inference_mode():
            source = batches.pack(text, size).to(self._settings.device)
            self._model.forward(batches.unpack(source, size, [size.tokens])).cpu()

    def add(self, request_id: str, ids: list[int]) -> None:
        """Queue a text, as token ids, for the next steps."""
        self._waiting[request_id] = ids

    def abort(self, request_ids: list[str]) -> None:
        """Drop texts that wait. Those in flight are still computed, and returned by `step`."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)

    def wait(self) -> None:
        """Wait until the GPU has computed half of the step that was started last.

        A text that arrives meanwhile can be a part of the next step. The other half, 4 ms for 4,096
        tokens of the 0.6B model on an H100, is enough time to start that step.
        """
        if self._flights and (halfway := self._flights[-1].halfway) is not None:
            halfway.synchronize()

    def step(self) -> tuple[list[str], Vectors]:
        """Start a step if texts wait; finish the oldest one if the next call may not start another.

        Returns:
            Request ids and vectors of the finished step; empty if none was finished.
        """
        with torch.inference_mode():
            if self._graphs:
                self._graphs.capture_wanted()
            request_ids = batches.take(self._waiting, self.limits)
            if request_ids:
                self._flights.append(self._launch(request_ids))
            if not self._flights or (request_ids and len(self._flights) < self.limits.steps):
                return [], np.empty((0, 0), dtype=np.float32)
            flight = self._flights.popleft()
            if flight.done is not None:
                flight.done.synchronize()
            return flight.request_ids, flight.rows.numpy()

    def prepare(self) -> bool:
        """Capture the next CUDA graph; return False if there was none left."""
        with torch.inference_mode():
            return self._graphs is not None and self._graphs.capture_next()

    def shut_down(self) -> None:
        """Wait for the device, and release model and graphs."""
        if self._settings.gpu:
            torch.cuda.synchronize(self._settings.device)
        self._flights.clear()
        self._waiting.clear()
        del self._model, self._graphs

    def _launch(self, request_ids: list[str]) -> _Flight:
        """Start a step: with a CUDA graph if one fits and was captured."""
        texts = [self._waiting.pop(request_id) for request_id in request_ids]
        size = batches.size_of(texts)
        padded = self._graphs.find(size) if self._graphs else None
        source = batches.pack(texts, padded or size, pin=self._settings.gpu)
        if padded and self._graphs:
            rows, halfway = self._graphs.replay(padded, source)
            rows = rows[: size.texts]
        else:
            halfway = torch.cuda.Event() if self._settings.gpu else None
            packed = source.to(self._settings.device, non_blocking=True)
            rows = self._model.forward(batches.unpack(packed, size, map(len, texts)), halfway)
        if not self._settings.gpu:
            return _Flight(request_ids, rows, None, None, source)
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return _Flight(request_ids, host, halfway, done, source)
