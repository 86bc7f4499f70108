"""LlamaIndex's embedding model on top of `qwen3_embeddings.Embedder`."""

from __future__ import annotations

import contextlib
import functools
import pickle
import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import (
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    field_serializer,
    field_validator,
)
from llama_index.core.callbacks import CallbackManager
from llama_index.core.storage.kvstore.types import BaseKVStore
from llama_index.embeddings.qwen3.cache import Query, RoleAwareStore
from llama_index.embeddings.qwen3.call import current, given, over

from qwen3_embeddings import (
    ConfigurationError,
    Embedder,
    EngineError,
    Qwen3EmbeddingsError,
    Task,
)
from qwen3_embeddings.embedder import Role
from qwen3_embeddings.redaction import hide, shown
from qwen3_embeddings.vectors import alists, lists

DEFAULT_BATCH_SIZE = 2048
"""Texts LlamaIndex hands over at once: its most. It waits for each batch before it asks for the
next; a synchronous call therefore computes three ahead, but behind a cache or a rate limiter, where
small ones leave the engine idle. The embedder cuts a batch into what the engine wants."""

_HANDLES = ("callback_manager", "embeddings_cache", "rate_limiter")


class Qwen3Embedding(BaseEmbedding):
    """Qwen3-Embedding vectors, from vLLM in this process or from a server.

    Queries carry the task's instruction and documents do not, as the models were trained. Thread
    safe, and usable from any number of event loops; models of one configuration share one engine,
    which starts at the first call and stops at `close` or at exit.

    Examples:
        ``pip install 'llama-index-embeddings-qwen3[vllm]'``

        ```python
        from llama_index.core import VectorStoreIndex
        from llama_index.embeddings.qwen3 import Qwen3Embedding

        embed_model = Qwen3Embedding("Qwen/Qwen3-Embedding-0.6B")
        remote = Qwen3Embedding(api_base="http://localhost:8000/v1", api_key="…")
        index = VectorStoreIndex.from_documents(documents, embed_model=embed_model)
        ```

    Args:
        model_name: hub id or folder. Default: QWEN3_EMBEDDINGS_MODEL, else what the server
            serves, else Qwen/Qwen3-Embedding-0.6B.
        api_base: root of an OpenAI-compatible server, e.g. ``http://localhost:8000/v1``.
            Default: QWEN3_EMBEDDINGS_BASE_URL; without either, vLLM runs in this process.
        api_key: the server's key. Default: QWEN3_EMBEDDINGS_API_KEY. It is in no dump, pickle,
            repr or event; the other side of a pickle or ``from_dict`` reads its own environment.
        dimensions: Matryoshka size, 32 to native; None for native.
        task: name of a preset in `qwen3_embeddings.TASKS`, or a `qwen3_embeddings.Task`.
        query_instruction: free text in place of the task's; then documents stay bare. An empty
            string embeds queries without any instruction.
        text_instruction: free text for documents. Default: none, or the task's own when it is
            symmetric.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32", for engines in this
            process; a server has chosen its own.
        overflow: what to do with a text longer than the model's context: "error", "truncate"
            (keeps instruction and end token) or "mean" (pieces, weighted by their tokens).
        on_error: when a text cannot be embedded, "stop" at once, or "finish" all others first and
            then raise `qwen3_embeddings.TextsFailedError`. Either error carries what was computed
            (``error.computed``). Errors of the engine or server always stop.
        engine: "vllm", "server" or "reference"; None chooses by `api_base`.
        embed_batch_size: texts handed to the engine at once, and a progress bar's step.
        num_workers: batches an asynchronous call keeps under way. None and 1 leave that to the
            engine, which bounds its own requests (see `max_concurrency`).
        max_retries: further attempts after what may pass (408, 429 but to one request too many, 5xx
            but 501, broken connections).
        timeout: seconds one request to a server may take.
        restart_timeout: seconds documents wait for a server that answered before and is down
            now, as while it restarts. Queries fail after `max_retries`: somebody waits for them.
        default_headers: sent with every request to a server. Values that are secret (a SecretStr,
            or under a name like Authorization, Cookie, X-Api-Key) are, like `api_key`, in no dump
            or pickle.
        verify: TLS verification: True, False, a CA file, or an `ssl.SSLContext` (which stays in
            this process: pickling refuses it and dumps leave it out).
        max_concurrency: most requests to a server under way at once, for queries and for
            documents each (16); fewer while it answers 429 to more.
        engine_kwargs: further arguments of the engine, by the engine's own names: vLLM's
            `EngineArgs`, or sentence-transformers' `SentenceTransformer`. Part of dumps and
            pickles.
        callback_manager: LlamaIndex's.
        embeddings_cache: any LlamaIndex key-value store. Keys carry `fingerprint`, so queries,
            documents and other models may share one store.
        **kwargs: further fields of `BaseEmbedding`, such as ``rate_limiter``.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        DimensionsError: `dimensions` is out of range.
        UnknownTaskError: `task` is not a preset.
        MissingDependencyError: the engine's extra is not installed.
    """

    # A misspelled argument must not pass unseen, and no message may show a misplaced key.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    # Frozen where the engine would not hear of a change.
    model_name: str = Field(default="", frozen=True, description="Hub id, folder or served name.")
    api_base: str | None = Field(default=None, frozen=True, description="Root of the server's API.")
    api_key: SecretStr | None = Field(
        default=None, frozen=True, exclude=True, repr=False, description="The server's key."
    )
    dimensions: int | None = Field(default=None, frozen=True, description="Matryoshka size.")
    task: str | Task = Field(default="web_search", frozen=True, description="Preset or Task.")
    query_instruction: str | None = Field(
        default=None, frozen=True, description="Instruction of queries, in place of the task's."
    )
    text_instruction: str | None = Field(
        default=None, frozen=True, description="Instruction of documents."
    )
    dtype: str = Field(default="auto", frozen=True, description="Precision in this process.")
    overflow: str = Field(default="error", frozen=True, description="Policy for over-long texts.")
    on_error: str = Field(default="stop", frozen=True, description="Stop or finish at a bad text.")
    engine: str | None = Field(default=None, frozen=True, description="Kind of engine.")
    max_retries: int = Field(default=4, frozen=True, description="Further attempts of a request.")
    timeout: float = Field(default=60.0, frozen=True, description="Seconds a request may take.")
    restart_timeout: float = Field(default=180.0, frozen=True, description="Seconds to wait.")
    default_headers: dict[str, str | SecretStr] | None = Field(
        default=None, frozen=True, repr=False, description="Headers of every request."
    )
    verify: bool | str | ssl.SSLContext = Field(
        default=True, frozen=True, description="TLS verification."
    )
    max_concurrency: int | None = Field(
        default=None, frozen=True, description="Most requests under way at once."
    )
    engine_kwargs: dict[str, Any] | None = Field(
        default=None, frozen=True, repr=False, description="Further arguments of the engine."
    )
    embed_batch_size: int = Field(
        default=DEFAULT_BATCH_SIZE, gt=0, le=2048, description="Texts handed over at once."
    )
    embeddings_cache: Any | None = Field(
        default=None, frozen=True, exclude=True, description="Where vectors are kept."
    )
    _embedder: Embedder = PrivateAttr()

    def __init__(
        self,
        model_name: str | None = None,
        *,
        api_base: str | None = None,
        api_key: str | SecretStr | None = None,
        dimensions: int | None = None,
        task: str | Task | Mapping[str, Any] = "web_search",
        query_instruction: str | None = None,
        text_instruction: str | None = None,
        dtype: str = "auto",
        overflow: str = "error",
        on_error: str = "stop",
        engine: str | None = None,
        embed_batch_size: int = DEFAULT_BATCH_SIZE,
        num_workers: int | None = None,
        max_retries: int = 4,
        timeout: float = 60.0,
        restart_timeout: float = 180.0,
        default_headers: Mapping[str, str | SecretStr] | None = None,
        verify: bool | str | ssl.SSLContext = True,
        max_concurrency: int | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
        callback_manager: CallbackManager | None = None,
        embeddings_cache: BaseKVStore | None = None,
        **kwargs: Any,
    ) -> None:
        settings: dict[str, Any] = {
            "dimensions": dimensions,
            "task": Task(**task) if isinstance(task, Mapping) else task,
            "query_instruction": query_instruction,
            "dtype": dtype,
            "overflow": overflow,
            "on_error": on_error,
            "engine": engine,
            "max_retries": max_retries,
            "timeout": timeout,
            "restart_timeout": restart_timeout,
            "default_headers": default_headers,
            "verify": verify,
            "max_concurrency": max_concurrency,
            "engine_kwargs": engine_kwargs,
        }
        key = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
        # Ahead of pydantic, which would turn the embedder's errors into its own.
        embedder = Embedder(
            model_name or None,
            base_url=api_base,
            api_key=key,
            document_instruction=text_instruction,
            **settings,
        )
        if isinstance(embeddings_cache, BaseKVStore):
            embeddings_cache = RoleAwareStore(embeddings_cache, embedder)
        settings |= {
            "model_name": embedder.model or "",
            "api_base": api_base,
            "api_key": SecretStr(key) if key else None,
            "text_instruction": text_instruction,
            "embed_batch_size": embed_batch_size,
            "num_workers": num_workers,
            "callback_manager": callback_manager or CallbackManager([]),
            "embeddings_cache": embeddings_cache,
        }
        for name in ("class_name", "fingerprint"):  # dumps hold them beside the parameters
            kwargs.pop(name, None)
        super().__init__(**settings, **kwargs)
        self._embedder = embedder

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in dumps and events."""
        return "Qwen3Embedding"

    def __setattr__(self, name: str, value: Any) -> None:
        field = type(self).model_fields.get(name)
        if field and field.frozen:  # pydantic's own error would show the value
            raise ConfigurationError(
                f"{name} cannot be changed. Make another with model_copy(update={{{name!r}: …}})."
            )
        super().__setattr__(name, value)

    # What BaseEmbedding calls.

    def _get_query_embedding(self, query: str) -> Embedding:
        return lists(self._embedder.encode_query([query]))[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return lists(await self._embedder.aencode_query([query]))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        call = current(self)
        try:
            vectors = call.next(texts) if call else None
            if vectors is None:
                vectors = self._embedder.encode_document(given(texts))
        except Qwen3EmbeddingsError as error:
            if call is None:
                raise
            return call.after(error, texts)
        rows = lists(vectors)
        return call.keep(texts, rows) if call else rows

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        call = current(self)
        try:
            rows = await alists(await self._embedder.aencode_document(given(texts)))
        except Qwen3EmbeddingsError as error:
            if call is None:
                raise
            return call.after(error, texts)
        return call.keep(texts, rows) if call else rows

    # What users call, where BaseEmbedding's way needs help. `wraps` keeps its one span a call, and
    # hides the signature from type checkers, which the base's own serves.

    if not TYPE_CHECKING:

        @functools.wraps(BaseEmbedding.get_query_embedding)
        def get_query_embedding(self, query: str) -> Embedding:
            """A query's vector, under the task's instruction."""
            return super().get_query_embedding(_marked(query))

        @functools.wraps(BaseEmbedding.aget_query_embedding)
        async def aget_query_embedding(self, query: str) -> Embedding:
            """`get_query_embedding` for coroutines."""
            return await super().aget_query_embedding(_marked(query))

        @functools.wraps(BaseEmbedding.get_text_embedding_batch)
        def get_text_embedding_batch(
            self, texts: list[str], show_progress: bool = False, **kwargs: Any
        ) -> list[Embedding]:
            """The vectors of documents, in their order; `show_progress` draws a bar."""
            with over(texts, self) as call:
                bounded = self.embeddings_cache or getattr(self, "rate_limiter", None)
                if len(call.texts) > self.embed_batch_size and not bounded:
                    documents = given(call.texts)
                    call.stream = self._embedder.stream(documents, size=self.embed_batch_size)
                rows = super().get_text_embedding_batch(call.texts, show_progress, **kwargs)
                return call.checked(rows)

        @functools.wraps(BaseEmbedding.aget_text_embedding_batch)
        async def aget_text_embedding_batch(
            self, texts: list[str], show_progress: bool = False, **kwargs: Any
        ) -> list[Embedding]:
            """`get_text_embedding_batch` for coroutines; all batches are under way at once."""
            with over(texts, self) as call:
                rows = await super().aget_text_embedding_batch(call.texts, show_progress, **kwargs)
                return call.checked(rows)

    # The embedder.

    def with_task(
        self,
        task: str | Task = "web_search",
        *,
        query_instruction: str | None = None,
        text_instruction: str | None = None,
    ) -> Self:
        """A sibling for another task on the same engine, which stops when both are closed.

        Raises:
            UnknownTaskError: `task` is not a preset.
        """
        return self.model_copy(
            update={
                "task": task,
                "query_instruction": query_instruction,
                "text_instruction": text_instruction,
            }
        )

    def fingerprint(self, role: Role) -> str:
        """A stable name for the vectors of one role, "query" or "document".

        It changes with anything that can change a vector and with nothing else. With
        `model_name` left out the server is asked.
        """
        return self._embedder.fingerprint(role)

    def close(self) -> None:
        """Release the engine; it stops when no other open model uses it. May be repeated."""
        self._embedder.close()

    async def aclose(self) -> None:
        """`close` for coroutines."""
        await self._embedder.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # Dumps, copies and pickles.

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """All parameters but key and handles, and the fingerprint of documents.

        The fingerprint tells an `IngestionCache` of changes no parameter shows: another model
        behind the server, other weights in the folder.
        """
        data = super().to_dict(**kwargs)
        with contextlib.suppress(EngineError):  # no server to ask: nothing can be embedded either
            data["fingerprint"] = self.fingerprint("document")
        return data

    @field_validator("default_headers")
    @classmethod
    def _hide_headers(cls, headers: dict[str, Any] | None) -> dict[str, Any] | None:
        return headers and hide(headers, SecretStr)

    @field_serializer("default_headers")
    def _dump_headers(self, headers: dict[str, Any] | None) -> dict[str, str] | None:
        return headers and shown(headers)

    @field_serializer("verify")
    def _dump_verify(self, verify: bool | str | ssl.SSLContext) -> bool | str:
        return True if isinstance(verify, ssl.SSLContext) else verify

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Another model with the same key and handles, and on the same engine if that fits."""
        return type(self)(**self._parameters() | dict(update or {}))

    def __copy__(self) -> Self:
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()

    def __getstate__(self) -> dict[str, Any]:
        """All parameters but key and secret headers, and the handles that can be pickled."""
        parameters = self._parameters()
        parameters["default_headers"] = self._dump_headers(self.default_headers)
        del parameters["api_key"]
        for name in _HANDLES:
            if not _can_pickle(parameters.get(name)):
                del parameters[name]
        return {"__dict__": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Not the base's, which hides what __init__ raises and leaves half a model.
        type(self).__init__(self, **state["__dict__"])

    def _parameters(self) -> dict[str, Any]:
        cache = self.embeddings_cache
        return self.__dict__ | {"embeddings_cache": cache and cache.store}


def _marked(query: str) -> str:
    """The query as the cache can tell it from a document; what is no text is refused later."""
    return Query(query) if isinstance(query, str) else query


def _can_pickle(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True
