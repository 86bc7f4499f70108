"""With LangChain's own parts, as they are."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_classic.storage import LocalFileStore
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_qwen3_embeddings import Qwen3Embeddings

from qwen3_embeddings import EngineClosedError, ServerTimeoutError

TEXTS = ["Beijing is the capital.", "Bread is baked.", "def f():\n\treturn 1\n", " 北京 ", "🙂"]


def bare(settings: dict[str, Any]) -> Qwen3Embeddings:
    """Queries without instruction, so that a text finds itself whatever the weights."""
    return Qwen3Embeddings(**settings, query_instruction="")


def test_vector_store_finds_every_text(settings: dict[str, Any]) -> None:
    store = InMemoryVectorStore.from_texts(TEXTS, bare(settings))
    for text in TEXTS:
        ((found, score),) = store.similarity_search_with_score(text, k=1)
        assert found.page_content == text
        assert score == pytest.approx(1, abs=1e-5)


def test_vector_store_ranks_as_the_vectors_do(embeddings: Qwen3Embeddings) -> None:
    store = InMemoryVectorStore(embeddings)
    store.add_documents([Document(text, id=str(i)) for i, text in enumerate(TEXTS)])
    query = embeddings.embed_query("capital?")
    rows = embeddings.embed_documents(TEXTS)
    scores = [sum(a * b for a, b in zip(query, row, strict=True)) for row in rows]
    best = sorted(range(len(TEXTS)), key=lambda i: -scores[i])
    found = store.similarity_search("capital?", k=len(TEXTS))
    assert [int(document.id or -1) for document in found] == best


async def test_async_retriever_finds_every_text(settings: dict[str, Any]) -> None:
    store = await InMemoryVectorStore.afrom_texts(TEXTS, bare(settings))
    retriever = store.as_retriever(search_kwargs={"k": 1})
    for text in TEXTS:
        (found,) = await retriever.ainvoke(text)
        assert found.page_content == text


def cache(embeddings: Qwen3Embeddings, folder: Path) -> CacheBackedEmbeddings:
    """As the docstring shows it."""
    return CacheBackedEmbeddings.from_bytes_store(
        embeddings,
        LocalFileStore(folder / "documents"),
        namespace=embeddings.fingerprint("document"),
        query_embedding_cache=LocalFileStore(folder / embeddings.fingerprint("query")),
        key_encoder="blake2b",
    )


def closed(embeddings: Qwen3Embeddings) -> Qwen3Embeddings:
    """A copy that can name itself and embed nothing: what it answers came from a cache."""
    copied = embeddings.model_copy()
    copied.close()
    return copied


def test_cache_returns_the_stored_vectors(embeddings: Qwen3Embeddings, tmp_path: Path) -> None:
    first = cache(embeddings, tmp_path)
    documents, query = first.embed_documents(TEXTS), first.embed_query(TEXTS[0])
    assert query != documents[0]
    second = cache(closed(embeddings), tmp_path)
    assert second.embed_documents(TEXTS) == documents
    assert second.embed_query(TEXTS[0]) == query
    with pytest.raises(EngineClosedError):
        second.embed_query(TEXTS[1])  # cached as a document only


async def test_async_cache_returns_the_stored_vectors(
    embeddings: Qwen3Embeddings, tmp_path: Path
) -> None:
    first = cache(embeddings, tmp_path)
    documents, query = await first.aembed_documents(TEXTS), await first.aembed_query(TEXTS[0])
    second = cache(closed(embeddings), tmp_path)
    assert await second.aembed_documents(TEXTS) == documents
    assert await second.aembed_query(TEXTS[0]) == query


def test_cache_of_another_task_misses_queries_only(
    embeddings: Qwen3Embeddings, tmp_path: Path
) -> None:
    first = cache(embeddings, tmp_path)
    documents, query = first.embed_documents(TEXTS), first.embed_query(TEXTS[0])
    code = cache(closed(embeddings).with_task("code"), tmp_path)
    assert code.embed_documents(TEXTS) == documents  # bare in both tasks: still right
    with pytest.raises(EngineClosedError):
        code.embed_query(TEXTS[0])
    assert cache(embeddings.with_task("code"), tmp_path).embed_query(TEXTS[0]) != query
    similar = cache(closed(embeddings).with_task("similarity"), tmp_path)
    with pytest.raises(EngineClosedError):
        similar.embed_documents(TEXTS)


def test_pickle_embeds_alike(
    embeddings: Qwen3Embeddings, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "api_key" in settings:
        monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", settings["api_key"])
    loaded = pickle.loads(pickle.dumps(embeddings.with_task("code")))
    expected = embeddings.with_task("code").embed_query("x")
    assert loaded.embed_query("x") == pytest.approx(expected, abs=1e-6)


async def test_client_of_the_openai_package_returns_the_same_vectors(
    remote: dict[str, Any],
) -> None:
    expected = Qwen3Embeddings(**remote).embed_documents(TEXTS)
    settings = {"base_url": remote["base_url"], "api_key": remote["api_key"]}
    headers = {"Authorization": f"Bearer {remote['api_key']}"}
    with openai.OpenAI(**settings) as client, httpx.Client(headers=headers) as http_client:
        for given in (
            {"client": client},
            {"http_client": http_client, "base_url": remote["base_url"]},
        ):
            with Qwen3Embeddings(**given) as embeddings:
                rows = embeddings.embed_documents(TEXTS)
                np.testing.assert_allclose(rows, expected, atol=1e-6)
                assert len(await embeddings.aembed_query("a")) == 128
                assert embeddings.usage.texts == len(TEXTS) + 1
                for shown in (repr(embeddings), str(embeddings.model_dump())):
                    assert "client" not in shown
                with pytest.raises(TypeError, match="is not pickled"):
                    pickle.dumps(embeddings)


def test_time_out_names_the_classes_own_parameter() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with (
            Qwen3Embeddings(model="tiny", base_url=url, timeout=0.2, max_retries=0) as embeddings,
            pytest.raises(ServerTimeoutError, match="lower chunk_size"),
        ):
            embeddings.embed_documents(TEXTS)
