"""A diagnosis as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from autosp_ir.doctor.findings import Diagnosis, Failure, RankFinding, Verdict

_STYLES = {
    Verdict.EXACT: "green",
    Verdict.EXACT_WITH_GATHERS: "yellow",
    Verdict.REFUSED: "magenta",
    Verdict.WRONG: "bold red",
    Verdict.CRASH: "bold red",
}
_GATHERS_SHOWN = 20


def tables(diagnosis: Diagnosis) -> Iterator[Table | Text]:
    """What to print of a diagnosis: operations by family, gathers, the verdicts, and failures in full.

    Args:
        diagnosis: What to show; families and gathers are those of the largest number of ranks that got so far.
    """
    reached = max((f for f in diagnosis.findings if f.families), key=lambda f: f.ranks, default=None)
    if reached is not None:
        yield _families(reached)
        if reached.gathers:
            yield _gathers(reached)
    yield _verdicts(diagnosis)
    yield from _failures(diagnosis)


def _families(finding: RankFinding) -> Table:
    table = _table(f"Operations that depend on the batch, {finding.ranks} ranks", "family")
    for column in ("cut", "gathered", "whole", "bytes gathered"):
        table.add_column(column, justify="right")
    for row in finding.families:
        numbers = (row.cut, row.gathered, row.whole, row.bytes)
        table.add_row(row.family, *(f"{n:,}" if n else "" for n in numbers))
    return table


def _gathers(finding: RankFinding) -> Table:
    table = _table(f"What reads gathered tokens ({finding.gathered_bytes:,} bytes in all)", "operation")
    table.add_column("family")
    table.add_column("bytes", justify="right")
    table.add_column("source", overflow="fold")
    for gather in finding.gathers[:_GATHERS_SHOWN]:
        table.add_row(gather.operation, gather.family, f"{gather.bytes:,}", escape(gather.source or ""))
    more = len(finding.gathers) - _GATHERS_SHOWN
    if more > 0:
        table.add_row(f"… and {more} more", "", "", "")
    return table


def _verdicts(diagnosis: Diagnosis) -> Table:
    table = _table(f"{diagnosis.model}, {diagnosis.parameters:,} parameters", "ranks")
    for column in ("verdict", "spread", "largest error"):
        table.add_column(column)
    table.add_column("why", overflow="fold")
    for finding in diagnosis.findings:
        style = _STYLES[finding.verdict]
        spread = "" if finding.spread is None else f"{finding.spread:.0%}"
        error = "" if finding.error is None else f"{finding.error:.1e}"
        verdict = f"[{style}]{finding.verdict}[/{style}]"
        table.add_row(str(finding.ranks), verdict, spread, error, escape(finding.reason))
    return table


def _failures(diagnosis: Diagnosis) -> Iterator[Text]:
    """Every failure in full, once."""
    shown: set[Failure] = set()
    for finding in diagnosis.findings:
        failure = finding.failure
        if failure is None or failure in shown:
            continue
        shown.add(failure)
        parts = [failure.reason, failure.context or "", f"What you can do: {failure.hint}" if failure.hint else ""]
        yield Text(f"\n{finding.ranks} ranks: " + "\n".join(part for part in parts if part), no_wrap=False)


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    return table


__all__ = ["tables"]
