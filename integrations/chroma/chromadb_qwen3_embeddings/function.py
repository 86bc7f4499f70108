"""`Qwen3EmbeddingFunction`: the core's Embedder in Chroma's shape."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from qwen3_embeddings import ConfigurationError, Embedder, Task
from qwen3_embeddings.integration import (
    TIMEOUT,
    Dtype,
    EmbedderHandle,
    EngineKind,
    Overflow,
    SupportsSecret,
    show_headers,
    text_list,
)


@register_embedding_function
class Qwen3EmbeddingFunction(EmbedderHandle, EmbeddingFunction[Documents]):
    """Qwen3-Embedding vectors for Chroma collections.

    Documents of `add`, `update` and `upsert` are embedded without an instruction, and
    `query_texts` of `query` under the instruction of the task. The engine starts at the first
    call. A server is asked for its model at once if `model` is left out, because a collection
    belongs to one model.

    Chroma stores the configuration with the collection, without the key. `get_collection` builds
    the function from it, so a later process does not pass one. That process imports this module,
    and reads the key from QWEN3_EMBEDDINGS_API_KEY.

    Args:
        model: hub id, folder, or name on the server. Default: QWEN3_EMBEDDINGS_MODEL, else what
            the server serves, else Qwen/Qwen3-Embedding-0.6B.
        dimensions: Matryoshka size, 32 to native. None is the native size.
        task: name of a preset in `qwen3_embeddings.TASKS`, or a `qwen3_embeddings.Task`.
        query_instruction: one English sentence instead of the task's.
        document_instruction: one English sentence for documents; the default is none.
        base_url: root of an OpenAI-compatible server. Default: QWEN3_EMBEDDINGS_BASE_URL. Without
            either, vLLM runs in this process.
        api_key: the server's key. Default: QWEN3_EMBEDDINGS_API_KEY. Never stored.
        engine: name of the engine; None chooses by `base_url`.
        dtype: "auto", "bfloat16" or "float32", for engines in this process.
        overflow: what to do with a text over the context: "error", "truncate" or "mean".
        timeout: seconds that one request to a server may take.
        max_retries: number of retries for transient failures of a server.
        default_headers: sent with every request to a server. Secret ones (under a name like
            Authorization or X-Api-Key) are never stored, so a reopened collection lacks them.
        engine_kwargs: further arguments of the engine.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        DimensionsError: `dimensions` is out of range.
        UnknownTaskError: `task` is not a preset.
        MissingDependencyError: the engine's extra is not installed.
        EngineError: the server has to be asked for its model, and does not answer.

    Example:
        >>> function = Qwen3EmbeddingFunction("Qwen/Qwen3-Embedding-0.6B", dimensions=512)
        >>> passages = client.create_collection("passages", embedding_function=function)
        >>> passages.add(ids=["bread"], documents=["Bread is baked in an oven."])
        >>> passages.query(query_texts=["How is bread made?"])["ids"]
        [['bread']]
    """

    _copying: ClassVar[str] = "Make another object with it."

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
        timeout: float | None = TIMEOUT,
        max_retries: int = 4,
        default_headers: Mapping[str, str | SupportsSecret] | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in {"self", "__class__"}}
        self._embedder = Embedder(**settings)
        # Stored as resolved, so that another process's environment or folder does not change the
        # model. Chroma ignores errors of `get_config` and would store no embedding function.
        resolved = {k: getattr(self._embedder, k) for k in ("model", "base_url", "dimensions")}
        model = resolved["model"] or self._embedder.start().model
        resolved["model"] = os.path.abspath(model) if os.path.isdir(model) else model
        self._config = settings | resolved | {"engine": self._embedder.engine}
        self._config["default_headers"] = show_headers(default_headers or {}) or None
        del self._config["api_key"]

    def __call__(self, input: Documents) -> Embeddings:  # noqa: A002  Chroma passes it by name
        """Embed documents.

        Args:
            input: the documents.

        Returns:
            A float32 unit vector (dimensions,) for each, in their order. The errors are those of
            `qwen3_embeddings.Embedder.encode_document`.

        Raises:
            ConfigurationError: `input` is empty. Chroma accepts no empty result.
            TextTypeError: `input` is one string instead of a list.
        """
        return list(self._embedder.encode_document(_some(input)))

    def embed_query(self, input: Documents) -> Embeddings:  # noqa: A002
        """Embed queries under the task's instruction.

        Args:
            input: the queries.

        Returns:
            A float32 unit vector (dimensions,) for each, in their order. The errors are those of
            `__call__`.
        """
        return list(self._embedder.encode_query(_some(input)))

    @staticmethod
    def name() -> str:
        """Return the name under which Chroma stores and finds this class."""
        return "qwen3_embeddings"

    def default_space(self) -> Space:
        """Return the distance of new collections."""
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        """Return the distances that rank correctly: for unit vectors all three rank alike."""
        return ["cosine", "ip", "l2"]

    def get_config(self) -> dict[str, Any]:
        """Return the arguments for `build_from_config`, without the key, as JSON values."""
        config = {k: v for k, v in self._config.items() if v is not None}
        if isinstance(config["task"], Task):
            config["task"] = dataclasses.asdict(config["task"])
        return config

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> Qwen3EmbeddingFunction:
        """Return the embedding function of a stored collection."""
        settings = dict(config)
        if isinstance(settings.get("task"), Mapping):
            settings["task"] = Task(**settings["task"])
        return Qwen3EmbeddingFunction(**settings)

    def validate_config_update(
        self, old_config: dict[str, Any], new_config: dict[str, Any]
    ) -> None:
        """Refuse a configuration whose vectors do not match the stored ones.

        Another server, engine or query instruction is accepted.

        Args:
            old_config: the collection's configuration.
            new_config: the configuration to replace it with.

        Raises:
            ConfigurationError: documents would have other vectors.
        """
        configs = (old_config, new_config)
        old, new = (self.build_from_config(config).fingerprint("document") for config in configs)
        if old != new:
            raise ConfigurationError(
                f"the collection holds vectors of {old}, not of {new}: they cannot be compared. "
                "Create another collection and add the documents to it."
            )


def _some(texts: Documents) -> Documents:
    """Return a list of texts, or raise what Chroma's own functions raise for an empty one."""
    items = text_list(texts)
    if not items:
        raise ConfigurationError("no texts to embed. Pass a list with at least one.")
    return items
