"""What one server can do, learned from its own answers: model, wire format, sizes, priorities."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_embeddings import models
from qwen3_embeddings.engines.base import Served
from qwen3_embeddings.engines.openai import wire
from qwen3_embeddings.engines.openai.endpoint import Endpoint
from qwen3_embeddings.engines.openai.limiter import Slots
from qwen3_embeddings.errors import (
    ModelNotFoundError,
    Qwen3EmbeddingsError,
    ServerConnectionError,
    ServerError,
    ServerResponseError,
)

logger = logging.getLogger(__name__)

FULL_CONTEXT = (0, 32)
"""First version of vLLM that always finishes an input as long as its context: an earlier one never
does when the input spans several steps (vllm-project/vllm#48039)."""
STRIPPING_SERVER = "infinity"
"""``owned_by`` of a server that strips every text (infinity_emb's `fastapi_schemas`)."""
PROBES = ["probe", "\n probe\n"]
"""Texts that differ in outer whitespace only."""


@dataclass(frozen=True)
class _Listed:
    """What ``/models`` says of the model.

    Attributes:
        name: the name to ask for it by.
        root: what it was loaded from.
        context: longest input in tokens; None when the list does not say.
        names: names of all models on the server.
        owner: the software that serves it, as the list says.
    """

    name: str
    root: str
    context: int | None = None
    names: tuple[str, ...] = ()
    owner: str = ""


async def learn(endpoint: Endpoint, slots: Slots, model: str | None) -> Served:
    """Ask a server what it serves, and by a probe how it can be asked.

    Args:
        endpoint: the server; its wire format is set.
        slots: limits the requests in flight.
        model: name of the model; None means the only one.

    Raises:
        ModelNotFoundError: the server has no such model, or several and `model` is None.
        ServerError: the server cannot be used.
    """
    listed = await _find_model(endpoint, model)
    try:
        # Not urgent: documents would leave a slot free for the next query.
        async with slots.one(urgent=False) as slot:
            probe = await endpoint.embed(listed.name, list(PROBES), None, True, slot)
    except ModelNotFoundError:
        raise _not_served(endpoint.base_url, listed.names, model) from None
    known = models.MODELS.get(listed.name) or models.MODELS.get(listed.root)
    stripped_for_certain = known is not None or listed.owner == STRIPPING_SERVER
    size = probe.vectors.shape[1]
    bare, padded = probe.vectors
    alike = bool(np.isclose(bare, padded, rtol=1e-5, atol=0).all())
    served = Served(
        engine="server",
        model=listed.name,
        dimensions=size,
        native=max(known.dimensions if known else 0, size),
        context=listed.context or (known.context if known else None),
        strips=alike and await _strips(endpoint, listed.name, stripped_for_certain),
    )
    logger.info("%s speaks %s: %s", endpoint.base_url, endpoint.wire_format, served)
    return served


async def _strips(endpoint: Endpoint, model: str, certain: bool) -> bool:
    """Whether the server, and not the model's tokenizer, removes outer whitespace.

    ``/tokenize`` decides. Without it, it is certain for the published models, whose tokenizers keep
    whitespace, and for a server that is known to strip. Else False accuses nobody.
    """
    with contextlib.suppress(Qwen3EmbeddingsError):
        bare, padded = [await endpoint.tokenize(model, text, retries=0) for text in PROBES]
        return bare != padded
    return certain


async def _find_model(endpoint: Endpoint, model: str | None) -> _Listed:
    """Look the model up in the server's list.

    With `model` given, a server without a usable list is probed for it anyway.
    """
    answer = await endpoint.get("/models")
    try:
        endpoint.check(answer)
        rows = wire.read_models(answer.content)
    except ServerError as error:
        if model is not None:
            return _Listed(model, model)
        raise _no_list(endpoint.base_url, error, answer.status_code) from None
    row = _choose(endpoint.base_url, rows, model)
    names = tuple(row["id"] for row in rows)
    if row is None:
        assert model is not None
        return _Listed(model, model, None, names)
    context = _context(row)
    if context and row.get("owned_by") == "vllm":
        version = wire.read_version(await endpoint.look("/version") or b"")
        if version < FULL_CONTEXT:
            logger.info("vLLM %s may hang on %d tokens: one less here", version, context)
            context -= 1
    owner = str(row.get("owned_by") or "")
    return _Listed(row["id"], row.get("root") or row["id"], context, names, owner)


def _no_list(base_url: str, error: ServerError, status: int) -> ServerError:
    """Return the error of a server whose model is not known because it lists none."""
    advice = "Pass the name of the model as model=, if the server embeds without listing models."
    if isinstance(error, ServerResponseError | ModelNotFoundError):
        return ServerResponseError(
            f"{base_url} has no usable list of models ({error.answered}). {advice} If this is the "
            "wrong address, correct base_url: it is the server's OpenAI-compatible root, usually "
            "ending in /v1.",
            status,
        )
    if isinstance(error, ServerConnectionError) or error.status == 401:
        return error
    return type(error)(f"{error} {advice}", error.status)


def _choose(base_url: str, rows: list[dict[str, Any]], model: str | None) -> dict[str, Any] | None:
    """Return the row of the model; None if the list omits the name, so that the probe decides."""
    if model is None:
        if len({row.get("root", row["id"]) for row in rows}) == 1:
            return rows[0]
        raise _not_served(base_url, tuple(row["id"] for row in rows), None)
    named = [row for row in rows if row["id"] == model]
    loaded = [row for row in rows if row.get("root") == model]
    return next(iter(named + loaded), None)


def _context(row: Mapping[str, Any]) -> int | None:
    """Return the longest input in tokens that a row of ``/models`` reports."""
    meta = row.get("meta")
    slot = meta.get("n_ctx") if isinstance(meta, dict) else None
    # llama.cpp refuses an input that fills its slot to the last token.
    context = slot - 1 if type(slot) is int else row.get("max_model_len")
    return context if type(context) is int and context > 0 else None


def _not_served(base_url: str, names: tuple[str, ...], model: str | None) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the server at {base_url} serves {', '.join(map(repr, names)) or 'no model it names'}"
        + (f", not {model!r}" if model else "")
        + (". Pass one of its names as model=." if names else ". Pass the model's name as model=.")
    )
