"""Checks of the size of the vectors."""

from __future__ import annotations

from qwen3_embeddings import models
from qwen3_embeddings.doctor.compare import distance, graded
from qwen3_embeddings.doctor.report import Finding
from qwen3_embeddings.doctor.subject import TEXTS, CannotTellError, Subject
from qwen3_embeddings.engines.openai.client import ServerEngine
from qwen3_embeddings.errors import Qwen3EmbeddingsError
from qwen3_embeddings.vectors import check_dimensions, truncate


async def model(subject: Subject) -> Finding:
    """Check that the native size is that of the published model, and the default."""
    served, check = subject.served, "model"
    said = f"{served.model}, {served.dimensions} dimensions, context {served.context or 'unknown'}"
    size = subject.published
    known = models.MODELS[f"Qwen/Qwen3-Embedding-{size.upper()}"].dimensions if size else None
    if known is None or known == served.dimensions:
        note = "" if known else "; not a published name, so this size is assumed to be native"
        return Finding(check, "ok", said + note)
    try:
        await subject.rows("probe", dimensions=known)
    except Qwen3EmbeddingsError as error:
        return Finding(
            check,
            "failure",
            f"{said}; the native size of this model is {known}, which is not available: {error}",
            "The model is not the one it is named after. Its vectors do not fit that model's "
            "indexes.",
            "Start the server with the published weights, or serve these under another name.",
        )
    return Finding(
        check,
        "warning",
        f"{said}; the native size is {known}, which this package requests",
        "Clients that do not send `dimensions` get the smaller size.",
        "Remove `dimensions` from --pooler-config, unless that is intended.",
    )


async def matryoshka(subject: Subject) -> Finding:
    """Check that a smaller size is the renormalized start of the native vector."""
    sizes = _sizes(subject)
    whole = await subject.rows(*TEXTS[:4], dimensions=subject.served.native)
    apart = 0.0
    for size in sizes:
        small = await subject.rows(*TEXTS[:4], dimensions=size)
        apart = max(apart, distance(small[:, :size], truncate(whole, size)))
    named = " and ".join(map(str, sizes))
    status = graded(apart)
    if status != "ok":
        return Finding(
            "matryoshka",
            status,
            f"size {named} differs from the first dimensions of the native vector by 1-cos = "
            f"{apart:.2g}",
            "Vectors of a smaller size do not match those that are truncated elsewhere.",
            "Do not request dimensions: truncate with qwen3_embeddings.truncate. Report this to "
            "the server's authors.",
            apart,
        )
    if not isinstance(subject.engine, ServerEngine) or subject.engine.cuts_itself:
        return Finding("matryoshka", "ok", f"size {named}: truncated by the engine", measured=apart)
    return Finding(
        "matryoshka",
        "warning",
        f"size {named}: the server refuses or ignores `dimensions`, so this package truncates and "
        "renormalizes",
        "This package's vectors are right. Other clients cannot get a smaller size.",
        """vLLM: --hf-overrides '{"is_matryoshka": true}'. llama.cpp has no such option: """
        "truncate and renormalize in those clients.",
        apart,
    )


def _sizes(subject: Subject) -> list[int]:
    """Return the sizes to test: the smallest, and the one that the user wants."""
    native = subject.served.native
    if subject.dimensions is not None:
        check_dimensions(subject.dimensions, native)
    wanted = {models.MIN_DIMENSIONS, subject.dimensions or 0} - {0, native}
    if sizes := sorted(size for size in wanted if size < native):
        return sizes
    raise CannotTellError(f"{native} is the smallest size that this model has")
