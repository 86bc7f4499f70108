"""CUDA graphs of whole steps, for a ladder of sizes.

A small step's kernels take the host longer to launch than the GPU to run. A graph launches all of
them at once. Steps are padded to the next size of the ladder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen3_embeddings.engines.torch import batches
from qwen3_embeddings.engines.torch.batches import Size
from qwen3_embeddings.engines.torch.model import Qwen3

TOKENS = (
    *(32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072),
    *(4096, 4608, 5120, 6144, 7168, 8192),
)
"""Token counts of the ladder. Above 8,192 tokens a step of 0.6B keeps an H100 busy longer
than the host."""
MOST_TEXTS = 256
LONGEST = 2048
"""Most tokens of one text in a graph. FlashAttention 2 launches blocks for this length per text."""


def ladder(most_tokens: int) -> list[Size]:
    """Return the sizes of the graphs, rising, up to a number of tokens.

    A size holds one text per eight tokens, and one more for the padding. The padding of a step is
    never longer than `LONGEST`, because sizes are less than that apart.
    """
    return [
        Size(tokens, max(4, min(MOST_TEXTS, tokens // 8)) + 1, min(tokens, LONGEST))
        for tokens in TOKENS
        if tokens <= most_tokens
    ]


def fitting(size: Size, sizes: list[Size]) -> Size | None:
    """Return the first size into which a step and the text of its padding fit; None for none."""
    for padded in sizes:
        if padded.tokens >= size.tokens and padded.texts > size.texts:
            return padded if size.longest <= padded.longest else None
    return None


@dataclass(frozen=True)
class _Captured:
    """A graph, the tensor that it reads, and the tensor that it writes."""

    graph: torch.cuda.CUDAGraph
    source: torch.Tensor
    rows: torch.Tensor


class Graphs:
    """The graphs of one model. They share one pool of memory, so the largest is captured first.

    A step whose graph is missing runs without. Its graph is captured before the next step, and all
    others while the engine is idle.

    Args:
        model: the loaded model.
        most_tokens: most tokens in one step.
        device: the GPU.
    """

    def __init__(self, model: Qwen3, most_tokens: int, device: torch.device) -> None:
        self._model, self._device = model, device
        self._sizes = ladder(most_tokens)
        self._wanted: Size | None = None  # of the last step that had to run without
        self._captured: dict[Size, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # cuBLAS keeps 32 MiB for every stream that it has been used on, until the process ends.
        self._stream = torch.cuda.Stream(device)

    def find(self, size: Size) -> Size | None:
        """Return the size of a captured graph for a step; None if the step has to run without."""
        padded = fitting(size, self._sizes)
        if padded in self._captured:
            return padded
        self._wanted = padded
        return None

    def replay(self, size: Size, source: torch.Tensor) -> torch.Tensor:
        """Run a step that was packed to a graph's size; return its vectors, on the device.

        The next replay overwrites them: copy them on the same stream.
        """
        captured = self._captured[size]
        captured.source.copy_(source, non_blocking=True)
        captured.graph.replay()
        return captured.rows

    def capture_wanted(self) -> None:
        """Capture the graph that the last step lacked."""
        if self._wanted and self._wanted not in self._captured:
            self._capture(self._wanted)

    def capture_next(self) -> bool:
        """Capture the largest size that is left; return whether there was one."""
        left = [size for size in self._sizes if size not in self._captured]
        if left:
            self._capture(left[-1])
        return bool(left)

    def _capture(self, size: Size) -> None:
        source = batches.pack([[0]], size).to(self._device)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate at their first calls
            for _ in range(2):
                self._model.forward(batches.unpack(source, size))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads may call CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode=mode):
            rows = self._model.forward(batches.unpack(source, size))
        self._captured[size] = _Captured(graph, source, rows)
