"""`Qwen3Embeddings`: the core's Embedder in LangChain's shape."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from langchain_core.embeddings import Embeddings
from langchain_core.utils import secret_from_env
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    field_serializer,
    field_validator,
)

from qwen3_embeddings import ConfigurationError, Embedder, Task
from qwen3_embeddings.config import check_at_least
from qwen3_embeddings.redaction import hide, shown
from qwen3_embeddings.vectors import alists, lists


class Qwen3Embeddings(BaseModel, Embeddings):
    """Qwen3-Embedding vectors from vLLM in this process, or from a server.

    Queries carry the task's instruction and documents do not, as the models were trained; texts
    reach the tokenizer unaltered. Any thread and any event loop may call. Objects of one
    configuration share one engine, which starts at the first call.

    Setup:
        Install the package alone for a server, or with an engine:

        ```bash
        pip install -U langchain-qwen3-embeddings              # a server
        pip install -U 'langchain-qwen3-embeddings[vllm]'      # a GPU in this machine
        ```

        For vLLM on a CPU the README says what is installed first.

        `QWEN3_EMBEDDINGS_MODEL`, `QWEN3_EMBEDDINGS_BASE_URL` and `QWEN3_EMBEDDINGS_API_KEY` stand
        in for `model`, `base_url` and `api_key` where these are left out.

    Key init args — embedding params:
        model:
            Hub id or folder. Default: what the server serves, else `Qwen/Qwen3-Embedding-0.6B`.
        dimensions:
            Matryoshka size, 32 to native; None for native.
        task:
            Name of a preset in `qwen3_embeddings.TASKS`, or a `qwen3_embeddings.Task`.
        query_instruction:
            One English sentence in place of the task's.
        overflow:
            What to do with a text over the context: `'error'`, `'truncate'` or `'mean'`.
        chunk_size:
            Most texts handed to the engine, or sent in one request, at once.

    Key init args — client params:
        base_url:
            Root of an OpenAI-compatible server; without one, vLLM runs in this process.
        api_key:
            The server's key.
        max_retries:
            Further attempts after what may pass: 408, 429 (but to one request too many), 5xx but
            501, broken connections.
        timeout:
            Seconds one request may take.

    See full list of supported init args and their descriptions in the params section. Objects are
    frozen; `with_task` and `model_copy(update=...)` give changed ones.

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
        A query and a document of the same text have different vectors, and
        `CacheBackedEmbeddings.from_bytes_store` puts one namespace before the keys of both. So
        documents go by the namespace, and queries into a store of their own
        (`pip install langchain-classic`):

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

        Both change with anything that changes their vectors, the task included. Leave
        `query_embedding_cache` out to cache documents only; `True` would mix the two.
    """

    # Frozen: a setting changed later would not reach the engine. Inputs hidden: one may be a key.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
    )

    model: str | None = None
    """Hub id or folder. Default: QWEN3_EMBEDDINGS_MODEL, else what the server serves, else
    Qwen/Qwen3-Embedding-0.6B."""

    base_url: str | None = None
    """Root of an OpenAI-compatible server, e.g. `http://localhost:8000/v1`. Default:
    QWEN3_EMBEDDINGS_BASE_URL; without either, vLLM runs in this process."""

    api_key: SecretStr | None = Field(
        default_factory=secret_from_env("QWEN3_EMBEDDINGS_API_KEY", default=None), exclude=True
    )
    """The server's key. Default: QWEN3_EMBEDDINGS_API_KEY. Never shown, dumped or pickled."""

    dimensions: int | None = None
    """Matryoshka size, 32 to native; None for native."""

    task: str | Task = "web_search"
    """Name of a preset in `qwen3_embeddings.TASKS`, or a `qwen3_embeddings.Task`."""

    query_instruction: str | None = None
    """Free text in place of the task's; then documents stay bare. An empty string embeds queries
    without any instruction."""

    document_instruction: str | None = None
    """Free text for documents. Default: none, or the task's own when it is symmetric."""

    dtype: str = "auto"
    """`'auto'` (the checkpoint's own), `'bfloat16'` or `'float32'`, for engines in this process."""

    overflow: str = "error"
    """What to do with a text longer than the model's context: `'error'`, `'truncate'` (keeps
    instruction and end token) or `'mean'` (pieces, weighted by their tokens)."""

    on_error: str = "stop"
    """When a text cannot be embedded: `'stop'` at once, or `'finish'` all others first and then
    raise `qwen3_embeddings.TextsFailedError`. Either error carries what was computed."""

    engine: str | None = None
    """`'vllm'`, `'server'` or `'reference'`; None chooses by `base_url`."""

    chunk_size: int | None = None
    """Most texts handed to the engine at once (its own choice), or sent to a server in one request
    (64)."""

    max_retries: int = 4
    """Further attempts after what may pass (408, 429 but to one request too many, 5xx but 501,
    broken connections)."""

    restart_timeout: float = 180.0
    """Seconds documents wait for a server that answered before and is down now, as while it
    restarts. Queries fail after `max_retries`: somebody waits for them."""

    timeout: float = 60.0
    """Seconds one request to a server may take."""

    default_headers: dict[str, str | SecretStr] | None = Field(default=None, repr=False)
    """Sent with every request to a server. Values that are secret (a `SecretStr`, or under a name
    like Authorization, Cookie, X-Api-Key) are, like `api_key`, never shown, dumped or pickled."""

    verify: bool | str | ssl.SSLContext = True
    """TLS verification: True, False, a CA file, or an `ssl.SSLContext`."""

    max_concurrency: int | None = None
    """Most requests to a server under way at once, for queries and for documents each (16); fewer
    while it answers 429 to more."""

    show_progress_bar: bool = False
    """Draw a progress bar while documents are embedded."""

    engine_kwargs: dict[str, Any] | None = Field(default=None, repr=False)
    """Further arguments of the engine, by the engine's own names."""

    _embedder: Embedder = PrivateAttr()

    @field_validator("default_headers")
    @classmethod
    def _hide_headers(cls, headers: dict[str, Any] | None) -> dict[str, Any] | None:
        return headers and hide(headers, SecretStr)

    @field_serializer("default_headers")
    def _dump_headers(self, headers: dict[str, Any] | None) -> dict[str, str] | None:
        return headers and shown(headers)

    @field_serializer("verify", when_used="json")
    def _dump_verify(self, verify: bool | str | ssl.SSLContext) -> bool | str:
        return True if isinstance(verify, ssl.SSLContext) else verify  # JSON has no form for one

    if not TYPE_CHECKING:  # type checkers know the arguments from the fields

        def __init__(self, **settings: Any) -> None:
            # Not in a validator: pydantic would bury the core's typed errors in its own.
            super().__init__(**settings)
            self._embedder = self._make_embedder()
            found = {"model": self._embedder.model, "base_url": self._embedder.base_url}
            self.__dict__.update(found)  # what the environment said, past the freeze

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_"):  # pydantic's own error would show the value
                raise ConfigurationError(
                    f"{name} cannot be set. Make another with model_copy(update={{{name!r}: …}})."
                )
            super().__setattr__(name, value)

    def _make_embedder(self) -> Embedder:
        check_at_least("chunk_size", self.chunk_size, 1)
        names = Qwen3Embeddings.model_fields.keys() - {"chunk_size", "show_progress_bar"}
        settings = {name: getattr(self, name) for name in names}
        return Embedder(batch_size=self.chunk_size, **settings)

    # Embedding.

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents: bare, or in a symmetric task under its instruction.

        Args:
            texts: the documents.

        Returns:
            A unit vector for each, in their order.

        Raises:
            TextTypeError: a text is not a string.
            TextEncodingError: a text holds a lone surrogate.
            TextTooLongError: a text is over the context and `overflow` is `'error'`.
            DimensionsError: `dimensions` is over what the engine's model has.
            TextRefusedError: the server refuses a text and takes others.
            InvalidVectorError: the engine answered NaN, infinity or zeros to a text.
            TextsFailedError: in place of these, after all other texts, with `on_error='finish'`.
            EngineError: the engine or server failed; the subclass says how.

        Whatever of these comes after something was computed carries it as `error.computed`.
        """
        return lists(self._embedder.encode_document(texts, show_progress=self.show_progress_bar))

    def embed_query(self, text: str) -> list[float]:
        """Embed a query under the task's instruction.

        Args:
            text: the query.

        Returns:
            Its unit vector. The errors are those of `embed_documents`.
        """
        row: list[float] = self._embedder.encode_query([text])[0].tolist()
        return row

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """`embed_documents` for coroutines; cancelling it drops its texts from the engine.

        Args:
            texts: the documents.

        Returns:
            A unit vector for each, in their order.
        """
        return await alists(
            await self._embedder.aencode_document(texts, show_progress=self.show_progress_bar)
        )

    async def aembed_query(self, text: str) -> list[float]:
        """`embed_query` for coroutines; cancelling it drops its text from the engine.

        Args:
            text: the query.

        Returns:
            Its unit vector.
        """
        row: list[float] = (await self._embedder.aencode_query([text]))[0].tolist()
        return row

    # Siblings and copies.

    def with_task(
        self,
        task: str | Task = "web_search",
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
    ) -> Self:
        """A sibling for another task on the same engine; closing either closes both.

        Args:
            task: name of a preset, or a `qwen3_embeddings.Task`.
            query_instruction: free text in place of the task's.
            document_instruction: free text for documents.

        Returns:
            The sibling; this object stays as it is.

        Raises:
            UnknownTaskError: `task` is not a preset.
        """
        instructions = {
            "query_instruction": query_instruction,
            "document_instruction": document_instruction,
        }
        sibling = super().model_copy(update={"task": task, **instructions})
        sibling._embedder = self._embedder.with_task(task, **instructions)
        return sibling

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some settings changed, checked as in the constructor.

        It uses the same engine where no change speaks against it, and is closed on its own.

        Args:
            update: settings by name.
            deep: without meaning here; settings are never changed in place.

        Returns:
            The copy, key included.
        """
        return type(self)(**dict(self) | dict(update or {}))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its settings, without key and secret headers.

        The other process reads the key from its environment.
        """
        settings = dict(self) | {"engine": self._embedder.engine}
        settings["default_headers"] = self._dump_headers(self.default_headers)
        del settings["api_key"]
        return _rebuild, (type(self), settings)

    # Identity and end.

    def fingerprint(self, role: Literal["query", "document"]) -> str:
        """A stable name for the vectors of one role, fit as a cache namespace or folder name.

        Args:
            role: `'query'` or `'document'`; they share a name only where they embed alike.

        Returns:
            A name that changes with anything that can change a vector, and with nothing else.
        """
        return self._embedder.fingerprint(role)

    def close(self) -> None:
        """Release the engine; it stops when nobody else uses it. May be repeated."""
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


def _rebuild(cls: type[Qwen3Embeddings], settings: dict[str, Any]) -> Qwen3Embeddings:
    return cls(**settings)
