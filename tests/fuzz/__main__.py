"""Fuzz: `python -m tests.fuzz models=2000 tokens=4000 graphs=4000 layouts=10000 --record FILE --resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tests.fuzz.cases import FINDING, Case
from tests.fuzz.kinds import KINDS, run, shrunk
from tests.fuzz.record import Record
from tests.fuzz.session import calm_process, code_version, console, fuzz


def replay(text: str, shrink: bool) -> None:
    """Run one case, print how it ended, and look for a smaller one that ends alike."""
    case = Case.parse(text)
    outcome = run(case)
    if shrink and outcome.verdict == FINDING:
        outcome = shrunk(case, outcome)
    console.print(f"{outcome.case}: {outcome.verdict} {outcome.reason}", soft_wrap=True, markup=False)
    console.print(outcome.details, soft_wrap=True, markup=False, highlight=False)
    raise typer.Exit(outcome.verdict == FINDING)


def main(
    counts: Annotated[list[str] | None, typer.Argument(help=f"KIND=CASES; kinds: {', '.join(KINDS)}.")] = None,
    record_path: Annotated[Path | None, typer.Option("--record", help="Summary, written after every block.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on behind the seeds of the record.")] = False,
    recheck: Annotated[bool, typer.Option(help="Run the findings of the record again first.")] = False,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    minutes: Annotated[float, typer.Option(help="Start no further case behind this.")] = 60 * 24 * 7,
    one: Annotated[str | None, typer.Option("--replay", help="Run one case, such as models:12.")] = None,
    shrink: Annotated[bool, typer.Option(help="Shrink the replayed case.")] = True,
) -> None:
    """Run seeded cases of every kind: exact, refused by a named error, or a finding."""
    calm_process()
    if one is not None:
        replay(one, shrink)
    if record_path is not None and record_path.exists() and not resume:
        raise typer.BadParameter(f"{record_path} exists: pass --resume to go on from it, or remove it")
    record = Record.load(record_path) if record_path is not None and record_path.exists() else Record()
    wanted = {k: int(n) for k, _, n in (c.partition("=") for c in counts or ())}
    if unknown := set(wanted) - set(KINDS):
        raise typer.BadParameter(f"no kind is called {sorted(unknown)}; kinds are {', '.join(KINDS)}")
    if counts:
        record.command = f"python -m tests.fuzz {' '.join(counts)} --record {record_path} --resume"
    for finding in list(record.findings) if recheck else ():
        record.recheck(finding, run(Case.parse(finding["case"])), code_version())
    fuzz(record, wanted, record_path, workers, minutes)
    if record_path is not None:
        record.save(record_path)
    console.print(record.totals())
    raise typer.Exit(bool(record.findings))


if __name__ == "__main__":
    typer.run(main)
