"""Qwen3-Embedding for Chroma, from vLLM in this process or from a server."""

from chromadb_qwen3_embeddings.function import Qwen3EmbeddingFunction

__version__ = "0.2.0"

__all__ = ["Qwen3EmbeddingFunction", "__version__"]
