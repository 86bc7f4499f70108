"""The operations between matrix products: norms, rotary embedding, attention, activation.

`TorchKernels` runs everywhere. `TritonKernels` fuses them for 16 bits on a GPU, and `VLLMKernels`
adds the attention of an installed vLLM.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own name for it)
from torch import Tensor

from qwen3_embeddings.engines.torch.architecture import Shape
from qwen3_embeddings.engines.torch.batches import Batch
from qwen3_embeddings.engines.torch.settings import Settings
from qwen3_embeddings.errors import ConfigurationError, MissingDependencyError

logger = logging.getLogger(__name__)

FUSED_HEAD_DIMS = frozenset({64, 128, 256})
"""Widths of a head for the fused kernels: Triton's blocks are powers of two, and FlashAttention has
heads of up to 256 dimensions. Qwen3 has 128."""


class TorchKernels:
    """PyTorch's own operations.

    Args:
        shape: shape of the model.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def turns(self, angles: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Return what `heads` needs of the rotary embedding, once per step."""
        cosines, sines = angles[positions].unsqueeze(1).chunk(2, dim=-1)
        return cosines, sines

    def add_norm(self, x: Tensor | None, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Add `x` to the residual stream; return the RMSNorm of the sum, and the sum.

        The sum is float32: rounded to 16 bits in each layer, it would cost most of the accuracy.
        """
        if x is not None:
            residual = residual + x
        normed = F.rms_norm(residual, weight.shape, weight.float(), self.shape.epsilon)
        return normed.to(weight.dtype), residual

    def heads(
        self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, turns: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalized and rotated queries and keys, and values: (tokens, heads, head_dim)."""
        shape = self.shape
        q, k, v = self.split(qkv)
        q = F.rms_norm(q, q_norm.shape, q_norm, shape.epsilon)
        k = F.rms_norm(k, k_norm.shape, k_norm, shape.epsilon)
        return _rotate(q, *turns), _rotate(k, *turns), v

    def split(self, qkv: Tensor) -> list[Tensor]:
        """Return views of queries, keys and values in one projection."""
        counts = [self.shape.heads, self.shape.kv_heads, self.shape.kv_heads]
        return list(qkv.unflatten(1, (-1, self.shape.head_dim)).split(counts, dim=1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Return causal attention within each text: (tokens, heads, head_dim)."""
        if not q.is_cuda or q.dtype == torch.float32:  # FlashAttention has 16 bits only
            return _attend_by_length(q, k, v, batch)
        from torch.nn.attention.varlen import varlen_attn

        out: Tensor = varlen_attn(
            *(q, k, v, batch.bounds, batch.bounds, batch.longest, batch.longest),
            window_size=(-1, 0),  # causal
            enable_gqa=True,
        )
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        """Return SwiGLU: the SiLU of the first half of each row times the second half."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


class TritonKernels(TorchKernels):
    """Fused operations, and PyTorch's FlashAttention, for 16 bits on a GPU.

    Args:
        shape: shape of the model.
        device: the GPU.

    Raises:
        MissingDependencyError: Triton cannot compile here.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__(shape)
        try:
            from qwen3_embeddings.engines.torch import fused

            fused.gate(torch.zeros(1, 2, dtype=torch.bfloat16, device=device))
        except Exception as error:  # Triton, the C compiler and CUDA each have errors of their own
            raise MissingDependencyError(
                f"Triton cannot compile kernels here ({error}). Install a C compiler and Python's "
                "headers (gcc and python3-dev on Debian), or pass kernels='torch' in "
                "engine_kwargs, which is half as fast."
            ) from error
        self._fused = fused

    def turns(self, angles: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Return the whole table and the positions: the kernel looks them up."""
        return angles, positions

    def add_norm(self, x: Tensor | None, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Add in place, and normalize."""
        if x is None:
            return super().add_norm(x, residual, weight)
        return self._fused.add_norm(x, residual, weight, self.shape.epsilon), residual

    def heads(
        self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, turns: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalize and rotate in place."""
        angles, positions = turns
        counts = (self.shape.heads, self.shape.kv_heads)
        self._fused.heads(qkv, q_norm, k_norm, angles, positions, counts, self.shape.epsilon)
        q, k, v = self.split(qkv)
        return q, k, v

    def gate(self, gate_up: Tensor) -> Tensor:
        """Return SwiGLU."""
        return self._fused.gate(gate_up)


class VLLMKernels(TritonKernels):
    """The same with the FlashAttention of an installed vLLM, which is faster on Hopper.

    Args:
        shape: shape of the model.
        device: the GPU.
        attention: vLLM's `flash_attn_varlen_func`.
    """

    def __init__(self, shape: Shape, device: torch.device, attention: Any) -> None:
        super().__init__(shape, device)
        self._attention = attention
        # FlashAttention 3 is for Hopper.
        self._version = 3 if torch.cuda.get_device_capability(device)[0] == 9 else 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Return causal attention within each text."""
        out: Tensor = self._attention(
            *(q, k, v, batch.longest, batch.bounds, batch.longest),
            cu_seqlens_k=batch.bounds,
            causal=True,
            fa_version=self._version,
        )
        return out


def load(wanted: str) -> None:
    """Import vLLM's FlashAttention if `choose` may use it; it reports what is missing."""
    may = wanted in ("auto", "vllm") and torch.cuda.is_available()
    if may and importlib.util.find_spec("vllm"):
        with contextlib.suppress(ImportError):
            _import_vllm()


def choose(shape: Shape, settings: Settings) -> TorchKernels:
    """Return the kernels that the settings ask for; with "auto" the fastest that work here.

    Raises:
        ConfigurationError: they do not compute this model in this precision on this device.
        MissingDependencyError: they cannot be imported or compiled.
    """
    wanted = settings.kernels
    fits = settings.gpu and settings.dtype == torch.bfloat16 and shape.head_dim in FUSED_HEAD_DIMS
    if wanted == "torch" or (wanted == "auto" and not fits):
        return TorchKernels(shape)
    if not fits:
        raise ConfigurationError(
            f"kernels={wanted!r} needs a GPU, bfloat16 and heads of 64, 128 or 256 dimensions. "
            "Leave kernels out."
        )
    try:
        return _fused_kernels(wanted, shape, settings.device)
    except MissingDependencyError as error:
        if wanted != "auto":
            raise
        logger.warning("engine='torch' runs at about half its speed: %s", error)
        return TorchKernels(shape)


def _fused_kernels(wanted: str, shape: Shape, device: torch.device) -> TritonKernels:
    if wanted == "vllm" or (wanted == "auto" and importlib.util.find_spec("vllm")):
        try:
            attention = _import_vllm()
        except ImportError as error:
            if wanted == "vllm":
                raise MissingDependencyError(
                    f"vLLM's FlashAttention cannot be imported ({error}). Leave kernels out, or "
                    "install vLLM's build for a GPU."
                ) from error
        else:
            return VLLMKernels(shape, device, attention)
    return TritonKernels(shape, device)


def _import_vllm() -> Any:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate each pair of a first and a second half, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, dim=-1).to(x.dtype)


def _attend_by_length(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Return attention, computed at once for all texts of one length."""
    if q.is_cuda:  # its memory-efficient kernel for float32 wants a key head per query head
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts, start = [], 0
    for count, length in batch.runs:
        end = start + count * length
        a, b, c = (x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=not q.is_cuda)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(parts)
