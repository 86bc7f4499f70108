"""Streams of batches: a few are embedded ahead, and results come in order."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from qwen3_embeddings.errors import EngineClosedError, Qwen3EmbeddingsError
from qwen3_embeddings.vectors import Vectors

BATCHES_AHEAD = 3
"""Batches in flight or waiting to be consumed: enough that the engine always has a full step."""


def ahead(
    texts: Iterable[str], size: int, start: Callable[[list[str]], Future[Vectors]]
) -> Generator[tuple[int, Future[Vectors]]]:
    """Yield the position of each batch's first text, and the future of its vectors.

    `texts` is read as needed. Closing the generator cancels the batches in flight. If the source
    raises, the batches read before it are yielded first.
    """
    waiting: deque[tuple[int, Future[Vectors]]] = deque()
    batches = _batches(texts, size)
    try:
        for place in itertools.count(0, size):
            batch = next(batches)
            if isinstance(batch, list):
                waiting.append((place, start(batch)))
            while waiting and (len(waiting) == BATCHES_AHEAD or not isinstance(batch, list)):
                yield waiting[0]
                waiting.popleft()
            if isinstance(batch, Exception):
                raise batch
            if batch is None:
                return
    finally:
        for _, future in waiting:
            future.cancel()


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str] | Exception | None]:
    """Yield lists of `size` texts and a shorter last one, then the source's error or None."""
    source = iter(texts)
    batch: list[str] = []
    failure: Exception | None = None
    while failure is None:
        batch = []
        try:
            for text in itertools.islice(source, size):
                batch.append(text)
        except Exception as error:
            failure = error
        if batch:
            yield batch
        if len(batch) < size:
            break
    yield failure


class Stream(Iterator[Vectors]):
    """Batches of vectors, in order; `Embedder.stream` returns one.

    If a batch fails, `next()` raises its error and the iterator stays usable. If a `next()` call is
    interrupted, the stream is closed, and later calls raise `EngineClosedError`: a truncated result
    cannot be mistaken for a complete one. Several threads may share a stream; each batch goes to
    one of them.

    Args:
        batches: the generator that `ahead` returns.

    Example:
        >>> for vectors in embedder.stream(texts, size=1024):
        ...     index.add(vectors)
    """

    def __init__(self, batches: Generator[tuple[int, Future[Vectors]]]) -> None:
        self._batches = batches
        self._process = os.getpid()
        self._turn = threading.RLock()
        self._interrupted = False

    def __next__(self) -> Vectors:
        place, batch = self.take()
        with self.ending(place):
            return batch.result()

    def take(self) -> tuple[int, Future[Vectors]]:
        """Return the position of the next batch's first text, and the future of the batch."""
        if self._process != os.getpid():
            raise EngineClosedError(
                "a stream belongs to the process that created it. Create another one here."
            )
        with self._turn:
            if self._interrupted:
                raise EngineClosedError(
                    "this stream was closed because a previous call was interrupted; some batches "
                    "were not returned. Create a new stream for the remaining texts."
                )
            try:
                return next(self._batches)
            except Exception:  # StopIteration among them
                raise
            except BaseException:
                self._interrupted = True
                raise

    def close(self) -> None:
        """Cancel the batches in flight."""
        with self._turn:
            self._batches.close()

    @contextmanager
    def ending(self, place: int) -> Iterator[None]:
        """Note where a failed batch began; close the stream when the wait itself is interrupted."""
        try:
            yield
        except Qwen3EmbeddingsError as error:
            error.add_note(f"Positions count from text {place} of the stream.")
            raise
        except BaseException:
            self._interrupted = True
            self.close()
            raise


class AsyncStream(AsyncIterator[Vectors]):
    """Batches of vectors for coroutines; `Embedder.astream` returns one.

    Example:
        >>> async for vectors in embedder.astream(texts, size=1024):
        ...     await store.add(vectors)
    """

    def __init__(self, batches: Generator[tuple[int, Future[Vectors]]]) -> None:
        self._stream = Stream(batches)

    async def __anext__(self) -> Vectors:
        try:
            place, batch = self._stream.take()
        except StopIteration:
            raise StopAsyncIteration from None
        with self._stream.ending(place):
            return await asyncio.wrap_future(batch)

    async def aclose(self) -> None:
        """Cancel the batches in flight."""
        self._stream.close()
