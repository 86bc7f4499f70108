"""Checks against known vectors: those of the model cards and of a reference checkpoint."""

from __future__ import annotations

import numpy as np

from qwen3_embeddings.doctor.compare import distance, graded
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

CLOSE = 0.01
"""Largest difference in similarity that precision explains. The two engines on the card differ by
0.0025; fp8 weights keep a cosine of 0.995 to bfloat16."""

QUANTIZED = 0.05
"""Largest difference in similarity that quantization to eight bits explains."""


async def similarities(subject: Subject) -> Finding:
    """Check that a published model returns the similarities on its model card."""
    if subject.published is None:
        raise CannotTellError(
            "the name is not that of a published model. If it is one, pass --model Qwen/…"
        )
    queries = [instruct(TASKS["web_search"].instruction, text) for text in PUBLISHED_QUERIES]
    one = normalize(await subject.rows(*queries))
    other = normalize(await subject.rows(*PUBLISHED_DOCUMENTS))
    apart = float(np.abs(one @ other.T - np.array(PUBLISHED[subject.published])).max())
    said = f"differ from the model card of {subject.published} by at most {apart:.2g}"
    if apart <= CLOSE:
        return Finding("similarities", "ok", said, measured=apart)
    status: Status = "warning" if apart <= QUANTIZED else "failure"
    return Finding(
        "similarities",
        status,
        said,
        "Quantized weights have that effect."
        if status == "warning"
        else "These are not the vectors of the published model: texts rank differently.",
        "See the findings above. Otherwise load the published weights in bfloat16, or serve a "
        "fine-tuned model under a name of its own.",
        apart,
    )


async def reference(subject: Subject) -> Finding:
    """Check that vectors equal those of sentence-transformers, run here in float32."""
    from qwen3_embeddings.engines.sentence_transformers import ReferenceEngine

    if subject.reference is None:
        raise CannotTellError("no --reference was passed")
    texts: list[Prompt] = [*TEXTS, *(instruct(subject.instruction, text) for text in TEXTS)]
    yardstick = ReferenceEngine(subject.reference, dtype="float32")
    try:
        expected = await yardstick.embed(texts, None, False)
    finally:
        await yardstick.close()
    rows = await subject.rows(*texts)
    if rows.shape != expected.shape:
        apart, said = 2.0, f"{rows.shape[1]} dimensions; the reference has {expected.shape[1]}"
    else:
        apart = distance(rows, expected)
        said = f"differs from {subject.reference} in float32 by at most 1-cos = {apart:.2g}"
    status = graded(apart)
    if status == "ok":
        return Finding("reference", "ok", said, measured=apart)
    return Finding(
        "reference",
        status,
        said,
        "Quantized weights have that effect. Do not mix these vectors with others in one index."
        if status == "warning"
        else "These are not the checkpoint's vectors, or it is quantized so far that texts rank "
        "differently.",
        "See the findings above. Serve the same weights, unquantized or in more bits.",
        apart,
    )
