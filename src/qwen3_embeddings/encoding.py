"""The methods of an embedder that turn texts into vectors."""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Iterable
from concurrent.futures import Future
from typing import Any, overload

import numpy as np

from qwen3_embeddings import config, event_loop, models, telemetry, token_counts
from qwen3_embeddings.config import Role
from qwen3_embeddings.engines.base import Usage
from qwen3_embeddings.engines.registry import Lease
from qwen3_embeddings.inputs import check_list, check_texts, read
from qwen3_embeddings.pipeline import Policy, encode
from qwen3_embeddings.request import Texts
from qwen3_embeddings.stream import AsyncStream, Stream, ahead
from qwen3_embeddings.vectors import Matrix, Vector, Vectors


class Encoding:
    """What `Embedder` inherits; it sets the attributes."""

    model: str | None
    engine: str
    base_url: str | None
    dimensions: int | None
    _settings: dict[str, Any]
    _policy: Policy
    _lease: Lease
    _usage: Usage

    @overload
    def encode_query(  # type: ignore[overload-overlap]
        self, texts: str, *, show_progress: bool = ..., usage: Usage | None = ...
    ) -> Vector: ...

    @overload
    def encode_query(
        self, texts: Iterable[str], *, show_progress: bool = ..., usage: Usage | None = ...
    ) -> Matrix: ...

    def encode_query(
        self, texts: Iterable[str], *, show_progress: bool = False, usage: Usage | None = None
    ) -> Vectors:
        """Embed queries, each under the task's instruction.

        Args:
            texts: a list of strings, or one string. Tuples, iterators, pandas and polars Series,
                NumPy and pyarrow string arrays count as lists.
            show_progress: draw a progress bar.
            usage: counter to add this call's texts and tokens to; `Embedder.usage` has the total
                of all calls.

        Returns:
            float32 array (n, dimensions) of unit rows, in the order of `texts`; (0, dimensions)
            for no texts. For one string one vector (dimensions,).

        Raises:
            TextTypeError: a text is not a string, or `texts` is not a list of texts.
            TextEncodingError: a text holds a lone surrogate.
            TextTooLongError: a text is over the context and `overflow` is "error".
            TextRefusedError: the server refuses a text and accepts others.
            InvalidVectorError: the engine returned NaN, infinity or zeros for a text.
            TextsFailedError: instead of these, after all other texts, with on_error="finish".
            DimensionsError: `dimensions` exceeds the native size of the engine's model.
            EngineError: the engine or server failed; the subclass says how.

        If some texts were embedded before the error occurred, their vectors are available as
        `error.computed`.

        Example:
            >>> embedder = Embedder("Qwen/Qwen3-Embedding-0.6B")
            >>> embedder.encode_query(["What is the capital of China?"]).shape
            (1, 1024)
            >>> embedder.encode_query("What is the capital of China?").shape
            (1024,)
        """
        return event_loop.run(self._call(texts, "query", show_progress, usage))

    @overload
    def encode_document(  # type: ignore[overload-overlap]
        self, texts: str, *, show_progress: bool = ..., usage: Usage | None = ...
    ) -> Vector: ...

    @overload
    def encode_document(
        self, texts: Iterable[str], *, show_progress: bool = ..., usage: Usage | None = ...
    ) -> Matrix: ...

    def encode_document(
        self, texts: Iterable[str], *, show_progress: bool = False, usage: Usage | None = None
    ) -> Vectors:
        """Embed documents: without instruction, or in a symmetric task under its instruction.

        Arguments, result and errors are those of `encode_query`.

        Example:
            >>> embedder = Embedder("Qwen/Qwen3-Embedding-0.6B")
            >>> embedder.encode_document(["Beijing is the capital.", "Bread is baked."]).shape
            (2, 1024)
        """
        return event_loop.run(self._call(texts, "document", show_progress, usage))

    @overload
    async def aencode_query(  # type: ignore[overload-overlap]
        self, texts: str, *, show_progress: bool = ..., usage: Usage | None = ...
    ) -> Vector: ...

    @overload
    async def aencode_query(
        self, texts: Iterable[str], *, show_progress: bool = ..., usage: Usage | None = ...
    ) -> Matrix: ...

    async def aencode_query(
        self, texts: Iterable[str], *, show_progress: bool = False, usage: Usage | None = None
    ) -> Vectors:
        """Embed queries like `encode_query`; cancelling it drops its texts from the engine.

        Example:
            >>> (await embedder.aencode_query(["What is the capital of China?"])).shape
            (1, 1024)
        """
        return await event_loop.wait(self._call(texts, "query", show_progress, usage))

    @overload
    async def aencode_document(  # type: ignore[overload-overlap]
        self, texts: str, *, show_progress: bool = ..., usage: Usage | None = ...
    ) -> Vector: ...

    @overload
    async def aencode_document(
        self, texts: Iterable[str], *, show_progress: bool = ..., usage: Usage | None = ...
    ) -> Matrix: ...

    async def aencode_document(
        self, texts: Iterable[str], *, show_progress: bool = False, usage: Usage | None = None
    ) -> Vectors:
        """Embed documents like `encode_document`; cancelling it drops its texts from the engine.

        Example:
            >>> (await embedder.aencode_document(["Beijing is the capital."])).shape
            (1, 1024)
        """
        return await event_loop.wait(self._call(texts, "document", show_progress, usage))

    def stream(self, texts: Iterable[str], *, role: Role = "document", size: int = 2048) -> Stream:
        """Embed any number of texts, in order and in bounded memory.

        Args:
            texts: any iterable of strings. It is read as vectors are consumed, never far ahead.
            role: "document" or "query".
            size: number of texts per batch.

        Returns:
            An iterator of float32 arrays (size, dimensions) of unit rows; the last may have fewer.
            If a batch fails, `next()` raises its error and the iterator stays usable. Positions
            count within that batch, and a note names its first text.

        Raises:
            TextTypeError: `texts` is not a list of texts.
            ConfigurationError: `role` or `size` has a value that cannot work.

        Example:
            >>> for vectors in embedder.stream(open("corpus.txt")):
            ...     index.add(vectors)
        """
        return Stream(self._ahead(texts, role, size))

    def astream(
        self, texts: Iterable[str], *, role: Role = "document", size: int = 2048
    ) -> AsyncStream:
        """Embed like `stream`. `texts` is read on your event loop, so reading should not block.

        Example:
            >>> async for vectors in embedder.astream(open("corpus.txt")):
            ...     index.add(vectors)
        """
        return AsyncStream(self._ahead(texts, role, size))

    def _ahead(
        self, texts: Iterable[str], role: Role, size: int
    ) -> Generator[tuple[int, Future[Vectors]]]:
        check_list(texts)
        config.check_count("size", size)
        self._instruction(role)  # a wrong role is reported before anything is read

        async def start(batch: list[str]) -> Vectors:
            return await self._call(batch, role, show_progress=False, usage=None)

        return ahead(read(texts), size, lambda batch: event_loop.submit(start(batch)))

    @overload
    def count_tokens(  # type: ignore[overload-overlap]
        self, texts: str, *, role: Role = ...
    ) -> int: ...

    @overload
    def count_tokens(self, texts: Iterable[str], *, role: Role = ...) -> list[int]: ...

    def count_tokens(self, texts: Iterable[str], *, role: Role = "document") -> int | list[int]:
        """Count the tokens that the model reads for each text.

        The model's own tokenizer counts. For an engine in this process it is loaded from the
        checkpoint, and no engine is started. A server is asked. The instruction of the role and
        the end token are included, because both are part of the input and count towards the
        context. A text over the context is counted whole.

        Args:
            texts: a list of strings, or one string.
            role: "document" or "query"; it decides which instruction is included.

        Returns:
            One number per text; for one string the number itself.

        Raises:
            TextTypeError: a text is not a string, or `texts` is not a list of texts.
            TextEncodingError: a text holds a lone surrogate.
            UnknownModelError: the tokenizer is neither on this machine nor on a reachable hub.
            ConfigurationError: the server has no ``/tokenize``, and the tokenizer is not here.
            EngineError: the server failed.

        Example:
            >>> embedder.count_tokens("Hello")
            2
            >>> embedder.count_tokens(["Hello", ""])
            [2, 1]
        """
        return event_loop.run(self._count(texts, role))

    @overload
    async def acount_tokens(  # type: ignore[overload-overlap]
        self, texts: str, *, role: Role = ...
    ) -> int: ...

    @overload
    async def acount_tokens(self, texts: Iterable[str], *, role: Role = ...) -> list[int]: ...

    async def acount_tokens(
        self, texts: Iterable[str], *, role: Role = "document"
    ) -> int | list[int]:
        """Count tokens like `count_tokens`.

        Example:
            >>> await embedder.acount_tokens("Hello")
            2
        """
        return await event_loop.wait(self._count(texts, role))

    def _instruction(self, role: Role) -> str:
        """Return the instruction of a role."""
        raise NotImplementedError

    def _checked(self, texts: Iterable[str], role: Role) -> Texts:
        return check_texts(texts, self._instruction(role), role == "query", self._policy.keep)

    def _call(
        self, texts: Iterable[str], role: Role, show_progress: bool, usage: Usage | None
    ) -> Coroutine[Any, Any, Vectors]:
        """Check a call's texts now, and return the coroutine that embeds them."""
        checked = self._checked(texts, role)
        return self._encode(checked, isinstance(texts, str), show_progress, usage)

    async def _encode(
        self, texts: Texts, one: bool, show_progress: bool, usage: Usage | None
    ) -> Vectors:
        known = models.MODELS.get(self.model or "") if self.engine != "server" else None
        if not texts.prompts and (self.dimensions or known):
            width = self.dimensions or (known.dimensions if known else 0)
            return np.empty((0, width), dtype=np.float32)
        mine = Usage()
        role = "query" if texts.urgent else "document"
        call = telemetry.Call(self.engine, self.model, self.base_url, self.dimensions, role)
        try:
            with telemetry.recorded(call, mine):
                rows = await encode(self._lease.engine, texts, self._policy, show_progress, mine)
        finally:
            self._usage.merge(mine)
            if usage is not None:
                usage.merge(mine)
        return rows[0] if one else rows

    def _count(self, texts: Iterable[str], role: Role) -> Coroutine[Any, Any, int | list[int]]:
        checked = self._checked(texts, role)

        async def count() -> int | list[int]:
            if checked.failures:
                raise checked.failures[0]
            if self.engine == "server" or self.model is None:
                counts = await token_counts.remote(self._lease.engine, checked, self.model)
            else:
                kwargs = self._settings["engine_kwargs"]
                counts = await token_counts.local(self.model, kwargs, checked.prompts)
            return counts[0] if isinstance(texts, str) else counts

        return count()
