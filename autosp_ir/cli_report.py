"""The commands that show a recorded run, and what `opt` records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from autosp_ir.errors import AutoSPError

if TYPE_CHECKING:
    from autosp_ir.pipeline.instrument import Instrument
    from autosp_ir.pipeline.trace import Trace

TraceFile = Annotated[Path | None, typer.Option("--trace", help="Record the run to this file, for `autosp-ir report`.")]
ShowDiff = Annotated[bool, typer.Option("--diff", help="Show on stderr what each pass did, line by line.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command()(report)


def instruments_for(trace: Path | None, diff: bool) -> list[Instrument]:
    """What `opt` has to run with."""
    from autosp_ir import instruments

    found: list[Instrument] = []
    if trace is not None:
        found.append(instruments.Recorder())
    if diff:
        found.append(instruments.Diff(Console(stderr=True)))
    return found


def save_trace(trace: Trace, path: Path | None) -> None:
    """Write the recording, if one was asked for."""
    if path is not None:
        trace.save(path)


def report(
    run: Annotated[Path, typer.Argument(help="A file written by `autosp-ir opt --trace`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file, or .json for a Chrome trace.")] = Path(
        "report.html"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Write a recorded run as one HTML file that opens without a network."""
    import json

    from autosp_ir.pipeline.trace import Trace

    if not run.is_file():
        raise AutoSPError(f"there is no file {run}", hint="write one with `autosp-ir opt … --trace run.json`")
    trace = Trace.load(run)
    written = trace.chrome(output) if output.suffix == ".json" else trace.report(output)
    facts = {"path": str(written), "bytes": written.stat().st_size, "passes": [r.name for r in trace]}
    facts["rewrites"] = sum(len(r.rewrites) for r in trace)
    shown = json.dumps(facts) if as_json else f"{facts['rewrites']} rewrites written to {written}"
    sys.stdout.write(shown + "\n")


__all__ = ["ShowDiff", "TraceFile", "instruments_for", "register", "report", "save_trace"]
