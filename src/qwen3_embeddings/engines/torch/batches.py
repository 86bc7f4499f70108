"""Pack texts into the tensors of one step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qwen3_embeddings.engines.scheduling import Limits


@dataclass(frozen=True)
class Batch:
    """The texts of one step, one behind the other.

    Attributes:
        ids: token ids, int32 (tokens).
        positions: position of each token in its text, int32 (tokens).
        bounds: where each text begins, and where the last one ends, int32 (texts + 1).
        last: index of the last token of each text, int32 (texts).
        longest: upper limit of the number of tokens of a text.
        runs: pairs of a number of texts and their length, in order.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    bounds: torch.Tensor
    last: torch.Tensor
    longest: int
    runs: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Size:
    """The size of a step; texts of other sizes are padded to it for a CUDA graph.

    Attributes:
        tokens: number of tokens.
        texts: number of texts.
        longest: most tokens of one text.
    """

    tokens: int
    texts: int
    longest: int


def take(waiting: Mapping[str, Sequence[int]], limits: Limits) -> list[str]:
    """Return the texts of the next step, the shortest first.

    The first text that waits is always taken, even if it is longer than a step. Texts of equal
    length follow each other, so that attention on a CPU can compute them together.

    Args:
        waiting: token ids by name, in the order in which they came.
        limits: most tokens and texts in one step.
    """
    chosen: list[str] = []
    tokens = 0
    for name, ids in waiting.items():
        tokens += len(ids)
        if chosen and (tokens > limits.tokens or len(chosen) == limits.texts):
            break
        chosen.append(name)
    return sorted(chosen, key=lambda name: len(waiting[name]))


def size_of(texts: Sequence[Sequence[int]]) -> Size:
    """Return the size of a step without padding."""
    lengths = [len(ids) for ids in texts]
    return Size(sum(lengths), len(lengths), max(lengths))


def pack(texts: Sequence[Sequence[int]], size: Size, *, pin: bool = False) -> torch.Tensor:
    """Return one int32 tensor on the host that holds what `unpack` returns.

    Padding is a text of its own. Attention leaves the values of tokens outside all texts undefined.
    A kernel that reads past the end of a text would multiply such a NaN by zero. Further texts of
    the padded size have no tokens; their last token is the last of the step. All padding has
    position 0, which every table of positions has.

    Args:
        texts: token ids of each text.
        size: size of the step, at least that of the texts.
        pin: whether to use pinned memory, from which a GPU can copy while the host goes on.
    """
    held = np.zeros(size.texts + 1, dtype=np.int32)
    lengths = np.fromiter(map(len, texts), dtype=np.int32, count=len(texts))
    np.cumsum(lengths, out=held[1 : len(texts) + 1])
    total = int(held[len(texts)])
    held[len(texts) + 1 :] = size.tokens
    buffer = torch.zeros(2 * size.tokens + 2 * size.texts + 1, dtype=torch.int32, pin_memory=pin)
    ids, positions, bounds, last = np.split(buffer.numpy(), _ends(size))
    ids[:total] = np.fromiter(itertools.chain.from_iterable(texts), dtype=np.int32, count=total)
    bounds[:] = held
    last[:] = held[1:] - 1
    positions[:total] = np.arange(total, dtype=np.int32) - np.repeat(held[: len(texts)], lengths)
    return buffer


def unpack(buffer: torch.Tensor, size: Size, lengths: Iterable[int] = ()) -> Batch:
    """Return the batch whose tensors are parts of a packed one.

    Args:
        buffer: what `pack` returned, on whatever device.
        size: the size it was packed to.
        lengths: number of tokens of each text, for attention that needs them on the host.
    """
    ids, positions, bounds, last = torch.tensor_split(buffer, _ends(size))
    runs = [(len(list(equal)), length) for length, equal in itertools.groupby(lengths)]
    return Batch(ids, positions, bounds, last, size.longest, runs)


def _ends(size: Size) -> list[int]:
    """Return where the first three of the four parts of a packed tensor end."""
    return list(itertools.accumulate((size.tokens, size.tokens, size.texts + 1)))
