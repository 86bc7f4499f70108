"""`Qwen3Embeddings`: the core's Embedder in LangChain's shape."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

from langchain_core.embeddings import Embeddings
from pydantic import PrivateAttr, SecretStr

from langchain_qwen3_embeddings.settings import NAMES, SYNONYMS, Settings, Synonyms
from qwen3_embeddings import ConfigurationError, Embedder, Task
from qwen3_embeddings import similarity as cosines
from qwen3_embeddings.integration import (
    TIMEOUT,
    Dtype,
    EmbedderHandle,
    EngineKind,
    OnError,
    Overflow,
    accept_synonyms,
    ato_list,
    check_at_least,
    check_can_pickle,
    text_list,
    to_list,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


class _Embedder(Embedder):
    batch_parameter: ClassVar[str] = NAMES["batch_size"]


class Qwen3Embeddings(EmbedderHandle, Settings, Embeddings):
    """Qwen3-Embedding vectors from vLLM in this process, or from a server.

    Queries carry the task's instruction and documents do not, as the models were trained. Texts
    reach the tokenizer unaltered. Any thread and any event loop may call. Objects of one
    configuration share one engine. It starts at the first call, and stops when the last of them is
    closed or at exit.

    Setup:
        Install the package alone for a server, or with an engine:

        ```bash
        pip install -U langchain-qwen3-embeddings              # a server
        pip install -U 'langchain-qwen3-embeddings[vllm]'      # a GPU in this machine
        ```

        The README has the steps for vLLM on a CPU.

        `model`, `base_url` and `api_key` default to `QWEN3_EMBEDDINGS_MODEL`,
        `QWEN3_EMBEDDINGS_BASE_URL` and `QWEN3_EMBEDDINGS_API_KEY`.

    Key init args — embedding params:
        model:
            Hub id or folder. Default: what the server serves, else `Qwen/Qwen3-Embedding-0.6B`.
        dimensions:
            Matryoshka size, 32 to native; None for native.
        task:
            Name of a preset in `qwen3_embeddings.TASKS`, or a `qwen3_embeddings.Task`.
        query_instruction:
            One English sentence instead of the task's.
        overflow:
            What to do with a text over the context: `'error'`, `'truncate'` or `'mean'`.
        chunk_size:
            Maximum number of texts passed to the engine at once, or sent in one request.

    Key init args — client params:
        base_url:
            Root of an OpenAI-compatible server; without one, vLLM runs in this process.
        api_key:
            The server's key.
        max_retries:
            Number of retries for transient failures: connection errors, HTTP 408, 429 and 5xx
            (except 501). Concurrency-limit 429s are not counted.
        timeout:
            Seconds that one request may take.

    See full list of supported init args and their descriptions in the params section. Names that
    other classes have for them are accepted too: `model_name`, `openai_api_base`, `api_base`,
    `openai_api_key`, `request_timeout` and `show_progress`. Objects are frozen; `with_task` and
    `model_copy(update=...)` return changed ones.

    Instantiate:
        Embedded, with vLLM in this process:

        ```python
        from langchain_qwen3_embeddings import Qwen3Embeddings

        embeddings = Qwen3Embeddings(model="Qwen/Qwen3-Embedding-0.6B")
        ```

        Remote, with any OpenAI-compatible server:

        ```python
        embeddings = Qwen3Embeddings(base_url="http://localhost:8000/v1")
        ```

    Embed single text:
        ```python
        vector = embeddings.embed_query("What is the capital of China?")
        ```

    Embed multiple texts:
        ```python
        vectors = embeddings.embed_documents(["Beijing is its capital.", "Bread is baked."])
        ```

    Async:
        ```python
        vector = await embeddings.aembed_query("What is the capital of China?")
        vectors = await embeddings.aembed_documents(["Beijing is its capital."])
        ```

    Another task on the same engine:
        ```python
        code = embeddings.with_task("code")
        vector = code.embed_query("read a file line by line")
        ```

    Caching:
        A query and a document of the same text have different vectors, but
        `CacheBackedEmbeddings.from_bytes_store` puts one namespace before the keys of both. Give
        queries a store of their own (`pip install langchain-classic`):

        ```python
        from langchain_classic.embeddings import CacheBackedEmbeddings
        from langchain_classic.storage import LocalFileStore

        cached = CacheBackedEmbeddings.from_bytes_store(
            embeddings,
            LocalFileStore("cache/documents"),
            namespace=embeddings.fingerprint("document"),
            query_embedding_cache=LocalFileStore(f"cache/{embeddings.fingerprint('query')}"),
            key_encoder="blake2b",
        )
        ```

        Both names change with anything that changes their vectors, including the task. Leave
        `query_embedding_cache` out to cache documents only. `True` would mix the two.
    """

    _embedder: Embedder = PrivateAttr()
    _own_settings: ClassVar[tuple[str, ...]] = ("show_progress_bar",)

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] | None = None,
        base_url: str | None = None,
        api_key: str | SecretStr | None = None,
        dimensions: int | None = None,
        task: str | Task = "web_search",
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        dtype: Dtype = "auto",
        overflow: Overflow = "error",
        on_error: OnError = "stop",
        engine: EngineKind | None = None,
        chunk_size: int | None = None,
        max_retries: int = 4,
        restart_timeout: float = 180.0,
        timeout: float | None = TIMEOUT,
        default_headers: Mapping[str, str | SecretStr] | None = None,
        verify: bool | str | ssl.SSLContext = True,
        max_concurrency: int | None = None,
        show_progress_bar: bool = False,
        engine_kwargs: Mapping[str, Any] | None = None,
        client: Any = None,
        http_client: Any = None,
        **others: Unpack[Synonyms],
    ) -> None:
        own = {k: v for k, v in locals().items() if k in type(self).model_fields}
        defaults = {k: field.default for k, field in type(self).model_fields.items()}
        defaults["api_key"] = None
        settings = accept_synonyms(own, others, synonyms=SYNONYMS, defaults=defaults, names=NAMES)
        # Not in a validator: pydantic would turn the core's typed errors into its own.
        super().__init__(**settings)
        self._embedder = self._make_embedder()
        # What the environment and the core made of the arguments, past the freeze.
        self.__dict__.update({k: getattr(self._embedder, k) for k in ("model", "base_url")})
        self.__dict__["dimensions"] = self._embedder.dimensions

    def _make_embedder(self) -> Embedder:
        check_at_least("chunk_size", self.chunk_size, 1)
        names = Qwen3Embeddings.model_fields.keys() - {"chunk_size", "show_progress_bar"}
        settings = {name: getattr(self, name) for name in names}
        if self.client is not None:
            settings["api_key"] = None  # the environment's is not meant for it
        return _Embedder(batch_size=self.chunk_size, **settings)

    # Embedding.

    def embed_documents(
        self, texts: Iterable[str], chunk_size: int | None = None
    ) -> list[list[float]]:
        """Embed documents: without instruction, or in a symmetric task under its instruction.

        Args:
            texts: the documents: a list, or what counts as one (tuples, iterators, pandas and
                polars Series, NumPy and pyarrow string arrays).
            chunk_size: accepted for callers of `OpenAIEmbeddings`. Requests are as large as the
                constructor's `chunk_size` allows; the vectors do not depend on it.

        Returns:
            A unit vector for each, in their order.

        Raises:
            TextTypeError: a text is not a string, or `texts` is not a list of texts.
            TextEncodingError: a text holds a lone surrogate.
            TextTooLongError: a text is over the context and `overflow` is `'error'`.
            DimensionsError: `dimensions` exceeds the native size of the engine's model.
            TextRefusedError: the server refuses a text and accepts others.
            InvalidVectorError: the engine returned NaN, infinity or zeros for a text.
            TextsFailedError: instead of these, after all other texts, with `on_error='finish'`.
            EngineError: the engine or server failed; the subclass says how.

        If some texts were embedded before the error occurred, their vectors are available as
        `error.computed`.

        Example:
            >>> vectors = embeddings.embed_documents(["Beijing is the capital.", "Bread is baked."])
        """
        _check_chunk_size(chunk_size)
        items = text_list(texts)
        return to_list(self._embedder.encode_document(items, show_progress=self.show_progress_bar))

    def embed_query(self, text: str) -> list[float]:
        """Embed a query under the task's instruction.

        Args:
            text: the query.

        Returns:
            Its unit vector. The errors are those of `embed_documents`.

        Example:
            >>> vector = embeddings.embed_query("What is the capital of China?")
        """
        return to_list(self._embedder.encode_query([text]))[0]

    async def aembed_documents(
        self, texts: Iterable[str], chunk_size: int | None = None
    ) -> list[list[float]]:
        """Embed documents like `embed_documents`; cancelling drops the texts from the engine.

        Args:
            texts: the documents.
            chunk_size: accepted, see `embed_documents`.

        Returns:
            A unit vector for each, in their order.
        """
        _check_chunk_size(chunk_size)
        progress = self.show_progress_bar
        items = text_list(texts)
        return await ato_list(await self._embedder.aencode_document(items, show_progress=progress))

    async def aembed_query(self, text: str) -> list[float]:
        """Embed a query like `embed_query`; cancelling drops its text from the engine.

        Args:
            text: the query.

        Returns:
            Its unit vector.
        """
        return to_list(await self._embedder.aencode_query([text]))[0]

    def similarity(self, a: ArrayLike, b: ArrayLike) -> NDArray[np.float32]:
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
            >>> embeddings.similarity(query_vector, document_vectors).argmax()
        """
        return cosines(a, b)

    # Copies.

    def with_task(
        self,
        task: str | Task = "web_search",
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
    ) -> Self:
        """Return embeddings for another task on the same engine.

        Each of the two is closed on its own. The engine stops when the last one is closed. The
        sibling of closed embeddings is closed.

        Args:
            task: name of a preset, or a `qwen3_embeddings.Task`.
            query_instruction: free text instead of the task's.
            document_instruction: free text for documents.

        Returns:
            The sibling; this object stays as it is.

        Raises:
            UnknownTaskError: `task` is not a preset.

        Example:
            >>> code = embeddings.with_task("code")
            >>> vector = code.embed_query("read a file line by line")
        """
        instructions = {
            "query_instruction": query_instruction,
            "document_instruction": document_instruction,
        }
        sibling = super().model_copy(update={"task": task, **instructions})
        sibling._embedder = self._embedder.with_task(task, **instructions)
        return sibling

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some settings changed, which are checked as in the constructor.

        It uses the same engine if its settings allow it, and is closed on its own.

        Args:
            update: settings by name.
            deep: has no effect, because settings are never changed in place.

        Returns:
            The copy, including the key.
        """
        return type(self)(**dict(self) | dict(update or {}))

    def __copy__(self) -> Self:
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its settings, without key and secret headers.

        The other process reads the key from its environment.
        """
        settings = dict(self) | {"engine": self._embedder.engine}
        settings["default_headers"] = self._dump_headers(self.default_headers)
        check_can_pickle(settings)
        del settings["api_key"]
        return _rebuild, (type(self), settings)


def _check_chunk_size(size: int | None) -> None:
    """Raise if the argument of a method is not an int of at least 1."""
    if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
        raise ConfigurationError(f"chunk_size is {type(size).__name__}. Pass int.")
    check_at_least("chunk_size", size, 1)


def _rebuild(cls: type[Qwen3Embeddings], settings: dict[str, Any]) -> Qwen3Embeddings:
    return cls(**settings)
