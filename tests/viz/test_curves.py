"""Curves of memory: peaks are kept, the picture stays inside."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from autosp_ir.viz.curves import memory_svg

SVG = "{http://www.w3.org/2000/svg}"


def points(svg: str) -> list[list[tuple[float, float]]]:
    lines = ET.fromstring(svg).iter(f"{SVG}polyline")
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in e.attrib["points"].split())] for e in lines]


def test_the_peak_of_a_long_curve_is_drawn() -> None:
    curve = [2**30] * 20000
    curve[12345] = 7 * 2**30
    svg = memory_svg({"<default>": curve, "flat": [2**30] * 10, "none": []}, memory=10 * 2**30)
    high, flat = points(svg)
    assert len(high) <= 1500 and len(flat) == 10
    assert min(y for _, y in high) < min(y for _, y in flat) - 100
    texts = [e.text or "" for e in ET.fromstring(svg).iter(f"{SVG}text")]
    assert "<default>: 7.00 GiB" in texts and "10 GiB" in texts


def test_everything_stays_inside() -> None:
    svg = memory_svg({"a": [1, 5, 3], "b": [0]}, memory=4)
    root = ET.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert all(0 <= x <= width and 0 <= y <= height for line in points(svg) for x, y in line)
