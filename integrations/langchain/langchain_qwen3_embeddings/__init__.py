"""Qwen3-Embedding for LangChain, from vLLM in this process or from a server."""

from langchain_qwen3_embeddings.embeddings import Qwen3Embeddings

__version__ = "0.2.0"

__all__ = ["Qwen3Embeddings", "__version__"]
