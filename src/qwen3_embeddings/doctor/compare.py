"""Distances between vectors, and the limits that checks compare them with.

The limits come from measurements over checkpoints of several shapes. docs/doctor.md lists the
smallest margin of each, and tools/doctor_margins.py measures them.
"""

from __future__ import annotations

import numpy as np

from qwen3_embeddings.doctor.report import Status
from qwen3_embeddings.vectors import Vectors, normalize

IDENTICAL = 1e-9
"""Largest 1 - cosine at which two prompts count as the same tokens to the model."""

SAME = 2e-3
"""Largest 1 - cosine that the rounding of bfloat16 explains."""

DIFFERENT = 5e-2
"""Smallest 1 - cosine that neither rounding nor quantization to eight bits explains."""

FAR = 100.0
"""Factor by which one distance must exceed another to count as of another order."""


def distance(one: Vectors, other: Vectors) -> float:
    """Return the largest 1 - cosine between the rows of two matrices.

    Computed from the difference of unit rows, which is exact for rows that are nearly equal.

    Args:
        one: Matrix (n, dimensions).
        other: Matrix of the same shape.

    Returns:
        A value from 0 (equal directions) to 2.

    Raises:
        InvalidVectorError: A row is not finite, or has length zero.
    """
    a, b = (normalize(rows).astype(np.float64) for rows in (one, other))
    return float(((a - b) ** 2).sum(axis=-1).max() / 2)


def angle(one: Vectors, other: Vectors) -> float:
    """Return the largest angle between the rows of two matrices, in radians.

    Angles add up along a path and scale with the change of a vector; 1 - cosine scales with its
    square.
    """
    return float(2 * np.arcsin(min(1.0, (distance(one, other) / 2) ** 0.5)))


def graded(apart: float) -> Status:
    """Return the status of a distance that should be zero except for rounding.

    Between `SAME` and `DIFFERENT` the cause may be the precision of the weights, so that is a
    warning and never a failure.
    """
    if apart <= SAME:
        return "ok"
    return "warning" if apart <= DIFFERENT else "failure"
