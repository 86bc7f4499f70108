"""Policies for texts longer than the model's context.

They work on token ids that end with the end token. The embedding is the hidden state of that
token, and the instruction is at the front, so every policy keeps both.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.vectors import Vectors, normalize

Overflow = Literal["error", "truncate", "mean"]
"""``error`` raises; ``truncate`` drops the end of the text; ``mean`` embeds pieces of the text and
averages them, weighted by their tokens."""

TRUNCATE_VERSION = 1
"""Version of `cut`, which fingerprints with ``overflow="truncate"`` hash. Raise it when other
tokens of an over-long text are kept, so that no cache serves older vectors."""

MEAN_VERSION = 1
"""Version of `split` and `merge`, which fingerprints with ``overflow="mean"`` hash. Raise it when
the pieces of a text or their weights change, so that no cache serves older vectors."""


def check_overflow(overflow: str) -> Overflow:
    """Return `overflow` if it is a policy.

    Raises:
        ConfigurationError: it is not.
    """
    if overflow not in get_args(Overflow):
        raise ConfigurationError(
            f"overflow={overflow!r} is not a policy. Use one of {', '.join(get_args(Overflow))}."
        )
    return overflow  # type: ignore[return-value]


def cut(ids: list[int], limit: int) -> list[int]:
    """Return the first `limit` - 1 tokens and the end token."""
    return [*ids[: limit - 1], ids[-1]]


def split(ids: list[int], limit: int, head: int) -> list[list[int]]:
    """Return pieces of at most `limit` tokens, each with the first `head` tokens and the end token.

    Raises:
        ConfigurationError: head and end token leave no space for text.
    """
    size = limit - head - 1
    if size < 1:
        raise ConfigurationError(
            f"the instruction has {head} of {limit} tokens, which leaves no space for text. "
            "Shorten query_instruction, or raise max_model_len."
        )
    body = ids[head:-1]
    starts = range(0, len(body), size)
    return [[*ids[:head], *body[start : start + size], ids[-1]] for start in starts]


def shared_head(ids: list[int], template: list[int]) -> int:
    """Return how many leading tokens two encodings share: the instruction's part of `ids`."""
    for position, (one, other) in enumerate(zip(ids, template, strict=False)):
        if one != other:
            return position
    return min(len(ids), len(template))


def merge(vectors: Vectors, owners: ArrayLike, weights: ArrayLike) -> Vectors:
    """Return one row per owner: the weighted mean of its unit vectors, normalized again.

    Args:
        vectors: float32 (pieces, d), unit rows, pieces of one text together.
        owners: for each piece the index of its text, rising.
        weights: for each piece its number of text tokens.

    Raises:
        InvalidVectorError: a mean is zero; its position counts owners.
    """
    if not len(vectors):
        return vectors
    weighted = normalize(vectors).astype(np.float64) * np.asarray(weights)[:, None]
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    return normalize(np.add.reduceat(weighted, starts, axis=0).astype(np.float32))
