"""Chrome-trace JSON for Perfetto: passes and rewrites of a pipeline run, and one step's memory and communication."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autosp_ir.viz.recording import Recording, Stage

_PIPELINE, _STEP = 1, 2
_PASSES, _REWRITES = 1, 2
_OPERATIONS, _COMMUNICATION = 1, 2


def trace_events(recording: Recording) -> dict[str, Any]:
    """The run as Chrome-trace data.

    Process 1 is the pipeline, in real time. Process 2 is one step of the last program, where each operation takes one
    microsecond: its order is real, its times are not.
    """
    events = [*_names(), *_pipeline(recording)]
    if recording.stages:
        events += _step(recording)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace_events(recording: Recording, path: str | Path) -> Path:
    """Write `trace_events` to a file."""
    target = Path(path)
    target.write_text(json.dumps(trace_events(recording), separators=(",", ":")), encoding="utf-8")
    return target


def _names() -> Iterator[dict[str, Any]]:
    for process, name in ((_PIPELINE, "pipeline"), (_STEP, "one step (an operation is 1 µs)")):
        yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
    threads = {
        (_PIPELINE, _PASSES): "passes",
        (_PIPELINE, _REWRITES): "rewrites",
        (_STEP, _OPERATIONS): "operations",
        (_STEP, _COMMUNICATION): "communication",
    }
    for (process, thread), name in threads.items():
        yield {"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": name}}


def _slice(process: int, thread: int, name: str, start: float, length: float, args: dict[str, Any]) -> dict[str, Any]:
    """A complete event; times in microseconds."""
    return {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "name": name,
        "ts": round(start, 3),
        "dur": round(max(length, 0.001), 3),
        "args": args,
    }


def _pipeline(recording: Recording) -> Iterator[dict[str, Any]]:
    for stage in recording.stages[1:]:
        args = {"pass": stage.text, "modified": stage.modified, "stage": stage.stage, **stage.statistics}
        yield _slice(_PIPELINE, _PASSES, stage.name, stage.start * 1e6, stage.seconds * 1e6, args)
        yield from _rewrites(stage)


def _rewrites(stage: Stage) -> Iterator[dict[str, Any]]:
    free = stage.start
    for number, delta in enumerate(stage.rewrites, start=1):
        # One lane holds no overlapping slices: two rewriters of a pass may work in turns.
        start = max(delta.at - delta.ms / 1e3, free)
        free = max(delta.at, start)
        counts = {"removed": len(delta.removed), "placed": len(delta.placed), "changed": len(delta.changed)}
        name = f"{stage.name} {number}"
        args = {"rule": delta.rule, **counts}
        yield _slice(_PIPELINE, _REWRITES, name, start * 1e6, (free - start) * 1e6, args)


def _step(recording: Recording) -> Iterator[dict[str, Any]]:
    last = recording.stages[-1]
    lines = recording.program(len(recording.stages) - 1)
    for position, line in enumerate(lines):
        if line.op not in ("placeholder", "output"):
            args: dict[str, Any] = {"value": line.name, "type": line.type, "module": line.module, "phase": line.phase}
            yield _slice(_STEP, _OPERATIONS, line.op, position, 1, args)
    for each in last.communication:
        args = {"value": each.name, "axis": each.axis, "ranks": each.size, "bytes": each.bytes, "phase": each.phase}
        yield _slice(_STEP, _COMMUNICATION, each.op, each.position, 1, args)
    for position, live in enumerate(last.memory):
        yield {"ph": "C", "pid": _STEP, "name": "memory", "ts": position, "args": {"bytes": live}}


__all__ = ["trace_events", "write_trace_events"]
