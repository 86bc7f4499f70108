"""langchain-tests' integration suite, on a real engine in this process and on a real server."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_qwen3_embeddings import Qwen3Embeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests


class TestStandard(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _choose(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    @property
    def embeddings_class(self) -> type[Qwen3Embeddings]:
        return Qwen3Embeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return self._settings
