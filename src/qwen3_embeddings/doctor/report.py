"""What the doctor found: typed, for a person and for a machine."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qwen3_embeddings.engines.base import Served

Status = Literal["ok", "warning", "failure", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: name of the check.
        status: "ok"; "warning" (this package's vectors are usable, but something about the engine
            is worth knowing); "failure" (wrong vectors, or none); "skipped" (could not be told,
            and the message says why).
        message: what was seen.
        effect: what it does to search; empty when ok.
        remedy: the flag or setting that mends it; empty when ok.
    """

    check: str
    status: Status
    message: str
    effect: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All findings about one engine or server.

    Attributes:
        target: the server's base URL, or the model an engine in this process runs.
        served: what it serves; None when it could not be started or reached.
        findings: one a check, in the order of the checks.
    """

    target: str
    served: Served | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed; warnings are not failures."""
        return not any(finding.status == "failure" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types."""
        return {"ok": self.ok} | asdict(self)

    def to_text(self, width: int = 100) -> str:
        """The report as a table of at most `width` columns."""
        lines = [self.target, ""]
        for finding in self.findings:
            head = f"{finding.status:<9}{finding.check:<16}"
            lines += _wrap(head, finding.message, width)
            for name in ("effect", "remedy"):
                if value := getattr(finding, name):
                    lines += _wrap(" " * 25 + f"{name}: ", value, width)
        counts = [f"{self._count(status)} {status}" for status in ("failure", "warning", "skipped")]
        verdict = "right" if self.ok else "WRONG"
        return "\n".join([*lines, "", f"{verdict}: {self._count('ok')} ok, {', '.join(counts)}"])

    def __str__(self) -> str:
        return self.to_text()

    def _count(self, status: Status) -> int:
        return sum(finding.status == status for finding in self.findings)


def _wrap(head: str, text: str, width: int) -> list[str]:
    indent = " " * len(head)
    return textwrap.wrap(
        text, max(width, 60), initial_indent=head, subsequent_indent=indent, break_on_hyphens=False
    )
