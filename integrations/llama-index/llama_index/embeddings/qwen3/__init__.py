"""Qwen3-Embedding for LlamaIndex, from vLLM in this process or from a server."""

from llama_index.embeddings.qwen3.base import Qwen3Embedding

__version__ = "0.2.0"

__all__ = ["Qwen3Embedding"]
