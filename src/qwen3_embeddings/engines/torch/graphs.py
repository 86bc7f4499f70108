"""CUDA graphs of whole steps, for a fixed list of sizes.

For a small step, the host needs longer to launch the kernels than the GPU to run them. A graph
launches all of them at once. Steps are padded to the next size of the list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen3_embeddings.engines.torch import batches
from qwen3_embeddings.engines.torch.batches import Size
from qwen3_embeddings.engines.torch.model import Qwen3
from qwen3_embeddings.models import LARGE_MODEL

TOKENS = (
    *(32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072),
    *(4096, 4608, 5120, 6144, 7168, 8192),
)
"""Token counts of the sizes. Above 8,192 tokens a step of 0.6B keeps an H100 busy longer than the
host, so a graph would save nothing."""
LARGE_MODEL_TOKENS = 2048
"""Most tokens of a graph for a large model. Larger steps keep the GPU busy longer than the host.
Without a graph they need no padding. On an H100 with the 4B model, 64 callers of single texts got
2 % more texts/s than with graphs up to 8,192 tokens (benchmarks/notes/torch-engine.md)."""
MOST_TEXTS = 256
"""Most texts of a step in a graph, without the padding."""
LONGEST = 2048
"""Most tokens of one text in a graph. A step with a longer text runs without a graph."""
NARROW = ((MOST_TEXTS, 256), (32, LONGEST))
"""Most texts, and most tokens of one text, of further graphs for FlashAttention 2. It launches as
many blocks for every text of a graph as the longest one could need. In a graph of 256 texts of
2,048 tokens, most blocks have nothing to do. On an H100 with the 0.6B model, a prototype of these
graphs embedded 823 documents/s during queries instead of 708 (benchmarks/notes/torch-engine.md)."""


def largest_graph(parameters: int) -> int:
    """Return the most tokens of a graph for a model with this number of parameters."""
    return TOKENS[-1] if parameters < LARGE_MODEL else LARGE_MODEL_TOKENS


def graph_sizes(most_tokens: int, *, narrow: bool) -> list[Size]:
    """Return the sizes of the graphs, up to a number of tokens.

    They are in ascending order of tokens, and a narrow size precedes a wide one. A size holds at
    most one text per eight tokens, and one more for the padding.

    Args:
        most_tokens: most tokens of a graph.
        narrow: whether to add the sizes of `NARROW`.
    """
    shapes = (*(NARROW if narrow else ()), (MOST_TEXTS, LONGEST))
    sizes = [
        Size(tokens, max(4, min(texts, tokens // 8)) + 1, min(tokens, longest))
        for tokens in TOKENS
        for texts, longest in shapes
        if tokens <= most_tokens
    ]
    return list(dict.fromkeys(sizes))  # small ones are equal


def fitting(size: Size, sizes: list[Size]) -> Size | None:
    """Return the first size that holds a step and its padding, if there is one.

    Args:
        size: size of the step.
        sizes: what `graph_sizes` returned.
    """
    for padded in sizes:
        spare = (padded.texts - size.texts) * padded.longest
        if 0 <= padded.tokens - size.tokens <= spare and size.longest <= padded.longest:
            return padded
    return None


@dataclass(frozen=True)
class _Captured:
    """A graph, the tensor that it reads, the tensor that it writes, and its event."""

    graph: torch.cuda.CUDAGraph
    source: torch.Tensor
    rows: torch.Tensor
    halfway: torch.cuda.Event


class Graphs:
    """The graphs of one model.

    A step whose graph is missing runs without one. That graph is captured before the next step, and
    all others while the engine is idle. The graphs share one pool of memory, so the largest one is
    captured first.

    Args:
        model: the loaded model.
        most_tokens: most tokens of a graph.
        device: the GPU.
    """

    def __init__(self, model: Qwen3, most_tokens: int, device: torch.device) -> None:
        self._model, self._device = model, device
        self._sizes = graph_sizes(most_tokens, narrow=model.kernels.dense_grid)
        self._wanted: Size | None = None  # size that the last step without a graph lacked
        self._captured: dict[Size, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # cuBLAS keeps 32 MiB for every stream that it has been used on, until the process ends.
        self._stream = torch.cuda.Stream(device)

    def find(self, size: Size) -> Size | None:
        """Return the size of the captured graph that fits a step.

        None if there is none. `capture_wanted` then captures it, if a graph can have this size.
        """
        padded = fitting(size, self._sizes)
        if padded in self._captured:
            return padded
        self._wanted = padded
        return None

    def replay(self, size: Size, source: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Run a step.

        Args:
            size: what `find` returned.
            source: the texts, packed to this size.

        Returns:
            The vectors on the device, float32 (size.texts, hidden), and the event that follows half
            of the layers. The next replay overwrites the vectors, so copy them on the same stream.
        """
        captured = self._captured[size]
        captured.source.copy_(source, non_blocking=True)
        captured.graph.replay()
        return captured.rows, captured.halfway

    def capture_wanted(self) -> None:
        """Capture the graph that the last step lacked."""
        if self._wanted and self._wanted not in self._captured:
            self._capture(self._wanted)

    def capture_next(self) -> bool:
        """Capture the largest graph that is missing; return False if none is."""
        left = [size for size in self._sizes if size not in self._captured]
        if left:
            self._capture(left[-1])
        return bool(left)

    def _capture(self, size: Size) -> None:
        """Capture the forward pass of one size, with a text of one token and padding."""
        source = batches.pack([[0]], size).to(self._device)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate memory at their first calls
            for _ in range(2):
                self._model.forward(batches.unpack(source, size))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        halfway = torch.cuda.Event(external=True)  # the host can wait for each replay
        mode = "thread_local"  # other threads may call CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode=mode):
            rows = self._model.forward(batches.unpack(source, size), halfway)
        self._captured[size] = _Captured(graph, source, rows, halfway)
