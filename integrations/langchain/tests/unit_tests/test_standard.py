"""langchain-tests' unit suite."""

from __future__ import annotations

from typing import Any

from langchain_qwen3_embeddings import Qwen3Embeddings
from langchain_tests.unit_tests import EmbeddingsUnitTests


class TestEmbedded(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Qwen3Embeddings]:
        return Qwen3Embeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "Qwen/Qwen3-Embedding-0.6B", "dimensions": 256}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        model = "Qwen/Qwen3-Embedding-4B"
        return {"QWEN3_EMBEDDINGS_MODEL": model}, {}, {"model": model, "base_url": None}


class TestRemote(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Qwen3Embeddings]:
        return Qwen3Embeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"base_url": "http://localhost:8000/v1", "api_key": "key"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        url = "http://localhost:8000/v1"
        environment = {"QWEN3_EMBEDDINGS_BASE_URL": url, "QWEN3_EMBEDDINGS_API_KEY": "key"}
        return environment, {}, {"base_url": url, "api_key": "key", "model": None}
