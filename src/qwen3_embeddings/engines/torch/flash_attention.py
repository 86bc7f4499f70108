"""vLLM's FlashAttention, without vLLM: the only part of vLLM that this engine uses.

`import vllm` also imports torch._inductor, which needs several seconds. On an H100 the first start
with all CUDA graphs took 14.4 s with it and 7.6 s without (benchmarks/notes/torch-engine.md).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

Attention = Callable[..., torch.Tensor]
"""vLLM's `flash_attn_varlen_func`."""
PACKAGE = "_qwen3_embeddings_vllm_flash_attn"
"""Name under which the files of `vllm.vllm_flash_attn` are imported."""


def installed() -> bool:
    """Whether vLLM is installed. Its FlashAttention may still not work here."""
    return importlib.util.find_spec("vllm") is not None


def load(device: torch.device) -> Attention:
    """Return vLLM's `flash_attn_varlen_func`, in the version for a GPU.

    Args:
        device: the GPU.

    Raises:
        ImportError: the installed vLLM does not have it, or was built for another PyTorch.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("vLLM is not installed")
    # The module imports its extensions relative to its package. An empty package with the same
    # folder is enough for that.
    package = ModuleSpec(PACKAGE, loader=None, is_package=True)
    package.submodule_search_locations = [
        str(Path(folder, "vllm_flash_attn")) for folder in spec.submodule_search_locations
    ]
    sys.modules.setdefault(PACKAGE, importlib.util.module_from_spec(package))
    interface = importlib.import_module(f"{PACKAGE}.flash_attn_interface")
    # Version 3 runs on Hopper only.
    version = 3 if torch.cuda.get_device_capability(device)[0] == 9 else 2
    if not getattr(interface, f"FA{version}_AVAILABLE"):
        raise ImportError(getattr(interface, f"FA{version}_UNAVAILABLE_REASON"))
    return functools.partial(interface.flash_attn_varlen_func, fa_version=version)
