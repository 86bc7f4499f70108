"""How far rows are apart, and what counts as equal."""

from __future__ import annotations

import numpy as np

from qwen3_embeddings.vectors import Vectors, normalize

SAME = 2e-3
"""1 - cosine up to which two vectors count as one text's: the noise of bfloat16 stays below (at
most 1e-3 between two engines, tests/test_parity.py; 8e-5 against float32 on a GPU)."""

IDENTICAL = 1e-6
"""1 - cosine of two float32 vectors of the very same tokens, computed alone."""

QUANTISED = 5e-2
"""1 - cosine up to which a difference can be explained by quantised weights."""


def distance(one: Vectors, other: Vectors) -> float:
    """The largest 1 - cosine of two matrices' rows, at least 0."""
    a, b = (normalize(rows).astype(np.float64) for rows in (one, other))
    return max(0.0, float((1 - (a * b).sum(axis=-1)).max()))
