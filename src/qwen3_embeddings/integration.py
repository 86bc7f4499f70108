"""Building blocks for integrations with frameworks.

An integration needs `qwen3_embeddings` and this module, nothing else of the package. The names
here are public: they change only as those of `qwen3_embeddings` do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, overload

from qwen3_embeddings.closing import Closing
from qwen3_embeddings.config import (
    TIMEOUT,
    Dtype,
    EngineKind,
    OnError,
    Role,
    check_at_least,
    check_can_pickle,
)
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.event_loop import gather
from qwen3_embeddings.inputs import text_list
from qwen3_embeddings.long_texts import Overflow
from qwen3_embeddings.redaction import SupportsSecret
from qwen3_embeddings.redaction import hide as hide_headers
from qwen3_embeddings.redaction import shown as show_headers
from qwen3_embeddings.vectors import alists as ato_list
from qwen3_embeddings.vectors import lists as to_list

if TYPE_CHECKING:
    from qwen3_embeddings.embedder import Embedder
    from qwen3_embeddings.engines.base import Usage

__all__ = [
    "FOREIGN",
    "TIMEOUT",
    "Dtype",
    "EmbedderHandle",
    "EngineKind",
    "OnError",
    "Overflow",
    "Role",
    "SupportsSecret",
    "accept_synonyms",
    "ato_list",
    "check_at_least",
    "check_can_pickle",
    "gather",
    "hide_headers",
    "show_headers",
    "text_list",
    "to_list",
]

_AZURE = "Pass client=openai.AzureOpenAI(…) with it."
_CONTEXT = "The context is the model's. For longer texts pass overflow='truncate' or 'mean'."
_FIXED = "Leave it out: tokenizer, pooling and normalization are the model's, as it was trained."
_IDS = "Leave it out: texts are sent as they are, not as token ids of another model's tokenizer."
_INSTRUCTION = "Pass task or query_instruction; for documents {document_instruction}."
_PROXY = "Set HTTPS_PROXY in the environment, or pass http_client with the proxy."
_RETRIES = "Leave it out: waits grow with each retry, and Retry-After is followed. See max_retries."
_SEVERAL = (
    "Leave it out. For several GPUs run `qwen3-embeddings serve MODEL --data-parallel-size N`."
)

FOREIGN: Mapping[str, str] = {
    **dict.fromkeys(("api_version", "azure_deployment", "azure_endpoint", "deployment"), _AZURE),
    **dict.fromkeys(("openai_api_type", "openai_api_version", "default_query"), _AZURE),
    **dict.fromkeys(("max_length", "max_seq_length", "truncate", "truncate_text"), _CONTEXT),
    **dict.fromkeys(("embedding_ctx_length", "check_embedding_ctx_length"), f"{_IDS} {_CONTEXT}"),
    **dict.fromkeys(("pooling", "pooling_mode", "tokenizer", "tokenizer_name"), _FIXED),
    **dict.fromkeys(("normalize", "normalize_embeddings"), _FIXED),
    **dict.fromkeys(("tiktoken_enabled", "tiktoken_model_name"), _IDS),
    **dict.fromkeys(("allowed_special", "disallowed_special"), _IDS),
    **dict.fromkeys(("prompts", "prompt", "prompt_name", "default_prompt_name"), _INSTRUCTION),
    **dict.fromkeys(("embed_instruction", "instruction", "prefix", "suffix"), _INSTRUCTION),
    **dict.fromkeys(("openai_proxy", "proxy", "proxies"), _PROXY),
    **dict.fromkeys(("retry_min_seconds", "retry_max_seconds"), _RETRIES),
    **dict.fromkeys(("multi_process", "parallel_process", "target_devices"), _SEVERAL),
    **dict.fromkeys(("auth_token", "api_token"), "Pass api_key."),
    **dict.fromkeys(("batch_size", "embed_batch_size", "chunk_size"), "Pass {batch_size}."),
    **dict.fromkeys(("truncate_dim", "output_dimensionality"), "Pass dimensions."),
    **dict.fromkeys(("http_async_client", "async_http_client"), "Pass http_client."),
    **dict.fromkeys(("encode_kwargs", "query_encode_kwargs"), (
        "Leave it out: vectors always have length 1. Its batch_size is {batch_size} here, its "
        "prompt is query_instruction."
    )),
    **dict.fromkeys(("cache_folder", "cache_dir"), (
        "Set HF_HOME in the environment, or pass engine_kwargs={{'download_dir': …}}."
    )),
    **dict.fromkeys(("openai_organization", "organization"), (
        "Pass default_headers={{'OpenAI-Organization': …}}."
    )),
    **dict.fromkeys(("show_progress", "show_progress_bar"), (
        "Pass show_progress=True to the method that embeds the texts."
    )),
    "additional_kwargs": "Leave it out: requests hold nothing else.",
    "async_client": "Pass client: synchronous and asynchronous methods share it.",
    "device": (
        "Leave it out: vLLM uses the GPU there is. To choose one set CUDA_VISIBLE_DEVICES."
    ),
    "document_instruction": "Pass {document_instruction}.",
    "headers": "Pass default_headers.",
    "huggingfacehub_api_token": (
        "For the hub set HF_TOKEN in the environment. A server's key is api_key."
    ),
    "mode": "Leave it out: queries and documents have methods of their own.",
    "model_kwargs": "Pass dtype, or engine_kwargs for further arguments of the engine.",
    "provider": "Pass the base_url and api_key of its OpenAI-compatible server.",
    "repo_id": "Pass model.",
    "reuse_client": "Leave it out: all models of one configuration share their connections.",
    "skip_empty": "Leave it out: an empty text has a vector too.",
    "text_instruction": "Pass {document_instruction}.",
    "trust_remote_code": "Leave it out: no Qwen3-Embedding model has code of its own.",
}  # fmt: skip
"""Arguments of other embedding classes, and what to do about each here. Names of the integration's
own arguments are filled in by `accept_synonyms`."""


def accept_synonyms(
    arguments: Mapping[str, Any],
    others: Mapping[str, Any],
    *,
    synonyms: Mapping[str, str],
    defaults: Mapping[str, Any],
    names: Mapping[str, str],
) -> dict[str, Any]:
    """Return a constructor's arguments under their own names, without those left at the default.

    Args:
        arguments: the constructor's own arguments.
        others: whatever else was passed; unknown names are returned as they are.
        synonyms: further names by which arguments are known, with the argument's own name.
        defaults: default values of the constructor's own arguments.
        names: what the integration calls "batch_size" and "document_instruction", for messages.

    Raises:
        ConfigurationError: an argument was passed under two names, or belongs to another class;
            the message says what to do instead.
    """
    passed = {k: v for k, v in arguments.items() if k not in defaults or v is not defaults[k]}
    for name, value in others.items():
        own = synonyms.get(name, name)
        if own != name and value is None:
            continue
        if own != name and own in passed:
            raise ConfigurationError(f"{name} and {own} are the same argument. Pass one of them.")
        if own == name and name in FOREIGN:
            if value is None:
                continue
            advice = FOREIGN[name].format_map(names)
            raise ConfigurationError(f"{name} is not an argument here. {advice}")
        passed[own] = value
    return passed


class EmbedderHandle(Closing):
    """What every integration's class offers on top of its framework's methods.

    A subclass sets `_embedder`. Each object holds the engine on its own: the engine stops when the
    last object that uses it is closed.
    """

    _embedder: Embedder
    _own_settings: ClassVar[tuple[str, ...]] = ()
    _changeable: ClassVar[frozenset[str]] = frozenset()
    _copying: ClassVar[str] = "Make a copy with model_copy(update={{'{name}': …}})."

    @property
    def embedding_dimension(self) -> int:
        """Number of dimensions of the vectors, for example to create a vector store with.

        No engine is started for it; see `qwen3_embeddings.Embedder.embedding_dimension`.
        """
        return self._embedder.embedding_dimension

    @property
    def usage(self) -> Usage:
        """Texts and tokens that this object has embedded so far, as a copy.

        Example:
            >>> embeddings.usage
            Usage(texts=2, tokens=4, uncounted=0)
        """
        return self._embedder.usage

    @overload
    def count_tokens(  # type: ignore[overload-overlap]
        self, texts: str, *, role: Role = ...
    ) -> int: ...

    @overload
    def count_tokens(self, texts: Iterable[str], *, role: Role = ...) -> list[int]: ...

    def count_tokens(self, texts: Iterable[str], *, role: Role = "document") -> int | list[int]:
        """Count the tokens that the model reads for each text, instruction and end token included.

        Args:
            texts: a list of strings, or one string.
            role: "document" or "query"; it decides which instruction is included.

        Returns:
            One number per text; for one string the number itself.

        Raises:
            TextTypeError: a text is not a string, or `texts` is not a list of texts.
            ConfigurationError: the server has no ``/tokenize``.
            EngineError: the engine or server failed.

        Example:
            >>> embeddings.count_tokens(["Hello", ""])
            [2, 1]
        """
        return self._embedder.count_tokens(texts, role=role)

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
        return await self._embedder.acount_tokens(texts, role=role)

    def fingerprint(self, role: Role) -> str:
        """Return a stable name for the vectors of one role, for a cache namespace or a folder.

        It changes with anything that can change a vector, and with nothing else. A server whose
        model was left out is asked for it.

        Args:
            role: "query" or "document"; they share a name only where they embed alike.

        Returns:
            A name such as ``Qwen3-Embedding-0.6B-1024-…``.

        Raises:
            ConfigurationError: `role` is neither.
            EngineError: the server has to be asked and cannot be.

        Example:
            >>> store = LocalFileStore(f"cache/{embeddings.fingerprint('document')}")
        """
        return self._embedder.fingerprint(role)

    def close(self) -> None:
        """Release the engine; it stops when no other open object uses it. May be repeated."""
        self._embedder.close()

    async def aclose(self) -> None:
        """Release the engine like `close`."""
        await self._embedder.aclose()

    def __eq__(self, other: object) -> bool:
        """Compare settings. Keys and secret headers do not count, as they change no vector."""
        if not isinstance(other, EmbedderHandle) or type(other) is not type(self):
            return False
        mine, theirs = ([getattr(it, name) for name in it._own_settings] for it in (self, other))
        return self._embedder == other._embedder and mine == theirs

    def __hash__(self) -> int:
        return hash(self._embedder)

    if not TYPE_CHECKING:  # type checkers would allow any name to be set

        def __setattr__(self, name: str, value: Any) -> None:
            # A setting changed later would not reach the engine. The framework's own error would
            # show the value, which may be a key.
            if not name.startswith("_") and name not in self._changeable:
                advice = self._copying.format(name=name)
                raise ConfigurationError(f"{name} cannot be changed. {advice}")
            super().__setattr__(name, value)
