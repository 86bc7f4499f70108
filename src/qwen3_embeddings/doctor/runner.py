"""One examination: start the engine, run every check, report."""

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


async def examine(
    engine: Engine,
    *,
    model: str | None,
    dimensions: int | None,
    instruction: str,
    reference: str | None,
) -> Report:
    """The report on `engine`; the arguments are those of `Subject`."""
    target = str(getattr(engine, "base_url", None) or model)
    try:
        served = await engine.start()
    except Qwen3EmbeddingsError as error:
        return Report(target, None, (_broken("reachable", error),))
    subject = Subject(engine, served, model, dimensions, instruction, reference)
    findings = [Finding("reachable", "ok", f"{served.engine} engine, {served.model}")]
    for name, check in CHECKS.items():
        pooled = any(f.check == "pooling" and f.status == "failure" for f in findings)
        # Vectors of the first token show no later change.
        if name in {"unaltered", "context"} and pooled:
            findings.append(Finding(name, "skipped", "cannot be told before pooling is mended"))
            continue
        try:
            findings.append(await check(subject))
        except CannotTellError as reason:
            findings.append(Finding(name, "skipped", str(reason)))
        except Qwen3EmbeddingsError as error:
            findings.append(_broken(name, error))
    return Report(target, served, tuple(findings))


def _broken(check: str, error: Qwen3EmbeddingsError) -> Finding:
    """The finding of a check that got an error in place of vectors, which names the way out."""
    effect = "There are no vectors, for this or for anything that does the same."
    return Finding(check, "failure", str(error), effect, "See the end of the message.")
