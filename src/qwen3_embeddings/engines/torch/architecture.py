"""Read from ``config.json`` what Qwen3's forward pass needs, and refuse other architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.models import Model


@dataclass(frozen=True)
class Shape:
    """Shape and constants of a Qwen3 model.

    Attributes:
        layers: number of transformer layers.
        heads: number of attention heads.
        kv_heads: number of key and value heads.
        head_dim: width of a head.
        hidden: width of the residual stream, the size of a vector.
        intermediate: width of the hidden layer of each MLP.
        epsilon: added to the mean square in each RMSNorm.
        theta: base of the rotary embedding's wavelengths.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    epsilon: float
    theta: float


def read(model: Model, config: Mapping[str, Any]) -> Shape:
    """Return the shape of a checkpoint.

    Args:
        model: its description.
        config: its ``config.json``.

    Raises:
        ConfigurationError: this engine does not compute a part of the checkpoint.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    layers = config.get("layer_types") or []
    refused = {
        f"is quantized with {model.quantization}": model.quantization,
        f"scales its rotary embedding ({kind})": kind != "default",
        "has sliding windows": config.get("use_sliding_window") or "sliding_attention" in layers,
        "has attention biases": config.get("attention_bias"),
        f"has the activation {config.get('hidden_act')}": config.get("hidden_act", "silu")
        not in {"silu", "swish"},
    }
    for reason, found in refused.items():
        if found:
            raise ConfigurationError(
                f"{model.name!r} {reason}, which engine='torch' does not compute. Use "
                "engine='vllm', or a checkpoint without it."
            )
    return Shape(
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        hidden=model.dimensions,
        intermediate=model.intermediate,
        epsilon=config.get("rms_norm_eps", 1e-6),
        theta=rope.get("rope_theta") or config.get("rope_theta", 1e6),
    )
