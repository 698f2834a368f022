"""Runs seeds in blocks, in processes that are replaced now and then, and keeps the record."""

from __future__ import annotations

import functools
import subprocess
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.collector import calm_collector
from tests.fuzz.cases import FINDING, Case, Outcome
from tests.fuzz.kinds import run
from tests.fuzz.record import Record

_BLOCK = 10
_BLOCKS_PER_PROCESS = 40

console = Console()
Ran = tuple[list[Outcome], float, str]


def calm_process() -> None:
    """Settings of a process that fuzzes."""
    warnings.simplefilter("ignore")
    calm_collector()
    code_version()


def run_block(kind: str, first: int, count: int) -> Ran:
    """Run consecutive seeds of a kind; returns how they ended, the processor time, and the code of this process."""
    started = time.process_time()
    outcomes = [run(Case(kind, seed)) for seed in range(first, first + count)]
    return outcomes, time.process_time() - started, code_version()


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
        running: list[tuple[tuple[str, int, int], Future[Ran]]] = []
        while True:
            while len(running) < 2 * workers and time.monotonic() < until and (block := next(left, None)):
                running.append((block, pool.submit(run_block, *block)))
            if not running:
                break
            block, future = running.pop(0)
            outcomes, seconds, code = _result(block, future)
            record.add(block[0], outcomes, seconds, code)
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
        workers, mp_context=get_context("spawn"), initializer=calm_process, max_tasks_per_child=_BLOCKS_PER_PROCESS
    )


def _result(block: tuple[str, int, int], future: Future[Ran]) -> Ran:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise SystemExit(
            f"a process died in {block[0]}:{block[1]} to {block[1] + block[2] - 1}: find the case with --replay"
        ) from error


@functools.cache
def code_version() -> str:
    """The commit that this process has imported, with a star when files differ from it."""
    git = ("git", "-C", str(Path(__file__).parent))
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    dirty = any(not line.endswith(".json") for line in changed.splitlines())
    return f"{commit or 'unknown'}{'*' if dirty else ''}"
