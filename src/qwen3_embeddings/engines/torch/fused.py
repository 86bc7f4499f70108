"""Triton kernels for the operations between matrix products, for 16 bits on a GPU.

Each kernel reads and writes its data once, and computes in float32. The residual stream, the sum of
all blocks, is float32 too. Rounded to 16 bits in each layer, it would cost most of the accuracy.
With 28 layers of random weights, 1 - cosine to float32 is 4e-5, and 1.3e-4 with a sum of 16 bits
(benchmarks/notes/torch-engine.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GATE_BLOCK = 1024
"""Columns that one program of the kernel of `gate` computes."""


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(x, residual, weight, out, epsilon, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tl.arange(0, block)
    inside = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    total = tl.load(residual + at, inside, 0.0) + tl.load(x + at, inside, 0.0).to(tl.float32)
    tl.store(residual + at, total, inside)
    scale = tl.rsqrt(tl.sum(total * total, 0) / width + epsilon)
    normed = total * scale * tl.load(weight + columns, inside, 0.0).to(tl.float32)
    tl.store(out + at, normed.to(out.dtype.element_ty), inside)


@triton.jit  # type: ignore[untyped-decorator]
def _heads(  # type: ignore[no-untyped-def]
    qkv,
    positions,
    angles,
    q_norm,
    k_norm,
    epsilon,
    row: tl.constexpr,
    queries: tl.constexpr,
    heads: tl.constexpr,
    half: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, block)[:, None]
    column = tl.arange(0, half)[None, :]
    at = qkv + token * row + head * (2 * half) + column
    inside = (head < heads) & (column < half)
    first = tl.load(at, inside, 0.0).to(tl.float32)
    second = tl.load(at + half, inside, 0.0).to(tl.float32)
    squares = tl.sum(first * first + second * second, 1)[:, None]
    scale = tl.rsqrt(squares / (2 * half) + epsilon)
    query = head < queries
    first_weight = tl.where(query, tl.load(q_norm + column), tl.load(k_norm + column))
    other = column + half
    second_weight = tl.where(query, tl.load(q_norm + other), tl.load(k_norm + other))
    first = first * scale * first_weight.to(tl.float32)
    second = second * scale * second_weight.to(tl.float32)
    angle = angles + tl.load(positions + token).to(tl.int64) * (2 * half) + column
    cosine, sine = tl.load(angle), tl.load(angle + half)
    element = qkv.dtype.element_ty
    tl.store(at, (first * cosine - second * sine).to(element), inside)
    tl.store(at + half, (second * cosine + first * sine).to(element), inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gate(gate_up, out, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    at = gate_up + row * (2 * width) + columns
    gate = tl.load(at, inside, 0.0).to(tl.float32)
    up = tl.load(at + width, inside, 0.0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + columns, gated.to(out.dtype.element_ty), inside)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Add `x` to the residual stream in place, and return the RMSNorm of the sum.

    Args:
        x: output of a block (tokens, hidden), 16 bits, contiguous.
        residual: the sum so far (tokens, hidden), float32, contiguous.
        weight: weight of the norm (hidden).
        epsilon: added to the mean square.

    Returns:
        The normalized sum (tokens, hidden), in the precision of `x`.
    """
    out = torch.empty_like(x)
    tokens, width = x.shape
    block = triton.next_power_of_2(width)
    warps = 4 if block <= 2048 else 8
    _add_norm[(tokens,)](x, residual, weight, out, epsilon, width, block, num_warps=warps)
    return out


def heads(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    angles: Tensor,
    positions: Tensor,
    counts: tuple[int, int],
    epsilon: float,
) -> None:
    """Normalize queries and keys by head and rotate them, in place.

    Args:
        qkv: queries, keys and values of each token (tokens, heads * head_dim), 16 bits, contiguous.
        q_norm: weight of the norm of queries (head_dim, a power of two).
        k_norm: weight of the norm of keys (head_dim).
        angles: cosines and sines of each position, float32 (positions, head_dim).
        positions: position of each token in its text, int32 (tokens).
        counts: number of query heads, and number of key heads.
        epsilon: added to the mean square.
    """
    tokens, row = qkv.shape
    queries, keys = counts
    half = len(q_norm) // 2
    _heads[(tokens,)](
        *(qkv, positions, angles, q_norm, k_norm, epsilon, row, queries, queries + keys, half),
        triton.next_power_of_2(queries + keys),
        num_warps=4,
    )


def gate(gate_up: Tensor) -> Tensor:
    """Return SwiGLU: the SiLU of the first half of each row times the second half.

    Args:
        gate_up: both halves (tokens, 2 * intermediate), 16 bits, contiguous.

    Returns:
        The product (tokens, intermediate), in the precision of `gate_up`.
    """
    tokens, both = gate_up.shape
    width = both // 2
    out = gate_up.new_empty(tokens, width)
    _gate[(tokens, triton.cdiv(width, GATE_BLOCK))](gate_up, out, width, GATE_BLOCK, num_warps=4)
    return out
