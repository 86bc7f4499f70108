"""`Embedder.stream`: any number of texts, in order, in bounded memory, nothing lost."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qwen3_embeddings import (
    ConfigurationError,
    Embedder,
    EngineClosedError,
    TextsFailedError,
    TextTypeError,
)
from qwen3_embeddings.stream import BATCHES_AHEAD


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 50])
def test_stream_yields_batches_in_order(embedder: Embedder, count: int) -> None:
    texts = [f"text {i} " + "word " * (i % 5) for i in range(count)]
    batches = list(embedder.stream(iter(texts), size=8))
    assert [len(batch) for batch in batches] == [8] * (count // 8) + [count % 8] * (count % 8 > 0)
    if count:
        expected = embedder.encode_document(texts)
        np.testing.assert_allclose(np.concatenate(batches), expected, atol=2e-6)


def test_stream_of_queries_uses_the_instruction(embedder: Embedder) -> None:
    (batch,) = embedder.stream(["a", "b"], role="query")
    np.testing.assert_allclose(batch, embedder.encode_query(["a", "b"]), atol=2e-6)


async def test_astream_yields_the_same_batches(embedder: Embedder) -> None:
    texts = [f"text {i}" for i in range(20)]
    batches = [batch async for batch in embedder.astream(texts, size=8)]
    expected = await embedder.aencode_document(texts)
    np.testing.assert_allclose(np.concatenate(batches), expected, atol=2e-6)


def test_stream_reads_few_batches_ahead(embedder: Embedder) -> None:
    """An endless source: what is read follows what is taken, and a stop cancels the rest."""
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield f"text {read}"

    stream = embedder.stream(endless(), size=10)
    for taken in range(1, 6):
        assert next(stream).shape == (10, 128)
        assert read <= 10 * (taken + BATCHES_AHEAD)
    stream.close()


def test_stream_raises_an_error_instead_of_its_batch(embedder: Embedder) -> None:
    texts: list[object] = [f"text {i}" for i in range(30)]
    texts[14] = None
    stream = embedder.stream(texts, size=10)  # type: ignore[arg-type]
    assert next(stream).shape == (10, 128), "what was computed before the error is not lost"
    with pytest.raises(TextTypeError) as caught:
        next(stream)
    assert caught.value.positions == (4,)
    assert "text 10 of the stream" in caught.value.__notes__[0]
    assert next(stream).shape == (10, 128), "what was read behind the error is not lost either"
    assert next(stream, None) is None


async def test_astream_continues_after_an_error(checkpoint: str) -> None:
    embedder = Embedder(checkpoint, dtype="float32", on_error="finish")
    texts = [f"text {i}" for i in range(12)]
    texts[5] = "\ud800"
    stream = embedder.astream(texts, size=4)
    assert (await anext(stream)).shape == (4, 128)
    with pytest.raises(TextsFailedError) as caught:
        await anext(stream)
    assert caught.value.computed is not None
    assert caught.value.computed.positions.tolist() == [0, 2, 3]
    assert (await anext(stream)).shape == (4, 128)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


def test_stream_of_a_failing_source_yields_what_was_read(embedder: Embedder) -> None:
    def source() -> Iterator[str]:
        yield from (f"text {i}" for i in range(14))
        raise OSError("the disk is gone")

    stream = embedder.stream(source(), size=10)
    assert [len(next(stream)), len(next(stream))] == [10, 4]
    with pytest.raises(OSError, match="disk"):
        next(stream)


def test_stream_with_wrong_arguments_raises(embedder: Embedder) -> None:
    with pytest.raises(TextTypeError, match="not a list"):
        next(embedder.stream("one text"))
    with pytest.raises(ConfigurationError, match="size"):
        next(embedder.stream(["a"], size=0))
    for size in (2.5, "3", True, None):
        with pytest.raises(ConfigurationError, match="size"):
            next(embedder.stream(["a"], size=size))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="role"):
        next(embedder.stream(["a"], role="passage"))  # type: ignore[arg-type]


async def test_astream_cancelled_stops_its_batches(embedder: Embedder) -> None:
    async def take() -> None:
        async for _ in embedder.astream((f"{i} " + "word " * 200 for i in range(5000)), size=100):
            pass

    task = asyncio.create_task(take())
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await embedder.aencode_document(["after"])).shape == (1, 128)


async def test_astream_interrupted_raises_instead_of_ending(embedder: Embedder) -> None:
    stream = embedder.astream((f"text {i}" for i in range(50)), size=10)
    wait = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait
    with pytest.raises(EngineClosedError, match="interrupted"):
        await anext(stream)


def test_stream_shared_by_threads_yields_each_batch_once(embedder: Embedder) -> None:
    stream = embedder.stream((f"text {i}" for i in range(205)), size=10)
    with ThreadPoolExecutor(4) as pool:
        batches = pool.map(lambda _: [len(batch) for batch in stream], range(4))
    assert sum(map(sum, batches)) == 205


def test_stream_in_a_forked_child_raises(embedder: Embedder) -> None:
    stream = embedder.stream(["a", "b", "c"], size=1)
    assert next(stream).shape == (1, 128)
    child = os.fork()
    if not child:
        try:
            next(stream)
        except EngineClosedError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert next(stream).shape == (1, 128)
