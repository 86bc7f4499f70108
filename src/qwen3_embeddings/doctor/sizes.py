"""Checks of the size of the vectors."""

from __future__ import annotations

from qwen3_embeddings import models
from qwen3_embeddings.doctor.compare import SAME, distance
from qwen3_embeddings.doctor.report import Finding
from qwen3_embeddings.doctor.subject import TEXTS, CannotTellError, Subject
from qwen3_embeddings.engines.openai.client import ServerEngine
from qwen3_embeddings.errors import Qwen3EmbeddingsError
from qwen3_embeddings.vectors import check_dimensions, truncate


async def model(subject: Subject) -> Finding:
    """The size is the published one, and the native one is what comes unasked."""
    served, check = subject.served, "model"
    said = f"{served.model}, {served.dimensions} numbers, context {served.context or 'not told'}"
    size = subject.published
    known = models.MODELS[f"Qwen/Qwen3-Embedding-{size.upper()}"].dimensions if size else None
    if known is None or known == served.dimensions:
        told = "" if known else "; not a published name, so the size is taken as native"
        return Finding(check, "ok", said + told)
    try:
        await subject.rows("probe", dimensions=known)
    except Qwen3EmbeddingsError as error:
        return Finding(
            check,
            "failure",
            f"{said}; {known} is the native size of this name, and it cannot be had: {error}",
            "Another model than the name says: its vectors fit no index of the right one.",
            "Start the server with the published weights, or under their true name.",
        )
    return Finding(
        check,
        "warning",
        f"{said}; native is {known}, which this package asks for",
        "Clients that send no `dimensions` get the smaller size.",
        "Leave `dimensions` out of --pooler-config, unless that is meant.",
    )


async def matryoshka(subject: Subject) -> Finding:
    """A smaller size is the first numbers of the native vector, renormalised."""
    native = subject.served.native
    if subject.dimensions is not None:
        check_dimensions(subject.dimensions, native)
    sizes = sorted({models.MIN_DIMENSIONS, subject.dimensions or 0} - {0, native})
    sizes = [size for size in sizes if size < native]
    if not sizes:
        raise CannotTellError(f"{native} is the smallest size there is")
    whole = await subject.rows(*TEXTS[:4], dimensions=native)
    apart = 0.0
    for size in sizes:
        small = await subject.rows(*TEXTS[:4], dimensions=size)
        apart = max(apart, distance(small[:, :size], truncate(whole, size)))
    named = " and ".join(map(str, sizes))
    if apart > SAME:
        return Finding(
            "matryoshka",
            "failure",
            f"size {named} is not the first numbers of {native} (1-cos = {apart:.2g})",
            "Vectors of a smaller size mean nothing, or do not fit those cut elsewhere.",
            "Leave dimensions out, cut with qwen3_embeddings.truncate; report it to the server.",
        )
    if not isinstance(subject.engine, ServerEngine) or subject.engine.cuts_itself:
        return Finding("matryoshka", "ok", f"size {named}: cut by the engine")
    return Finding(
        "matryoshka",
        "warning",
        f"size {named}: the server refuses or ignores `dimensions`; cut and renormalised here",
        "This package's vectors are right; other clients get no smaller size.",
        """vLLM: --hf-overrides '{"is_matryoshka": true}'. llama.cpp cannot: cut and renormalise """
        "in those clients.",
    )
