"""Stable names for the vectors of one configuration, for caches and index folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from qwen3_embeddings import long_texts, models, prompts, vectors
from qwen3_embeddings.canonical import canonical

# Engine arguments that steer speed and memory and can change no vector.
_NEUTRAL = frozenset(
    {"gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs"}
    | {"async_scheduling"}
    | {"enable_prefix_caching", "enforce_eager", "disable_log_stats", "scheduling_policy"}
    | {"device", "download_dir", "hf_token", "kernels", "use_tqdm_on_load"}
)


def fingerprint(
    model: str,
    *,
    dimensions: int | None,
    template: str,
    dtype: str,
    overflow: str,
    engine_kwargs: Mapping[str, Any],
) -> str:
    """Return a name that changes with anything that can change a vector.

    Args:
        model: hub id or folder. The contents of a folder count, of a hub id the id alone.
        dimensions: size of the vectors; None counts as the native size, where it is known.
        template: an empty text under the instruction.
        dtype: precision; "auto" counts as the checkpoint's own.
        overflow: policy for texts over the context.
        engine_kwargs: further arguments of the engine; those that change no vector do not count.

    Returns:
        ``MODEL-SIZE-DIGEST``, usable as a folder name.
    """
    shape = models.known_shape(model)
    neutral = _NEUTRAL if overflow != "error" else _NEUTRAL | {"max_model_len"}
    size = dimensions or (shape.dimensions if shape else "native")
    parts = {
        "model": models.weights_digest(model),
        "dimensions": size,
        "template": template,
        "dtype": shape.precision(dtype) if shape else dtype,
        "overflow": overflow,
        "engine_kwargs": {k: v for k, v in engine_kwargs.items() if k not in neutral},
        "versions": _versions(template, overflow),
    }
    digest = hashlib.sha256(canonical(parts, _stable).encode())
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", model.rstrip("/").rsplit("/", 1)[-1])
    return f"{slug}-{size}-{digest.hexdigest()[:16]}"


def _versions(template: str, overflow: str) -> dict[str, int]:
    """Return the versions of the algorithms that these settings use."""
    versions = {"size": vectors.SIZE_VERSION}
    if template:
        versions["template"] = prompts.TEMPLATE_VERSION
    if overflow == "truncate":
        versions["truncate"] = long_texts.TRUNCATE_VERSION
    if overflow == "mean":
        versions["mean"] = long_texts.MEAN_VERSION
    return versions


def _stable(value: Any) -> Any:
    """Return a form of an object for JSON that is the same in every process."""
    own: Any = type(value).__repr__
    if own is object.__repr__:  # it would show an address
        return [type(value).__qualname__, getattr(value, "__dict__", {})]
    return repr(value)
