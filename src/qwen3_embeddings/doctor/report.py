"""Findings and reports of the doctor, as objects, JSON and text."""

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
        check: Name of the check.
        status: "ok", "warning" (this package's vectors are usable, but other clients may have a
            problem), "failure" (vectors are wrong or missing) or "skipped" (the check does not
            apply or cannot decide).
        message: What was measured or why the check was skipped.
        effect: Effect on search; empty unless the status is "warning" or "failure".
        remedy: What to change; empty unless the status is "warning" or "failure".
        measured: The value that the check compared with its limits, or None. docs/doctor.md
            defines it for each check.

    Example:
        >>> for finding in embedder.doctor().findings:
        ...     if finding.status == "failure":
        ...         print(finding.check, finding.remedy)
    """

    check: str
    status: Status
    message: str
    effect: str = ""
    remedy: str = ""
    measured: float | None = None


@dataclass(frozen=True)
class Report:
    """All findings about one engine or server.

    Attributes:
        target: The server's base URL, or the model that an engine in this process runs.
        served: What the engine serves; None if it could not be started or reached.
        findings: One finding per check, in the order of the checks.

    Example:
        >>> report = embedder.doctor()
        >>> report.ok
        True
        >>> [finding.check for finding in report.findings if finding.status == "warning"]
        ['authentication']
    """

    target: str
    served: Served | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed. Warnings are not failures."""
        return not any(finding.status == "failure" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the report in types that JSON can represent.

        Example:
            >>> print(json.dumps(report.to_dict(), indent=2))
        """
        return {"ok": self.ok} | asdict(self)

    def to_text(self, width: int = 100) -> str:
        """Return the report as a table for a terminal.

        Args:
            width: Largest line length in characters, at least 60.

        Example:
            >>> print(report.to_text(80))
        """
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
