"""One call: its texts and vectors, the cache, the rate limiter and LlamaIndex's events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.callbacks.base import EventContext
from llama_index.core.instrumentation.events.embedding import (
    EmbeddingEndEvent,
    EmbeddingStartEvent,
)
from llama_index_instrumentation import get_dispatcher

from qwen3_embeddings import Computed, Qwen3EmbeddingsError, TextError, TextsFailedError, Usage
from qwen3_embeddings.integration import Role, ato_list, gather, to_list

if TYPE_CHECKING:
    from llama_index.embeddings.qwen3.base import Qwen3Embedding

COLLECTION = "embeddings"
"""Collection of the cache, as LlamaIndex names it."""

dispatcher = get_dispatcher(__name__)


class Call:
    """The texts of one call, and their vectors as far as they are computed.

    All texts go to the engine in one call of the core. Behind a rate limiter, and in coroutines
    with `num_workers`, they go in batches of `embed_batch_size`.

    Args:
        model: the model that was called.
        texts: the texts, whatever they are; the core refuses those that are not `str`.
        role: "query" or "document".
        show_progress: draw a progress bar.
    """

    def __init__(
        self, model: Qwen3Embedding, texts: list[Any], role: Role, show_progress: bool = False
    ) -> None:
        # A subclass of str, such as a str Enum, is its text; events accept nothing else.
        self._texts = [str.__str__(text) if isinstance(text, str) else text for text in texts]
        self._model, self._role, self._show_progress = model, role, show_progress
        self._rows: list[Embedding | None] = [None] * len(texts)
        self._failures: list[TextError] = []
        self._usage = Usage()

    def run(self) -> list[Embedding]:
        """Embed the texts."""
        with self._reported():
            for batch in self._batches(whole=self._model.rate_limiter is None):
                self._embed(batch)
            return self._finished()

    async def arun(self) -> list[Embedding]:
        """Embed the texts, for coroutines."""
        workers = self._model.num_workers or 1
        whole = self._model.rate_limiter is None and workers == 1
        free = asyncio.Semaphore(workers) if workers > 1 else contextlib.nullcontext()

        async def embed(batch: range) -> None:
            async with free:
                await self._aembed(batch)

        with self._reported():
            await gather(map(embed, self._batches(whole)))
            return self._finished()

    def _batches(self, whole: bool) -> list[range]:
        size = len(self._texts) if whole else self._model.embed_batch_size
        return [
            range(start, min(start + size, len(self._texts)))
            for start in range(0, len(self._texts), size or 1)
        ]

    # One batch.

    def _embed(self, batch: range) -> None:
        cache: Any = self._model.embeddings_cache
        limiter = self._model.rate_limiter
        keys: dict[int, str] = {}
        if cache is not None:
            keys = self._keys(batch, self._model.fingerprint(self._role))
            for i, key in keys.items():
                self._rows[i] = _cached(cache.get(key, COLLECTION))
        missing = [i for i in batch if self._rows[i] is None]
        if not missing:
            return
        if limiter is not None:
            limiter.acquire()
        encode = getattr(self._model._embedder, f"encode_{self._role}")
        try:
            with self._collecting(missing):
                self._put(missing, to_list(encode(self._of(missing), **self._options)))
        finally:
            for key, value in self._computed_values(missing, keys):
                cache.put(key, value, COLLECTION)

    async def _aembed(self, batch: range) -> None:
        cache: Any = self._model.embeddings_cache
        limiter = self._model.rate_limiter
        keys: dict[int, str] = {}
        if cache is not None:  # the fingerprint may have to ask the server for its model
            keys = self._keys(batch, await asyncio.to_thread(self._model.fingerprint, self._role))
            for i, key in keys.items():
                self._rows[i] = _cached(await cache.aget(key, COLLECTION))
        missing = [i for i in batch if self._rows[i] is None]
        if not missing:
            return
        if limiter is not None:
            await limiter.async_acquire()
        encode = getattr(self._model._embedder, f"aencode_{self._role}")
        try:
            with self._collecting(missing):
                rows = await encode(self._of(missing), **self._options)
                self._put(missing, await ato_list(rows))
        finally:
            for key, value in self._computed_values(missing, keys):
                await cache.aput(key, value, COLLECTION)

    @property
    def _options(self) -> dict[str, Any]:
        return {"show_progress": self._show_progress, "usage": self._usage}

    def _of(self, positions: list[int]) -> list[Any]:
        return [self._texts[i] for i in positions]

    def _put(self, positions: Any, rows: list[Embedding]) -> None:
        for i, row in zip(positions, rows, strict=True):
            self._rows[i] = row

    def _keys(self, batch: range, fingerprint: str) -> dict[int, str]:
        """Return the cache's keys by position: LlamaIndex's own would mix roles and models."""
        texts = self._texts
        return {i: f"{fingerprint}:{texts[i]!r}" for i in batch if isinstance(texts[i], str)}

    def _computed_values(
        self, positions: list[int], keys: dict[int, str]
    ) -> Iterator[tuple[str, dict[str, Embedding]]]:
        """Yield what the cache is to keep, in LlamaIndex's form."""
        for i in positions:
            if i in keys and (row := self._rows[i]) is not None:
                yield keys[i], {str(uuid.uuid4()): row}

    # Errors.

    @contextlib.contextmanager
    def _collecting(self, positions: list[int]) -> Iterator[None]:
        """Keep what an error of the core carries, by its positions in this call."""
        try:
            yield
        except Qwen3EmbeddingsError as error:
            if done := error.computed:
                self._put([positions[i] for i in done.positions], to_list(done.vectors))
            if isinstance(error, TextsFailedError):
                self._failures += [
                    failure.at(positions[i] for i in failure.positions) for failure in error.errors
                ]
            elif isinstance(error, TextError):
                raise error.at(positions[i] for i in error.positions) from error.__cause__
            else:
                raise

    def _finished(self) -> list[Embedding]:
        if self._failures:
            raise TextsFailedError.of(self._failures)
        return [row for row in self._rows if row is not None]

    def _computed(self) -> Computed:
        there = [i for i, row in enumerate(self._rows) if row is not None]
        rows = [self._rows[i] for i in there]
        return Computed(np.array(there, np.intp), np.array(rows, np.float32), len(self._texts))

    # Events.

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Send LlamaIndex's events, one pair per batch of `embed_batch_size`.

        The last one holds the call's token usage. Errors carry what was computed.
        """
        batches, model = self._batches(whole=False), self._model.to_payload()
        with contextlib.ExitStack() as stack:
            started: list[EventContext] = []
            for _ in batches:
                dispatcher.event(EmbeddingStartEvent(model_dict=model))
                event = self._model.callback_manager.event(
                    CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: model}
                )
                started += [stack.enter_context(event)]
            try:
                yield
            except Qwen3EmbeddingsError as error:
                raise error.carrying(self._computed()) from error.__cause__
            for i, batch in enumerate(batches, 1):
                usage = self._usage if i == len(batches) else Usage()
                self._end(started[i - 1], list(batch), {"usage": dataclasses.asdict(usage)})

    def _end(self, event: EventContext, batch: list[int], usage: dict[str, Any]) -> None:
        chunks, rows = self._of(batch), [self._rows[i] or [] for i in batch]
        event.on_end(
            payload={
                EventPayload.CHUNKS: chunks,
                EventPayload.EMBEDDINGS: rows,
                EventPayload.ADDITIONAL_KWARGS: usage,
            }
        )
        dispatcher.event(EmbeddingEndEvent(chunks=chunks, embeddings=rows, tags=usage))


def _cached(value: dict[str, Embedding] | None) -> Embedding | None:
    return next(iter(value.values()), None) if value else None
