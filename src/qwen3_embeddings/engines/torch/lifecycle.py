"""Start the PyTorch engine's core, and explain why a start failed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from qwen3_embeddings import checkpoint, models
from qwen3_embeddings.engines import faults
from qwen3_embeddings.engines.base import Served
from qwen3_embeddings.errors import MissingDependencyError
from qwen3_embeddings.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from qwen3_embeddings.engines.torch.core import Core

NAME = "PyTorch"
NEEDED = {"torch": "PyTorch", "safetensors": "safetensors", "tokenizers": "tokenizers"}
"""Modules without which the engine cannot start, each with its name in messages."""
INSTALL = (
    "Run pip install 'qwen3-embeddings[torch]'. To use a server instead, pass base_url=…; "
    "engine='reference' runs sentence-transformers."
)

GPU_ERROR = "CUDA|cuDNN|CUDNN|CUBLAS|FlashAttention"
"""Words in the messages of the libraries that run kernels."""


def load() -> None:
    """Import PyTorch.

    Raises:
        MissingDependencyError: PyTorch cannot be imported.
    """
    try:
        from qwen3_embeddings.engines.torch import core  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"PyTorch cannot be imported ({error}). {INSTALL}") from error


def start(name: str, dtype: str, engine_kwargs: dict[str, Any]) -> tuple[Core, Tokenizer, Served]:
    """Start a core; also return the model's tokenizer, and what the core serves.

    Args:
        name: hub id or folder of the model.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32".
        engine_kwargs: fields of `settings.Settings` that override the defaults.

    Raises:
        ConfigurationError: this engine does not compute the model, or a setting cannot work.
        UnknownModelError: there is no such model, or its files do not fit together.
    """
    from qwen3_embeddings.engines.torch import architecture, core, model, settings

    revision = settings.check_names(engine_kwargs).get("revision")
    config = checkpoint.read_json(name, "config.json", revision)
    described = models.from_config(name, config)
    shape = architecture.read(described, config)
    checkpoint.check_weights(name)
    tokenizer = load_tokenizer(name, revision)
    chosen = settings.choose(described, dtype, engine_kwargs)
    loaded = model.load(name, shape, tokenizer.get_vocab_size(), chosen)
    started = core.Core(loaded, chosen, described.parameters)
    started.warm_up()
    size = described.dimensions
    vocabulary = len(loaded.table)
    served = Served("torch", name, size, size, chosen.max_model_len, vocabulary=vocabulary)
    return started, tokenizer, served


def explain(said: str, name: str, dtype: str, engine_kwargs: dict[str, Any]) -> str | None:
    """Return why a start failed and what to do, to follow "PyTorch could not start with …"."""
    if re.search(faults.OUT_OF_MEMORY, said):
        return (
            f" ({said}). Lower max_num_batched_tokens or max_model_len (engine_kwargs), end other "
            "programs that hold the memory, or use a smaller model."
        )
    if re.search(GPU_ERROR, said):
        return (
            f" ({said}). Check that PyTorch's build fits the GPU, its driver and the installed "
            "cuDNN, or pass device='cpu' in engine_kwargs."
        )
    return None
