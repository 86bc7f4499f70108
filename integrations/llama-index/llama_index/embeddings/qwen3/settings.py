"""The settings of `Qwen3Embedding`, and the names by which they are known elsewhere."""

from __future__ import annotations

import os
import ssl
from typing import Annotated, Any, TypedDict

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import (
    ConfigDict,
    Field,
    SecretStr,
    field_serializer,
    field_validator,
)
from llama_index.core.callbacks import CallbackManager
from pydantic import SkipValidation

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

DEFAULT_BATCH_SIZE = 2048
"""Texts per event and per batch: the maximum that LlamaIndex allows."""

SYNONYMS = {"base_url": "api_base", "model": "model_name"}
"""Names that other embedding classes of LlamaIndex have for our arguments."""

NAMES = {"batch_size": "embed_batch_size", "document_instruction": "text_instruction"}
"""What messages of the core call our arguments."""


class Synonyms(TypedDict, total=False):
    """The names in `SYNONYMS`, for type checkers."""

    base_url: str | None
    model: str | os.PathLike[str] | None


class Settings(BaseEmbedding):
    """Fields that the constructor of `Qwen3Embedding` fills."""

    # A misspelled argument must not pass unseen, and no message may show a misplaced key.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    # Frozen where a change would not reach the engine.
    model_name: str = Field(default="", frozen=True, description="Hub id, folder or served name.")
    api_base: str | None = Field(default=None, frozen=True, description="Root of the server's API.")
    api_key: SecretStr | None = Field(
        default=None, frozen=True, exclude=True, repr=False, description="The server's key."
    )
    dimensions: Annotated[int | None, SkipValidation] = Field(
        default=None, frozen=True, description="Matryoshka size."
    )
    task: str | Task = Field(default="web_search", frozen=True, description="Preset or Task.")
    query_instruction: str | None = Field(
        default=None, frozen=True, description="Instruction of queries, in place of the task's."
    )
    text_instruction: str | None = Field(
        default=None, frozen=True, description="Instruction of documents."
    )
    dtype: Annotated[Dtype, SkipValidation] = Field(
        default="auto", frozen=True, description="Precision in this process."
    )
    overflow: Annotated[Overflow, SkipValidation] = Field(
        default="error", frozen=True, description="Policy for over-long texts."
    )
    on_error: Annotated[OnError, SkipValidation] = Field(
        default="stop", frozen=True, description="Stop or finish at a bad text."
    )
    engine: Annotated[EngineKind | None, SkipValidation] = Field(
        default=None, frozen=True, description="Kind of engine."
    )
    max_retries: int = Field(default=4, frozen=True, description="Further attempts of a request.")
    timeout: float | None = Field(
        default=TIMEOUT, frozen=True, description="Seconds a request may take."
    )
    restart_timeout: float = Field(default=180.0, frozen=True, description="Seconds to wait.")
    default_headers: dict[str, str | SecretStr] | None = Field(
        default=None, frozen=True, repr=False, description="Headers of every request."
    )
    verify: bool | str | ssl.SSLContext = Field(
        default=True, frozen=True, description="TLS verification."
    )
    max_concurrency: int | None = Field(
        default=None, frozen=True, description="Maximum number of requests in flight."
    )
    engine_kwargs: dict[str, Any] | None = Field(
        default=None, frozen=True, repr=False, description="Further arguments of the engine."
    )
    embed_batch_size: int = Field(
        default=DEFAULT_BATCH_SIZE, gt=0, le=2048, description="Texts handed over at once."
    )
    embeddings_cache: Any | None = Field(
        default=None, frozen=True, exclude=True, repr=False, description="Where vectors are kept."
    )
    rate_limiter: Any | None = Field(
        default=None, exclude=True, repr=False, description="Asked before each batch."
    )
    client: Any = Field(
        default=None, frozen=True, exclude=True, repr=False, description="OpenAI client to use."
    )
    http_client: Any = Field(
        default=None, frozen=True, exclude=True, repr=False, description="httpx client to use."
    )
    callback_manager: CallbackManager = Field(
        default_factory=lambda: CallbackManager([]),
        exclude=True,
        repr=False,
        description="Where events go.",
    )

    @field_validator("default_headers")
    @classmethod
    def _hide_headers(cls, headers: dict[str, Any] | None) -> dict[str, Any] | None:
        return headers and hide_headers(headers, SecretStr)

    @field_serializer("default_headers")
    def _dump_headers(self, headers: dict[str, Any] | None) -> dict[str, str] | None:
        return headers and show_headers(headers)

    @field_serializer("verify")
    def _dump_verify(self, verify: bool | str | ssl.SSLContext) -> bool | str:
        return True if isinstance(verify, ssl.SSLContext) else verify
