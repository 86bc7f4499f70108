"""More texts than memory holds: batches are started a few ahead and answered in order."""

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
"""Batches under way or waiting to be taken: enough that the engine always has a full step."""


def ahead(
    texts: Iterable[str], size: int, start: Callable[[list[str]], Future[Vectors]]
) -> Generator[tuple[int, Future[Vectors]]]:
    """The place of each batch's first text, and its vectors to come; `texts` is read as needed.

    Closing it cancels what is under way. An error of the source is raised behind the batches that
    were read before it.
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
    """Lists of `size` texts and a shorter last one, then the source's error, or None."""
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
    """Batches of vectors, in order. An error takes its batch's place; the next one comes after it.

    Threads may share it: each batch goes to one of them.

    Args:
        batches: what `ahead` gives.
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
        """The place of the next batch's first text, and the batch to come."""
        if self._process != os.getpid():
            raise EngineClosedError("a stream stays with the process that made it. Make another.")
        with self._turn:
            if self._interrupted:
                raise EngineClosedError(
                    "a wait for this stream was interrupted, which closed it: batches are missing. "
                    "Make another, of the texts whose vectors you lack."
                )
            try:
                return next(self._batches)
            except Exception:  # StopIteration among them
                raise
            except BaseException:
                self._interrupted = True
                raise

    def close(self) -> None:
        """Cancel what is under way."""
        with self._turn:
            self._batches.close()

    @contextmanager
    def ending(self, place: int) -> Iterator[None]:
        """Say where a failed batch began; stop when the wait itself is ended."""
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
    """`Stream` for coroutines."""

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
        """Cancel what is under way."""
        self._stream.close()
