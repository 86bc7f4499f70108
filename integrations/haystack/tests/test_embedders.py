"""The embedders in real Haystack pipelines."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import qwen3_embeddings_demo_model
from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import Secret
from haystack_integrations.components.embedders.qwen3 import (
    Qwen3DocumentEmbedder,
    Qwen3TextEmbedder,
)

from conftest import RunningServer
from qwen3_embeddings import ConfigurationError, DimensionsError, Embedder, Task, TextTypeError
from qwen3_embeddings.engines import registry

MODEL = str(qwen3_embeddings_demo_model.path())
SERVER = "http://127.0.0.1:9/v1"
KEY = "sk-not-to-be-written"
LOCAL: dict[str, Any] = {"model": MODEL, "engine": "reference", "dimensions": 64}
PASSAGES = [
    Document(content="Bread dough rises because yeast turns sugar into carbon dioxide."),
    Document(content="The Moon causes the tides: its gravity pulls the oceans towards it."),
    Document(content="Bees tell each other where flowers are by dancing."),
]
QUERY = "why does the sea come in and go out"


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    with Embedder(MODEL, engine="reference", dimensions=64) as shared:
        yield shared


def index(store: InMemoryDocumentStore) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("embedder", Qwen3DocumentEmbedder(**LOCAL))
    pipeline.add_component("writer", DocumentWriter(store))
    pipeline.connect("embedder.documents", "writer.documents")
    return pipeline


def search(store: InMemoryDocumentStore) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("embedder", Qwen3TextEmbedder(**LOCAL))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=3))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    return pipeline


@pytest.fixture(scope="module")
def store(embedder: Embedder) -> InMemoryDocumentStore:
    """A store with the passages; the embedder keeps the engine for all pipelines."""
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    result = index(store).run({"embedder": {"documents": PASSAGES}})
    assert result["writer"] == {"documents_written": 3}
    assert result["embedder"]["meta"]["usage"]["texts"] == 3
    return store


@pytest.mark.engine
def test_pipeline_embeds_documents_and_queries_in_their_roles(
    store: InMemoryDocumentStore, embedder: Embedder
) -> None:
    stored = {document.id: document.embedding for document in store.filter_documents()}
    documents = embedder.encode_document([str(passage.content) for passage in PASSAGES])
    rows = np.array([stored[passage.id] for passage in PASSAGES])
    assert np.abs(rows - documents).max() < 1e-6

    found = search(store).run({"embedder": {"text": QUERY}})["retriever"]["documents"]
    cosines = documents @ embedder.encode_query(QUERY)
    assert found[0].content == PASSAGES[1].content
    assert [hit.score for hit in found] == pytest.approx(sorted(cosines, reverse=True), abs=1e-5)


@pytest.mark.engine
def test_pipeline_loaded_from_yaml_finds_the_same(store: InMemoryDocumentStore) -> None:
    pipeline = search(store)
    loaded = Pipeline.loads(pipeline.dumps())
    assert loaded.get_component("embedder") == pipeline.get_component("embedder")
    inputs = {"embedder": {"text": QUERY}}
    vector, same = (
        each.run(inputs, include_outputs_from={"embedder"})["embedder"]["embedding"]
        for each in (pipeline, loaded)
    )
    assert same == vector


@pytest.mark.engine
async def test_run_async_returns_what_run_returns(embedder: Embedder) -> None:
    text, documents = Qwen3TextEmbedder(**LOCAL), Qwen3DocumentEmbedder(**LOCAL)
    await text.warm_up_async()
    assert await text.run_async(QUERY) == text.run(QUERY)
    assert await documents.run_async(PASSAGES) == documents.run(PASSAGES)
    for component in (text, documents):
        await component.close_async()


@pytest.mark.engine
def test_documents_embed_metadata_before_content(embedder: Embedder) -> None:
    documents = [
        Document(content="Baked in an oven.", meta={"title": "Bread", "page": 3, "note": None}),
        Document(content=None, meta={"title": "Tides"}),
        Document(content="No metadata."),
    ]
    component = Qwen3DocumentEmbedder(
        **LOCAL, meta_fields_to_embed=["title", "page", "note"], embedding_separator=" | "
    )
    result = component.run(documents)["documents"]
    expected = embedder.encode_document(["Bread | 3 | Baked in an oven.", "Tides", "No metadata."])
    assert np.abs(np.array([each.embedding for each in result]) - expected).max() < 1e-6
    assert [each.content for each in result] == [each.content for each in documents]
    assert all(each.embedding is None for each in documents)


@pytest.mark.engine
def test_document_without_text_is_refused_by_its_position(embedder: Embedder) -> None:
    with pytest.raises(TextTypeError) as caught:
        Qwen3DocumentEmbedder(**LOCAL).run([*PASSAGES, Document(content=None)])
    assert caught.value.positions == (3,)


@pytest.mark.engine
def test_closed_component_is_warmed_up_again(embedder: Embedder) -> None:
    component = Qwen3TextEmbedder(**LOCAL)
    component.warm_up()
    before = component.run(QUERY)
    component.close()
    assert component.run(QUERY) == before


async def test_component_loaded_for_a_server_reads_its_key(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_KEY", server.api_key)
    key = Secret.from_env_var("GATEWAY_KEY")
    written = Qwen3TextEmbedder(api_base_url=server.base_url, api_key=key, dimensions=64).to_dict()
    component = Qwen3TextEmbedder.from_dict(written)
    result = component.run(QUERY)
    assert np.linalg.norm(result["embedding"]) == pytest.approx(1, abs=1e-5)
    assert len(result["embedding"]) == 64
    assert result["meta"]["model"] == server.model
    assert result["meta"]["usage"]["texts"] == 1
    assert await component.run_async(QUERY) == result
    component.close()


def remote(kind: Any = Qwen3TextEmbedder, **settings: Any) -> Any:
    return kind(**({"model": "demo", "api_base_url": SERVER} | settings))


@pytest.mark.parametrize("kind", [Qwen3TextEmbedder, Qwen3DocumentEmbedder])
@pytest.mark.parametrize(
    "settings",
    [
        {"dimensions": 128, "task": "code", "overflow": "mean", "max_retries": 2},
        {"task": Task("products", "Retrieve similar products", symmetric=True)},
        {"query_instruction": "Find the spare part", "document_instruction": "A spare part"},
        {"model": None, "api_key": None, "default_headers": {"X-Tenant": "search"}},
        {"on_error": "finish", "batch_size": 8, "max_concurrency": 2, "verify": False},
    ],
)
def test_yaml_round_trip_makes_an_equal_component(kind: Any, settings: dict[str, Any]) -> None:
    pipeline = Pipeline()
    pipeline.add_component("embedder", remote(kind, **settings))
    loaded = Pipeline.loads(pipeline.dumps())
    assert loaded.get_component("embedder") == remote(kind, **settings)
    assert loaded.dumps() == pipeline.dumps()


def test_yaml_round_trip_keeps_the_fields_of_documents() -> None:
    component = remote(
        Qwen3DocumentEmbedder,
        meta_fields_to_embed=["title"], embedding_separator=" ", progress_bar=True,
    )  # fmt: skip
    data = component.to_dict()
    assert Qwen3DocumentEmbedder.from_dict(data).to_dict() == data
    assert data["init_parameters"]["meta_fields_to_embed"] == ["title"]


def test_yaml_names_the_variable_of_the_key_and_holds_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GATEWAY_KEY", KEY)
    component = remote(api_key=Secret.from_env_var("GATEWAY_KEY"))
    data = component.to_dict()
    assert data["init_parameters"]["api_key"]["env_vars"] == ["GATEWAY_KEY"]
    assert KEY not in str(data) + repr(component)
    headers = {"Authorization": f"Basic {KEY}", "X-Tenant": "search"}
    written = remote(default_headers=headers).to_dict()["init_parameters"]
    assert written["default_headers"] == {"X-Tenant": "search"}
    with pytest.raises(ValueError, match="token"):
        remote(api_key=Secret.from_token(KEY)).to_dict()


def test_dimensions_out_of_range_are_refused_before_anything_starts() -> None:
    with pytest.raises(DimensionsError):
        remote(dimensions=16)


@pytest.mark.parametrize("kind", [Qwen3TextEmbedder, Qwen3DocumentEmbedder])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"api_key": KEY}, "api_key is str. Pass a Secret"),
        ({"api_base_url": 8000}, "api_base_url is int. Pass str"),
        ({"base_url": SERVER}, "base_url is not an argument here. Pass api_base_url"),
        ({"prefix": "query: "}, "prefix is not an argument here.*Pass.*query_instruction"),
        ({"suffix": ""}, "suffix is not an argument here.*Pass.*query_instruction"),
        ({"truncate_dim": 64}, "Pass dimensions"),
        ({"organization": "us"}, "OpenAI-Organization"),
        ({"raise_on_failure": False}, "an error is always raised"),
        ({"http_client": object()}, "Pass api_base_url and api_key"),
        ({"dimension": 64}, "The arguments are: model, api_base_url, api_key, dimensions"),
    ],
)
def test_argument_of_another_embedder_is_refused_with_the_one_to_pass(
    kind: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        remote(kind, **settings)
    assert KEY not in str(caught.value)


def test_arguments_of_documents_are_refused_by_the_text_embedder() -> None:
    with pytest.raises(ConfigurationError, match="belongs to Qwen3DocumentEmbedder"):
        remote(meta_fields_to_embed=["title"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"meta_fields_to_embed": "title"}, "meta_fields_to_embed is str. Pass a list"),
        ({"meta_fields_to_embed": [3]}, "a name in meta_fields_to_embed is int. Pass str"),
        ({"embedding_separator": 3}, "embedding_separator is int. Pass str"),
    ],
)
def test_fields_of_a_wrong_type_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        remote(Qwen3DocumentEmbedder, **settings)


def test_fields_left_at_none_are_no_fields() -> None:
    data = remote(Qwen3DocumentEmbedder, meta_fields_to_embed=None).to_dict()
    assert data["init_parameters"]["meta_fields_to_embed"] == []


def test_key_written_into_yaml_is_refused_and_not_shown() -> None:
    data = remote().to_dict()
    data["init_parameters"]["api_key"] = KEY
    with pytest.raises(ConfigurationError, match="Pass a Secret") as caught:
        Qwen3TextEmbedder.from_dict(data)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("text", [["a"], [], None, 3, Document(content="a")])
async def test_text_embedder_refuses_what_is_not_a_string(text: Any) -> None:
    component = remote(max_retries=0)
    with pytest.raises(TextTypeError, match="For documents use Qwen3DocumentEmbedder"):
        component.run(text)
    with pytest.raises(TypeError, match=f"not {type(text).__name__}"):
        await component.run_async(text)


@pytest.mark.parametrize(
    ("documents", "positions"),
    [
        ("a", ()),
        (None, ()),
        (PASSAGES[0], ()),
        (iter(PASSAGES), ()),
        (["a"], (0,)),
        ([PASSAGES[0], "a", None], (1, 2)),
    ],
)
async def test_document_embedder_refuses_what_is_not_a_list_of_documents(
    documents: Any, positions: tuple[int, ...]
) -> None:
    component = remote(Qwen3DocumentEmbedder, max_retries=0)
    with pytest.raises(TextTypeError, match=r"\[Document\(content=text\)\]") as caught:
        component.run(documents)
    assert caught.value.positions == positions
    with pytest.raises(TypeError, match="For a query use Qwen3TextEmbedder"):
        await component.run_async(documents)


@pytest.mark.parametrize("settings", [{}, {"model": None}, {"dimensions": 64}])
async def test_no_documents_need_no_server(settings: dict[str, Any]) -> None:
    component = remote(Qwen3DocumentEmbedder, max_retries=0, **settings)
    result = component.run([])
    assert result["documents"] == []
    assert result["meta"]["usage"]["texts"] == 0
    assert await component.run_async([]) == result


def test_setting_an_attribute_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be changed\. Make another component"):
        remote().dimensions = 32


def test_components_that_are_all_closed_leave_no_engine(checkpoint: str) -> None:
    local: dict[str, Any] = {"model": checkpoint, "engine": "reference"}
    components: list[Any] = [Qwen3TextEmbedder(**local), Qwen3DocumentEmbedder(**local)]
    engine = components[0]._embedder._lease.engine
    for component in components:
        component.close()
    assert engine not in registry._engines.values()


def test_pickle_holds_no_key_and_no_secret_header() -> None:
    embedder = Qwen3TextEmbedder(
        "demo",
        api_base_url="http://127.0.0.1:9/v1",
        api_key=Secret.from_token("sesame"),
        default_headers={"Authorization": "Bearer sesame", "X-Team": "search"},
    )
    stored = pickle.dumps(embedder)
    assert b"sesame" not in stored
    assert pickle.loads(stored)._settings["default_headers"] == {"X-Team": "search"}


@pytest.mark.engine
def test_copy_that_is_closed_leaves_the_original_open(checkpoint: str) -> None:
    component = Qwen3TextEmbedder(checkpoint, engine="reference")
    component.warm_up()
    copy.copy(component).close()
    copy.deepcopy(component).close()
    assert not component._released
    assert len(component._embedder.encode_query("still open")) == 128


def test_components_with_other_fields_are_unequal() -> None:
    plain = Qwen3DocumentEmbedder("demo", api_base_url=SERVER)
    assert plain == Qwen3DocumentEmbedder("demo", api_base_url=SERVER)
    assert plain != Qwen3DocumentEmbedder("demo", api_base_url=SERVER, meta_fields_to_embed=["a"])
