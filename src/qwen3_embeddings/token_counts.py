"""Counting tokens: with the model's own tokenizer, locally where it is at hand."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from qwen3_embeddings import event_loop
from qwen3_embeddings.engines.base import Engine
from qwen3_embeddings.errors import (
    ConfigurationError,
    MissingDependencyError,
    ServerRefusedError,
    ServerResponseError,
    UnknownModelError,
)
from qwen3_embeddings.request import Texts
from qwen3_embeddings.tokenizer import load_tokenizer

BATCH = 1024
"""Texts tokenized at once; their token ids are dropped before the next batch."""

_loaded = functools.lru_cache(maxsize=2)(load_tokenizer)


async def local(model: str, engine_kwargs: Mapping[str, Any], prompts: list[str]) -> list[int]:
    """Return the number of tokens of each prompt, without an engine.

    Args:
        model: hub id or folder.
        engine_kwargs: further arguments of the engine, which may name another tokenizer.
        prompts: the texts under their instruction.

    Raises:
        UnknownModelError: the tokenizer is neither on this machine nor on a reachable hub.
        MissingDependencyError: tokenizers is not installed.
    """
    revision = engine_kwargs.get("tokenizer_revision") or engine_kwargs.get("revision")
    name = engine_kwargs.get("tokenizer") or model
    return await event_loop.in_thread(_count, str(name), revision, prompts)


async def remote(engine: Engine, texts: Texts, model: str | None) -> list[int]:
    """Return the number of tokens of each text of a call, as the server counts them.

    A server without ``/tokenize`` serves a model whose tokenizer may be on this machine.

    Raises:
        ConfigurationError: the server has no ``/tokenize``, and the tokenizer is not here either.
    """
    if not texts.prompts:
        return []
    served = await engine.start()
    model = model or served.model
    try:
        return [len(ids) for ids in await engine.tokenize(texts.prompts, texts.urgent)]
    except (ServerResponseError, ServerRefusedError) as error:
        try:
            return await local(model, {}, texts.prompts)
        except (UnknownModelError, MissingDependencyError):
            pass
        raise ConfigurationError(
            f"count_tokens needs the model's tokenizer: this server has no /tokenize ({error}), "
            f"and {model} is not on this machine. Pass the folder of its checkpoint "
            "to an Embedder without base_url, and count there."
        ) from error


def _count(model: str, revision: str | None, prompts: list[str]) -> list[int]:
    tokenizer = _loaded(model, revision)
    batches = (prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH))
    return [len(one.ids) for batch in batches for one in tokenizer.encode_batch(batch)]
