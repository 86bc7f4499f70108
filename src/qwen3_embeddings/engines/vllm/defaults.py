"""How vLLM is set up for embedding on each kind of device: one row a kind of device.

The engine in this process and ``qwen3-embeddings serve`` both start vLLM with `engine_arguments`;
each argument can be overridden (``engine_kwargs``, or the flag of the same name). Where the figures
come from: benchmarks/notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qwen3_embeddings.models import Model

GIB = 1 << 30
BLOCK_TOKENS = 16
"""Tokens of one block of vLLM's cache: a text uses whole blocks."""
OVERHEAD_BYTES = 6 * GIB
"""GPU memory besides weights and cache: activations of a step, CUDA graphs, the context."""
GRAPH_TOKENS = (
    *(1, 2, 4, 8, 16, 32, 64, 128),
    *range(256, 4608, 256),  # a small step of documents, and a query on top of it
    *range(4608, 8193, 512),
)
"""Steps whose kernels are recorded as CUDA graphs; a step is filled up to the next of them. vLLM
stops at 512 tokens, where the host takes longer to launch the kernels than the GPU to run them: 22
against 18 ms for 8,192 tokens of 0.6B on an H100 (benchmarks/notes/in-process.md)."""


@dataclass(frozen=True)
class Device:
    """What vLLM will run on.

    Attributes:
        kind: "cpu" or "gpu".
        memory: bytes of device memory; 0 for a CPU.
        bfloat16: whether it computes bfloat16 (NVIDIA: Ampere and later).
    """

    kind: str
    memory: int = 0
    bfloat16: bool = True


@dataclass(frozen=True)
class Profile:
    """Settings for one kind of device.

    Attributes:
        name: what the row is called.
        memory: bytes of device memory from which on the row holds.
        step_tokens: most tokens the model computes in one step.
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
"""By name; of a GPU's rows the last whose memory the card has."""


def profile(device: Device) -> Profile:
    """Return the row for a device."""
    if device.kind == "cpu":
        return PROFILES["cpu"]
    rows = [row for row in PROFILES.values() if row.name != "cpu" and row.memory <= device.memory]
    return rows[-1]


def engine_arguments(model: Model, dtype: str, device: Device) -> dict[str, Any]:
    """Arguments of vLLM, by the names of its `EngineArgs`, for embedding with `model`.

    Args:
        model: the checkpoint's shape.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32".
        device: what vLLM will run on.
    """
    row = profile(device)
    dtype = model.precision(dtype)
    if dtype == "bfloat16" and not device.bfloat16:
        dtype = "float32"  # vLLM would fall back to float16
    width = 2 if dtype == "float32" else 1
    # A pooling engine keeps nothing between requests, so more cache than two steps fill (as many
    # overlap with async_scheduling), or one of the longest inputs and a step, is never read.
    tokens = row.step_tokens + row.step_texts * BLOCK_TOKENS
    tokens = max(2 * tokens, tokens + model.context)
    cache = tokens * model.kv_bytes_per_token * width
    arguments: dict[str, Any] = {
        "runner": "pooling",
        "convert": "embed",
        "dtype": dtype,
        "hf_overrides": {"is_matryoshka": True},
        "max_model_len": model.context,
        "max_num_batched_tokens": row.step_tokens,
        "max_num_seqs": row.step_texts,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": cache,
        "disable_log_stats": True,
    }
    if device.kind == "cpu":
        arguments["enforce_eager"] = True  # compiling needs a C++ compiler and minutes
    else:
        # The host prepares a step while the GPU computes the one before.
        arguments |= {"async_scheduling": True, "max_num_seqs": 2 * row.step_texts}
        arguments["compilation_config"] = {
            "cudagraph_mode": "PIECEWISE",  # all that vLLM has for pooling
            "cudagraph_capture_sizes": list(GRAPH_TOKENS),  # vLLM drops what is over a step
        }
        need = model.parameters * 2 * width + cache + OVERHEAD_BYTES
        arguments["gpu_memory_utilization"] = round(min(0.92, max(0.05, need / device.memory)), 3)
    return arguments
