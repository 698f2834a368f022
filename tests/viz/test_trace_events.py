"""Chrome traces: the fields that Perfetto reads, and slices that do not overlap within a lane."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from tests.viz.recorded import llama_result


def test_the_trace_has_passes_rewrites_and_one_step(tmp_path: Path) -> None:
    trace = llama_result().trace
    data = json.loads(trace.chrome(tmp_path / "run.json").read_text())
    slices = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert [e["name"] for e in slices if (e["pid"], e["tid"]) == (1, 1)] == [r.name for r in trace]
    assert sum((e["pid"], e["tid"]) == (1, 2) for e in slices) == sum(len(s.rewrites) for s in trace.recording.stages)
    last = trace.recording.stages[-1]
    assert sum((e["pid"], e["tid"]) == (2, 2) for e in slices) == len(last.communication)
    assert sum(e["ph"] == "C" for e in data["traceEvents"]) == len(last.memory)
    named = {(e["pid"], e.get("tid")) for e in data["traceEvents"] if e["ph"] == "M"}
    assert {(e["pid"], e["tid"]) for e in slices} <= named


def test_slices_of_a_lane_follow_each_other(tmp_path: Path) -> None:
    data = json.loads(llama_result().trace.chrome(tmp_path / "run.json").read_text())
    ends: dict[tuple[int, int], float] = defaultdict(float)
    for event in data["traceEvents"]:
        if event["ph"] == "X":
            lane = event["pid"], event["tid"]
            assert event["ts"] >= ends[lane] - 0.01
            assert event["dur"] > 0
            ends[lane] = event["ts"] + event["dur"] - 0.001
