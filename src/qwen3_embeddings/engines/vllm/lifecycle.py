"""Start vLLM's engine core, and explain why a start failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen3_embeddings import checkpoint, models
from qwen3_embeddings.engines import scheduling
from qwen3_embeddings.engines.base import Served
from qwen3_embeddings.engines.vllm import compat, defaults, oom
from qwen3_embeddings.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME = "vLLM"


def load() -> None:
    """Import vLLM.

    Raises:
        MissingDependencyError: vLLM cannot be imported.
    """
    compat.load()


def start(
    name: str, dtype: str, engine_kwargs: dict[str, Any]
) -> tuple[compat.Core, Tokenizer, Served]:
    """Start an engine core; also return the model's tokenizer, and what the core serves."""
    model = models.describe(name)
    checkpoint.check_weights(name)
    revision = engine_kwargs.get("tokenizer_revision") or engine_kwargs.get("revision")
    tokenizer = load_tokenizer(engine_kwargs.get("tokenizer") or name, revision)
    arguments = {"model": name, "use_tqdm_on_load": False}
    arguments |= defaults.engine_arguments(model, dtype, compat.this_device()) | engine_kwargs
    core = compat.Core(arguments, scheduling.mixed_tokens(model.parameters))
    size = model.dimensions
    return core, tokenizer, Served("vllm", name, size, size, core.context)


def explain(said: str, name: str, dtype: str, engine_kwargs: dict[str, Any]) -> str | None:
    """Return why a start failed and what to do, to follow "vLLM could not start with …"."""

    def asked_for() -> dict[str, Any]:
        model, device = models.describe(name), compat.this_device()
        return defaults.engine_arguments(model, dtype, device) | engine_kwargs

    if problem := compat.checkpoint_problem(said):
        return f": {problem}"
    advice = oom.advice(said, asked_for)
    return f" ({said}). {advice}" if advice else None
