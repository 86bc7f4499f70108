"""LlamaIndex's embedding model on top of `qwen3_embeddings.Embedder`."""

from __future__ import annotations

import contextlib
import os
import pickle
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self, Unpack

from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.bridge.pydantic import PrivateAttr, SecretStr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.storage.kvstore.types import BaseKVStore
from llama_index.embeddings.qwen3.call import Call
from llama_index.embeddings.qwen3.settings import (
    DEFAULT_BATCH_SIZE,
    NAMES,
    SYNONYMS,
    Settings,
    Synonyms,
)

from qwen3_embeddings import ConfigurationError, Embedder, EngineError, Task
from qwen3_embeddings.integration import (
    TIMEOUT,
    Dtype,
    EmbedderHandle,
    EngineKind,
    OnError,
    Overflow,
    accept_synonyms,
    ato_list,
    check_can_pickle,
    text_list,
    to_list,
)

REQUEST_SIZE = 64
"""An `embed_batch_size` below it is passed on to the engine. From it on the engine chooses: the
server engine sends at most this many texts per request, and vLLM wants more."""

_HANDLES = ("callback_manager", "embeddings_cache", "rate_limiter")


class _Embedder(Embedder):
    batch_parameter: ClassVar[str] = NAMES["batch_size"]


class Qwen3Embedding(EmbedderHandle, Settings):
    """Qwen3-Embedding vectors, from vLLM in this process or from a server.

    Queries carry the task's instruction and documents do not, as the models were trained. Any
    thread and any event loop may call. Models of one configuration share one engine. It starts at
    the first call, and stops when the last of them is closed or at exit.

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
        model_name: hub id, folder, or name on the server. Default: QWEN3_EMBEDDINGS_MODEL, else
            what the server serves, else Qwen/Qwen3-Embedding-0.6B.
        api_base: root of an OpenAI-compatible server, e.g. ``http://localhost:8000/v1``.
            Default: QWEN3_EMBEDDINGS_BASE_URL; without either, vLLM runs in this process.
        api_key: the server's key. Default: QWEN3_EMBEDDINGS_API_KEY. It is in no dump, pickle,
            repr or event; the other side of a pickle or ``from_dict`` reads its own environment.
        dimensions: Matryoshka size, 32 to native; None for native.
        task: name of a preset in `qwen3_embeddings.TASKS`, or a `qwen3_embeddings.Task`.
        query_instruction: free text instead of the task's; then documents have no instruction. An
            empty string embeds queries without any instruction.
        text_instruction: free text for documents. Default: none, or the task's own when it is
            symmetric.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32", for engines in this
            process. A server has its own.
        overflow: what to do with a text longer than the model's context: "error", "truncate"
            (keeps instruction and end token) or "mean" (pieces, weighted by their tokens).
        on_error: when a text cannot be embedded, "stop" at once, or "finish" all others first and
            then raise `qwen3_embeddings.TextsFailedError`. Either error carries what was computed
            (``error.computed``). Errors of the engine or server always stop.
        engine: name of the engine, "vllm", "torch", "server" or "reference"; None chooses by
            `api_base`.
        embed_batch_size: texts per event. Below 64 also the maximum number of texts passed to the
            engine at once, or sent to a server in one request.
        num_workers: maximum number of batches that an asynchronous call keeps in flight. None and
            1 leave that to the engine, which bounds its own requests (see `max_concurrency`).
        max_retries: number of retries for transient failures: connection errors, HTTP 408, 429
            and 5xx (except 501). Concurrency-limit 429s are not counted.
        timeout: seconds that one request to a server may take; None for the default of 60.
        restart_timeout: how long, in seconds, document requests keep retrying while a server that
            answered before is down. Queries fail after `max_retries`.
        default_headers: sent with every request to a server. Secret values (a SecretStr, or under
            a name like Authorization, Cookie, X-Api-Key) are in no dump or pickle, like `api_key`.
        verify: TLS verification: True, False, a CA file, or an `ssl.SSLContext`. A context cannot
            be pickled, and dumps leave it out.
        max_concurrency: maximum number of in-flight requests per role (queries, documents); 16 by
            default. Lowered automatically while the server answers 429.
        engine_kwargs: further arguments of the engine, by the engine's own names: vLLM's
            `EngineArgs`, or sentence-transformers' `SentenceTransformer`. Part of dumps and
            pickles.
        callback_manager: LlamaIndex's.
        embeddings_cache: any LlamaIndex key-value store. Its keys begin with `fingerprint`, so
            queries, documents and other models may share one store.
        rate_limiter: LlamaIndex's; it is asked once per batch of `embed_batch_size` texts.
        client: an `openai.OpenAI`, `AsyncOpenAI` or Azure client, whose base URL, key, headers and
            connections are used.
        http_client: an httpx client, whose connections are used.
        **others: `model` for `model_name`, and `base_url` for `api_base`.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        DimensionsError: `dimensions` is out of range.
        UnknownTaskError: `task` is not a preset.
        MissingDependencyError: the engine's extra is not installed.
    """

    _embedder: Embedder = PrivateAttr()
    _own_settings: ClassVar[tuple[str, ...]] = ("embed_batch_size", "num_workers")
    _changeable: ClassVar[frozenset[str]] = frozenset(
        {"num_workers", "callback_manager", "rate_limiter"}
    )

    def __init__(
        self,
        model_name: str | os.PathLike[str] | None = None,
        *,
        api_base: str | None = None,
        api_key: str | SecretStr | None = None,
        dimensions: int | None = None,
        task: str | Task | Mapping[str, Any] = "web_search",
        query_instruction: str | None = None,
        text_instruction: str | None = None,
        dtype: Dtype = "auto",
        overflow: Overflow = "error",
        on_error: OnError = "stop",
        engine: EngineKind | None = None,
        embed_batch_size: int = DEFAULT_BATCH_SIZE,
        num_workers: int | None = None,
        max_retries: int = 4,
        timeout: float | None = TIMEOUT,
        restart_timeout: float = 180.0,
        default_headers: Mapping[str, str | SecretStr] | None = None,
        verify: bool | str | ssl.SSLContext = True,
        max_concurrency: int | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
        callback_manager: CallbackManager | None = None,
        embeddings_cache: BaseKVStore | None = None,
        rate_limiter: Any = None,
        client: Any = None,
        http_client: Any = None,
        **others: Unpack[Synonyms],
    ) -> None:
        own = {k: v for k, v in locals().items() if k in type(self).model_fields}
        # Dumps hold the class's name and the fingerprint next to the arguments.
        brought = {k: v for k, v in others.items() if k not in {"class_name", "fingerprint"}}
        defaults = {k: field.default for k, field in type(self).model_fields.items()}
        defaults |= dict.fromkeys(("model_name", "callback_manager"))
        given = accept_synonyms(own, brought, synonyms=SYNONYMS, defaults=defaults, names=NAMES)
        if isinstance(task, Mapping):
            given["task"] = Task(**task)
        if timeout is None:
            given["timeout"] = TIMEOUT
        # Ahead of pydantic, which would turn the core's typed errors into its own.
        embedder = _make_embedder(given)
        given |= {"model_name": embedder.model or "", "dimensions": embedder.dimensions}
        super().__init__(**given)
        self._embedder = embedder

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in dumps and events."""
        return "Qwen3Embedding"

    # What users call.

    def get_query_embedding(self, query: str) -> Embedding:
        """Embed a query under the task's instruction.

        Args:
            query: the query.

        Returns:
            Its unit vector.

        Raises:
            TextTypeError: `query` is not a string.
            TextError: the query cannot be embedded for another reason.
            EngineError: the engine or server failed.

        Example:
            >>> vector = embed_model.get_query_embedding("What is the capital of China?")
        """
        return Call(self, [query], "query").run()[0]

    async def aget_query_embedding(self, query: str) -> Embedding:
        """Embed a query like `get_query_embedding`."""
        return (await Call(self, [query], "query").arun())[0]

    def get_text_embedding(self, text: str) -> Embedding:
        """Embed a document: without instruction, or in a symmetric task under its instruction.

        Args:
            text: the document.

        Returns:
            Its unit vector. The errors are those of `get_query_embedding`.

        Example:
            >>> vector = embed_model.get_text_embedding("Beijing is the capital of China.")
        """
        return Call(self, [text], "document").run()[0]

    async def aget_text_embedding(self, text: str) -> Embedding:
        """Embed a document like `get_text_embedding`."""
        return (await Call(self, [text], "document").arun())[0]

    def get_text_embedding_batch(
        self, texts: Iterable[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """Embed documents.

        Args:
            texts: the documents: a list, or what counts as one (tuples, iterators, pandas and
                polars Series, NumPy and pyarrow string arrays).
            show_progress: draw a progress bar.
            **kwargs: ignored, as in LlamaIndex.

        Returns:
            A unit vector for each, in their order.

        Raises:
            TextTypeError: a text is not a string, or `texts` is not a list of texts.
            TextError: a text cannot be embedded for another reason.
            TextsFailedError: instead of these, after all other texts, with on_error="finish".
            EngineError: the engine or server failed; the subclass says how.

        If some texts were embedded before the error occurred, their vectors are available as
        `error.computed`.

        Example:
            >>> vectors = embed_model.get_text_embedding_batch(["Beijing", "Bread is baked."])
        """
        return Call(self, text_list(texts), "document", show_progress).run()

    async def aget_text_embedding_batch(
        self, texts: Iterable[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """Embed documents like `get_text_embedding_batch`."""
        return await Call(self, text_list(texts), "document", show_progress).arun()

    def get_agg_embedding_from_queries(
        self, queries: Iterable[str], agg_fn: Callable[..., Embedding] | None = None
    ) -> Embedding:
        """Embed queries and aggregate their vectors, by default to their mean."""
        return super().get_agg_embedding_from_queries(text_list(queries), agg_fn)

    async def aget_agg_embedding_from_queries(
        self, queries: Iterable[str], agg_fn: Callable[..., Embedding] | None = None
    ) -> Embedding:
        """Embed queries and aggregate their vectors, for coroutines."""
        return await super().aget_agg_embedding_from_queries(text_list(queries), agg_fn)

    # What `BaseEmbedding` and its other subclasses call.

    def _get_query_embedding(self, query: str) -> Embedding:
        return to_list(self._embedder.encode_query([query]))[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return to_list(await self._embedder.aencode_query([query]))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return to_list(self._embedder.encode_document(text_list(texts)))

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await ato_list(await self._embedder.aencode_document(text_list(texts)))

    # The embedder.

    def with_task(
        self,
        task: str | Task = "web_search",
        *,
        query_instruction: str | None = None,
        text_instruction: str | None = None,
    ) -> Self:
        """Return a model for another task on the same engine.

        Each of the two is closed on its own. The engine stops when the last one is closed. The
        sibling of a closed model is closed.

        Args:
            task: name of a preset, or a `qwen3_embeddings.Task`.
            query_instruction: free text instead of the task's.
            text_instruction: free text for documents.

        Returns:
            The sibling; this model stays as it is.

        Raises:
            UnknownTaskError: `task` is not a preset.

        Example:
            >>> code = embed_model.with_task("code")
            >>> vector = code.get_query_embedding("read a file line by line")
        """
        embedder = self._embedder.with_task(
            task, query_instruction=query_instruction, document_instruction=text_instruction
        )
        update = {"task": task, "query_instruction": query_instruction}
        sibling = super().model_copy(update=update | {"text_instruction": text_instruction})
        sibling._embedder = embedder
        return sibling

    # Dumps, copies and pickles.

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return all parameters except key and handles, and the fingerprint of documents.

        The fingerprint makes an `IngestionCache` notice changes that no parameter shows: another
        model on the server, other weights in the folder.
        """
        data = super().to_dict(**kwargs)
        with contextlib.suppress(EngineError):  # without a server nothing can be embedded either
            data["fingerprint"] = self.fingerprint("document")
        return data

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some parameters changed, with the same key and handles.

        It uses the same engine if its parameters allow it, and is closed on its own.
        """
        return type(self)(**self.__dict__ | dict(update or {}))

    def __copy__(self) -> Self:
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()

    def __getstate__(self) -> dict[str, Any]:
        """Return the parameters and handles to pickle, without key and secret headers."""
        check_can_pickle(self.__dict__)
        parameters = dict(self.__dict__)
        parameters["default_headers"] = self._dump_headers(self.default_headers)
        del parameters["api_key"]
        for name in _HANDLES:
            if not _can_pickle(parameters.get(name)):
                del parameters[name]
        return {"__dict__": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Not the base's, which hides what __init__ raises and leaves an incomplete model.
        type(self).__init__(self, **state["__dict__"])


def _make_embedder(given: Mapping[str, Any]) -> Embedder:
    """Return the embedder of a model's arguments."""
    ours = {"model_name": "model", "api_base": "base_url"}
    ours["text_instruction"] = "document_instruction"
    for name in ours:  # the core would call them by its own names
        value = given.get(name)
        if value is not None and not isinstance(value, str | os.PathLike):
            raise ConfigurationError(f"{name} is {type(value).__name__}. Pass str.")
    others = {"embed_batch_size", "num_workers", *_HANDLES}
    names = Qwen3Embedding.model_fields.keys() - others  # pydantic refuses what is in neither
    settings = {ours.get(k, k): given[k] for k in names & given.keys()}
    batch_size = given.get("embed_batch_size", DEFAULT_BATCH_SIZE)
    small = isinstance(batch_size, int) and 0 < batch_size < REQUEST_SIZE
    return _Embedder(
        settings.pop("model", None) or None, batch_size=batch_size if small else None, **settings
    )


def _can_pickle(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True
