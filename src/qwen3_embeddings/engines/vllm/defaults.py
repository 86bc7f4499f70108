"""The settings of vLLM for embedding, by kind of device.

The in-process engine and ``qwen3-embeddings serve`` both start vLLM with `engine_arguments`. Each
argument can be overridden: with ``engine_kwargs``, or with the option of the same name. The figures
come from docs/performance.md and benchmarks/notes/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qwen3_embeddings.models import Model

GIB = 1 << 30
BLOCK_TOKENS = 16
"""Tokens of one block of vLLM's KV cache; a text occupies whole blocks."""
OVERHEAD_BYTES = 6 * GIB
"""GPU memory for all but weights and KV cache: activations, CUDA graphs, the CUDA context."""
GRAPH_TOKENS = (
    *(1, 2, 4, 8, 16, 32, 64, 128),
    *range(256, 4608, 256),  # a small step of documents, and a query on top of it
    *range(4608, 8193, 512),
)
"""Step sizes, in tokens, whose kernels are recorded as CUDA graphs; a step is padded to the next.
vLLM's own sizes end at 512 tokens. Above that the host launches kernels more slowly than the GPU
runs them: 22 ms against 18 ms for 8,192 tokens of 0.6B on an H100
(benchmarks/notes/in-process.md)."""


@dataclass(frozen=True)
class Device:
    """The device that vLLM will run on.

    Attributes:
        kind: "cpu" or "gpu".
        memory: bytes of device memory; 0 for a CPU.
        bfloat16: whether it computes in bfloat16 (NVIDIA: Ampere and later).
    """

    kind: str
    memory: int = 0
    bfloat16: bool = True


@dataclass(frozen=True)
class Profile:
    """Settings for one kind of device.

    Attributes:
        name: name of the profile.
        memory: smallest device memory of the profile, in bytes.
        step_tokens: most tokens in one step.
        step_texts: most texts in one step.
    """

    name: str
    memory: int
    step_tokens: int
    step_texts: int


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        row[0]: Profile(*row)
        for row in (
            ("cpu", 0, 4096, 256),
            ("gpu-8", 0, 8192, 512),
            ("gpu-24", 20 * GIB, 16384, 1024),
            ("gpu-80", 40 * GIB, 32768, 1024),
        )
    }
)
"""Profiles by name. For a GPU, the last one whose memory the card has applies."""


def profile(device: Device) -> Profile:
    """Return the profile that applies to a device."""
    if device.kind == "cpu":
        return PROFILES["cpu"]
    rows = [row for row in PROFILES.values() if row.name != "cpu" and row.memory <= device.memory]
    return rows[-1]


def engine_arguments(model: Model, dtype: str, device: Device) -> dict[str, Any]:
    """Return the arguments of vLLM for embedding with a model, by the names of its `EngineArgs`.

    Args:
        model: the shape of the checkpoint.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32".
        device: what vLLM will run on.

    Raises:
        ConfigurationError: `dtype` does not fit the quantization of the checkpoint.
    """
    chosen = profile(device)
    dtype = model.precision(dtype)
    if dtype == "bfloat16" and not device.bfloat16:
        dtype = "float32"  # vLLM would fall back to float16
    cache = _cache_tokens(chosen, model) * model.kv_bytes_per_token * _width(dtype)
    arguments: dict[str, Any] = {
        "runner": "pooling",
        "convert": "embed",
        "dtype": dtype,
        "hf_overrides": {"is_matryoshka": True},
        "max_model_len": model.context,
        "max_num_batched_tokens": chosen.step_tokens,
        "max_num_seqs": chosen.step_texts,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": cache,
        "disable_log_stats": True,
    }
    if device.kind == "cpu":
        return arguments | {"enforce_eager": True}  # compiling needs a C++ compiler and minutes
    share = (model.parameters * 2 * _width(dtype) + cache + OVERHEAD_BYTES) / device.memory
    return arguments | {
        "max_num_seqs": 2 * chosen.step_texts,
        "async_scheduling": True,  # the host prepares a step while the GPU computes the previous
        "compilation_config": {
            "cudagraph_mode": "PIECEWISE",  # the only mode that vLLM has for pooling
            "cudagraph_capture_sizes": list(GRAPH_TOKENS),  # vLLM drops those larger than a step
        },
        "gpu_memory_utilization": round(min(0.92, max(0.05, share)), 3),
    }


def _cache_tokens(chosen: Profile, model: Model) -> int:
    """Return the size of the KV cache in tokens.

    Pooling requests do not reuse the cache. So it is sized for two full steps, because two overlap
    with async_scheduling, or for one step and one longest input, whichever is larger.
    """
    step = chosen.step_tokens + chosen.step_texts * BLOCK_TOKENS
    return max(2 * step, step + model.context)


def _width(dtype: str) -> int:
    """Return the size of a number in units of 16 bits."""
    return 2 if dtype == "float32" else 1
