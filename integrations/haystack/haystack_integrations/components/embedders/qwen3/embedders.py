"""`Qwen3TextEmbedder` and `Qwen3DocumentEmbedder`: the core's Embedder as Haystack components.

The package lies under `haystack_integrations` because Haystack loads pipelines from YAML only from
modules that it trusts, and this one is among them.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, Unpack

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import Secret, deserialize_secrets_inplace
from haystack.utils.auth import TokenSecret
from haystack_integrations.components.embedders.qwen3.settings import (
    KEY_VARIABLE,
    Settings,
    check_arguments,
    check_fields,
    check_kind,
)

from qwen3_embeddings import Embedder, Task, TextTypeError, Usage
from qwen3_embeddings.integration import EmbedderHandle, show_headers, to_list

_KEY = Secret.from_env_var(KEY_VARIABLE, strict=False)


class _Component(EmbedderHandle):
    """What both components share: the engine and the form in YAML.

    Subclasses call it by name: `@component` makes another class, in which `super()` fails.
    """

    _copying: ClassVar[str] = "Make another component with it."

    def __init__(
        self,
        model: str | os.PathLike[str] | None,
        api_base_url: str | None,
        api_key: Secret | None,
        settings: Settings,
    ) -> None:
        check_arguments(api_base_url, api_key, settings)
        self._settings = settings
        self._api_key = api_key
        self._model, self._api_base_url = model, api_base_url
        self._embedder = self._make_embedder()
        self._released = False

    def _make_embedder(self) -> Embedder:
        return Embedder(
            self._model,
            base_url=self._api_base_url,
            api_key=self._api_key.resolve_value() if self._api_key else None,
            **self._settings,
        )

    # Haystack's life cycle: a closed component is warmed up again before its next run.

    def warm_up(self) -> None:
        """Start the engine, or reach the server. May be repeated."""
        self._open().start()

    async def warm_up_async(self) -> None:
        """Start the engine like `warm_up`."""
        await self._open().astart()

    def close(self) -> None:
        """Release the engine; it stops when no other open object uses it."""
        self._released = True
        self._embedder.close()

    async def close_async(self) -> None:
        """Release the engine like `close`."""
        self._released = True
        await self._embedder.aclose()

    def _open(self) -> Embedder:
        """Return the embedder, a new one after a `close`."""
        if self._released:
            self._embedder, self._released = self._make_embedder(), False
        return self._embedder

    aclose = close_async

    # Copies and pickles.

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a component that shares the engine and is closed on its own."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            shared = name == "_embedder"
            twin.__dict__[name] = copy.copy(value) if shared else copy.deepcopy(value, memo)
        return twin

    def __copy__(self) -> Self:
        return self.__deepcopy__({})

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: no secret header, and no key except an environment variable's."""
        state = {name: value for name, value in self.__dict__.items() if name != "_embedder"}
        state["_settings"] = dict(self._settings)
        if headers := self._settings.get("default_headers"):
            state["_settings"]["default_headers"] = show_headers(headers)
        if isinstance(self._api_key, TokenSecret):
            state["_api_key"] = _KEY
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._embedder, self._released = self._make_embedder(), False

    # YAML.

    def to_dict(self) -> dict[str, Any]:
        """Return the component as Haystack writes it to YAML, without key and secret headers.

        Raises:
            ValueError: `api_key` was made by `Secret.from_token`; use `Secret.from_env_var`.
        """
        settings: dict[str, Any] = dict(self._settings)
        if isinstance(task := settings.get("task"), Task):
            settings["task"] = dataclasses.asdict(task)
        if headers := settings.get("default_headers"):
            settings["default_headers"] = show_headers(headers)
        return default_to_dict(
            self,
            model=None if self._model is None else os.fspath(self._model),
            api_base_url=self._api_base_url,
            api_key=self._api_key.to_dict() if self._api_key else None,
            **settings,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the component that `to_dict` described."""
        arguments = dict(data.get("init_parameters", {}))
        if isinstance(task := arguments.get("task"), Mapping):
            arguments["task"] = Task(**task)
        if isinstance(arguments.get("api_key"), Mapping):  # the constructor refuses another kind
            deserialize_secrets_inplace(arguments, ["api_key"])
        return default_from_dict(cls, data | {"init_parameters": arguments})

    def _meta(self, usage: Usage) -> dict[str, Any]:
        model = self._embedder.model
        if model is None and usage.texts:  # the server has answered
            model = self._embedder.start().model
        return {"model": model, "usage": dataclasses.asdict(usage)}


def _check_text(text: object) -> None:
    """Raise for what is not a string, as Haystack's own embedders do."""
    if not isinstance(text, str):
        raise TextTypeError(
            f"Qwen3TextEmbedder embeds one string, not {type(text).__name__}. For documents use "
            "Qwen3DocumentEmbedder."
        )


def _check_documents(documents: object) -> None:
    """Raise for what is not a list of documents, as Haystack's own embedders do."""
    advice = "For one text write [Document(content=text)]. For a query use Qwen3TextEmbedder."
    if not isinstance(documents, (list, tuple)):
        kind = type(documents).__name__
        raise TextTypeError(
            f"Qwen3DocumentEmbedder embeds a list of Documents, not {kind}. {advice}"
        )
    if wrong := [i for i, it in enumerate(documents) if not isinstance(it, Document)]:
        kind = type(documents[wrong[0]]).__name__
        raise TextTypeError(f"{kind} is not a Document. {advice}", wrong)


@component
class Qwen3TextEmbedder(_Component):
    """Embed a query, under the instruction of the task.

    Documents are embedded by `Qwen3DocumentEmbedder`. The components of one configuration share
    one engine.

    Args:
        model: hub id, folder, or name on the server. Default: QWEN3_EMBEDDINGS_MODEL, else what
            the server serves, else Qwen/Qwen3-Embedding-0.6B.
        api_base_url: root of an OpenAI-compatible server. Default: QWEN3_EMBEDDINGS_BASE_URL.
            Without either, vLLM runs in this process.
        api_key: the server's key. Default: the environment's QWEN3_EMBEDDINGS_API_KEY.
        settings: `dimensions`, `task`, `query_instruction`, `document_instruction`, `engine`,
            `dtype`, `overflow`, `on_error`, `batch_size`, `max_concurrency`, `timeout`,
            `max_retries`, `restart_timeout`, `default_headers`, `verify` and `engine_kwargs` of
            `qwen3_embeddings.Embedder`. YAML holds no secret header, such as Authorization.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        DimensionsError: `dimensions` is out of range.

    Example:
        >>> embedder = Qwen3TextEmbedder("Qwen/Qwen3-Embedding-0.6B", dimensions=512)
        >>> len(embedder.run("How is bread made?")["embedding"])
        512
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        api_base_url: str | None = None,
        api_key: Secret | None = _KEY,
        **settings: Unpack[Settings],
    ) -> None:
        _Component.__init__(self, model, api_base_url, api_key, settings)

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """Embed a query.

        Args:
            text: the query.

        Returns:
            `embedding`, a unit vector (dimensions,); `meta` with the model and the token usage.
            The errors are those of `qwen3_embeddings.Embedder.encode_query`.
        """
        usage = Usage()
        _check_text(text)
        [row] = to_list(self._open().encode_query([text], usage=usage))
        return {"embedding": row, "meta": self._meta(usage)}

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str) -> dict[str, Any]:
        """Embed a query like `run`; cancelling drops its text from the engine."""
        usage = Usage()
        _check_text(text)
        [row] = to_list(await self._open().aencode_query([text], usage=usage))
        return {"embedding": row, "meta": self._meta(usage)}


@component
class Qwen3DocumentEmbedder(_Component):
    """Embed documents, without an instruction unless the task is symmetric.

    Args:
        model: hub id, folder, or name on the server, as in `Qwen3TextEmbedder`.
        api_base_url: root of an OpenAI-compatible server.
        api_key: the server's key.
        meta_fields_to_embed: names of metadata fields whose values precede the content.
        embedding_separator: text between these values and the content.
        progress_bar: draw a progress bar.
        settings: as in `Qwen3TextEmbedder`. Both components need the same model and size.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        DimensionsError: `dimensions` is out of range.

    Example:
        >>> embedder = Qwen3DocumentEmbedder(dimensions=512, meta_fields_to_embed=["title"])
        >>> embedder.run([Document(content="Baked in an oven.", meta={"title": "Bread"})])
    """

    _own_settings: ClassVar[tuple[str, ...]] = ("_fields", "_separator", "_progress_bar")

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        api_base_url: str | None = None,
        api_key: Secret | None = _KEY,
        meta_fields_to_embed: Sequence[str] | None = None,
        embedding_separator: str = "\n",
        progress_bar: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        check_kind("embedding_separator", embedding_separator, str, "str")
        self._fields = check_fields(meta_fields_to_embed)
        _Component.__init__(self, model, api_base_url, api_key, settings)
        self._separator = embedding_separator
        self._progress_bar = progress_bar

    def to_dict(self) -> dict[str, Any]:
        """Return the component like `Qwen3TextEmbedder.to_dict`."""
        data = _Component.to_dict(self)
        data["init_parameters"] |= {
            "meta_fields_to_embed": self._fields,
            "embedding_separator": self._separator,
            "progress_bar": self._progress_bar,
        }
        return data

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Embed documents.

        Args:
            documents: the documents.

        Returns:
            `documents`, copies with a unit vector as `embedding`, in their order; `meta` with the
            model and the token usage. The errors are those of
            `qwen3_embeddings.Embedder.encode_document`. A document without content, or what is not
            a document, is a `TextTypeError`. For no documents nothing is started.
        """
        usage = Usage()
        texts: Any = self._texts(documents)
        if not texts:  # no server is needed for it
            return self._embedded([], [], usage)
        rows = self._open().encode_document(texts, show_progress=self._progress_bar, usage=usage)
        return self._embedded(documents, to_list(rows), usage)

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """Embed documents like `run`; cancelling drops their texts from the engine."""
        usage = Usage()
        texts: Any = self._texts(documents)
        if not texts:
            return self._embedded([], [], usage)
        rows = await self._open().aencode_document(
            texts, show_progress=self._progress_bar, usage=usage
        )
        return self._embedded(documents, to_list(rows), usage)

    def _texts(self, documents: list[Document]) -> list[str | None]:
        _check_documents(documents)
        return [self._text(document) for document in documents]

    def _text(self, document: Document) -> str | None:
        """Return what to embed; None, which the core refuses, for no text at all."""
        values = [document.meta.get(name) for name in self._fields]
        parts = [str(value) for value in values if value is not None]
        if document.content is not None:
            parts.append(document.content)
        return self._separator.join(parts) if parts else None

    def _embedded(
        self, documents: list[Document], rows: list[list[float]], usage: Usage
    ) -> dict[str, Any]:
        pairs = zip(documents, rows, strict=True)
        copies = [dataclasses.replace(document, embedding=row) for document, row in pairs]
        return {"documents": copies, "meta": self._meta(usage)}
