"""vLLM in this process. It runs here, so a killed process leaves nothing behind."""

from __future__ import annotations

from typing import Any, ClassVar

from qwen3_embeddings.engines.backend import Backend
from qwen3_embeddings.engines.base import require
from qwen3_embeddings.engines.stepping import SteppingEngine
from qwen3_embeddings.engines.vllm import compat, lifecycle


class VLLMEngine(SteppingEngine):
    """In-process vLLM (`pip install 'qwen3-embeddings[vllm]'`).

    Args:
        model: hub id or folder.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32".
        engine_kwargs: vLLM engine arguments that override the defaults chosen here.

    Raises:
        MissingDependencyError: vLLM is not installed.
    """

    backend: ClassVar[Backend] = lifecycle

    def __init__(
        self, model: str, *, dtype: str = "auto", engine_kwargs: dict[str, Any] | None = None
    ) -> None:
        require("vllm", "vLLM is not installed.", compat.INSTALL)
        super().__init__(model, dtype, engine_kwargs)
