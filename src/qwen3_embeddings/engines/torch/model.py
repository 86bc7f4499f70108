"""Qwen3's forward pass over packed texts: no padding, no cache, one vector per text.

The texts of a step follow each other in one list of tokens. The layers are those of
transformers' ``modeling_qwen3.py``. Projections of the same input are joined into one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own name for it)

from qwen3_embeddings.engines.torch import kernels, weights
from qwen3_embeddings.engines.torch.architecture import Shape
from qwen3_embeddings.engines.torch.batches import Batch
from qwen3_embeddings.engines.torch.settings import Settings


@dataclass(frozen=True)
class Layer:
    """The weights of one layer; a matrix has one row per output."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Qwen3:
    """A Qwen3 model.

    Attributes:
        shape: its shape.
        table: embeddings of the tokens (vocabulary, hidden).
        layers: the transformer layers.
        norm: weight of the final RMSNorm.
        angles: cosines and sines of each position, float32 (positions, head_dim).
        kernels: the operations between matrix products.
    """

    shape: Shape
    table: torch.Tensor
    layers: list[Layer]
    norm: torch.Tensor
    angles: torch.Tensor
    kernels: kernels.TorchKernels

    def forward(self, batch: Batch, halfway: torch.cuda.Event | None = None) -> torch.Tensor:
        """Return the unit vector of each text, float32 (texts, hidden).

        The vector of a text is the hidden state of its last token. So the last layer computes only
        the last tokens after its attention.

        Args:
            batch: the texts.
            halfway: event to record after half of the layers.
        """
        ops, shape = self.kernels, self.shape
        residual = F.embedding(batch.ids, self.table).float()
        rotary = ops.rotary(self.angles, batch.positions)
        x = None
        for number, layer in enumerate(self.layers, 1):
            x, residual = ops.add_norm(x, residual, layer.attention_norm)
            q, k, v = ops.heads(F.linear(x, layer.qkv), layer.q_norm, layer.k_norm, rotary)
            x = ops.attend(q, k, v, batch).flatten(1)
            if number == shape.layers:
                x, residual = x[batch.last], residual[batch.last]
            x, residual = ops.add_norm(F.linear(x, layer.out), residual, layer.mlp_norm)
            x = F.linear(ops.gate(F.linear(x, layer.gate_up)), layer.down)
            if halfway is not None and number == (shape.layers + 1) // 2:
                halfway.record()
        assert x is not None
        rows = F.rms_norm(residual + x, (shape.hidden,), self.norm.float(), shape.epsilon)
        return F.normalize(rows, dim=1)


def load(name: str, shape: Shape, vocabulary: int, settings: Settings) -> Qwen3:
    """Load a checkpoint onto the device.

    Args:
        name: hub id or folder.
        shape: its shape.
        vocabulary: number of tokens that the tokenizer knows.
        settings: device and precision.

    Raises:
        UnknownModelError: weights are missing or do not fit config.json.
        ConfigurationError: there are no weights as safetensors, or the kernels do not fit.
        MissingDependencyError: the kernels cannot be imported or compiled.
    """
    operations = kernels.choose(shape, settings)  # may fail, so before gigabytes are read
    found = weights.read(name, settings)
    table = found.take("embed_tokens.weight", (None, shape.hidden))
    return Qwen3(
        shape=shape,
        table=_padded(table, vocabulary),
        layers=[_layer(found, shape, number) for number in range(shape.layers)],
        norm=found.take("norm.weight", (shape.hidden,)),
        angles=_angles(shape, settings),
        kernels=operations,
    )


def _layer(found: weights.Weights, shape: Shape, number: int) -> Layer:
    """Take the weights of one layer, counted from 0, out of a checkpoint's."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, inner = shape.hidden, shape.intermediate

    def take(part: str, *size: int) -> torch.Tensor:
        return found.take(f"layers.{number}.{part}.weight", size)

    attention = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
    qkv = [take(f"self_attn.{part}", rows, hidden) for part, rows in attention]
    gate_up = [take(f"mlp.{part}", inner, hidden) for part in ("gate_proj", "up_proj")]
    return Layer(
        attention_norm=take("input_layernorm", hidden),
        qkv=torch.cat(qkv),
        q_norm=take("self_attn.q_norm", shape.head_dim),
        k_norm=take("self_attn.k_norm", shape.head_dim),
        out=take("self_attn.o_proj", hidden, q),
        mlp_norm=take("post_attention_layernorm", hidden),
        gate_up=torch.cat(gate_up),
        down=take("mlp.down_proj", hidden, inner),
    )


def _padded(table: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return a table with a row for every token of the tokenizer.

    The published 4B and 8B have 151,665 rows, four fewer than their tokenizer has tokens. Added
    rows are zero, as in vLLM.
    """
    return F.pad(table, (0, 0, 0, vocabulary - len(table))) if vocabulary > len(table) else table


def _angles(shape: Shape, settings: Settings) -> torch.Tensor:
    """Return cosines and sines of all positions (max_model_len, head_dim).

    They are float32 for every precision of the model, because the rotation is computed in float32.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    positions = torch.arange(settings.max_model_len, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / shape.theta**exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(settings.device)
