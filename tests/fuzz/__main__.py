"""Fuzz: `python -m tests.fuzz models=2000 tokens=8000 graphs=4000 layouts=6000 --record FILE --resume`."""

from __future__ import annotations

import subprocess
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.collector import calm_collector
from tests.fuzz.cases import FINDING, Case, Outcome
from tests.fuzz.kinds import KINDS, run, shrunk
from tests.fuzz.record import Record

_BLOCK = 10
_BLOCKS_PER_PROCESS = 40

console = Console()


def _start() -> None:
    warnings.simplefilter("ignore")
    calm_collector()


def run_block(kind: str, first: int, count: int) -> tuple[list[Outcome], float]:
    """Run consecutive seeds of a kind; returns how they ended, and the processor time."""
    started = time.process_time()
    return [run(Case(kind, seed)) for seed in range(first, first + count)], time.process_time() - started


def blocks(record: Record, wanted: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    """What is left to run, the kind that is furthest behind first."""
    done = {kind: record.kind(kind).done for kind in wanted}
    while behind := [kind for kind in wanted if done[kind] < wanted[kind]]:
        kind = min(behind, key=lambda k: done[k] / wanted[k])
        count = min(_BLOCK, wanted[kind] - done[kind])
        yield kind, done[kind], count
        done[kind] += count


def fuzz(record: Record, wanted: dict[str, int], path: Path | None, workers: int, minutes: float) -> None:
    """Run what is left, in order, and save after every block."""
    until = time.monotonic() + 60 * minutes
    left = blocks(record, wanted)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, _pool(workers) as pool:
        total = sum(wanted.values())
        bar = progress.add_task("cases", total=total, completed=min(total, record.totals()["cases"]))
        running: list[tuple[tuple[str, int, int], Future[tuple[list[Outcome], float]]]] = []
        while True:
            while len(running) < 2 * workers and time.monotonic() < until and (block := next(left, None)):
                running.append((block, pool.submit(run_block, *block)))
            if not running:
                break
            block, future = running.pop(0)
            outcomes, seconds = _result(block, future)
            record.add(block[0], outcomes, seconds, code_version())
            totals = record.totals()
            progress.update(
                bar,
                completed=totals["cases"],
                description=f"{totals['refused']} refused, {totals['findings']} findings",
            )
            for outcome in outcomes:
                if outcome.verdict == FINDING:
                    progress.console.print(f"[red]{outcome.case}[/] {outcome.reason}", soft_wrap=True)
            if path is not None:
                record.save(path)


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start, max_tasks_per_child=_BLOCKS_PER_PROCESS
    )


def _result(block: tuple[str, int, int], future: Future[tuple[list[Outcome], float]]) -> tuple[list[Outcome], float]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise SystemExit(
            f"a process died in {block[0]}:{block[1]} to {block[1] + block[2] - 1}: find the case with --replay"
        ) from error


def code_version() -> str:
    """The commit that runs, with a star when files differ from it."""
    git = ("git", "-C", str(Path(__file__).parent))
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    dirty = any(not line.endswith(".json") for line in changed.splitlines())
    return f"{commit or 'unknown'}{'*' if dirty else ''}"


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
    _start()
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
