"""Inside LlamaIndex: indices, pipelines, caches, callbacks and progress bars."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.qwen3 import Qwen3Embedding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwen3_embeddings import Embedder

    from .conftest import Make, Recorder

NODES = [
    TextNode(text=text, metadata={"source": str(i)})
    for i, text in enumerate(["red apples", "\tcode()\n", "量子力学", "a long walk", " spaces "])
]


def nodes() -> list[TextNode]:
    return [node.model_copy() for node in NODES]


# Indices.


@pytest.mark.parametrize("use_async", [False, True])
async def test_retriever_ranks_as_the_reference_does(
    make: Make, reference: Embedder, use_async: bool
) -> None:
    model = make(embed_batch_size=2)
    index = VectorStoreIndex(nodes(), embed_model=model, use_async=False)
    retriever = index.as_retriever(similarity_top_k=len(NODES))
    question = "what grows on trees?"
    found = await retriever.aretrieve(question) if use_async else retriever.retrieve(question)
    texts = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in NODES]
    scores = reference.encode_document(texts) @ reference.encode_query([question])[0]
    assert [hit.node.node_id for hit in found] == [NODES[i].node_id for i in np.argsort(-scores)]
    assert [hit.score for hit in found] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)


async def test_settings_accept_the_model(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_embed_model", None)
    Settings.embed_model = make()
    index = VectorStoreIndex(nodes())
    assert index._embed_model is Settings.embed_model
    assert len(await index.as_retriever(similarity_top_k=1).aretrieve("apples")) == 1


# Pipelines.


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> str:
    """A variable in the environment of every process started from now on."""
    monkeypatch.setenv("QWEN3_TEST_RUN", mark := os.urandom(8).hex())
    return mark


def left_behind(mark: str) -> list[str]:
    """Commands of living processes that carry the mark, multiprocessing's own helper aside."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in environment and "resource_tracker" not in command:
            found.append(command)
    return found


def test_pipeline_embeds_nodes(make: Make) -> None:
    model = make()
    ran = IngestionPipeline(transformations=[model], disable_cache=True).run(nodes=nodes())
    expected = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in NODES]
    assert [node.embedding for node in ran] == model.get_text_embedding_batch(expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pipeline_in_processes_embeds_nodes_and_leaves_no_process(make: Make, marked: str) -> None:
    model = make(dimensions=64, embeddings_cache=SimpleKVStore())
    pipeline = IngestionPipeline(transformations=[model])
    ran = pipeline.run(nodes=nodes(), num_workers=2)
    texts = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in NODES]
    expected = model.get_text_embedding_batch(texts)
    assert [node.node_id for node in ran] == [node.node_id for node in NODES]
    np.testing.assert_allclose([node.embedding for node in ran], expected, atol=1e-5)
    assert multiprocessing.active_children() == []
    assert left_behind(marked) == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
async def test_pipeline_in_forked_processes_uses_no_parent_connection(recorder: Recorder) -> None:
    """`arun` forks where that is the default: connections of the parent must not be used."""
    model = Qwen3Embedding("tiny", api_base=recorder.base_url)
    await model.aget_text_embedding("the parent's connection")
    pipeline = IngestionPipeline(transformations=[model], disable_cache=True)
    ran = await pipeline.arun(nodes=nodes(), num_workers=2)
    assert [node.node_id for node in ran] == [node.node_id for node in NODES]
    assert all(node.embedding for node in ran)
    assert await model.aget_text_embedding("again")


def test_ingestion_cache_is_used_and_holds_no_key(recorder: Recorder) -> None:
    cache = IngestionCache()

    def texts_sent() -> int:
        before = len(recorder.inputs)
        with Qwen3Embedding(api_base=recorder.base_url, api_key="sesame-street") as model:
            IngestionPipeline(transformations=[model], cache=cache).run(nodes=nodes())
        return sum(map(len, recorder.inputs[before:]))

    probe = 2  # what the client learns the server's model and sizes from
    assert texts_sent() == probe + len(NODES)
    assert texts_sent() == probe
    recorder.model = "another"
    assert texts_sent() == probe + len(NODES)
    assert "sesame-street" not in str(cache.cache.get_all(cache.collection))


# The embeddings cache.


async def test_cache_keeps_roles_apart(make: Make) -> None:
    plain = make()
    query, text = plain.get_query_embedding("same"), plain.get_text_embedding("same")
    for first in ("query", "text"):
        model = make(embeddings_cache=SimpleKVStore())
        for _ in range(2):
            if first == "query":
                assert model.get_query_embedding("same") == pytest.approx(query, abs=1e-6)
            assert model.get_text_embedding("same") == pytest.approx(text, abs=1e-6)
            assert await model.aget_text_embedding("same") == pytest.approx(text, abs=1e-6)
            assert model.get_text_embedding_batch(["same"])[0] == pytest.approx(text, abs=1e-6)
            batch = await model.aget_text_embedding_batch(["same"])
            assert batch[0] == pytest.approx(text, abs=1e-6)
            assert model.get_query_embedding("same") == pytest.approx(query, abs=1e-6)
            assert await model.aget_query_embedding("same") == pytest.approx(query, abs=1e-6)


def test_cache_shared_by_models_keeps_them_apart(make: Make) -> None:
    store = SimpleKVStore()
    models = [
        make(embeddings_cache=store, **parameters)
        for parameters in ({}, {"dimensions": 64}, {"dimensions": 32}, {"text_instruction": "x"})
    ]
    for _ in range(2):
        for model, size in zip(models, (128, 64, 32, 128), strict=True):
            assert len(model.get_text_embedding("same")) == size
            assert len(model.get_query_embedding("same")) == size
    # The instruction of documents changes documents only.
    assert len(store.get_all("embeddings")) == 7


async def test_cache_hits_send_no_request(recorder: Recorder) -> None:
    store = SimpleKVStore()
    model = Qwen3Embedding(api_base=recorder.base_url, embeddings_cache=store)
    texts = ["a", "b\n", "it's", 'say "c"', "", "None"]
    first = await model.aget_text_embedding_batch(texts)
    await model.aget_query_embedding("a")
    asked = len(recorder.inputs)
    again = Qwen3Embedding("tiny", api_base=recorder.base_url, embeddings_cache=store)
    assert again.get_text_embedding_batch(texts) == first
    assert await again.aget_text_embedding(texts[1]) == first[1]
    again.get_query_embedding("a")
    assert len(recorder.inputs) == asked
    with pytest.raises(TypeError, match=r"texts\[2\]"):
        again.get_text_embedding_batch(["a", "b\n", None])  # type: ignore[list-item]


async def test_cache_store_stays_usable_by_its_owner(recorder: Recorder) -> None:
    store = SimpleKVStore()
    cache = Qwen3Embedding(api_base=recorder.base_url, embeddings_cache=store).embeddings_cache
    assert cache is not None
    cache.put("a", {"id": [1.0]}, "embeddings")
    await cache.aput("b", {"id": [2.0]}, "embeddings")
    assert await cache.aget_all("embeddings") == cache.get_all("embeddings")
    assert len(store.get_all("embeddings")) == 2
    assert cache.delete("a", "embeddings")
    assert await cache.adelete("b", "embeddings")
    assert store.get_all("embeddings") == {}


# Callbacks, events, progress.


class Recording(BaseCallbackHandler):
    """Keeps the payloads of embedding events."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.started: list[dict[str, Any]] = []
        self.ended: list[dict[str, Any]] = []

    def on_event_start(
        self, event_type: CBEventType, payload: dict[str, Any] | None = None, *_: Any, **__: Any
    ) -> str:
        if event_type == CBEventType.EMBEDDING:
            self.started.append(payload or {})
        return ""

    def on_event_end(
        self, event_type: CBEventType, payload: dict[str, Any] | None = None, *_: Any, **__: Any
    ) -> None:
        if event_type == CBEventType.EMBEDDING:
            self.ended.append(payload or {})

    def start_trace(self, trace_id: str | None = None) -> None:
        pass

    def end_trace(self, *_: Any, **__: Any) -> None:
        pass


async def test_callbacks_get_every_batch(make: Make) -> None:
    handler = Recording()
    counter = TokenCountingHandler(tokenizer=str.split)
    manager = CallbackManager([handler, counter])
    model = make(callback_manager=manager, embed_batch_size=2, embeddings_cache=SimpleKVStore())
    model.get_query_embedding("a query")
    model.get_text_embedding_batch(["one", "two", "three"])
    await model.aget_text_embedding_batch(["four", "five", "six"])
    await model.aget_query_embedding("a query")
    chunks = [payload[EventPayload.CHUNKS] for payload in handler.ended]
    assert chunks == [
        *(["a query"], ["one", "two"], ["three"]),
        *(["four", "five"], ["six"], ["a query"]),
    ]
    for payload in handler.ended:
        assert len(payload[EventPayload.EMBEDDINGS]) == len(payload[EventPayload.CHUNKS])
    assert counter.total_embedding_token_count == 10
    assert handler.started[0][EventPayload.SERIALIZED]["model_name"] == model.model_name


@pytest.fixture
def spans_and_events() -> Iterator[tuple[SimpleSpanHandler, list[Any]]]:
    events: list[Any] = []

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **_: Any) -> None:
            events.append(event)

    root, spans = get_dispatcher(), SimpleSpanHandler()
    before = list(root.span_handlers), list(root.event_handlers)
    root.add_span_handler(spans)
    root.add_event_handler(Handler())
    yield spans, events
    root.span_handlers, root.event_handlers = before


def test_event_handler_may_embed_during_a_call(make: Make) -> None:
    """Batches are computed ahead: one asked for in between is not answered with the next."""
    texts = [f"text {i}" for i in range(10)] + ["text 0"]
    model, other = make(embed_batch_size=2), make(embed_batch_size=2, query_instruction="Other")
    expected = make().get_text_embedding_batch(texts)
    seen: list[list[list[float]]] = []
    busy: list[bool] = []

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **_: Any) -> None:
            if isinstance(event, EmbeddingEndEvent) and not busy:
                busy.append(True)  # its own calls have events too
                rows = model.get_text_embedding_batch(texts[:2])
                rows += model._get_text_embeddings(texts[2:4])
                rows += other._get_text_embeddings(texts[4:6])
                seen.append(rows)
                busy.clear()

    root = get_dispatcher()
    before = list(root.event_handlers)
    root.add_event_handler(Handler())
    try:
        rows = model.get_text_embedding_batch(texts)
    finally:
        root.event_handlers = before
    np.testing.assert_allclose(rows, expected, atol=2e-6)
    assert len(seen) == 6
    for rows in seen:
        np.testing.assert_allclose(rows, expected[:6], atol=2e-6)


async def test_each_call_has_one_span_and_one_event(
    recorder: Recorder, spans_and_events: tuple[SimpleSpanHandler, list[Any]]
) -> None:
    model = Qwen3Embedding(api_base=recorder.base_url, api_key="sesame-street")
    model.get_query_embedding("a")
    await model.aget_query_embedding("a")
    model.get_text_embedding_batch(["a"])
    await model.aget_text_embedding_batch(["a"])
    spans, events = spans_and_events
    names = [span.id_.split("-")[0].split(".")[1] for span in spans.completed_spans]
    assert [name for name in names if not name.startswith("_")] == [
        *("get_query_embedding", "aget_query_embedding"),
        *("get_text_embedding_batch", "aget_text_embedding_batch"),
    ]
    ended = [event for event in events if isinstance(event, EmbeddingEndEvent)]
    assert [type(event.chunks[0]) for event in ended] == [str] * 4
    assert "sesame-street" not in "".join(event.model_dump_json() for event in events)


async def test_show_progress_counts_every_text(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(embed_batch_size=2)
    model.get_text_embedding_batch(["a", "b", "c"], show_progress=False)
    assert capsys.readouterr().err == ""
    model.get_text_embedding_batch(["a", "b", "c"], show_progress=True)
    assert "3/3" in capsys.readouterr().err
    await model.aget_text_embedding_batch(["a", "b", "c"], show_progress=True)
    assert "3/3" in capsys.readouterr().err
