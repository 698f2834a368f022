"""Traces from files."""

from __future__ import annotations

from pathlib import Path

from autosp_ir.pipeline.trace import PassRecord, Trace
from autosp_ir.rewrite.events import RewriteEvent
from autosp_ir.viz.recording import Delta, Recording, Stage


def load_trace(path: str | Path) -> Trace:
    """The trace that `Trace.save` wrote.

    Raises:
        AutoSPError: The file is no recording, or of another version.
    """
    recording = Recording.load(path)
    known: set[int] = {recording.lines[i].key for i in recording.stages[0].lines or ()} if recording.stages else set()
    trace = Trace([_record(stage, recording, known) for stage in recording.stages[1:]])
    trace.attach(lambda: recording)
    return trace


def _record(stage: Stage, recording: Recording, known: set[int]) -> PassRecord:
    rewrites = [_event(stage.name, delta, recording, known) for delta in stage.rewrites]
    known.update(recording.lines[i].key for i in stage.lines or ())
    return PassRecord(
        stage.name, stage.text, stage.modified, stage.seconds, statistics=dict(stage.statistics), rewrites=rewrites
    )


def _event(pass_name: str, delta: Delta, recording: Recording, known: set[int]) -> RewriteEvent:
    placed = [recording.lines[i].key for i, _ in delta.placed]
    moved = tuple(k for k in placed if k in known)
    created = tuple(k for k in placed if k not in known)
    known.update(created)
    changed = tuple(recording.lines[i].key for i in delta.changed)
    return RewriteEvent(pass_name, delta.rule, delta.removed, created, (*changed, *moved), delta.ms, moved)
