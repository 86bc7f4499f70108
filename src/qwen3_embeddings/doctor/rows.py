"""Checks of the rows as such: finite, of unit length, precise, the same at every call."""

from __future__ import annotations

import numpy as np

from qwen3_embeddings.doctor.compare import SAME, distance
from qwen3_embeddings.doctor.report import Finding
from qwen3_embeddings.doctor.subject import TEXTS, Subject
from qwen3_embeddings.prompts import instruct

FEW = 256
"""Different numbers in all rows together that eight bits can hold; bfloat16 gives over 1000."""


async def finite(subject: Subject) -> Finding:
    """No NaN or infinity."""
    rows = await subject.rows(*TEXTS)
    bad = [TEXTS[i][:20] for i in np.flatnonzero(~np.isfinite(rows).all(axis=1))]
    if not bad:
        return Finding("finite", "ok", f"{len(TEXTS)} texts give finite numbers")
    return Finding(
        "finite",
        "failure",
        f"{len(bad)} of {len(TEXTS)} texts give NaN or infinity: {', '.join(map(repr, bad[:3]))}",
        "This package refuses such texts; other clients index them, and no search finds them.",
        "Run the model in --dtype bfloat16 or float32: float16 overflows. Else the weights are "
        "broken: download them again.",
    )


async def unit_length(subject: Subject) -> Finding:
    """Rows come normalised."""
    rows = await subject.rows(*TEXTS)
    with np.errstate(invalid="ignore"):  # garbage bytes may be signalling NaN
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    if np.abs(lengths - 1).max() < 1e-2:
        return Finding("unit length", "ok", "rows have length 1")
    return Finding(
        "unit length",
        "warning",
        f"rows have length {lengths.min():.3g} to {lengths.max():.3g}; normalised here",
        "Other clients of it rank by length, where their index uses the dot product.",
        "vLLM: no use_activation=false in --pooler-config; llama.cpp: --embd-normalize 2.",
    )


async def precision(subject: Subject) -> Finding:
    """Rows hold more than a few different numbers."""
    rows = await subject.rows(*TEXTS)
    different = len(np.unique(rows))
    said = f"{rows.size} numbers, {different} of them different"
    if different > min(FEW, rows.size // 4):
        return Finding("precision", "ok", said)
    return Finding(
        "precision",
        "warning",
        f"{said}: vectors are rounded, or hold signs only",
        "Texts close to each other cannot be ranked; do not mix these vectors with others.",
        "Have the server or the gateway return float32, not int8 or binary vectors.",
    )


async def repeatable(subject: Subject) -> Finding:
    """The same text gives the same vector at every call."""
    text = instruct(subject.instruction, TEXTS[2])
    first = await subject.rows(text)
    worst = max([distance(first, await subject.rows(text)) for _ in range(5)])
    if worst <= SAME:
        return Finding("repeatable", "ok", f"six calls differ by 1-cos = {worst:.1g} at most")
    return Finding(
        "repeatable",
        "failure",
        f"six calls with one text differ by 1-cos = {worst:.2g}",
        "Queries meet documents of other vectors: results change from call to call.",
        "Check that every replica behind the URL serves the same weights with the same flags.",
    )


async def batch(subject: Subject) -> Finding:
    """A text alone equals the same text in a batch."""
    together = await subject.rows(*TEXTS)
    alone = np.concatenate([await subject.rows(text) for text in TEXTS])
    worst = distance(together, alone)
    if worst <= SAME:
        return Finding("batch", "ok", f"alone and in a batch differ by 1-cos = {worst:.1g} at most")
    return Finding(
        "batch",
        "failure",
        f"alone and in a batch of {len(TEXTS)} texts differ by 1-cos = {worst:.2g}",
        "Documents come in batches and queries alone: equal texts do not match.",
        "The server mixes up rows, or pads without a mask. Send one text a request "
        "(batch_size=1), and report it to the server's authors.",
    )
