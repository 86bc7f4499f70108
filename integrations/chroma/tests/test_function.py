"""The embedding function in real Chroma collections, on disk and in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
import qwen3_embeddings_demo_model
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings
from chromadb_qwen3_embeddings import Qwen3EmbeddingFunction

from conftest import RunningServer
from qwen3_embeddings import (
    ConfigurationError,
    DimensionsError,
    Embedder,
    EngineError,
    Task,
    TextTypeError,
)

MODEL = str(qwen3_embeddings_demo_model.path())
SERVER = "http://127.0.0.1:9/v1"
KEY = "sk-not-to-be-stored"
PASSAGES = {
    "dough": "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "tides": "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "bees": "Bees tell each other where flowers are by dancing.",
}
QUERY = "why does the sea come in and go out"


def remote(**settings: Any) -> Qwen3EmbeddingFunction:
    """A function that needs no engine until it is called."""
    return Qwen3EmbeddingFunction(**({"model": MODEL, "base_url": SERVER} | settings))


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    with Embedder(MODEL, engine="reference", dimensions=64) as shared:
        yield shared


@pytest.fixture
def client(tmp_path: Path) -> Any:
    return chromadb.PersistentClient(tmp_path)


def filled(client: Any, **settings: Any) -> Any:
    function = Qwen3EmbeddingFunction(MODEL, engine="reference", dimensions=64, **settings)
    collection = client.create_collection("passages", embedding_function=function)
    collection.add(ids=list(PASSAGES), documents=list(PASSAGES.values()))
    return collection


@pytest.mark.engine
def test_collection_embeds_documents_and_queries_in_their_roles(
    client: Any, embedder: Embedder
) -> None:
    collection = filled(client)
    stored = collection.get(include=["embeddings"])
    documents = embedder.encode_document(list(PASSAGES.values()))
    assert stored["ids"] == list(PASSAGES)
    assert np.abs(stored["embeddings"] - documents).max() < 1e-6

    found = collection.query(query_texts=[QUERY], n_results=3)
    cosines = (documents @ embedder.encode_query(QUERY)).tolist()
    assert found["ids"][0][0] == "tides"
    assert dict(zip(found["ids"][0], found["distances"][0], strict=True)) == pytest.approx(
        {name: 1 - cosine for name, cosine in zip(PASSAGES, cosines, strict=True)}, abs=1e-5
    )


@pytest.mark.engine
def test_collection_reopened_without_function_uses_the_stored_one(
    client: Any, tmp_path: Path
) -> None:
    before = filled(client, task="question_answering").query(query_texts=[QUERY])
    chromadb.api.client.SharedSystemClient.clear_system_cache()
    reopened = chromadb.PersistentClient(tmp_path).get_collection("passages")
    assert reopened.query(query_texts=[QUERY]) == before


def test_created_collection_has_cosine_distance_and_no_key_on_disk(
    client: Any, tmp_path: Path
) -> None:
    function = remote(api_key=KEY)
    collection = client.create_collection("passages", embedding_function=function)
    assert collection.configuration["hnsw"]["space"] == "cosine"
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(SERVER.encode() in content for content in files)
    assert not any(KEY.encode() in content for content in files)
    assert KEY not in repr(function)


@pytest.mark.parametrize(
    "settings",
    [
        {"dimensions": 128, "task": "code", "overflow": "mean", "max_retries": 2},
        {"task": Task("products", "Retrieve similar products", symmetric=True)},
        {"query_instruction": "Find the spare part", "document_instruction": "A spare part"},
        {"api_key": KEY, "default_headers": {"X-Tenant": "search"}},
    ],
)
def test_config_round_trip_through_json_builds_an_equal_function(settings: dict[str, Any]) -> None:
    function = remote(**settings)
    config = json.loads(json.dumps(function.get_config()))
    assert Qwen3EmbeddingFunction.build_from_config(config) == function
    assert KEY not in json.dumps(config)


def test_config_holds_no_secret_header() -> None:
    function = remote(default_headers={"Authorization": f"Basic {KEY}", "X-Tenant": "search"})
    assert function.get_config()["default_headers"] == {"X-Tenant": "search"}
    assert KEY not in str(function.get_config()) + repr(function)


def test_config_keeps_the_model_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_MODEL", MODEL)
    config = remote(model=None).get_config()
    monkeypatch.setenv("QWEN3_EMBEDDINGS_MODEL", "another")
    assert Qwen3EmbeddingFunction.build_from_config(config) == remote()


def test_config_without_model_names_the_one_that_the_server_runs(server: RunningServer) -> None:
    with Qwen3EmbeddingFunction(base_url=server.base_url, api_key=server.api_key) as function:
        config = function.get_config()
    assert config["model"] == server.model
    assert server.api_key not in str(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"dimensions": 128},
        {"model": "Qwen/Qwen3-Embedding-0.6B"},
        {"overflow": "truncate"},
        {"document_instruction": "A spare part"},
        {"task": "clustering"},
    ],
)
def test_update_that_changes_document_vectors_is_refused(
    client: Any, settings: dict[str, Any]
) -> None:
    collection = client.create_collection("passages", embedding_function=remote())
    with pytest.raises(ConfigurationError, match="Create another collection"):
        collection.modify(configuration={"embedding_function": remote(**settings)})
    assert collection.configuration["embedding_function"] == remote()


def test_update_of_server_and_query_instruction_is_stored(client: Any, tmp_path: Path) -> None:
    collection = client.create_collection("passages", embedding_function=remote())
    other = remote(base_url="http://127.0.0.1:10/v1", task="question_answering")
    collection.modify(configuration={"embedding_function": other})
    stored = chromadb.PersistentClient(tmp_path).get_collection("passages")
    assert stored.configuration["embedding_function"] == other


class ChromasOwn(EmbeddingFunction[Documents]):
    """A function with no more than Chroma's base class checks."""

    def __init__(self) -> None:
        pass

    def __call__(self, input: Documents) -> Embeddings:  # noqa: A002
        return [np.ones(2, np.float32) for _ in input]


@pytest.mark.parametrize("method", ["__call__", "embed_query"])
def test_empty_list_is_refused_as_by_chromas_own_functions(method: str) -> None:
    with pytest.raises(ValueError, match="non-empty"):
        getattr(ChromasOwn(), method)([])
    with pytest.raises(ConfigurationError, match="at least one") as caught:
        getattr(remote(max_retries=0), method)([])
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("method", ["__call__", "embed_query"])
def test_one_string_is_refused_with_the_list_to_pass(method: str) -> None:
    with pytest.raises(TextTypeError, match=r"For one text write \[text\]"):
        getattr(remote(max_retries=0), method)("a text")


def test_setting_an_attribute_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be changed\. Make another object"):
        remote().dimensions = 32  # type: ignore[misc, attr-defined]


def test_dimensions_out_of_range_are_refused_before_anything_starts() -> None:
    with pytest.raises(DimensionsError):
        remote(dimensions=16)


def test_server_that_is_away_without_a_model_is_an_error_of_the_constructor() -> None:
    """Chroma ignores an error of `get_config`, and would store its own default function."""
    with pytest.raises(EngineError):
        Qwen3EmbeddingFunction(base_url="http://127.0.0.1:9/v1", max_retries=0)


def test_config_holds_the_absolute_path_of_a_folder(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(checkpoint).parent)
    function = Qwen3EmbeddingFunction(f"./{Path(checkpoint).name}", engine="reference")
    assert function.get_config()["model"] == checkpoint
