"""The embedder: texts and a role in, a matrix of unit vectors out."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from qwen3_embeddings import event_loop, models
from qwen3_embeddings import long_texts as policies
from qwen3_embeddings.config import check, check_count, engine_kind
from qwen3_embeddings.doctor.report import Report
from qwen3_embeddings.encoding import Policy, encode
from qwen3_embeddings.engines.base import Served
from qwen3_embeddings.engines.registry import Lease
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.fingerprint import fingerprint
from qwen3_embeddings.inputs import check_list, check_texts
from qwen3_embeddings.prompts import Task, find_task, instruct
from qwen3_embeddings.redaction import Secret, SupportsSecret, hide, shown
from qwen3_embeddings.request import Texts
from qwen3_embeddings.stream import AsyncStream, Stream, ahead
from qwen3_embeddings.vectors import Vectors, check_dimensions

if TYPE_CHECKING:
    import ssl

Role = Literal["query", "document"]


class Embedder:
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

    def __init__(
        self,
        model: str | None = None,
        *,
        dimensions: int | None = None,
        task: str | Task = "web_search",
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        base_url: str | None = None,
        api_key: str | SupportsSecret | None = None,
        engine: str | None = None,
        dtype: str = "auto",
        overflow: str = "error",
        on_error: str = "stop",
        batch_size: int | None = None,
        max_concurrency: int | None = None,
        timeout: float = 60.0,
        max_retries: int = 4,
        restart_timeout: float = 180.0,
        default_headers: Mapping[str, str | SupportsSecret] | None = None,
        verify: bool | str | ssl.SSLContext = True,
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in {"self", "api_key"}}
        check(settings)
        settings["default_headers"] = hide(default_headers or {})
        environment = os.environ.get
        if engine in {None, "server"}:
            base_url = base_url or environment("QWEN3_EMBEDDINGS_BASE_URL")
        self.engine = engine_kind(engine, base_url)
        model = model or environment("QWEN3_EMBEDDINGS_MODEL") or None
        self.model = model if self.engine == "server" else model or models.DEFAULT_MODEL
        self.base_url = base_url
        self.dtype = dtype
        self.overflow = policies.check_overflow(overflow)
        self.on_error = on_error
        known = models.MODELS.get(self.model or "")
        native = known.dimensions if known else None
        self.dimensions = None if dimensions is None else check_dimensions(dimensions, native)
        self.batch_size = batch_size
        self._policy = Policy(self.dimensions, self.overflow, on_error, batch_size)
        self._choose_instructions(task, query_instruction, document_instruction)
        self._engine_kwargs = dict(engine_kwargs or {})
        # Pickled as resolved here: another process's environment must not make it another model.
        resolved = {"model": self.model, "base_url": self.base_url, "engine": self.engine}
        self._settings = settings | resolved
        key = api_key or environment("QWEN3_EMBEDDINGS_API_KEY")
        self._lease = Lease(self.engine, self._engine_arguments(key))

    def _engine_arguments(self, key: str | SupportsSecret | None) -> dict[str, Any]:
        """What the engine is made with."""
        if self.engine != "server":
            passed = {"model": self.model, "dtype": self.dtype}
            return passed | {"engine_kwargs": self._engine_kwargs}
        if self._engine_kwargs:
            raise ConfigurationError(
                "engine_kwargs are for an engine in this process. Set a server's where it starts."
            )
        mine = self._settings
        names = ("timeout", "max_retries", "restart_timeout", "default_headers", "verify")
        return {name: mine[name] for name in (*names, "model", "base_url")} | {
            "api_key": Secret.of(key),
            "max_concurrency": mine["max_concurrency"] or 16,
            "batch_size": mine["batch_size"] or 64,
        }

    # Embedding.

    def encode_query(self, texts: Iterable[str], *, show_progress: bool = False) -> Vectors:
        """Embed queries, each under the task's instruction.

        Args:
            texts: a list of strings, not a string.
            show_progress: draw a progress bar.

        Returns:
            float32 array (n, dimensions) of unit rows, in the order of `texts`; (0, dimensions)
            for no texts.

        Raises:
            TextTypeError: a text is not a string.
            TextEncodingError: a text holds a lone surrogate.
            TextTooLongError: a text is over the context and `overflow` is "error".
            TextRefusedError: the server refuses a text and takes others.
            InvalidVectorError: the engine answered NaN, infinity or zeros to a text.
            TextsFailedError: in place of these, after all other texts, with on_error="finish".
            DimensionsError: `dimensions` is over what the engine's model has.
            EngineError: the engine or server failed; the subclass says how.

        Whatever of these comes after something was computed carries it as `error.computed`.
        """
        return event_loop.run(self._encode(self._check(texts, "query"), show_progress))

    def encode_document(self, texts: Iterable[str], *, show_progress: bool = False) -> Vectors:
        """Embed documents: bare, or in a symmetric task under its instruction.

        Arguments, result and errors are those of `encode_query`.
        """
        return event_loop.run(self._encode(self._check(texts, "document"), show_progress))

    async def aencode_query(self, texts: Iterable[str], *, show_progress: bool = False) -> Vectors:
        """`encode_query` for coroutines; cancelling it drops its texts from the engine."""
        return await event_loop.wait(self._encode(self._check(texts, "query"), show_progress))

    async def aencode_document(
        self, texts: Iterable[str], *, show_progress: bool = False
    ) -> Vectors:
        """`encode_document` for coroutines; cancelling it drops its texts from the engine."""
        return await event_loop.wait(self._encode(self._check(texts, "document"), show_progress))

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
        check_count("size", size)
        self._instruction(role)  # a wrong role is said before anything is read

        async def encode(batch: list[str]) -> Vectors:
            return await self._encode(self._check(batch, role), show_progress=False)

        return ahead(texts, size, lambda batch: event_loop.submit(encode(batch)))

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
            reference=reference,
        )

    def with_task(
        self,
        task: str | Task = "web_search",
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
    ) -> Self:
        """A sibling for another task on the same engine; closing either closes both.

        Raises:
            UnknownTaskError: `task` is not a preset.
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

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
            engine_kwargs=self._engine_kwargs,
        )

    def __repr__(self) -> str:
        shown = {"model": self.model, "engine": self.engine, "dimensions": self.dimensions}
        shown |= {"task": self.task.name}
        return f"Embedder({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    def __copy__(self) -> Self:
        """Another handle on the same engine."""
        sibling = object.__new__(type(self))
        sibling.__dict__.update(self.__dict__)
        return sibling

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same as a copy: an engine is not copied, and a key travels within the process."""
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its settings, without key and secret headers.

        The other process reads the key from its environment.
        """
        others = {
            "default_headers": shown(self._settings["default_headers"]),
            "task": self.task,
            "query_instruction": self.query_instruction,
            "document_instruction": self.document_instruction,
        }
        return _rebuild, (type(self), self._settings | others)

    # How a text goes.

    def _choose_instructions(
        self, task: str | Task, query_instruction: str | None, document_instruction: str | None
    ) -> None:
        self.task = find_task(task)
        if query_instruction is not None:
            self.task = Task("custom", query_instruction)
        self.query_instruction = query_instruction
        self.document_instruction = document_instruction

    def _instruction(self, role: Role) -> str:
        if role not in {"query", "document"}:
            raise ConfigurationError(f"role={role!r} is not a role. Use 'query' or 'document'.")
        if role == "query" or (self.task.symmetric and self.document_instruction is None):
            return self.task.instruction
        return self.document_instruction or ""

    def _check(self, texts: Iterable[str], role: Role) -> Texts:
        return check_texts(texts, self._instruction(role), role == "query", self._policy.keep)

    async def _encode(self, texts: Texts, show_progress: bool) -> Vectors:
        known = models.MODELS.get(self.model or "") if self.engine != "server" else None
        if not texts.prompts and (self.dimensions or known):
            width = self.dimensions or (known.dimensions if known else 0)
            return np.empty((0, width), dtype=np.float32)
        return await encode(self._lease.engine, texts, self._policy, show_progress)


def _rebuild(cls: type[Embedder], settings: dict[str, Any]) -> Embedder:
    return cls(**settings)
