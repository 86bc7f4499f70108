"""Vectors as the lists of floats that the frameworks want.

With 1,024 numbers a text this costs as much as all else the client does, so it is done in blocks:
between two of them other threads and tasks run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from qwen3_embeddings.matryoshka import Vectors

BLOCK = 256
"""Rows converted at once: with 1,024 numbers each some 10 ms."""


def lists(vectors: Vectors) -> list[list[float]]:
    """The rows of a matrix (n, dimensions) as lists."""
    return [row for block in _blocks(vectors) for row in block]


async def alists(vectors: Vectors) -> list[list[float]]:
    """`lists` that lets the event loop's other tasks run."""
    rows: list[list[float]] = []
    for block in _blocks(vectors):
        rows += block
        await asyncio.sleep(0)
    return rows


def _blocks(vectors: Vectors) -> Iterator[list[list[float]]]:
    for start in range(0, len(vectors), BLOCK):
        yield vectors[start : start + BLOCK].tolist()
