"""Checks against vectors that are known: the model cards' and a reference's."""

from __future__ import annotations

import numpy as np

from qwen3_embeddings.doctor.compare import QUANTISED, SAME, distance
from qwen3_embeddings.doctor.report import Finding, Status
from qwen3_embeddings.doctor.subject import TEXTS, CannotTellError, Subject
from qwen3_embeddings.engines.base import Prompt
from qwen3_embeddings.prompts import TASKS, instruct
from qwen3_embeddings.vectors import normalize

PUBLISHED = {
    "0.6b": ((0.7645568, 0.1414251), (0.1354974, 0.5999550)),
    "4b": ((0.7534, 0.1147), (0.0320, 0.6258)),
    "8b": ((0.7493016, 0.0750648), (0.0879597, 0.6318400)),
}
"""Similarities of `PUBLISHED_QUERIES` to `PUBLISHED_DOCUMENTS`, from the model cards."""

PUBLISHED_QUERIES = ("What is the capital of China?", "Explain gravity")
PUBLISHED_DOCUMENTS = (
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical "
    "objects and is responsible for the movement of planets around the sun.",
)


async def similarities(subject: Subject) -> Finding:
    """A published model gives the similarities on its card."""
    if subject.published is None:
        raise CannotTellError(
            "not a published model by its name; --model Qwen/… says so where it is"
        )
    queries = [instruct(TASKS["web_search"].instruction, text) for text in PUBLISHED_QUERIES]
    one = normalize(await subject.rows(*queries))
    other = normalize(await subject.rows(*PUBLISHED_DOCUMENTS))
    apart = float(np.abs(one @ other.T - np.array(PUBLISHED[subject.published])).max())
    said = f"differ from the model card of {subject.published} by {apart:.2g} at most"
    # The card's own two engines differ by 0.0025; fp8 keeps cosine 0.995 to bf16.
    if apart <= 0.01:
        return Finding("similarities", "ok", said)
    status: Status = "warning" if apart <= 0.05 else "failure"
    return Finding(
        "similarities",
        status,
        said,
        "Quantised weights cost that much."
        if status == "warning"
        else "These are not the vectors of the published model, whatever the cause.",
        "Look at the findings above; else load the published weights in bfloat16.",
    )


async def reference(subject: Subject) -> Finding:
    """The vectors of sentence-transformers running the checkpoint here."""
    from qwen3_embeddings.engines.sentence_transformers import ReferenceEngine

    if subject.reference is None:
        raise CannotTellError("no --reference to compare with")
    texts: list[Prompt] = [*TEXTS, *(instruct(subject.instruction, text) for text in TEXTS)]
    yardstick = ReferenceEngine(subject.reference, dtype="float32")
    try:
        expected = await yardstick.embed(texts, None, False)
    finally:
        await yardstick.close()
    rows = await subject.rows(*texts)
    if rows.shape != expected.shape:
        apart, said = 2.0, f"{rows.shape[1]} numbers, {expected.shape[1]} in the reference"
    else:
        apart = distance(rows, expected)
        said = f"differs from {subject.reference} in float32 by 1-cos = {apart:.2g} at most"
    if apart <= SAME:
        return Finding("reference", "ok", said)
    quantised = apart <= QUANTISED
    return Finding(
        "reference",
        "warning" if quantised else "failure",
        said,
        "Quantised weights cost that much; do not mix these vectors with others in one index."
        if quantised
        else "Not that checkpoint's vectors, or quantised so far that texts rank otherwise.",
        "Look at the findings above; serve the same weights, unquantised or in more bits.",
    )
