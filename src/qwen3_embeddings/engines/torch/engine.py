"""Qwen3 in plain PyTorch: one forward pass per step, without a cache or a model server."""

from __future__ import annotations

from typing import Any, ClassVar

from qwen3_embeddings.engines.backend import Backend
from qwen3_embeddings.engines.base import require
from qwen3_embeddings.engines.stepping import SteppingEngine
from qwen3_embeddings.engines.torch import lifecycle


class TorchEngine(SteppingEngine):
    """In-process PyTorch (`pip install 'qwen3-embeddings[torch]'`).

    Args:
        model: hub id or folder.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32".
        engine_kwargs: fields of `engines.torch.settings.Settings` that override the defaults.

    Raises:
        MissingDependencyError: PyTorch, safetensors or tokenizers is not installed.
    """

    backend: ClassVar[Backend] = lifecycle

    def __init__(
        self, model: str, *, dtype: str = "auto", engine_kwargs: dict[str, Any] | None = None
    ) -> None:
        for module, name in lifecycle.NEEDED.items():
            require(module, f"{name} is not installed.", lifecycle.INSTALL)
        super().__init__(model, dtype, engine_kwargs)
