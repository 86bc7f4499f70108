"""The arguments of the components, and what the names of other embedders are here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from haystack.utils import Secret

from qwen3_embeddings import ConfigurationError, Task
from qwen3_embeddings.integration import FOREIGN, Dtype, EngineKind, OnError, Overflow

KEY_VARIABLE = "QWEN3_EMBEDDINGS_API_KEY"
"""Environment variable with the server's key."""


class Settings(TypedDict, total=False):
    """Arguments of both components, which mean what they mean in `qwen3_embeddings.Embedder`."""

    dimensions: int | None
    task: str | Task
    query_instruction: str | None
    document_instruction: str | None
    engine: EngineKind | None
    dtype: Dtype
    overflow: Overflow
    on_error: OnError
    batch_size: int | None
    max_concurrency: int | None
    timeout: float | None
    max_retries: int
    restart_timeout: float
    default_headers: Mapping[str, str] | None
    verify: bool | str
    engine_kwargs: Mapping[str, Any] | None


_CLIENT = "Leave it out: YAML cannot hold it. Pass api_base_url and api_key."
_DOCUMENTS = "It belongs to Qwen3DocumentEmbedder."

ADVICE: Mapping[str, str] = {
    **FOREIGN,
    **dict.fromkeys(("base_url", "api_base", "url"), "Pass api_base_url."),
    **dict.fromkeys(("client", "http_client", "async_client"), _CLIENT),
    **dict.fromkeys(("meta_fields_to_embed", "embedding_separator", "progress_bar"), _DOCUMENTS),
    **dict.fromkeys(("show_progress", "show_progress_bar"), "Pass progress_bar."),
    "http_client_kwargs": "Pass timeout, default_headers or verify. For a proxy set HTTPS_PROXY.",
    "raise_on_failure": "Leave it out: an error is always raised, and carries what was computed.",
    "token": FOREIGN["huggingfacehub_api_token"],
}
"""Arguments of other embedders, and what to do about each here."""

_OWN = ("model", "api_base_url", "api_key")
_NAMES = {"batch_size": "batch_size", "document_instruction": "document_instruction"}


def check_arguments(api_base_url: object, api_key: object, settings: Mapping[str, Any]) -> None:
    """Check the arguments of both components that the core does not know by their names.

    Raises:
        ConfigurationError: an argument is of the wrong type, or belongs to another embedder.
    """
    known = Settings.__annotations__
    for name in settings.keys() - known.keys():
        advice = ADVICE.get(name, f"The arguments are: {', '.join((*_OWN, *known))}.").format_map(
            _NAMES
        )
        raise ConfigurationError(f"{name} is not an argument here. {advice}")
    check_kind("api_base_url", api_base_url, str, "str")
    check_kind("api_key", api_key, Secret, f'a Secret: Secret.from_env_var("{KEY_VARIABLE}")')


def check_kind(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raise if a value is neither None nor of a kind. It may be a key, so it is not shown."""
    if value is not None and not isinstance(value, kind):
        raise ConfigurationError(f"{name} is {type(value).__name__}. Pass {wanted}.")


def check_fields(fields: Sequence[str] | None) -> list[str]:
    """Return the names of metadata fields.

    Raises:
        ConfigurationError: they are not a list of names, such as one name, whose letters would
            count as names.
    """
    check_kind("meta_fields_to_embed", fields, (list, tuple), 'a list, for example ["title"]')
    for name in fields or ():
        check_kind("a name in meta_fields_to_embed", name, str, "str")
    return list(fields or ())
