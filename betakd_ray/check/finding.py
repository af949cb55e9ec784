"""Findings of the checks: what was seen, what was expected, and the verdict; as a table, as JSON and as one error."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from betakd_ray.errors import ModelUnfit

Verdict = Literal["ok", "doubt", "fail", "skipped"]
"""`fail` stops the job, `doubt` is a warning, `skipped` says why a check could not be made."""

CAUSES = (
    "identity",
    "canaries",
    "vocabulary",
    "weights",
    "parity",
    "batching",
    "settings",
    "template",
    "sight",
    "alignment",
)
"""Checks, the ones that explain others first: a tower without weights is also blind, and then knows no answers."""
_STYLES = {"ok": "green", "doubt": "yellow", "fail": "bold red", "skipped": "dim"}


@dataclass(frozen=True)
class Finding:
    """Result of one check of one model."""

    check: str
    """Name of the check; one of `CAUSES`."""
    seen: str
    expected: str
    verdict: Verdict
    cause: str = ""
    """Likely cause; empty if the verdict is ok."""
    remedy: str = ""
    """What to do."""
    part: str = "teacher"
    """Model that was checked: teacher or student."""

    def __str__(self) -> str:
        """Return the finding as one sentence of an error or a warning: the likely cause first."""
        cause = f"{self.cause} — " if self.cause else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{self.part}, {self.check}: {cause}seen: {self.seen}; expected: {self.expected}.{remedy}"


def as_table(findings: Iterable[Finding]) -> Table:
    """Return the findings as a table for a terminal."""
    table = Table("model", "check", "seen", "expected", "verdict")
    for each in findings:
        seen = f"{each.seen} ({each.cause})" if each.cause else each.seen
        verdict = f"[{_STYLES[each.verdict]}]{each.verdict}[/]"
        table.add_row(each.part, each.check, escape(seen), escape(each.expected), verdict)
    return table


def as_records(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Return the findings as JSON takes them; `Finding(**record)` gives a finding back."""
    return [asdict(each) for each in findings]


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Return the failed findings, the most likely cause of the others first."""
    return sorted((each for each in findings if each.verdict == "fail"), key=lambda each: _rank(each.check))


def doubts(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that are warnings."""
    return [each for each in findings if each.verdict == "doubt"]


def require_fit(findings: Sequence[Finding]) -> None:
    """Raise ModelUnfit if a finding failed; its message has every failure, the likely cause first."""
    failed = failures(findings)
    if not failed:
        return
    first, *others = failed
    lines = [str(first), *(f"  also {each}" for each in others)]
    model = f"the {first.part}" if len({each.part for each in failed}) == 1 else "the models"
    lines.append(f"If {model} should be used as it is, set teacher.check: off; the model card will say so.")
    raise ModelUnfit("\n".join(lines))


def _rank(check: str) -> int:
    return CAUSES.index(check) if check in CAUSES else len(CAUSES)
