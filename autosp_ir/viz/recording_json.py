"""Recordings as JSON: columns instead of objects, and every long string once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from autosp_ir.errors import AutoSPError
from autosp_ir.viz.recording import FORMAT, Collective, Delta, Line, RecordedLane, Recording, Stage

_PLAIN = ("key", "name", "args", "operands")
_SHARED = ("op", "type", "layout", "module", "source", "phase", "passes", "traits")


def encode(recording: Recording) -> dict[str, Any]:
    """The recording as JSON data; columns in `_SHARED` hold indices into `strings`."""
    strings: dict[str, int] = {}

    def shared(item: str | tuple[str, ...]) -> int:
        return strings.setdefault(item if isinstance(item, str) else " ".join(item), len(strings))

    columns: dict[str, list[Any]] = {name: [getattr(n, name) for n in recording.lines] for name in _PLAIN}
    columns |= {name: [shared(getattr(n, name)) for n in recording.lines] for name in _SHARED}
    stages = [_encode_stage(s, shared) for s in recording.stages]
    return {"format": FORMAT, "strings": list(strings), "lines": columns, "stages": stages}


def dumps(recording: Recording) -> str:
    """The recording as JSON text."""
    return json.dumps(encode(recording), ensure_ascii=False, separators=(",", ":"))


def loads(text: str) -> Recording:
    """The recording that `dumps` wrote.

    Raises:
        AutoSPError: It is no recording, or of another version.
    """
    hint = "pass a file that `autosp-ir opt --trace` or `result.trace.save` wrote"
    try:
        data = json.loads(text)
    except ValueError as error:
        raise AutoSPError(f"this is no recording: {error}", hint=hint) from error
    if not isinstance(data, dict) or "format" not in data:
        raise AutoSPError("this is no recording: it has no format", hint=hint)
    if data["format"] != FORMAT:
        raise AutoSPError(
            f"the recording has format {data['format']}, this version reads {FORMAT}",
            hint="record the pipeline again with this version",
        )
    try:
        return _decode(data)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise AutoSPError(f"the recording is damaged: {type(error).__name__}: {error}", hint=hint) from error


def _encode_stage(stage: Stage, shared: Callable[[str], int]) -> dict[str, Any]:
    rewrites = [
        [shared(d.rule), round(d.at, 6), round(d.ms, 4), d.removed, [i for pair in d.placed for i in pair], d.changed]
        for d in stage.rewrites
    ]
    communication = [list(asdict(c).values()) for c in stage.communication]
    plain = {k: getattr(stage, k) for k in ("name", "text", "stage", "mesh", "facts", "outputs", "modified")}
    return {
        **plain,
        "start": round(stage.start, 6),
        "seconds": round(stage.seconds, 6),
        "statistics": stage.statistics,
        "rewrites": rewrites,
        "lines": stage.lines,
        "matches": stage.matches,
        "memory": stage.memory,
        "communication": communication,
        "lanes": [[lane.name, lane.slices] for lane in stage.lanes],
    }


def _decode(data: dict[str, Any]) -> Recording:
    strings, columns = data["strings"], data["lines"]
    rows = zip(
        columns["key"],
        columns["name"],
        columns["args"],
        columns["operands"],
        *([strings[i] for i in columns[name]] for name in _SHARED),
        strict=True,
    )
    lines = [
        Line(
            key=key,
            name=name,
            args=args,
            operands=tuple(operands),
            op=op,
            type=kind,
            layout=layout,
            module=module,
            source=source,
            phase=phase,
            passes=tuple(passes.split()),
            traits=tuple(traits.split()),
        )
        for key, name, args, operands, op, kind, layout, module, source, phase, passes, traits in rows
    ]
    return Recording(lines, [_decode_stage(s, strings) for s in data["stages"]])


def _decode_stage(data: dict[str, Any], strings: list[str]) -> Stage:
    return Stage(
        name=data["name"],
        text=data["text"],
        stage=data["stage"],
        mesh=data["mesh"],
        facts=tuple(data["facts"]),
        outputs=tuple(data["outputs"]),
        modified=data["modified"],
        start=data["start"],
        seconds=data["seconds"],
        statistics=data["statistics"],
        rewrites=[_decode_delta(d, strings) for d in data["rewrites"]],
        lines=None if data["lines"] is None else tuple(data["lines"]),
        matches=tuple((b, a) for b, a in data["matches"]),
        memory=tuple(data["memory"]),
        communication=[Collective(*row) for row in data["communication"]],
        lanes=tuple(RecordedLane(name, tuple((n, b, t, k) for n, b, t, k in slices)) for name, slices in data["lanes"]),
    )


def _decode_delta(data: list[Any], strings: list[str]) -> Delta:
    rule, at, ms, removed, placed, changed = data
    return Delta(
        rule=strings[rule],
        at=at,
        ms=ms,
        removed=tuple(removed),
        placed=tuple(zip(placed[::2], placed[1::2], strict=True)),
        changed=tuple(changed),
    )


__all__ = ["dumps", "encode", "loads"]
