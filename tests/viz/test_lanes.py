"""Lanes of a step: what is estimated, what a profile says, and the same picture for both."""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

import autosp_ir as air
from autosp_ir.viz.lanes import (
    Lane,
    Slice,
    exposed_seconds,
    kernel_kind,
    lanes_svg,
    lanes_trace,
    measured_lanes,
    predicted_lanes,
)
from tests.models import build

_PIPELINE = f"{air.DEFAULT_PIPELINE},overlap{{device=cpu link=network-400g memory=4.0 gradients=own}}"


@functools.cache
def lanes() -> tuple[Lane, ...]:
    model, batch = build("plain", length=16)
    program = air.PassManager(_PIPELINE).run(air.capture(model, batch), mesh={"sp": 2}).program
    return tuple(predicted_lanes(program, "cpu", "network-400g"))


def test_there_is_a_lane_for_compute_and_for_each_stream() -> None:
    assert [lane.name for lane in lanes()] == ["compute", "sp", "sp:gradients"]
    kinds = {s.kind for lane in lanes() for s in lane.slices}
    assert kinds == {"attention", "product", "other", "communication", "stall"}


def test_slices_of_the_compute_lane_do_not_overlap() -> None:
    slices = lanes()[0].slices
    for a, b in pairwise(slices):
        assert a.begin + a.seconds <= b.begin + 1e-12


def test_what_is_exposed_is_what_the_estimate_calls_stalled() -> None:
    stalled = sum(s.seconds for s in lanes()[0].slices if s.kind == "stall")
    assert exposed_seconds(lanes()) == pytest.approx(stalled, rel=0.05)


def test_exposed_communication_is_what_no_kernel_covers() -> None:
    compute = Lane("compute", (Slice(0.0, 1.0, "product", "a"), Slice(2.0, 1.0, "product", "b")))
    sent = Lane("sp", (Slice(0.5, 2.0, "communication", "c"),))
    assert exposed_seconds([compute, sent]) == pytest.approx(1.0)


def test_a_profile_becomes_lanes() -> None:
    def kernel(name: str, ts: float, dur: float) -> dict[str, object]:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur}

    events = [
        kernel("ncclDevKernel_SendRecv", 120.0, 50.0),
        kernel("nvjet_tst_128x256", 100.0, 40.0),
        kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 140.0, 10.0),
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 5.0},
    ]
    compute, sent = measured_lanes(events)
    assert [(s.kind, round(s.begin * 1e6), round(s.seconds * 1e6)) for s in compute.slices] == [
        ("product", 0, 40),
        ("attention", 40, 10),
    ]
    assert [s.kind for s in sent.slices] == ["communication"]
    assert exposed_seconds([compute, sent]) == pytest.approx(20e-6)
    assert kernel_kind("triton_poi_fused_add_0") == "other"


def test_the_picture_shows_every_lane_and_stays_inside() -> None:
    root = ET.fromstring(lanes_svg({"predicted": lanes(), "measured <again>": lanes()}))
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "predicted: sp:gradients" in texts and "measured <again>: compute" in texts
    width = float(root.attrib["viewBox"].split()[2])
    rectangles = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if "x" in e.attrib]
    assert len(rectangles) > 40
    assert all(float(e.attrib["x"]) + float(e.attrib["width"]) <= width for e in rectangles)


def test_the_trace_holds_every_slice() -> None:
    events = lanes_trace({"predicted": lanes()})["traceEvents"]
    assert sum(e["ph"] == "X" for e in events) == sum(len(lane.slices) for lane in lanes())
