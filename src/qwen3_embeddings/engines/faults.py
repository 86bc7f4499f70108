"""Errors of engines in this process: describe them, and free the memory that they hold."""

from __future__ import annotations

import gc
import logging
import re
import sys
import traceback
from collections.abc import Callable

from qwen3_embeddings.errors import (
    ConfigurationError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    MissingDependencyError,
    UnknownModelError,
)

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    r"out of memory|can't allocate memory|Cannot allocate memory|MemoryError|bad_alloc"
    r"|STATUS_ALLOC_FAILED"
)
"""Messages of PyTorch's allocators (c10/cuda/CUDACachingAllocator.cpp and
c10/core/impl/alloc_cpu.cpp), of Python, and of cuBLAS and cuDNN."""


def message(error: BaseException) -> str:
    """Return the type and message of an error; of one that cannot be printed, the type."""
    try:
        details = getattr(error, "errors", None)
        if callable(details):  # pydantic's: its text prints all arguments
            return "; ".join(str(detail["msg"]) for detail in details())
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def start_error(
    error: BaseException, engine: str, model: str, explain: Callable[[str], str | None]
) -> Exception:
    """Return the error that callers get for one that ended a start, once its memory is free.

    Args:
        error: what the start raised.
        engine: name of the engine, for the message.
        model: hub id or folder.
        explain: returns the rest of the sentence for what `message` says; None if it is unknown.
    """
    typed = (EngineError, UnknownModelError, ConfigurationError, MissingDependencyError)
    if isinstance(error, typed):
        return error
    said = message(error)
    reason = None
    try:
        forget_frames(error)
        free_memory()
        reason = explain(said)
    except Exception:  # the first error is the one to report
        logger.exception("no advice on how to start the engine")
    advice = "Check that the checkpoint is complete, and what engine_kwargs asks for."
    wrapped = EngineStartError(
        f"{engine} could not start with {model!r}{reason or f' ({said}). {advice}'}"
    )
    wrapped.__cause__ = error
    return wrapped


def death_error(error: BaseException, engine: str) -> EngineDeadError:
    """Return the error that callers get when an error ended a running engine.

    Args:
        error: what ended it.
        engine: name of the engine, for the message.
    """
    said = message(error)
    advice = "The next call starts a new one."
    if re.search(OUT_OF_MEMORY, said):
        advice += " Lower max_num_batched_tokens in engine_kwargs if it dies again."
    return EngineDeadError(f"the {engine} engine died ({said}). {advice}")


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
