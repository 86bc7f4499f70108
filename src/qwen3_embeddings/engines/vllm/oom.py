"""What to do when an engine does not fit: how much was asked for, how much there is, which knob."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

# Wordings of vLLM 0.25.1 to 0.32.0 (v1/core/kv_cache_utils.py, v1/worker/utils.py and
# cpu_worker.py) and of PyTorch's allocators, each with its way out. vLLM itself names
# gpu_memory_utilization where kv_cache_memory_bytes, which this package sets, decides.
_WAYS_OUT = (
    (
        r"No available memory for the cache blocks|larger than the available KV cache",
        "The cache has no room for one text of max_model_len: lower max_model_len, or raise "
        "kv_cache_memory_bytes",
    ),
    (
        r"less than desired .PU memory utilization",
        "Lower gpu_memory_utilization, or end what else holds the memory",
    ),
    (
        r"less than requested memory for kv",
        "Lower kv_cache_memory_bytes, or end what else holds the memory",
    ),
    (
        r"out of memory|can't allocate memory|Cannot allocate memory|MemoryError|bad_alloc",
        "Lower max_num_batched_tokens, max_model_len or kv_cache_memory_bytes, end what else "
        "holds the memory, or take a smaller model",
    ),
)
_PLAIN = (
    (
        r"torch\.(\w+) is not supported for quantization method ([\w-]+)",
        r"the weights are quantized with \2, whose kernels do not compute in \1. Leave dtype out, "
        "or pass dtype='bfloat16' on a device that computes it (NVIDIA Ampere or later)",
    ),
    (
        r"Unknown quantization method: ([\w-]+)",
        r"it does not know the quantization method \1 here. Use the original checkpoint, or one "
        "that is quantized with a method that vLLM runs on this device",
    ),
    (
        r"is not supported for the current GPU|quantization is currently not supported in"
        "|Failed to find a kernel that can implement",
        "this device does not run the quantization of its weights. Use the original checkpoint, or "
        "another device",
    ),
    (
        r"no module or parameter named '([\w.]+)'",
        r"the weights do not fit config.json: the model has no parameter \1. Download the model "
        "again",
    ),
)
"""Wordings of vLLM 0.32 and 0.33 about checkpoints (config/vllm.py, config/model.py,
model_executor/kernels/linear, model_executor/models/utils.py), each with a plain sentence."""
_KNOBS = (
    *("kv_cache_memory_bytes", "gpu_memory_utilization"),
    *("max_model_len", "max_num_batched_tokens", "max_num_seqs"),
)


def plain(said: str) -> str | None:
    """Return a plain sentence for an error about the checkpoint; None for any other.

    Args:
        said: the error's type and message.
    """
    for pattern, sentence in _PLAIN:
        if found := re.search(pattern, said):
            return f"{found.expand(sentence)}."
    return None


def way_out(said: str, asked_for: Callable[[], Mapping[str, Any]]) -> str | None:
    """The advice for an error at a start; None when it is not about memory.

    Args:
        said: the error's type and message.
        asked_for: gives the arguments the engine was started with, by vLLM's names.
    """
    for pattern, advice in _WAYS_OUT:
        if re.search(pattern, said):
            arguments = asked_for()
            asked = (f"{name}={arguments[name]}" for name in _KNOBS if arguments.get(name))
            return f"{advice} (engine_kwargs). Asked for: {', '.join(asked)}; {_there()}."
    return None


def _there() -> str:
    """Free and total memory of the device, now that the failed engine's is back."""
    import psutil
    import torch

    if torch.cuda.is_available():
        try:
            free, total = torch.cuda.mem_get_info()
        except RuntimeError as error:
            return f"the device does not say what is free ({error})"
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
