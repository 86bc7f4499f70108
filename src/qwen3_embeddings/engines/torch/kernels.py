"""The operations between matrix products: norms, rotary embedding, attention, activation.

`TorchKernels` runs everywhere. `TritonKernels` fuses the operations for bfloat16 on a GPU.
`VLLMKernels` also uses the attention of an installed vLLM.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own name for it)
from torch import Tensor

from qwen3_embeddings.engines.torch import flash_attention
from qwen3_embeddings.engines.torch.architecture import Shape
from qwen3_embeddings.engines.torch.batches import Batch
from qwen3_embeddings.engines.torch.flash_attention import Attention
from qwen3_embeddings.engines.torch.settings import Settings
from qwen3_embeddings.errors import ConfigurationError, MissingDependencyError

logger = logging.getLogger(__name__)

FUSED_HEAD_DIMS = frozenset({64, 128, 256})
"""Head dimensions for which the fused kernels run: Triton's blocks are powers of two, and
FlashAttention accepts at most 256. Qwen3 has 128."""


class TorchKernels:
    """PyTorch's own operations.

    In all methods, `tokens` is the number of tokens of a step.

    Args:
        shape: shape of the model.

    Attributes:
        dense_grid: whether attention launches as many blocks for each text as for the longest one.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.dense_grid = True  # PyTorch has FlashAttention 2

    def rotary(self, angles: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Return what `heads` needs of the rotary embedding; the same for all layers of a step.

        Args:
            angles: cosines and sines of each position, float32 (positions, head_dim).
            positions: position of each token in its text, int32 (tokens).
        """
        cosines, sines = angles[positions].unsqueeze(1).chunk(2, dim=-1)
        return cosines, sines

    def add_norm(self, x: Tensor | None, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Add the output of a block to the residual stream, and normalize the sum.

        The sum is float32: rounded to 16 bits in each layer, it would cost most of the accuracy
        (figures in `fused`).

        Args:
            x: output of the block (tokens, hidden); None before the first block.
            residual: the residual stream, float32 (tokens, hidden), which may be overwritten.
            weight: weight of the RMSNorm (hidden).

        Returns:
            The RMSNorm of the sum, in the precision of `weight`, and the sum.
        """
        if x is not None:
            residual = residual + x
        normed = F.rms_norm(residual, weight.shape, weight.float(), self.shape.epsilon)
        return normed.to(weight.dtype), residual

    def heads(
        self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, rotary: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalized and rotated queries and keys, and the values.

        Args:
            qkv: their joint projection (tokens, (heads + 2 * kv_heads) * head_dim), which may be
                overwritten.
            q_norm: weight of the RMSNorm of queries (head_dim).
            k_norm: weight of the RMSNorm of keys (head_dim).
            rotary: what `rotary` returned.

        Returns:
            Queries (tokens, heads, head_dim); keys and values (tokens, kv_heads, head_dim).
        """
        shape = self.shape
        q, k, v = self.split(qkv)
        q = F.rms_norm(q, q_norm.shape, q_norm, shape.epsilon)
        k = F.rms_norm(k, k_norm.shape, k_norm, shape.epsilon)
        return _rotate(q, *rotary), _rotate(k, *rotary), v

    def split(self, qkv: Tensor) -> list[Tensor]:
        """Return queries, keys and values as views of their joint projection."""
        counts = [self.shape.heads, self.shape.kv_heads, self.shape.kv_heads]
        return list(qkv.unflatten(1, (-1, self.shape.head_dim)).split(counts, dim=1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Return causal attention within each text: (tokens, heads, head_dim).

        Args:
            q: queries (tokens, heads, head_dim).
            k: keys (tokens, kv_heads, head_dim).
            v: values (tokens, kv_heads, head_dim).
            batch: the texts.
        """
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
        """Return SwiGLU: the SiLU of the first half of each row times the second half.

        Args:
            gate_up: both halves (tokens, 2 * intermediate).
        """
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


class TritonKernels(TorchKernels):
    """Fused operations, and PyTorch's FlashAttention, for bfloat16 on a GPU.

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

    def rotary(self, angles: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Return both arguments: the kernel looks the positions up in the table."""
        return angles, positions

    def add_norm(self, x: Tensor | None, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Add in place, and normalize."""
        if x is None:
            return super().add_norm(x, residual, weight)
        return self._fused.add_norm(x, residual, weight, self.shape.epsilon), residual

    def heads(
        self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, rotary: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalize and rotate in place."""
        angles, positions = rotary
        counts = (self.shape.heads, self.shape.kv_heads)
        self._fused.heads(qkv, q_norm, k_norm, angles, positions, counts, self.shape.epsilon)
        q, k, v = self.split(qkv)
        return q, k, v

    def gate(self, gate_up: Tensor) -> Tensor:
        """Return SwiGLU."""
        return self._fused.gate(gate_up)


class VLLMKernels(TritonKernels):
    """Fused operations with the FlashAttention of an installed vLLM, which is faster on Hopper.

    Args:
        shape: shape of the model.
        device: the GPU.
        attention: what `flash_attention.load` returned.
    """

    def __init__(self, shape: Shape, device: torch.device, attention: Attention) -> None:
        super().__init__(shape, device)
        self._attention = attention
        self.dense_grid = flash_attention.version(device) == 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Return causal attention within each text."""
        out: Tensor = self._attention(
            *(q, k, v, batch.longest, batch.bounds, batch.longest),
            cu_seqlens_k=batch.bounds,
            causal=True,
            num_splits=1,  # split keys need a second kernel: 2 % fewer texts/s of 512 tokens
        )
        return out


def choose(shape: Shape, settings: Settings) -> TorchKernels:
    """Return the kernels that the settings name; for "auto", the fastest that work here.

    Args:
        shape: shape of the model.
        settings: kernels, device and precision.

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
    """Return the fused kernels, with vLLM's FlashAttention if it is wanted or just installed."""
    if wanted == "vllm" or (wanted == "auto" and flash_attention.installed()):
        try:
            attention = flash_attention.load(device)
        except ImportError as error:
            if wanted == "vllm":
                raise MissingDependencyError(
                    f"vLLM's FlashAttention cannot be imported ({error}). Leave kernels out, or "
                    "install vLLM's build for a GPU."
                ) from error
            logger.warning(
                "engine='torch' uses PyTorch's FlashAttention, which is slower for long texts, "
                "because vLLM's cannot be loaded: %s",
                error,
            )
        else:
            return VLLMKernels(shape, device, attention)
    return TritonKernels(shape, device)


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Apply the rotary embedding, in float32. Dimension i is paired with i + head_dim / 2."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(rotated, dim=-1).to(x.dtype)


def _attend_by_length(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Return causal attention, computed together for texts of equal length in succession."""
    if q.is_cuda:  # the memory-efficient kernel for float32 needs as many key heads as query heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts, start = [], 0
    for count, length in batch.runs:
        end = start + count * length
        a, b, c = (x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=not q.is_cuda)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(parts)
