"""Advice for an engine that does not fit: what was asked for, what is free, what to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwen3_embeddings.engines.vllm.compat import memory_problem

# vLLM itself names gpu_memory_utilization where kv_cache_memory_bytes, which this package sets,
# decides.
ADVICE = {
    "cache": "The cache cannot hold one text of max_model_len: lower max_model_len, or raise "
    "kv_cache_memory_bytes",
    "share": "Lower gpu_memory_utilization, or end other programs that hold the memory",
    "cache size": "Lower kv_cache_memory_bytes, or end other programs that hold the memory",
    "allocation": "Lower max_num_batched_tokens, max_model_len or kv_cache_memory_bytes, end other "
    "programs that hold the memory, or use a smaller model",
}
"""What to do, by what is too large for the memory."""
SETTINGS = (
    *("kv_cache_memory_bytes", "gpu_memory_utilization"),
    *("max_model_len", "max_num_batched_tokens", "max_num_seqs"),
)
"""Arguments of vLLM that decide how much memory it uses."""


def advice(said: str, asked_for: Callable[[], Mapping[str, Any]]) -> str | None:
    """Return the advice for an error at a start; None if it is not about memory.

    Args:
        said: the error's type and message.
        asked_for: returns the arguments the engine was started with, by vLLM's names.
    """
    problem = memory_problem(said)
    if problem is None:
        return None
    arguments = asked_for()
    asked = (f"{name}={arguments[name]}" for name in SETTINGS if arguments.get(name))
    return f"{ADVICE[problem]} (engine_kwargs). Asked for: {', '.join(asked)}; {_free()}."


def _free() -> str:
    """Return free and total memory of the device, once the failed engine's is free."""
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
