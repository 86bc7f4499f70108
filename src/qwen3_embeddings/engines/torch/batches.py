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
    """The texts of one step, joined into one list of tokens.

    Attributes:
        ids: token ids, int32 (tokens).
        positions: position of each token in its text, int32 (tokens).
        bounds: index of the first token of each text, and the number of tokens, int32 (texts + 1).
        last: index of the last token of each text, int32 (texts).
        longest: upper limit of the number of tokens of a text.
        runs: for texts of equal length in succession, their number and their length in tokens;
            empty if the lengths are not known on the host.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    bounds: torch.Tensor
    last: torch.Tensor
    longest: int
    runs: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Size:
    """The size of a step, or the size of a CUDA graph, to which smaller steps are padded.

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
        waiting: token ids of each text by its name, in the order in which they were added.
        limits: most tokens and texts in one step.

    Returns:
        Names of texts.
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
    """Return one int32 tensor on the host whose parts `unpack` returns.

    Padding becomes texts of their own, none longer than `size.longest`. Attention leaves the rows
    of tokens outside all texts undefined, and they may be NaN. A kernel that reads past the end of
    a text multiplies such rows by zero, which leaves NaN. If the padded size has further texts,
    they are empty, and their last token is the last token of the step. Padding tokens have id and
    position 0, which every model has.

    Args:
        texts: token ids of each text.
        size: size of the step, at least that of the texts.
        pin: whether to use pinned memory, from which a GPU can copy while the host goes on.

    Returns:
        ids, positions, bounds and last of `Batch`, joined.
    """
    offsets = np.zeros(size.texts + 1, dtype=np.int32)
    lengths = np.fromiter(map(len, texts), dtype=np.int32, count=len(texts))
    np.cumsum(lengths, out=offsets[1 : len(texts) + 1])
    total = int(offsets[len(texts)])
    spare = np.arange(1, size.texts - len(texts) + 1, dtype=np.int32)
    offsets[len(texts) + 1 :] = np.minimum(total + size.longest * spare, size.tokens)
    buffer = torch.zeros(2 * size.tokens + 2 * size.texts + 1, dtype=torch.int32, pin_memory=pin)
    ids, positions, bounds, last = np.split(buffer.numpy(), _ends(size))
    ids[:total] = np.fromiter(itertools.chain.from_iterable(texts), dtype=np.int32, count=total)
    bounds[:] = offsets
    last[:] = offsets[1:] - 1
    positions[:total] = np.arange(total, dtype=np.int32) - np.repeat(offsets[: len(texts)], lengths)
    return buffer


def unpack(buffer: torch.Tensor, size: Size, lengths: Iterable[int] = ()) -> Batch:
    """Return the batch that a packed tensor holds. Its tensors are views.

    Args:
        buffer: what `pack` returned, on any device.
        size: the size it was packed to.
        lengths: number of tokens of each text, for attention that needs them on the host.
    """
    ids, positions, bounds, last = torch.tensor_split(buffer, _ends(size))
    runs = [(len(list(equal)), length) for length, equal in itertools.groupby(lengths)]
    return Batch(ids, positions, bounds, last, size.longest, runs)


def _ends(size: Size) -> list[int]:
    """Return where the first three of the four parts of a packed tensor end."""
    return list(itertools.accumulate((size.tokens, size.tokens, size.texts + 1)))
