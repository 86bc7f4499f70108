"""A Triton kernel for the sum and norm between two blocks of a layer.

vLLM's kernel keeps the running sum of the layers in 16 bits. With 28 layers of random weights most
of the error comes from that rounding: 1 - cosine to float32 is 1.3e-4, and 4e-5 with this kernel
(benchmarks/notes/torch-engine.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


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


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Add `x` to the residual stream in place, and return the RMSNorm of the sum.

    Args:
        x: what a block computed (tokens, hidden), 16 bits, contiguous.
        residual: the sum so far (tokens, hidden), float32, contiguous.
        weight: weight of the norm (hidden).
        epsilon: added to the mean square.

    Returns:
        The norm (tokens, hidden), in the precision of `x`.
    """
    out = torch.empty_like(x)
    tokens, width = x.shape
    if tokens:
        block = triton.next_power_of_2(width)
        warps = 4 if block <= 2048 else 8
        _add_norm[(tokens,)](x, residual, weight, out, epsilon, width, block, num_warps=warps)
    return out
