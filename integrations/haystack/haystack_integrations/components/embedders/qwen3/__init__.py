"""Qwen3-Embedding for Haystack, from vLLM in this process or from a server."""

from haystack_integrations.components.embedders.qwen3.embedders import (
    Qwen3DocumentEmbedder,
    Qwen3TextEmbedder,
)

__version__ = "0.2.0"

__all__ = ["Qwen3DocumentEmbedder", "Qwen3TextEmbedder", "__version__"]
