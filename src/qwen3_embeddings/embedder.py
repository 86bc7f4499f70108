"""`Embedder`: its settings, its engine and its identity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from numpy.typing import ArrayLike

from qwen3_embeddings import config, event_loop, models, vectors
from qwen3_embeddings.closing import Closing
from qwen3_embeddings.config import Dtype, EngineKind, OnError, Role
from qwen3_embeddings.doctor.report import Report
from qwen3_embeddings.encoding import Encoding
from qwen3_embeddings.engines.base import Served, Usage
from qwen3_embeddings.engines.registry import Lease
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.fingerprint import fingerprint
from qwen3_embeddings.fixed_settings import FixedSettings
from qwen3_embeddings.long_texts import Overflow
from qwen3_embeddings.pipeline import Policy
from qwen3_embeddings.prompts import Task, find_task, instruct
from qwen3_embeddings.redaction import SupportsSecret
from qwen3_embeddings.vectors import Matrix

if TYPE_CHECKING:
    import os
    import ssl


class Embedder(Encoding, FixedSettings, Closing):
    """Qwen3-Embedding vectors, from vLLM in this process or from a server.

    Any thread and any event loop may call it. Embedders of one configuration share one engine. It
    starts at the first call, and stops when the last of them is closed or at exit.

    Args:
        model: hub id, folder, or name on the server. Default: QWEN3_EMBEDDINGS_MODEL, else what
            the server serves, else Qwen/Qwen3-Embedding-0.6B.
        dimensions: Matryoshka size, 32 to native. None is the native size, whatever the server's
            default is.
        task: name of a preset in `TASKS`, or a `Task`.
        query_instruction: free text instead of the task's; then documents have no instruction. An
            empty string embeds queries without any instruction.
        document_instruction: free text for documents. Default: none, or the task's own when it is
            symmetric.
        base_url: root of an OpenAI-compatible server, for example ``http://localhost:8000/v1``.
            Default: QWEN3_EMBEDDINGS_BASE_URL. Without either, vLLM runs in this process.
        api_key: the server's key. Default: QWEN3_EMBEDDINGS_API_KEY. Never shown or pickled.
        engine: "vllm", "torch", "server" or "reference". None is "server" with a `base_url`, and
            "vllm" without.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32", for engines in this
            process. A server has its own.
        overflow: what to do with a text longer than the model's context: "error", "truncate"
            (keeps instruction and end token) or "mean" (averages pieces, weighted by their
            tokens).
        on_error: when a text cannot be embedded, "stop" at once, or "finish" all others first and
            then raise `TextsFailedError`. Either error carries what was computed. Errors of the
            engine or server always stop.
        batch_size: maximum number of texts passed to the engine at once (its own choice), or sent
            to a server in one request (64).
        max_concurrency: maximum number of in-flight requests per role (queries, documents).
            Defaults to 16. Lowered automatically while the server returns HTTP 429.
        timeout: seconds that one request to a server may take. None is the default of 60.
        max_retries: number of retries for transient failures: connection errors, HTTP 408, 429
            and 5xx (except 501). Concurrency-limit 429s are not counted.
        restart_timeout: how long, in seconds, document requests keep retrying while a previously
            reachable server is down (for example, restarting). Queries are interactive, so they
            fail after `max_retries`.
        default_headers: sent with every request to a server. Secret values (a SecretStr, or under
            a name like Authorization, Cookie, X-Api-Key) are never shown or pickled.
        verify: TLS verification: True, False, a CA file, or an `ssl.SSLContext`.
        engine_kwargs: further arguments of the engine, by the engine's own names: vLLM's
            `EngineArgs`, sentence-transformers' `SentenceTransformer`, or for "torch" the fields
            of `engines.torch.settings.Settings`. They are part of fingerprints and pickles, so
            tokens are refused here, and so is ``trust_remote_code``.
        client: an `openai.OpenAI`, `AsyncOpenAI` or Azure client. Its base URL, key, headers,
            proxies and instrumentation are used. An embedder with one is not pickled.
        http_client: an httpx client whose connections are used. Key and headers are added.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        DimensionsError: `dimensions` is out of range.
        UnknownTaskError: `task` is not a preset.
        MissingDependencyError: the engine's extra is not installed.

    Example:
        >>> with Embedder("Qwen/Qwen3-Embedding-0.6B") as embedder:
        ...     embedder.encode_document(["Beijing is the capital of China."]).shape
        (1, 1024)
    """

    task: Task
    query_instruction: str | None
    document_instruction: str | None

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
        arguments = config.engine_arguments(settings, api_key, self.batch_parameter)
        self._lease = Lease(self.engine, arguments)

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

        `dimensions` where it is set, else the native size of the model. No engine is started. The
        size of a published model is known, and that of a local checkpoint is in its
        ``config.json``. That of another hub id is read from the hub. A server is asked, unless
        `model` is the name of a published model; in a coroutine await `astart` first.

        Raises:
            UnknownModelError: the model is not known, not local and not on a reachable hub.
            ServerError: the server has to be asked and cannot be.

        Example:
            >>> embedder.embedding_dimension
            1024
        """
        if self.dimensions is not None:
            return self.dimensions
        if self.model and (shape := models.known_shape(self.model)):
            return shape.dimensions
        if self.engine == "server" or self.model is None:
            return self.start().native
        return models.describe(self.model).dimensions

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
        """Start the engine, or reach the server, before the first call.

        Returns:
            What the engine runs.

        Raises:
            EngineError: the engine could not start, or the server could not be reached.

        Example:
            >>> embedder.start().native
            1024
        """
        return event_loop.run(self._lease.engine.start())

    async def astart(self) -> Served:
        """Start the engine like `start`.

        Example:
            >>> (await embedder.astart()).native
            1024
        """
        return await event_loop.wait(self._lease.engine.start())

    def doctor(self, *, reference: str | os.PathLike[str] | None = None) -> Report:
        """Check that the engine returns the vectors that Qwen3-Embedding should return.

        It is sent about 150 texts. The failure of an engine is reported, not raised.

        Args:
            reference: hub id or folder of the checkpoint, to compare with sentence-transformers
                running it in this process.

        Returns:
            The findings.

        Example:
            >>> embedder.doctor().ok
            True
        """
        return event_loop.run(self._examine(reference))

    async def adoctor(self, *, reference: str | os.PathLike[str] | None = None) -> Report:
        """Check the engine like `doctor`.

        Example:
            >>> (await embedder.adoctor()).ok
            True
        """
        return await event_loop.wait(self._examine(reference))

    async def _examine(self, reference: str | os.PathLike[str] | None) -> Report:
        # Imported here: with the engines it judges it is a fifth of the package's import time.
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
        """Release the engine. It stops when no other open embedder uses it. May be repeated.

        Example:
            >>> embedder.close()
        """
        if engine := self._lease.detach():
            event_loop.run(engine.close())

    async def aclose(self) -> None:
        """Release the engine like `close`.

        Example:
            >>> await embedder.aclose()
        """
        if engine := self._lease.detach():
            await event_loop.wait(engine.close())

    # Identity.

    def fingerprint(self, role: Role) -> str:
        """Return a stable name for the vectors of one role, for a cache or a folder.

        It changes with anything that can change a vector (model, size, instruction, precision,
        overflow policy, engine arguments), and with nothing else. The engine is not part of it,
        because a model returns the same vectors on every engine. Roles that embed alike
        share it. A folder counts by its contents, a hub id by the id alone. If `model` was left
        out, the server is asked.

        Two differences cannot be detected: a server that runs another precision or quantized
        weights, and one that truncates to a shorter context.

        Args:
            role: "query" or "document".

        Returns:
            A name such as ``Qwen3-Embedding-0.6B-1024-…``.

        Raises:
            ConfigurationError: `role` is neither.
            EngineError: the server has to be asked and cannot be.

        Example:
            >>> folder = Path("cache") / embedder.fingerprint("document")
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

    # How a text goes.

    def _choose_instructions(
        self, task: str | Task, query_instruction: str | None, document_instruction: str | None
    ) -> None:
        found = find_task(task)
        if query_instruction is not None:
            found = Task("custom", query_instruction)
        chosen: dict[str, Any] = {
            "task": found,
            "query_instruction": query_instruction,
            "document_instruction": document_instruction,
        }
        self.__dict__.update(chosen)
        self._settings = self._settings | chosen

    def _instruction(self, role: Role) -> str:
        if role not in {"query", "document"}:
            raise ConfigurationError(f"role={role!r} is not a role. Use 'query' or 'document'.")
        if role == "query" or (self.task.symmetric and self.document_instruction is None):
            return self.task.instruction
        return self.document_instruction or ""
