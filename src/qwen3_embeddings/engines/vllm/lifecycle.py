"""Start an engine core, and free its memory when it has ended or failed to start."""

from __future__ import annotations

import gc
import logging
import sys
import traceback
from typing import TYPE_CHECKING, Any

from qwen3_embeddings import checkpoint, models
from qwen3_embeddings.engines.base import Served
from qwen3_embeddings.engines.vllm import compat, defaults, oom
from qwen3_embeddings.errors import (
    ConfigurationError,
    EngineError,
    EngineStartError,
    MissingDependencyError,
    UnknownModelError,
)
from qwen3_embeddings.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)


def start(
    name: str, dtype: str, engine_kwargs: dict[str, Any]
) -> tuple[compat.Core, Tokenizer, Served]:
    """Start an engine core; also return the model's tokenizer, and what the core serves."""
    compat.quiet()
    try:
        device = compat.this_device()
    except ImportError as error:
        said = f"vLLM cannot be imported ({error}). {compat.INSTALL}"
        raise MissingDependencyError(said) from error
    model = models.describe(name)
    checkpoint.check_weights(name)
    revision = engine_kwargs.get("tokenizer_revision") or engine_kwargs.get("revision")
    tokenizer = load_tokenizer(engine_kwargs.get("tokenizer") or name, revision)
    arguments = {"model": name, "use_tqdm_on_load": False}
    arguments |= defaults.engine_arguments(model, dtype, device) | engine_kwargs
    core = compat.Core(arguments)
    size = model.dimensions
    return core, tokenizer, Served("vllm", name, size, size, core.context)


def start_error(
    error: BaseException, name: str, dtype: str, engine_kwargs: dict[str, Any]
) -> Exception:
    """Return the error that callers get for one that ended a start, once its memory is free."""
    typed = (EngineError, UnknownModelError, ConfigurationError, MissingDependencyError)
    if isinstance(error, typed):
        return error

    def asked_for() -> dict[str, Any]:
        model, device = models.describe(name), compat.this_device()
        return defaults.engine_arguments(model, dtype, device) | engine_kwargs

    said = compat.message(error)
    advice = None
    try:
        forget_frames(error)
        free_memory()
        advice = oom.advice(said, asked_for)
    except Exception:  # the first error is the one to report
        logger.exception("no advice on how to start the vLLM engine")
    advice = advice or "Check that the checkpoint is complete, and what engine_kwargs asks for."
    problem = compat.checkpoint_problem(said)
    reason = f": {problem}" if problem else f" ({said}). {advice}"
    wrapped = EngineStartError(f"vLLM could not start with {name!r}{reason}")
    wrapped.__cause__ = error
    return wrapped


def forget_frames(error: BaseException) -> None:
    """Clear the frames of a caught error, which hold the engine and its memory."""
    seen: set[int] = set()  # a chain of causes can be a circle
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def free_memory() -> None:
    """Return the device's memory, once no name refers to the engine any more."""
    gc.collect()
    torch = sys.modules.get("torch")  # without it there is no memory to return
    if torch is not None and torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # after some CUDA errors every further call fails
            logger.exception("the device's memory was not returned")
