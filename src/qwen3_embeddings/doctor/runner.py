"""Run every check on one engine and collect the findings in a report."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from qwen3_embeddings.doctor import known, pooling, rows, server, sizes, texts
from qwen3_embeddings.doctor.report import Finding, Report
from qwen3_embeddings.doctor.subject import CannotTellError, Subject
from qwen3_embeddings.engines.base import Engine
from qwen3_embeddings.errors import Qwen3EmbeddingsError

CHECKS: dict[str, Callable[[Subject], Awaitable[Finding]]] = {
    "model": sizes.model,
    "finite": rows.finite,
    "unit length": rows.unit_length,
    "precision": rows.precision,
    "repeatable": rows.repeatable,
    "batch": rows.batch,
    "end token": pooling.end_token,
    "pooling": pooling.pooling,
    "unaltered": texts.unaltered,
    "token ids": texts.token_ids,
    "matryoshka": sizes.matryoshka,
    "similarities": known.similarities,
    "reference": known.reference,
    "context": texts.context,
    "wire formats": server.wire_formats,
    "authentication": server.authentication,
}
"""Every check by its name, in the order of the report."""

NEED_LAST_TOKEN = {"unaltered", "context"}
"""Checks that are skipped if pooling failed: a first token's vector shows no later change."""


async def examine(
    engine: Engine,
    *,
    model: str | None,
    dimensions: int | None,
    instruction: str,
    reference: str | None,
) -> Report:
    """Run every check on `engine` and return the report.

    An engine that fails is reported, not raised. The arguments are those of `Subject`.
    """
    target = str(getattr(engine, "base_url", None) or model)
    try:
        served = await engine.start()
    except Qwen3EmbeddingsError as error:
        return Report(target, None, (_broken("reachable", error),))
    subject = Subject(engine, served, model, dimensions, instruction, reference)
    findings = [Finding("reachable", "ok", f"{served.engine} engine, {served.model}")]
    for name, check in CHECKS.items():
        failed = {finding.check for finding in findings if finding.status == "failure"}
        if name in NEED_LAST_TOKEN and "pooling" in failed:
            findings.append(Finding(name, "skipped", "cannot be checked until pooling is fixed"))
            continue
        try:
            findings.append(await check(subject))
        except CannotTellError as reason:
            findings.append(Finding(name, "skipped", str(reason)))
        except Qwen3EmbeddingsError as error:
            findings.append(_broken(name, error))
    return Report(target, served, tuple(findings))


def _broken(check: str, error: Qwen3EmbeddingsError) -> Finding:
    """Return the finding of a check that got an error instead of vectors."""
    effect = "No vectors are returned for this request, or for any like it."
    return Finding(check, "failure", str(error), effect, "The end of the message says what to do.")
