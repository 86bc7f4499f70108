"""Vectors: sizes, truncation, normalization, similarity, and conversion to lists.

Matryoshka Representation Learning (arXiv 2205.13147) trains the first dimensions of a vector to be
a usable embedding on their own. A shorter vector is the first d dimensions, normalized again.
Without the second step its length is wrong, and dot products no longer rank like cosines.
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Iterator
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen3_embeddings.errors import DimensionsError, InvalidVectorError
from qwen3_embeddings.models import MIN_DIMENSIONS

SIZE_VERSION = 1
"""Version of `truncate` and `normalize`, which every fingerprint hashes. Raise it when one of them
returns other vectors, beyond rounding, so that no cache serves older ones."""

Vectors = NDArray[np.float32]
Vector = np.ndarray[tuple[int], np.dtype[np.float32]]
"""One vector (dimensions,)."""
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""Vectors (n, dimensions), one per row."""


def check_dimensions(dimensions: SupportsIndex | float, native: int | None = None) -> int:
    """Return a size as an int, if it is within the Matryoshka range.

    Args:
        dimensions: the size. A float without a fraction counts as an int: some configuration
            readers turn 64 into 64.0, and engines hang on it.
        native: native size of the model; None checks the lower end only.

    Raises:
        DimensionsError: the size is out of range (32 to `native`), or not a whole number.
    """
    span = f"a whole number from {MIN_DIMENSIONS} to {native or 'the native size'}"
    whole: Any = dimensions
    if isinstance(whole, float) and whole.is_integer():
        whole = int(whole)
    try:
        size = operator.index(whole)
    except TypeError:
        size = -1
    if isinstance(dimensions, str):
        raise DimensionsError(
            f"dimensions={dimensions!r} is a str: use {span}, for example int({dimensions!r})."
        )
    if isinstance(dimensions, bool) or size < MIN_DIMENSIONS or (native and size > native):
        raise DimensionsError(
            f"dimensions={dimensions!r} is out of range: use {span}, or None for the native size."
        )
    return size


def truncate(vectors: ArrayLike, dimensions: SupportsIndex | float) -> Vectors:
    """Return the first `dimensions` dimensions of each vector, normalized again.

    Args:
        vectors: one vector (native,) or a matrix (n, native).
        dimensions: target size, 32 to native.

    Returns:
        float32 array (dimensions,) or (n, dimensions), a copy.

    Raises:
        DimensionsError: `dimensions` is out of range, or `vectors` have none.
        InvalidVectorError: a row is not finite, or zero in its first `dimensions` dimensions, or
            `vectors` is neither a vector nor a matrix of real numbers.

    Example:
        >>> truncate(embedder.encode_document(["Hello"]), 256).shape
        (1, 256)
    """
    whole = _real("vectors", vectors)
    if not whole.shape[-1]:
        raise DimensionsError("vectors have no dimensions. Pass what an embedder returned.")
    return _unit("vectors", whole[..., : check_dimensions(dimensions, whole.shape[-1])])


def _real(name: str, value: ArrayLike) -> Vectors:
    """Return a caller's vector or matrix as float32.

    Raises:
        InvalidVectorError: it is something else.
    """
    wanted = "Pass one vector (dimensions,) or a matrix (n, dimensions) of real numbers."
    try:
        array = np.asarray(value)
        if array.dtype.kind in "cSU":  # NumPy would drop imaginary parts, and parse strings
            raise TypeError(f"its values are {array.dtype}")
        array = array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidVectorError(f"{name} cannot be read as vectors ({error}). {wanted}") from error
    if array.ndim not in {1, 2}:
        raise InvalidVectorError(f"{name} is an array of {array.ndim} axes. {wanted}")
    return array


class _RowError(InvalidVectorError):
    """`positions` are rows of an argument, which the message names: there are no texts."""

    def _say(self) -> str:
        return self.message


def _unit(name: str, vectors: Vectors) -> Vectors:
    """Return a caller's vectors normalized; an error names the argument, as there are no texts."""
    try:
        return normalize(vectors)
    except InvalidVectorError as error:
        rows = ", ".join(map(str, error.positions[:10]))
        where = f"{name}[{rows}]" if vectors.ndim == 2 else name
        raise _RowError(
            f"{where} is not finite or has length zero, so it has no direction. Leave it out, or "
            "embed its text again.",
            error.positions,
        ) from None


def normalize(vectors: Vectors) -> Vectors:
    """Return each row divided by its Euclidean length, as a float32 copy.

    Raises:
        InvalidVectorError: a row contains NaN or infinity, or has length zero.
    """
    # float64: the squares of very small and very large values are outside float32
    lengths = np.sqrt(np.einsum("...i,...i->...", vectors, vectors, dtype=np.float64))
    usable = np.isfinite(lengths) & (lengths > 0)
    if not usable.all():
        bad = [int(i) for i in np.flatnonzero(~np.atleast_1d(usable))]
        raise InvalidVectorError(
            "the vector is not finite or has length zero. Run the model in bfloat16 or float32: "
            "float16 overflows on some texts.",
            bad,
        )
    unit: Vectors = (vectors / lengths[..., None]).astype(np.float32)
    return unit


def similarity(a: ArrayLike, b: ArrayLike) -> Matrix:
    """Return the cosine similarity of every vector in `a` with every vector in `b`.

    Args:
        a: vectors (n, dimensions), or one vector (dimensions,).
        b: vectors (m, dimensions), or one vector (dimensions,).

    Returns:
        float32 array (n, m); one vector counts as a matrix of one row.

    Raises:
        DimensionsError: `a` and `b` have vectors of different sizes.
        InvalidVectorError: a vector is not finite or has length zero, or `a` or `b` is neither a
            vector nor a matrix of real numbers.

    Example:
        >>> similarity([[1.0, 0.0], [0.0, 2.0]], [3.0, 0.0]).tolist()
        [[1.0], [0.0]]
    """
    rows, columns = (np.atleast_2d(_real(name, side)) for name, side in (("a", a), ("b", b)))
    if rows.shape[-1] != columns.shape[-1]:
        raise DimensionsError(
            f"vectors of {rows.shape[-1]} and of {columns.shape[-1]} dimensions have no cosine. "
            "Embed both with the same model and dimensions."
        )
    cosines: Matrix = _unit("a", rows) @ _unit("b", columns).T
    return cosines


BLOCK = 256
"""Rows converted at once: about 10 ms with 1,024 dimensions each."""


def lists(vectors: Vectors) -> list[list[float]]:
    """Return the rows of a matrix (n, dimensions) as lists.

    With 1,024 dimensions this costs as much as the rest of a client's work. It is done in blocks,
    so that other threads can run between them.
    """
    return [row for block in _blocks(vectors) for row in block]


async def alists(vectors: Vectors) -> list[list[float]]:
    """Return the rows as lists, and let other tasks of the event loop run between blocks."""
    rows: list[list[float]] = []
    for block in _blocks(vectors):
        rows += block
        await asyncio.sleep(0)
    return rows


def _blocks(vectors: Vectors) -> Iterator[list[list[float]]]:
    for start in range(0, len(vectors), BLOCK):
        yield vectors[start : start + BLOCK].tolist()
