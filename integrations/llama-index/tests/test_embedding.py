"""Vectors from both engines: right, whoever calls and however many at once."""

from __future__ import annotations

import asyncio
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent
from llama_index.core.rate_limiter import BaseRateLimiter, TokenBucketRateLimiter
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.qwen3 import Qwen3Embedding

from qwen3_embeddings import (
    Embedder,
    ServerTimeoutError,
    TextEncodingError,
    TextsFailedError,
    TextTooLongError,
    TextTypeError,
)

if TYPE_CHECKING:
    from conftest import RunningServer

    from .conftest import Make, Recorder

WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"


TEXTS = [
    "a plain sentence",
    " outer spaces ",
    "\tdef f(x):\n\t\treturn x  # tab\n\n",
    "line one\nline two\r\nline three\n",
    "text that holds <|endoftext|> inside",
    "通义千问的向量模型",
    "مرحبا بالعالم",
    "👩‍👩‍👧 and 🚀",
    "",
    "word " * 300,
    "a plain sentence",
]


def assert_same(rows: Any, expected: Any) -> None:
    """Cosine 1 and length 1, row by row."""
    rows, expected = np.asarray(rows, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert rows.shape == expected.shape
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() <= 1e-5
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
    assert np.abs((rows * expected).sum(axis=1) / lengths - 1).max() <= 1e-6


@pytest.mark.parametrize("dimensions", [None, 32, 96])
async def test_embeddings_equal_the_reference(
    make: Make, checkpoint: str, dimensions: int | None
) -> None:
    reference = Embedder(checkpoint, engine="reference", dtype="float32", dimensions=dimensions)
    model = make(dimensions=dimensions)
    documents = reference.encode_document(TEXTS)
    queries = reference.encode_query(TEXTS)
    assert_same(model.get_text_embedding_batch(TEXTS), documents)
    assert_same(await model.aget_text_embedding_batch(TEXTS), documents)
    assert_same([model.get_text_embedding(text) for text in TEXTS], documents)
    assert_same([await model.aget_text_embedding(text) for text in TEXTS], documents)
    assert_same([model.get_query_embedding(text) for text in TEXTS], queries)
    assert_same([await model.aget_query_embedding(text) for text in TEXTS], queries)


def test_embedding_is_a_list_of_floats(make: Make) -> None:
    vector = make().get_text_embedding("a")
    assert type(vector) is list
    assert {type(number) for number in vector} == {float}


def test_query_embedding_uses_the_template_byte_for_byte(make: Make) -> None:
    """The template written out by hand has the query's vector; with one more space it has not."""
    model = make()
    for text in ("hello", " \tspaces\n ", "代码", ""):
        query = model.get_query_embedding(text)
        bare = model.get_text_embedding(f"Instruct: {WEB_SEARCH}\nQuery:{text}")
        spaced = model.get_text_embedding(f"Instruct: {WEB_SEARCH}\nQuery: {text}")
        assert np.dot(query, bare) == pytest.approx(1, abs=1e-6)
        assert np.dot(query, spaced) < 1 - 1e-5


async def test_requests_hold_the_texts_unaltered(recorder: Recorder) -> None:
    model = Qwen3Embedding(
        api_base=recorder.base_url, api_key="sesame", default_headers={"X-Team": "search"}
    )
    model.get_text_embedding("start")
    recorder.inputs.clear()
    model.get_text_embedding_batch(TEXTS)
    await model.aget_text_embedding_batch(TEXTS)
    assert recorder.inputs == [TEXTS, TEXTS]
    recorder.inputs.clear()
    for text in TEXTS:
        await model.aget_query_embedding(text)
    assert recorder.inputs == [[f"Instruct: {WEB_SEARCH}\nQuery:{text}"] for text in TEXTS]
    assert recorder.headers[-1]["X-Team"] == "search"
    assert recorder.headers[-1]["Authorization"] == "Bearer sesame"


async def test_instructions_are_applied_by_role(make: Make) -> None:
    free = make(query_instruction="Find code", text_instruction="Code")
    plain = make(query_instruction="")
    symmetric = make(task="similarity")
    text = plain.get_text_embedding("a")
    assert np.dot(plain.get_query_embedding("a"), text) == pytest.approx(1, abs=1e-6)
    assert_same(
        [free.get_query_embedding("a"), await free.aget_text_embedding("a")],
        plain.get_text_embedding_batch(["Instruct: Find code\nQuery:a", "Instruct: Code\nQuery:a"]),
    )
    assert_same([symmetric.get_query_embedding("a")], [symmetric.get_text_embedding("a")])
    assert_same(
        [symmetric.get_query_embedding("a")],
        [plain.with_task("similarity").get_query_embedding("a")],
    )


@pytest.mark.parametrize("num_workers", [None, 1, 2])
async def test_small_batches_keep_the_order(make: Make, num_workers: int | None) -> None:
    texts = [f"text {i}" for i in range(50)]
    whole = make().get_text_embedding_batch(texts)
    model = make(embed_batch_size=4, num_workers=num_workers)
    assert_same(model.get_text_embedding_batch(texts), whole)
    assert_same(await model.aget_text_embedding_batch(texts), whole)


@pytest.mark.parametrize(("num_workers", "most"), [(None, 3), (1, 3), (2, 2)])
async def test_requests_in_flight_are_bounded(
    recorder: Recorder, num_workers: int | None, most: int
) -> None:
    model = Qwen3Embedding(
        api_base=recorder.base_url,
        max_concurrency=3,
        embed_batch_size=64,
        num_workers=num_workers,
    )
    await model.aget_text_embedding_batch([f"text {i}" for i in range(64 * 30)])
    assert recorder.most_under_way <= most


def test_successive_event_loops_return_the_same_vectors(make: Make) -> None:
    model = make()
    expected = model.get_text_embedding_batch(TEXTS)
    for _ in range(5):
        assert_same(asyncio.run(model.aget_text_embedding_batch(TEXTS)), expected)
        assert_same(
            [asyncio.run(model.aget_query_embedding("a"))], [model.get_query_embedding("a")]
        )


async def test_many_coroutines_return_the_same_vectors(make: Make) -> None:
    model = make()
    texts = [f"number {i}" for i in range(100)]
    queries, documents = await asyncio.gather(
        asyncio.gather(*map(model.aget_query_embedding, texts)),
        asyncio.gather(*map(model.aget_text_embedding, texts)),
    )
    assert_same(documents, model.get_text_embedding_batch(texts))
    assert_same(queries, model._embedder.encode_query(texts))


def test_many_threads_return_the_same_vectors(make: Make) -> None:
    model = make()
    texts = [f"number {i}" for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        documents = list(pool.map(lambda text: model.get_text_embedding_batch([text])[0], texts))
        queries = list(pool.map(model.get_query_embedding, texts))
    assert_same(documents, model.get_text_embedding_batch(texts))
    assert_same(queries, model._embedder.encode_query(texts))


async def test_cancelled_call_leaves_the_engine_working(make: Make) -> None:
    model = make()
    task = asyncio.create_task(model.aget_text_embedding_batch(["some words " * 50] * 500))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(await model.aget_query_embedding("a")) == 128


def test_sibling_of_another_task_shares_the_engine(make: Make) -> None:
    model = make()
    with model.with_task("code") as sibling:
        code = sibling.get_query_embedding("a")
    assert np.dot(code, model.get_query_embedding("a")) < 1 - 1e-5


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (None, TextTypeError),
        (b"bytes", TextTypeError),
        (3, TextTypeError),
        ("torn \ud800", TextEncodingError),
        ("word " * 3000, TextTooLongError),
    ],
)
async def test_bad_texts_are_named_by_position(
    make: Make, bad: Any, error: type[Exception]
) -> None:
    model = make(embed_batch_size=4)
    texts = [f"text {i}" for i in range(9)] + [bad, "after", bad]
    with pytest.raises(error, match=r"texts\[9, 11\]"):
        model.get_text_embedding_batch(texts)
    with pytest.raises(error, match=r"texts\[9, 11\]"):
        await model.aget_text_embedding_batch(texts)
    with pytest.raises(error, match=r"texts\[0\]"):
        model.get_query_embedding(bad)
    with pytest.raises(error, match=r"texts\[0\]"):
        await model.aget_text_embedding(bad)


async def failures(model: Qwen3Embedding, texts: Any) -> list[TextsFailedError]:
    """What a call raises, and one of a coroutine."""
    with pytest.raises(TextsFailedError) as caught:
        model.get_text_embedding_batch(texts)
    with pytest.raises(TextsFailedError) as awaited:
        await model.aget_text_embedding_batch(texts)
    return [caught.value, awaited.value]


def assert_carried(error: TextsFailedError, positions: list[int], expected: Any) -> None:
    """The error carries the vectors of all other texts."""
    assert error.computed is not None
    assert error.computed.positions.tolist() == positions
    np.testing.assert_allclose(error.computed.vectors, expected, atol=2e-6)


@pytest.mark.parametrize("cached", [False, True])
async def test_on_error_finish_embeds_all_other_batches(make: Make, cached: bool) -> None:
    """LlamaIndex stops at the first batch that fails, and forgets those before."""
    long, text = "word " * 3000, "text 0"
    texts = [text, long + "a", "b", "c", long, *(f"d {i}" for i in range(5)), long + "b", text]
    good = [0, 2, 3, 5, 6, 7, 8, 9, 11]
    expected = np.array(make().get_text_embedding_batch([texts[i] for i in good]))
    for batch in (1, 3, 2048):
        settings: dict[str, Any] = {"embed_batch_size": batch, "on_error": "finish"}
        store = SimpleKVStore()
        model = make(**settings, embeddings_cache=store if cached else None)
        for _ in range(2):
            for error in await failures(model, texts):
                assert error.positions == (1, 4, 10)
                assert [kind.positions for kind in error.errors] == [(1, 4, 10)]
                assert_carried(error, good, expected)
        assert len(store.get_all("embeddings")) == (8 if cached else 0)


async def test_on_error_finish_embeds_all_texts_that_are_str(make: Make) -> None:
    """LlamaIndex's own events take nothing else."""
    texts: list[Any] = ["a", "b", None, "c", 5, b"d", "e"]
    expected = np.array(make().get_text_embedding_batch(["a", "b", "c", "e"]))
    for batch in (2, 2048):
        model = make(embed_batch_size=batch, on_error="finish", embeddings_cache=SimpleKVStore())
        for error in await failures(model, texts):
            assert error.positions == (2, 4, 5)
            assert_carried(error, [0, 1, 3, 6], expected)


async def test_errors_about_an_array_name_its_positions(make: Make) -> None:
    """Its items are made anew each time they are read."""
    texts = np.array([f"text {i}" for i in range(40)] + ["word " * 3000])
    expected = np.array(make().get_text_embedding_batch(texts[:40]))
    for batch in (1, 7, 2048):
        model = make(embed_batch_size=batch, on_error="finish")
        for error in await failures(model, texts):
            assert error.positions == (40,)
            assert_carried(error, list(range(40)), expected)
    generated = make().get_text_embedding_batch(text for text in texts[:40])
    np.testing.assert_allclose(generated, expected, atol=2e-6)


async def test_error_carries_the_batches_before_it(make: Make) -> None:
    texts = ["a", "b", "c", "d", "torn \ud800", "e"]
    expected = np.array(make().get_text_embedding_batch(texts[:4]))
    limiter = TokenBucketRateLimiter(requests_per_minute=6000)  # one batch after the other
    with pytest.raises(TextEncodingError, match="4 of 6 texts") as caught:
        make(embed_batch_size=2, rate_limiter=limiter).get_text_embedding_batch(texts)
    assert caught.value.computed is not None
    assert caught.value.computed.positions.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(caught.value.computed.vectors, expected, atol=2e-6)
    with pytest.raises(TextEncodingError) as caught:
        make(embed_batch_size=2).get_text_embedding_batch(texts)
    assert caught.value.computed is None, "all texts are checked before anything is computed"


class Counting(BaseRateLimiter):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def acquire(self, num_tokens: int = 0) -> None:
        self.asked += 1

    async def async_acquire(self, num_tokens: int = 0) -> None:
        self.asked += 1


async def test_rate_limiter_is_asked_once_per_computed_batch(make: Make) -> None:
    limiter, store = Counting(), SimpleKVStore()
    model = make(embed_batch_size=4, rate_limiter=limiter, embeddings_cache=store)
    texts = [f"text {i}" for i in range(10)]
    rows = model.get_text_embedding_batch(texts)
    assert_same(rows, make().get_text_embedding_batch(texts))
    assert limiter.asked == 3
    assert await model.aget_text_embedding_batch(texts) == rows
    assert limiter.asked == 3, "all of it comes from the cache"
    await model.aget_text_embedding_batch([*texts[:8], "new"])
    assert limiter.asked == 4
    model.get_query_embedding("a")
    assert limiter.asked == 5


@pytest.mark.parametrize("num_workers", [None, 3])
async def test_events_hold_the_usage_of_their_call(make: Make, num_workers: int | None) -> None:
    events: list[EmbeddingEndEvent] = []

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **_: Any) -> None:
            if isinstance(event, EmbeddingEndEvent):
                events.append(event)

    root = get_dispatcher()
    before = list(root.event_handlers)
    root.add_event_handler(Handler())
    model = make(embed_batch_size=2, num_workers=num_workers)
    texts = ["one", "two words", "three more words"]
    try:
        model.get_text_embedding_batch(texts)
        await model.aget_text_embedding_batch(texts)
    finally:
        root.event_handlers = before
    usages = [event.tags["usage"] for event in events]
    assert [usage["texts"] for usage in usages] == [0, 3, 0, 3]
    tokens = 2 * sum(model.count_tokens(texts))
    assert sum(usage["tokens"] for usage in usages) in {0, tokens}
    assert model.usage.texts == 6


async def test_embed_no_texts_returns_an_empty_list(make: Make) -> None:
    model = make()
    assert model.get_text_embedding_batch([]) == []
    assert await model.aget_text_embedding_batch([]) == []


def test_overflow_truncate_equals_the_reference(make: Make, reference: Embedder) -> None:
    cut = Embedder(reference.model, engine="reference", dtype="float32", overflow="truncate")
    text = "word " * 3000
    assert_same([make(overflow="truncate").get_text_embedding(text)], cut.encode_document([text]))


async def test_client_of_the_openai_package_returns_the_same_vectors(
    server: RunningServer,
) -> None:
    settings = {"api_base": server.base_url, "api_key": server.api_key}
    expected = Qwen3Embedding(**settings).get_text_embedding_batch(TEXTS)
    own = {"base_url": server.base_url, "api_key": server.api_key}
    with openai.OpenAI(**own) as client, Qwen3Embedding(client=client) as model:
        assert_same(model.get_text_embedding_batch(TEXTS), expected)
        assert len(await model.aget_query_embedding("a")) == 128
        assert model.usage.texts == len(TEXTS) + 1
        assert "client" not in repr(model) + model.to_json()
        assert model.with_task("code").get_query_embedding("a")
        with pytest.raises(TypeError, match="is not pickled"):
            pickle.dumps(model)


def test_time_out_names_the_classes_own_parameter() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with (
            Qwen3Embedding("tiny", api_base=url, timeout=0.2, max_retries=0) as model,
            pytest.raises(ServerTimeoutError, match="lower embed_batch_size"),
        ):
            model.get_text_embedding_batch(TEXTS)
