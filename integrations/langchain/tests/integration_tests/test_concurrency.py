"""One engine under many callers: threads, coroutines, and one event loop after another."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from langchain_qwen3_embeddings import Qwen3Embeddings

QUERIES = [f"question {i}: " + "why " * (i % 17) for i in range(100)]


@pytest.fixture(scope="module")
def expected(embeddings: Qwen3Embeddings) -> np.ndarray[Any, Any]:
    as_documents = embeddings.with_task("similarity")
    return np.array(as_documents.embed_documents(QUERIES))


def assert_right(rows: list[list[float]], expected: np.ndarray[Any, Any]) -> None:
    cosines = (np.array(rows) * expected[: len(rows)]).sum(axis=1)
    assert np.abs(cosines - 1).max() <= 1e-6


def test_many_threads_return_the_same_vectors(
    embeddings: Qwen3Embeddings, expected: np.ndarray[Any, Any]
) -> None:
    similar = embeddings.with_task("similarity")
    with ThreadPoolExecutor(32) as pool:
        assert_right(list(pool.map(similar.embed_query, QUERIES)), expected)


async def test_many_coroutines_return_the_same_vectors(
    embeddings: Qwen3Embeddings, expected: np.ndarray[Any, Any]
) -> None:
    similar = embeddings.with_task("similarity")
    rows = await asyncio.gather(*map(similar.aembed_query, QUERIES))
    assert_right(list(rows), expected)


async def test_coroutines_leave_the_loop_free(embeddings: Qwen3Embeddings) -> None:
    embedding = asyncio.create_task(embeddings.aembed_documents(QUERIES * 3))
    turns = 0
    while not embedding.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns >= 5


def test_successive_event_loops_return_the_same_vectors(
    embeddings: Qwen3Embeddings, expected: np.ndarray[Any, Any]
) -> None:
    similar = embeddings.with_task("similarity")

    async def some() -> list[list[float]]:
        return list(await asyncio.gather(*map(similar.aembed_query, QUERIES[:10])))

    for _ in range(5):
        assert_right(asyncio.run(some()), expected)


async def test_cancelled_call_leaves_the_engine_working(embeddings: Qwen3Embeddings) -> None:
    embedding = asyncio.create_task(embeddings.aembed_documents(QUERIES * 3))
    await asyncio.sleep(0.01)
    embedding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await embedding
    expected = pytest.approx(embeddings.embed_query("after"), abs=1e-6)
    assert await embeddings.aembed_query("after") == expected
