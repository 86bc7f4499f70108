"""The embedder: texts and a role in, a matrix of unit vectors out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Coroutine, Generator, Iterable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ClassVar, Self, overload

import numpy as np
from numpy.typing import ArrayLike

from qwen3_embeddings import config, event_loop, models, vectors
from qwen3_embeddings.closing import Closing
from qwen3_embeddings.config import Dtype, EngineKind, OnError, Role
from qwen3_embeddings.doctor.report import Report
from qwen3_embeddings.encoding import Policy, encode, token_ids
from qwen3_embeddings.engines.base import Served, Usage
from qwen3_embeddings.engines.registry import Lease
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.fingerprint import fingerprint
from qwen3_embeddings.inputs import check_list, check_texts, read
from qwen3_embeddings.long_texts import Overflow
from qwen3_embeddings.prompts import Task, find_task, instruct
from qwen3_embeddings.redaction import SupportsSecret, shown
from qwen3_embeddings.request import Texts
from qwen3_embeddings.stream import AsyncStream, Stream, ahead
from qwen3_embeddings.vectors import Matrix, Vector, Vectors

if TYPE_CHECKING:
    import os
    import ssl


class Embedder(Closing):
    """Qwen3-Embedding vectors, from vLLM in this process or from a server.

    Thread-safe, and usable from any number of event loops; embedders of one configuration share
    one engine, which starts at the first call and stops at `close` or at exit.

    Args:
        model: hub id or folder. Default: QWEN3_EMBEDDINGS_MODEL, else what the server serves,
            else Qwen/Qwen3-Embedding-0.6B.
        dimensions: Matryoshka size, 32 to native; None for native, whatever a server's default.
        task: name of a preset in `TASKS`, or a `Task`.
        query_instruction: free text in place of the task's; then documents stay bare. An empty
            string embeds queries without any instruction.
        document_instruction: free text for documents. Default: none, or the task's own when it is
            symmetric.
        base_url: root of an OpenAI-compatible server, e.g. ``http://localhost:8000/v1``.
            Default: QWEN3_EMBEDDINGS_BASE_URL; without either, vLLM runs in this process.
        api_key: the server's key. Default: QWEN3_EMBEDDINGS_API_KEY. Never shown or pickled.
        engine: "vllm", "server" or "reference"; None chooses by `base_url`.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32", for engines in this
            process; a server has chosen its own.
        overflow: what to do with a text longer than the model's context: "error", "truncate"
            (keeps instruction and end token) or "mean" (pieces, weighted by their tokens).
        on_error: when a text cannot be embedded, "stop" at once, or "finish" all others first and
            then raise `TextsFailedError`. Either error carries what was computed. Errors of the
            engine or server always stop.
        batch_size: most texts handed to the engine at once (its own choice), or sent to a server in
            one request (64).
        max_concurrency: most requests to a server under way at once, for queries and for documents
            each (16); fewer while it answers 429 to more.
        timeout: seconds one request to a server may take.
        max_retries: further attempts after what may pass (408, 429 but to one request too many, 5xx
            but 501, broken connections).
        restart_timeout: seconds documents wait for a server that answered before and is down
            now, as while it restarts. Queries fail after `max_retries`: somebody waits for them.
        default_headers: sent with every request to a server. Values that are secret (a SecretStr,
            or under a name like Authorization, Cookie, X-Api-Key) are, like `api_key`, never
            shown or pickled.
        verify: TLS verification: True, False, a CA file, or an `ssl.SSLContext`.
        engine_kwargs: further arguments of the engine, by the engine's own names: vLLM's
            `EngineArgs`, or sentence-transformers' `SentenceTransformer`. They are part of
            fingerprints and pickles: tokens are refused here, and so is ``trust_remote_code``.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        DimensionsError: `dimensions` is out of range.
        UnknownTaskError: `task` is not a preset.
        MissingDependencyError: the engine's extra is not installed.
    """

    batch_parameter: ClassVar[str] = "batch_size"
    """Name of `batch_size` in messages; an integration that calls it otherwise overrides it."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        dimensions: int | None = None,
        task: str | Task = "web_search",
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        base_url: str | None = None,
        api_key: str | SupportsSecret | None = None,
        engine: EngineKind | None = None,
        dtype: Dtype = "auto",
        overflow: Overflow = "error",
        on_error: OnError = "stop",
        batch_size: int | None = None,
        max_concurrency: int | None = None,
        timeout: float | None = config.TIMEOUT,
        max_retries: int = 4,
        restart_timeout: float = 180.0,
        default_headers: Mapping[str, str | SupportsSecret] | None = None,
        verify: bool | str | ssl.SSLContext = True,
        engine_kwargs: Mapping[str, Any] | None = None,
        client: Any = None,
        http_client: Any = None,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in {"self", "api_key"}}
        settings = self._settings = config.resolve(given)
        self.model: str | None = settings["model"]
        self.engine: EngineKind = settings["engine"]
        self.base_url: str | None = settings["base_url"]
        self.dimensions: int | None = settings["dimensions"]
        self.dtype, self.overflow, self.on_error = dtype, overflow, on_error
        self.batch_size = batch_size
        self._policy = Policy(self.dimensions, overflow, on_error, batch_size)
        self._choose_instructions(task, query_instruction, document_instruction)
        self._usage = Usage()
        self._lease = Lease(self.engine, config.engine_arguments(settings, api_key))

    # Embedding.

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
        """Embed queries like `encode_query`; cancelling it drops its texts from the engine."""
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
        """Embed documents like `encode_document`; cancelling it drops its texts from the engine."""
        return await event_loop.wait(self._call(texts, "document", show_progress, usage))

    def stream(self, texts: Iterable[str], *, role: Role = "document", size: int = 2048) -> Stream:
        """Embed texts of any number, in order, in bounded memory: nothing is read far ahead.

        Args:
            texts: any iterable of strings; it is read as vectors are taken.
            role: "document" or "query".
            size: texts in a batch.

        Returns:
            An iterator of float32 arrays (size, dimensions) of unit rows; the last may have fewer.
            An error of `encode_document` takes the place of the batch it concerns: positions count
            within that batch, a note names its first text, and the iterator can be asked for the
            next batch.
        """
        return Stream(self._ahead(texts, role, size))

    def astream(
        self, texts: Iterable[str], *, role: Role = "document", size: int = 2048
    ) -> AsyncStream:
        """`stream` for coroutines. Reading `texts` should not block: it is read on your loop."""
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

    def similarity(self, a: ArrayLike, b: ArrayLike) -> Matrix:
        """Return the cosine similarity of every vector in `a` with every vector in `b`.

        Args:
            a: vectors (n, dimensions), or one vector (dimensions,).
            b: vectors (m, dimensions), or one vector (dimensions,).

        Returns:
            float32 array (n, m).

        Raises:
            DimensionsError: `a` and `b` have vectors of different sizes.
            InvalidVectorError: a vector is not finite or has length zero.

        Example:
            >>> queries = embedder.encode_query(["capital of China"])
            >>> documents = embedder.encode_document(["Beijing", "Bread"])
            >>> embedder.similarity(queries, documents).shape
            (1, 2)
        """
        return vectors.similarity(a, b)

    # Sizes and tokens.

    @property
    def embedding_dimension(self) -> int:
        """Number of dimensions of the vectors, for example to create a vector store with.

        `dimensions` where it is set, else the native size of the model. No engine is started: the
        size of a published model is known, that of a local checkpoint is in its ``config.json``,
        and that of another hub id is read from the hub. A server is asked, unless it is called by
        the name of a published model; in a coroutine await `astart` first.

        Raises:
            UnknownModelError: the model is not known, not local and not on a reachable hub.
            ServerError: the server has to be asked and cannot be.
        """
        if self.dimensions is not None:
            return self.dimensions
        if self.model and (shape := models.known_shape(self.model)):
            return shape.dimensions
        if self.engine == "server" or self.model is None:
            return self.start().native
        return models.describe(self.model).dimensions

    @overload
    def count_tokens(  # type: ignore[overload-overlap]
        self, texts: str, *, role: Role = ...
    ) -> int: ...

    @overload
    def count_tokens(self, texts: Iterable[str], *, role: Role = ...) -> list[int]: ...

    def count_tokens(self, texts: Iterable[str], *, role: Role = "document") -> int | list[int]:
        """Count the tokens that the model reads for each text.

        The model's own tokenizer counts. The instruction of the role and the end token are
        included, because both are part of the input and count towards the context. A text over
        the context is counted whole.

        Args:
            texts: a list of strings, or one string.
            role: "document" or "query"; it decides which instruction is included.

        Returns:
            One number per text; for one string the number itself.

        Raises:
            TextTypeError: a text is not a string, or `texts` is not a list of texts.
            TextEncodingError: a text holds a lone surrogate.
            ConfigurationError: the server has no ``/tokenize``.
            EngineError: the engine or server failed.

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
        """Count tokens like `count_tokens`."""
        return await event_loop.wait(self._count(texts, role))

    @property
    def usage(self) -> Usage:
        """Texts and tokens that this object has embedded so far, as a copy.

        Instruction and end token are included. Copies and `with_task` siblings count on their own.

        Example:
            >>> embedder.encode_document(["Hello", "Hello"])
            >>> embedder.usage
            Usage(texts=2, tokens=4, uncounted=0)
        """
        return dataclasses.replace(self._usage)

    # The engine.

    def start(self) -> Served:
        """Start the engine, or reach the server, before the first call; say what it serves."""
        return event_loop.run(self._lease.engine.start())

    async def astart(self) -> Served:
        """`start` for coroutines."""
        return await event_loop.wait(self._lease.engine.start())

    def doctor(self, *, reference: str | None = None) -> Report:
        """Check that the engine returns the vectors Qwen3-Embedding should return.

        Sends it some 150 texts; an engine that fails is reported, not raised.

        Args:
            reference: hub id or folder of the checkpoint, to compare with sentence-transformers
                running it in this process.
        """
        return event_loop.run(self._examine(reference))

    async def adoctor(self, *, reference: str | None = None) -> Report:
        """`doctor` for coroutines."""
        return await event_loop.wait(self._examine(reference))

    async def _examine(self, reference: str | None) -> Report:
        # Here: with the engines it judges it takes a fifth of the package's import time.
        from qwen3_embeddings.doctor.runner import examine

        return await examine(
            self._lease.engine,
            model=self.model,
            dimensions=self.dimensions,
            instruction=self._instruction("query"),
            reference=config.local_path(reference) if reference else None,
        )

    def with_task(
        self,
        task: str | Task = "web_search",
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
    ) -> Self:
        """Return an embedder for another task on the same engine.

        Each of the two is closed on its own. The engine stops when the last one is closed. The
        sibling of a closed embedder is closed.

        Args:
            task: name of a preset in `TASKS`, or a `Task`.
            query_instruction: free text instead of the task's; then documents have none.
            document_instruction: free text for documents.

        Returns:
            The sibling; this embedder stays as it is.

        Raises:
            UnknownTaskError: `task` is not a preset.

        Example:
            >>> code = embedder.with_task("code")
            >>> vector = code.encode_query("read a file line by line")
        """
        sibling = self.__copy__()
        sibling._choose_instructions(task, query_instruction, document_instruction)
        return sibling

    def close(self) -> None:
        """Release the engine; it stops when no other open embedder uses it. May be repeated."""
        if engine := self._lease.detach():
            event_loop.run(engine.close())

    async def aclose(self) -> None:
        """`close` for coroutines."""
        if engine := self._lease.detach():
            await event_loop.wait(engine.close())

    # Identity.

    def fingerprint(self, role: Role) -> str:
        """A stable name for the vectors of one role, fit as a cache namespace or folder name.

        It changes with anything that can change a vector (model, size, instruction, precision,
        overflow policy, engine arguments) and with nothing else: the same model gives the same
        vectors on every engine. Roles that embed alike share it. With `model` left out the
        server is asked. Of a folder its contents count, of a hub id the id alone. Not seen is
        what a server keeps to itself: another precision or quantised weights, and a context
        shorter than the model's, to which `overflow` cuts sooner.
        """
        return fingerprint(
            self.model or self.start().model,
            dimensions=self.dimensions,
            template=instruct(self._instruction(role), ""),
            dtype="auto" if self.engine == "server" else self.dtype,  # a server has chosen its own
            overflow=self.overflow,
            engine_kwargs=self._settings["engine_kwargs"],
        )

    def __repr__(self) -> str:
        shown = {"model": self.model, "engine": self.engine, "dimensions": self.dimensions}
        shown |= {"task": self.task.name}
        return f"Embedder({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    def __eq__(self, other: object) -> bool:
        """Compare settings. Keys and secret headers do not count, as they change no vector."""
        return type(other) is type(self) and other._identity() == self._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> str:
        """Return what equal settings have in common, without secrets."""
        settings = self._public_settings() | {"task": dataclasses.astuple(self.task)}
        return json.dumps(settings, sort_keys=True, default=lambda v: f"{type(v)}@{id(v)}")

    def __copy__(self) -> Self:
        """Return another handle on the same engine, which is closed on its own."""
        sibling = object.__new__(type(self))
        sibling.__dict__.update(self.__dict__)
        sibling._lease = self._lease.share()
        sibling._usage = Usage()
        return sibling

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy as `copy.copy` does: an engine is not copied."""
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings, without key and secret headers.

        The other process reads the key from its environment.

        Raises:
            TypeError: the embedder uses a client of the caller's own.
        """
        config.check_can_pickle(self._settings)
        return _rebuild, (type(self), self._public_settings())

    def _public_settings(self) -> dict[str, Any]:
        headers = shown(self._settings["default_headers"])
        return self._settings | {"default_headers": headers}

    # How a text goes.

    def _choose_instructions(
        self, task: str | Task, query_instruction: str | None, document_instruction: str | None
    ) -> None:
        self.task = find_task(task)
        if query_instruction is not None:
            self.task = Task("custom", query_instruction)
        self.query_instruction = query_instruction
        self.document_instruction = document_instruction
        self._settings = self._settings | {
            "task": self.task,
            "query_instruction": query_instruction,
            "document_instruction": document_instruction,
        }

    def _instruction(self, role: Role) -> str:
        if role not in {"query", "document"}:
            raise ConfigurationError(f"role={role!r} is not a role. Use 'query' or 'document'.")
        if role == "query" or (self.task.symmetric and self.document_instruction is None):
            return self.task.instruction
        return self.document_instruction or ""

    def _check(self, texts: Iterable[str], role: Role) -> Texts:
        return check_texts(texts, self._instruction(role), role == "query", self._policy.keep)

    def _call(
        self, texts: Iterable[str], role: Role, show_progress: bool, usage: Usage | None
    ) -> Coroutine[Any, Any, Vectors]:
        """Check a call's texts now, and return the coroutine that embeds them."""
        checked = self._check(texts, role)
        return self._encode(checked, isinstance(texts, str), show_progress, usage)

    async def _encode(
        self, texts: Texts, one: bool, show_progress: bool, usage: Usage | None
    ) -> Vectors:
        known = models.MODELS.get(self.model or "") if self.engine != "server" else None
        if not texts.prompts and (self.dimensions or known):
            width = self.dimensions or (known.dimensions if known else 0)
            return np.empty((0, width), dtype=np.float32)
        mine = Usage()
        try:
            rows = await encode(self._lease.engine, texts, self._policy, show_progress, mine)
        finally:
            self._usage.merge(mine)
            if usage is not None:
                usage.merge(mine)
        return rows[0] if one else rows

    def _count(self, texts: Iterable[str], role: Role) -> Coroutine[Any, Any, int | list[int]]:
        checked = self._check(texts, role)

        async def count() -> int | list[int]:
            if checked.failures:
                raise checked.failures[0]
            counts = [len(ids) for ids in await token_ids(self._lease.engine, checked)]
            return counts[0] if isinstance(texts, str) else counts

        return count()


def _rebuild(cls: type[Embedder], settings: dict[str, Any]) -> Embedder:
    return cls(**settings)
