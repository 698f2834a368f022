"""`autosp-ir opt`: run passes over a program, watch them, and find the one that is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from autosp_ir.cli_authoring import pass_manager
from autosp_ir.cli_io import load, read_mesh, read_source, write
from autosp_ir.cli_report import ShowDiff, TraceFile, instruments_for, save_trace
from autosp_ir.errors import PipelineError
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.instrument import Instrument, PrintIR, Statistics
from autosp_ir.pipeline.trace import PassRecord, Trace

if TYPE_CHECKING:
    from autosp_ir.pipeline.manager import PassResult

_WATCH = "Watch the passes"
_DEBUG = "Find a wrong pass"


def opt(
    program: Annotated[
        str | None,
        typer.Argument(help="IR file, config.json, or package.module:factory returning (model, batch)."),
    ] = None,
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="Passes by name, or a .toml or .json file.")] = "",
    mesh: Annotated[
        str | None, typer.Option("--mesh", help="Mesh axes, such as sp=4 or dp=2,sp=4; else the program's own.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the IR here, not to the screen.")] = None,
    strict: Annotated[bool, typer.Option(help="Refuse instead of running an operation replicated.")] = False,
    loads: Annotated[
        list[str] | None, typer.Option("--load", help="Module or Python file that registers passes; repeatable.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option("--skip", help="Pass to leave out, by name; repeatable.")] = None,
    time: Annotated[bool, typer.Option("--time", help="Show seconds by pass.", rich_help_panel=_WATCH)] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show counts, rules and operations by pass.", rich_help_panel=_WATCH)
    ] = False,
    remarks: Annotated[
        bool, typer.Option("--remarks", help="Show what was rewritten, not only what was not.", rich_help_panel=_WATCH)
    ] = False,
    trace: TraceFile = None,
    diff: ShowDiff = False,
    dump_dir: Annotated[
        Path | None, typer.Option("--dump-dir", help="Folder for the IR after each pass.", rich_help_panel=_WATCH)
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Verify after each pass.", rich_help_panel=_DEBUG)
    ] = True,
    timeout: Annotated[
        float | None, typer.Option("--timeout", help="Seconds that a pass may take.", rich_help_panel=_DEBUG)
    ] = None,
    reproducer: Annotated[
        Path | None,
        typer.Option("--reproducer", help="File or folder to write when a pass fails.", rich_help_panel=_DEBUG),
    ] = None,
    reproduce: Annotated[
        Path | None, typer.Option("--reproduce", help="Replay what a failing pass wrote.", rich_help_panel=_DEBUG)
    ] = None,
    bisect: Annotated[
        str | None,
        typer.Option(
            "--bisect",
            help="Find the first wrong rewrite: a command that gets an IR file and exits with 0 when it is good, "
            "125 when it cannot tell. Empty when the pipeline itself fails.",
            rich_help_panel=_DEBUG,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Run a pipeline over a program and print what became of it."""
    for source in loads or ():
        load(source)
    if reproduce is not None:
        _replay(reproduce, as_json)
        return
    if program is None or not pipeline:
        raise PipelineError("there is nothing to run", hint="give a program and --pipeline, or --reproduce FILE")
    source_program = read_source(program)
    axes = read_mesh(mesh) if mesh is not None else source_program.mesh or {"sp": 1}
    counted = Statistics()
    with _progress() as progress:
        instruments: list[Instrument] = [_Progress(progress), counted, *instruments_for(trace, diff)]
        if dump_dir is not None:
            instruments.append(PrintIR(dump_dir))
        manager = pass_manager(
            pipeline, verify=verify, instruments=instruments, skip=skip or (), timeout=timeout, reproducer=reproducer
        )
        if bisect is None:
            result = manager.run(source_program, mesh=axes, strict=strict)
    if bisect is not None:
        _bisect(manager.passes, source_program, bisect, axes, strict, verify, as_json)
        return
    save_trace(result.trace, trace)
    for remark in result.remarks:
        if remarks or remark.kind == "missed":
            sys.stderr.write(f"{remark}\n")
    if as_json:
        _write_json(result, counted, output)
        return
    write(result.program, output, as_json=False)
    console = Console(stderr=True)
    if time:
        console.print(_timings(result))
    if stats:
        console.print(_statistics(result))
        sys.stderr.write(f"{counted}\n")


class _Progress(Instrument):
    """Shows which pass is running."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def before_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        """Start the bar."""
        self._task = self._progress.add_task("", total=len(passes))

    def before_pass(self, pass_: Pass, program: Program) -> None:
        """Name the pass."""
        if self._task is not None:
            self._progress.update(self._task, description=f"{pass_.name}, {len(program.graph)} nodes")

    def after_pass(self, pass_: Pass, program: Program, record: PassRecord) -> None:
        """Step on."""
        if self._task is not None:
            self._progress.advance(self._task)

    def after_pipeline(self, program: Program, trace: Trace) -> None:
        """Say that it is done."""
        if self._task is not None:
            self._progress.update(self._task, description="done")


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _replay(path: Path, as_json: bool) -> None:
    """Exit with 1 when it fails as written down, with 3 when it fails differently, else with 0."""
    from autosp_ir.pipeline.replay import reproduce

    replay = reproduce(path)
    if as_json:
        fails = replay.error is not None
        told = {"fails": fails, "same": replay.same, "pass": replay.expected.pass_name, "message": str(replay)}
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
    else:
        (sys.stderr if replay.error is not None else sys.stdout).write(f"{replay}\n")
    if replay.error is not None:
        raise typer.Exit(1 if replay.same else 3)


def _bisect(
    passes: Sequence[Pass],
    program: Program,
    command: str,
    mesh: dict[str, int],
    strict: bool,
    verify: bool,
    as_json: bool,
) -> None:
    from autosp_ir.pipeline.bisect import bisect, command_judge

    judge = command_judge(command) if command else None
    found = bisect(list(passes), program, judge, mesh=mesh, strict=strict, verify=verify)
    sys.stdout.write((json.dumps(found.to_dict(), indent=2) if as_json else str(found)) + "\n")


def _timings(result: PassResult) -> Table:
    table = Table("pass", "ms", "modified", "rewrites", title="time")
    for record in result.trace:
        modified = "yes" if record.modified else "no"
        table.add_row(record.text, f"{record.seconds * 1e3:.1f}", modified, str(len(record.rewrites)))
    table.add_row("all", f"{sum(r.seconds for r in result.trace) * 1e3:.1f}", "", "")
    return table


def _statistics(result: PassResult) -> Table:
    table = Table("pass", "what", "count", "tries", "ms", title="statistics")
    for name, counts in result.statistics.items():
        rules = result.rules.get(name, {})
        for key, count in counts.items():
            if key not in rules:
                table.add_row(name, key, str(count), "", "")
        for rule, done in rules.items():
            table.add_row(name, rule, str(done.hits), str(done.tries), f"{done.ms:.1f}")
    return table


def _write_json(result: PassResult, counted: Statistics, output: Path | None) -> None:
    report: dict[str, Any] = {
        "passes": [
            {"pass": r.text, "modified": r.modified, "seconds": r.seconds, "rewrites": len(r.rewrites)}
            for r in result.trace
        ],
        "statistics": result.statistics,
        "rules": {
            name: {rule: {"tries": s.tries, "hits": s.hits, "ms": s.ms} for rule, s in rules.items()}
            for name, rules in result.rules.items()
        },
        "operations": [{"pass": name, "changes": change} for name, change in counted.changes],
        "remarks": [vars(remark) for remark in result.remarks],
    }
    if output is None:
        report["program"] = json.loads(result.program.to_json())
    else:
        output.write_text(f"{result.program}\n", encoding="utf-8")
        report["output"] = str(output)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


__all__ = ["opt"]
