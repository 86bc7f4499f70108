"""Qwen3-Embedding for search and RAG: the right vectors, as fast as the hardware allows."""

from qwen3_embeddings.doctor.report import Finding, Report
from qwen3_embeddings.embedder import Embedder
from qwen3_embeddings.engines.base import Served, Usage
from qwen3_embeddings.errors import (
    AuthenticationError,
    Computed,
    ConfigurationError,
    DimensionsError,
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    InvalidVectorError,
    MissingDependencyError,
    ModelNotFoundError,
    Qwen3EmbeddingsError,
    ServerBusyError,
    ServerConnectionError,
    ServerError,
    ServerRefusedError,
    ServerResponseError,
    ServerTimeoutError,
    TextEncodingError,
    TextError,
    TextRefusedError,
    TextsFailedError,
    TextTooLongError,
    TextTypeError,
    UnknownModelError,
    UnknownTaskError,
)
from qwen3_embeddings.models import MODELS, Model
from qwen3_embeddings.prompts import TASKS, Task
from qwen3_embeddings.vectors import similarity, truncate

__version__ = "0.2.0"

__all__ = [
    "MODELS",
    "TASKS",
    "AuthenticationError",
    "Computed",
    "ConfigurationError",
    "DimensionsError",
    "Embedder",
    "EngineClosedError",
    "EngineDeadError",
    "EngineError",
    "EngineStartError",
    "Finding",
    "InvalidVectorError",
    "MissingDependencyError",
    "Model",
    "ModelNotFoundError",
    "Qwen3EmbeddingsError",
    "Report",
    "Served",
    "ServerBusyError",
    "ServerConnectionError",
    "ServerError",
    "ServerRefusedError",
    "ServerResponseError",
    "ServerTimeoutError",
    "Task",
    "TextEncodingError",
    "TextError",
    "TextRefusedError",
    "TextTooLongError",
    "TextTypeError",
    "TextsFailedError",
    "UnknownModelError",
    "UnknownTaskError",
    "Usage",
    "__version__",
    "similarity",
    "truncate",
]
