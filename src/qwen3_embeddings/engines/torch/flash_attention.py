"""vLLM's FlashAttention, without vLLM: the only part of vLLM that this engine uses.

`import vllm` also imports torch._inductor, which needs several seconds. On an H100 the first start
with all CUDA graphs took 14.4 s with it and 7.6 s without (benchmarks/notes/torch-engine.md).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

from qwen3_embeddings.engines import faults

Attention = Callable[..., torch.Tensor]
"""vLLM's `flash_attn_varlen_func`."""
PACKAGE = "_qwen3_embeddings_vllm_flash_attn"
"""Name under which the files of `vllm.vllm_flash_attn` are imported."""
INTERFACE = f"{PACKAGE}.flash_attn_interface"


def installed() -> bool:
    """Return whether vLLM is installed. Its FlashAttention may still not work here."""
    return bool(_folders())


def load(device: torch.device) -> Attention:
    """Return vLLM's `flash_attn_varlen_func`, in the version for a GPU.

    Args:
        device: the GPU.

    Raises:
        ImportError: vLLM is not installed, or its FlashAttention cannot be loaded here.
    """
    folders = _folders()
    if not folders:
        raise ImportError("vLLM is not installed")
    # The module imports its extensions relative to its package. An empty package with the same
    # folder is enough for that.
    package = ModuleSpec(PACKAGE, loader=None, is_package=True)
    package.submodule_search_locations = [str(Path(f, "vllm_flash_attn")) for f in folders]
    sys.modules.setdefault(PACKAGE, importlib.util.module_from_spec(package))
    try:
        interface = importlib.import_module(INTERFACE)
        number = version(device)
        if not getattr(interface, f"FA{number}_AVAILABLE"):
            raise ImportError(getattr(interface, f"FA{number}_UNAVAILABLE_REASON"))
        return functools.partial(interface.flash_attn_varlen_func, fa_version=number)
    except Exception as error:  # another vLLM may have other names, or other extensions
        for name in (INTERFACE, PACKAGE):  # the next call may find a vLLM that was repaired
            sys.modules.pop(name, None)
        raise ImportError(faults.message(error).replace(PACKAGE, "vllm.vllm_flash_attn")) from error


def version(device: torch.device) -> int:
    """Return the version of FlashAttention for a GPU: 3 on Hopper, the only one where it runs."""
    return 3 if torch.cuda.get_device_capability(device)[0] == 9 else 2


def _folders() -> Sequence[str]:
    """Return the folders of the installed vLLM; none if it is not installed."""
    try:
        spec = importlib.util.find_spec("vllm")
    except ValueError:  # something else was put into sys.modules under this name
        return []
    return spec.submodule_search_locations or [] if spec else []
