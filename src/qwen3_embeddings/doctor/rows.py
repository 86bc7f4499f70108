"""Checks of raw rows: finite, of unit length, precise, and equal from call to call."""

from __future__ import annotations

import numpy as np

from qwen3_embeddings.doctor.compare import distance, graded
from qwen3_embeddings.doctor.report import Finding
from qwen3_embeddings.doctor.subject import TEXTS, Subject
from qwen3_embeddings.prompts import instruct

FEW = 256
"""Distinct values that eight bits can represent. Rows in bfloat16 have over 1,000."""


async def finite(subject: Subject) -> Finding:
    """Check that no row contains NaN or infinity."""
    rows = await subject.rows(*TEXTS)
    bad = [TEXTS[i][:20] for i in np.flatnonzero(~np.isfinite(rows).all(axis=1))]
    if not bad:
        return Finding("finite", "ok", f"the vectors of {len(TEXTS)} texts are finite")
    return Finding(
        "finite",
        "failure",
        f"{len(bad)} of {len(TEXTS)} texts return NaN or infinity: {', '.join(map(repr, bad[:3]))}",
        "This package raises an error for such texts. Other clients index them, and no search "
        "finds them.",
        "Run the model with --dtype bfloat16 or float32, because float16 overflows. If it already "
        "does, the weights are damaged: download them again.",
        measured=float(len(bad)),
    )


async def unit_length(subject: Subject) -> Finding:
    """Check that rows are normalized."""
    rows = await subject.rows(*TEXTS)
    with np.errstate(invalid="ignore"):  # damaged bytes may be signalling NaN
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    worst = float(np.abs(lengths - 1).max())
    if worst < 1e-2:
        return Finding("unit length", "ok", "rows have length 1", measured=worst)
    return Finding(
        "unit length",
        "warning",
        f"rows have lengths from {lengths.min():.3g} to {lengths.max():.3g}; this package "
        "normalizes them",
        "Other clients rank by length if their index uses the dot product.",
        "vLLM: remove use_activation=false from --pooler-config; llama.cpp: --embd-normalize 2.",
        worst,
    )


async def precision(subject: Subject) -> Finding:
    """Check that rows hold more distinct values than eight bits can represent."""
    rows = await subject.rows(*TEXTS)
    distinct = len(np.unique(rows))
    said = f"{distinct} distinct values among {rows.size}"
    if distinct > min(FEW, rows.size // 4):
        return Finding("precision", "ok", said, measured=float(distinct))
    return Finding(
        "precision",
        "warning",
        f"{said}: vectors are rounded, or contain only signs",
        "Similar texts cannot be ranked. Do not mix these vectors with others in one index.",
        "Configure the server or gateway to return float32, not int8 or binary vectors.",
        float(distinct),
    )


async def repeatable(subject: Subject) -> Finding:
    """Check that a text has the same vector in every call."""
    text = instruct(subject.instruction, TEXTS[2])
    first = await subject.rows(text)
    worst = max([distance(first, await subject.rows(text)) for _ in range(5)])
    status = graded(worst)
    if status == "ok":
        said = f"six calls differ by at most 1-cos = {worst:.1g}"
        return Finding("repeatable", "ok", said, measured=worst)
    return Finding(
        "repeatable",
        status,
        f"six calls with one text differ by 1-cos = {worst:.2g}",
        "Search results change from call to call.",
        "Check that every replica behind the URL serves the same weights with the same flags.",
        worst,
    )


async def batch(subject: Subject) -> Finding:
    """Check that a text has the same vector alone and in a batch."""
    together = await subject.rows(*TEXTS)
    alone = np.concatenate([await subject.rows(text) for text in TEXTS])
    worst = distance(together, alone)
    status = graded(worst)
    if status == "ok":
        said = f"alone and in a batch, texts differ by at most 1-cos = {worst:.1g}"
        return Finding("batch", "ok", said, measured=worst)
    return Finding(
        "batch",
        status,
        f"alone and in a batch of {len(TEXTS)}, texts differ by up to 1-cos = {worst:.2g}",
        "Documents are sent in batches and queries alone, so equal texts do not match.",
        "The server mixes up rows, or pads without a mask. Send one text per request "
        "(batch_size=1), and report this to the server's authors.",
        worst,
    )
