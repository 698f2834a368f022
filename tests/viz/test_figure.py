"""Figures for papers: one column wide, one block, readable without colour."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import autosp_ir as air
from autosp_ir.viz.figure import COLUMN_INCHES
from autosp_ir.viz.figure_blocks import Box, boxes_of, statuses
from autosp_ir.viz.matching import compare
from tests.viz.recorded import llama_recording, llama_result

BLOCK = "model.layers.0.self_attn"


def ulysses_boxes() -> tuple[list[Box], list[Box]]:
    recording = llama_recording()
    stage = recording.stage_of("ulysses")
    before, after = recording.program(stage - 1), recording.program(stage)
    left, right = statuses(compare(before, after))
    return boxes_of(before, BLOCK, left), boxes_of(after, BLOCK, right)


def test_what_the_pass_did_is_drawn_and_the_rest_is_folded() -> None:
    before, after = ulysses_boxes()
    assert [b.title for b in before if b.status == "removed"] == ["attention"]
    assert sorted(b.title for b in after if b.status == "added") == ["all_to_all"] * 4 + ["attention"]
    assert len([b for b in after if b.status == "same" and not b.enters]) <= 8


def test_folding_loses_no_operation_and_makes_no_cycle() -> None:
    recording = llama_recording()
    _, after = ulysses_boxes()
    inside = [n for n in recording.program(recording.stage_of("ulysses")) if n.module.startswith(BLOCK)]
    assert sorted(n.key for b in after for n in b.lines) == sorted(n.key for n in inside)
    seen: list[Box] = []
    for box in after:
        assert all(any(s is b for b in seen) for s in box.sources)
        seen.append(box)


def test_the_svg_is_one_column_wide_and_tells_states_by_frame(tmp_path: Path) -> None:
    path = llama_result().trace.figure(pass_="ulysses", module=BLOCK, path=tmp_path / "figure.svg")
    root = ElementTree.parse(path).getroot()
    assert root.attrib["width"] == f"{COLUMN_INCHES:.3f}in"
    assert float(root.attrib["height"].removesuffix("in")) < 6
    text = path.read_text()
    assert text.count("stroke-dasharray") == 1
    assert text.count("+ all_to_all") == 4
    assert "− attention" in text
    assert min(float(s) for s in re.findall(r'font-size="([\d.]+)"', text)) >= 3.8


def test_nothing_is_drawn_outside_the_page(tmp_path: Path) -> None:
    path = llama_result().trace.figure(pass_="ulysses", module="model.layers.0", path=tmp_path / "figure.svg")
    root = ElementTree.parse(path).getroot()
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
        if "x" in rect.attrib:
            assert 0 <= float(rect.attrib["x"]) <= float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width + 1
            assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height


@pytest.mark.parametrize("suffix", ["pdf", "png"])
def test_other_formats_go_through_matplotlib(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = llama_result().trace.figure(pass_="ulysses", module=BLOCK, path=tmp_path / f"figure.{suffix}")
    assert path.read_bytes()[:4] in (b"%PDF", b"\x89PNG")


def test_without_matplotlib_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(air.UnsupportedError, match=r"autosp-ir\[viz\].*\.svg"):
        llama_result().trace.figure(pass_="ulysses", module=BLOCK, path=tmp_path / "figure.pdf")


@pytest.mark.parametrize(
    ("pass_", "module", "name", "message"),
    [
        ("uliss", BLOCK, "a.svg", "no pass called"),
        ("input", BLOCK, "a.svg", "is no pass"),
        ("ulysses", "model.layer", "a.svg", "no line belongs"),
        ("ulysses", BLOCK, "a.jpg", "cannot be written as"),
        ("lower-comm", "model", "a.svg", "do not fit a column"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pass_: str, module: str, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(air.AutoSPError, match=message):
        llama_result().trace.figure(pass_=pass_, module=module, path=tmp_path / name)
