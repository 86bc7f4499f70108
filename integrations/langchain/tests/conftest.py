"""The same class over a real vLLM engine in this process, and over the real server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langchain_qwen3_embeddings import Qwen3Embeddings

from qwen3_embeddings import Embedder

if TYPE_CHECKING:
    from conftest import RunningServer


@pytest.fixture(scope="session")
def in_process(checkpoint: str) -> dict[str, Any]:
    return {"model": checkpoint, "dtype": "float32"}


@pytest.fixture(scope="session")
def remote(server: RunningServer) -> dict[str, Any]:
    return {"base_url": server.base_url, "api_key": server.api_key, "model": server.model}


@pytest.fixture(scope="session", params=["in_process", "remote"])
def settings(request: pytest.FixtureRequest, checkpoint: str) -> dict[str, Any]:
    """Each kind of settings. `checkpoint` marks the tests as running a model."""
    chosen: dict[str, Any] = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture(scope="session")
def embeddings(settings: dict[str, Any]) -> Qwen3Embeddings:
    return Qwen3Embeddings(**settings)


@pytest.fixture(scope="session")
def reference(checkpoint: str) -> Embedder:
    """The yardstick: sentence-transformers on the same checkpoint."""
    return Embedder(checkpoint, engine="reference", dtype="float32")
