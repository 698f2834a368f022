"""`Diff`: what each pass did to the program, as coloured lines in a terminal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.instrument import Instrument
from autosp_ir.pipeline.trace import PassRecord, Trace
from autosp_ir.rewrite.events import RewriteEvent
from autosp_ir.viz.matching import Row, compare
from autosp_ir.viz.recorder import Recorder
from autosp_ir.viz.recording import Line, Recording, Stage

_MARKS = {"same": " ", "changed": "~", "removed": "-", "added": "+", "moved": ">"}
_STYLES = {"same": "dim", "changed": "yellow", "removed": "red", "added": "green", "moved": "cyan"}


class Diff(Instrument):
    """Prints, after the run, what each pass removed, added, changed and moved.

    Lines are told apart by the node's identity; where a pass made a new graph, by structure. Renaming is no change.

    Args:
        console: Where to print; the standard output when None.
        context: Unchanged lines to show around changes.
        limit: Lines to show per pass; the rest is counted.
    """

    def __init__(self, console: Console | None = None, *, context: int = 2, limit: int = 200) -> None:
        self._console = console or Console()
        self._context = context
        self._limit = limit
        self._recorder = Recorder()

    def before_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        """Keep the input."""
        self._recorder.before_pipeline(program, passes)

    def before_pass(self, pass_: Pass, program: Program) -> None:
        """Start a pass."""
        self._recorder.before_pass(pass_, program)

    def on_rewrite(self, event: RewriteEvent) -> None:
        """Keep a rewrite."""
        self._recorder.on_rewrite(event)

    def after_pass(self, pass_: Pass, program: Program, record: PassRecord) -> None:
        """Keep what the pass left."""
        self._recorder.after_pass(pass_, program, record)

    def after_pipeline(self, program: Program, trace: Trace) -> None:
        """Print."""
        recording = self._recorder.recording()
        for number in range(1, len(recording.stages)):
            for line in render_diff(recording, number, context=self._context, limit=self._limit):
                self._console.print(line, soft_wrap=True)


def pass_rows(recording: Recording, stage: int) -> list[Row]:
    """The program before and after one pass, side by side."""
    made = recording.stages[stage]
    before, after = recording.program(stage - 1), recording.program(stage)
    return compare(before, after, made.matches if made.lines is not None else None)


def render_diff(recording: Recording, stage: int, *, context: int = 2, limit: int = 200) -> Iterator[Text]:
    """One pass's changes as lines for rich.

    Args:
        recording: A recorded run.
        stage: Index of the pass's stage.
        context: Unchanged lines around changes.
        limit: Most lines to show.
    """
    rows = pass_rows(recording, stage)
    yield _title(recording.stages[stage], rows)
    for number, row in enumerate(_near_changes(rows, context)):
        if number == limit:
            yield Text("      … more; write a report to see all", style="dim")
            return
        yield from _lines(row)


def _title(stage: Stage, rows: Iterable[Row]) -> Text:
    counts = Counter(row.kind for row in rows)
    moved = sum(row.kind == "moved" and row.after is not None for row in rows)
    text = Text(f"{stage.text}  ", style="bold")
    if not set(counts) - {"same"}:
        return text.append("no change", style="dim")
    for kind, count in (*((k, counts[k]) for k in ("added", "removed", "changed")), ("moved", moved)):
        if count:
            text.append(f"{_MARKS[kind]}{count} {kind}  ", style=_STYLES[kind])
    rewrites = f"{len(stage.rewrites)} rewrite{'' if len(stage.rewrites) == 1 else 's'}"
    return text.append(f"{rewrites}, {stage.seconds * 1e3:.0f} ms", style="dim")


def _near_changes(rows: Sequence[Row], context: int) -> Iterator[Row | None]:
    """Changed rows with their neighbours; None where rows are left out."""
    wanted = {
        near
        for index, row in enumerate(rows)
        if row.kind != "same"
        for near in range(max(0, index - context), min(len(rows), index + context + 1))
    }
    last = -1
    for index in sorted(wanted):
        if index != last + 1:
            yield None
        yield rows[index]
        last = index


def _lines(row: Row | None) -> Iterator[Text]:
    if row is None:
        yield Text("      ⋯", style="dim")
    elif row.kind == "changed" and row.before is not None and row.after is not None:
        yield _line("-", row.before, "red")
        yield _line("+", row.after, "green")
    elif row.kind == "moved":
        yield _line("<" if row.before is not None else ">", row.before or row.after, "cyan")
    else:
        yield _line(_MARKS[row.kind], row.after or row.before, _STYLES[row.kind])


def _line(mark: str, line: Line | None, style: str) -> Text:
    if line is None:
        return Text()
    place = " ".join(p for p in (os.path.basename(line.source), line.module) if p)
    text = Text(f"  {mark} {line.text}", style=style)
    return text.append(f"   # {place}", style="dim") if place else text


__all__ = ["Diff", "pass_rows", "render_diff"]
