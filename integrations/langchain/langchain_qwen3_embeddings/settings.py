"""The settings of `Qwen3Embeddings`, and the names by which they are known elsewhere."""

from __future__ import annotations

import os
import ssl
from typing import Annotated, Any, TypedDict

from langchain_core.utils import secret_from_env
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    SkipValidation,
    field_serializer,
    field_validator,
)

from qwen3_embeddings import Task
from qwen3_embeddings.integration import (
    TIMEOUT,
    Dtype,
    EngineKind,
    OnError,
    Overflow,
    hide_headers,
    show_headers,
)

SYNONYMS = {
    "api_base": "base_url",
    "model_name": "model",
    "openai_api_base": "base_url",
    "openai_api_key": "api_key",
    "request_timeout": "timeout",
    "show_progress": "show_progress_bar",
}
"""Names that other embedding classes of LangChain have for our arguments."""

NAMES = {"batch_size": "chunk_size", "document_instruction": "document_instruction"}
"""What messages of the core call our arguments."""


class Synonyms(TypedDict, total=False):
    """The names in `SYNONYMS`, for type checkers."""

    api_base: str | None
    model_name: str | os.PathLike[str] | None
    openai_api_base: str | None
    openai_api_key: str | SecretStr | None
    request_timeout: float | None
    show_progress: bool


class Settings(BaseModel):
    """Fields that the constructor of `Qwen3Embeddings` fills."""

    # Frozen: a setting changed later would not reach the engine. Inputs hidden: one may be a key.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
    )

    # The core checks what pydantic skips, so that its typed errors are not buried in pydantic's.
    model: Annotated[str | None, SkipValidation] = None
    """Hub id, folder, or name on the server. Default: QWEN3_EMBEDDINGS_MODEL, else what the server
    serves, else Qwen/Qwen3-Embedding-0.6B."""

    base_url: str | None = None
    """Root of an OpenAI-compatible server, e.g. `http://localhost:8000/v1`. Default:
    QWEN3_EMBEDDINGS_BASE_URL. Without either, vLLM runs in this process."""

    api_key: SecretStr | None = Field(
        default_factory=secret_from_env("QWEN3_EMBEDDINGS_API_KEY", default=None), exclude=True
    )
    """The server's key. Default: QWEN3_EMBEDDINGS_API_KEY. Never shown, dumped or pickled."""

    dimensions: Annotated[int | None, SkipValidation] = None
    """Matryoshka size, 32 to native; None for native."""

    task: str | Task = "web_search"
    """Name of a preset in `qwen3_embeddings.TASKS`, or a `qwen3_embeddings.Task`."""

    query_instruction: str | None = None
    """Free text instead of the task's; then documents have no instruction. An empty string embeds
    queries without any instruction."""

    document_instruction: str | None = None
    """Free text for documents. Default: none, or the task's own when it is symmetric."""

    dtype: Annotated[Dtype, SkipValidation] = "auto"
    """`'auto'` (the checkpoint's own), `'bfloat16'` or `'float32'`, for engines in this process."""

    overflow: Annotated[Overflow, SkipValidation] = "error"
    """What to do with a text longer than the model's context: `'error'`, `'truncate'` (keeps
    instruction and end token) or `'mean'` (pieces, weighted by their tokens)."""

    on_error: Annotated[OnError, SkipValidation] = "stop"
    """When a text cannot be embedded: `'stop'` at once, or `'finish'` all others first and then
    raise `qwen3_embeddings.TextsFailedError`. Either error carries what was computed."""

    engine: Annotated[EngineKind | None, SkipValidation] = None
    """Name of the engine, `'vllm'`, `'torch'`, `'server'` or `'reference'`; None chooses by
    `base_url`."""

    chunk_size: int | None = None
    """Maximum number of texts passed to the engine at once (its own choice), or sent to a server in
    one request (64)."""

    max_retries: Annotated[int, SkipValidation] = 4
    """Number of retries for transient failures: connection errors, HTTP 408, 429 and 5xx (except
    501). Concurrency-limit 429s are not counted."""

    restart_timeout: Annotated[float, SkipValidation] = 180.0
    """How long, in seconds, document requests keep retrying while a server that answered before is
    down. Queries fail after `max_retries`."""

    timeout: Annotated[float | None, SkipValidation] = TIMEOUT
    """Seconds that one request to a server may take; None for the default."""

    default_headers: dict[str, str | SecretStr] | None = Field(default=None, repr=False)
    """Sent with every request to a server. Secret values (a `SecretStr`, or under a name like
    Authorization, Cookie, X-Api-Key) are never shown, dumped or pickled, like `api_key`."""

    verify: bool | str | ssl.SSLContext = True
    """TLS verification: True, False, a CA file, or an `ssl.SSLContext`."""

    max_concurrency: Annotated[int | None, SkipValidation] = None
    """Maximum number of in-flight requests per role (queries, documents); 16 by default. Lowered
    automatically while the server answers 429."""

    show_progress_bar: bool = False
    """Draw a progress bar while documents are embedded."""

    engine_kwargs: dict[str, Any] | None = Field(default=None, repr=False)
    """Further arguments of the engine, by the engine's own names."""

    client: Any = Field(default=None, exclude=True, repr=False)
    """An `openai.OpenAI`, `AsyncOpenAI` or Azure client, whose base URL, key, headers and
    connections are used."""

    http_client: Any = Field(default=None, exclude=True, repr=False)
    """An httpx client, whose connections are used."""

    @field_validator("default_headers")
    @classmethod
    def _hide_headers(cls, headers: dict[str, Any] | None) -> dict[str, Any] | None:
        return headers and hide_headers(headers, SecretStr)

    @field_serializer("default_headers")
    def _dump_headers(self, headers: dict[str, Any] | None) -> dict[str, str] | None:
        return headers and show_headers(headers)

    @field_serializer("verify", when_used="json")
    def _dump_verify(self, verify: bool | str | ssl.SSLContext) -> bool | str:
        return True if isinstance(verify, ssl.SSLContext) else verify  # JSON has no form for one
