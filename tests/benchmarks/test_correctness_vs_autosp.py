"""The comparison with AutoSP without AutoSP: ours is exact, a missing DeepSpeed is a row, and so is every ending."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import correctness_vs_autosp
from benchmarks.correctness import children, ours
from benchmarks.correctness.cases import CASES, Case
from benchmarks.correctness.children import judged, run
from benchmarks.correctness.table import described, markdown

_SHORT = [c for c in CASES if c.batch()["input_ids"].shape[1] <= 64]


@pytest.mark.parametrize("case", _SHORT[::9], ids=lambda case: case.name)
def test_ours_is_exact(case: Case) -> None:
    assert judged(ours.measure(case))["outcome"] == "exact"


@pytest.mark.slow
def test_without_deepspeed_ours_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed.py").write_text("raise ImportError('there is no deepspeed')")
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), root, os.path.join(root, "passes")]))
    output = tmp_path / "rows.json"
    app = correctness_vs_autosp.app
    result = CliRunner().invoke(app, ["--cases", "0", "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "autosp is not run: ImportError: there is no deepspeed" in result.output
    row = json.loads(output.read_text())["cases"][0]
    assert row["autosp"] == {"outcome": "not run"} and row["ours"]["outcome"] == "exact"


def side(measure: Any) -> ModuleType:
    module = ModuleType("side.ours")
    vars(module).update(measure=measure, refuses=ours.refuses)
    return module


def fails(case: Case) -> Any:
    raise ValueError(f"no file {Path(__file__)} for {case.ranks} ranks")


@pytest.mark.parametrize(
    ("measure", "limit", "expected"),
    [
        (lambda case: time.sleep(60), 1.0, {"outcome": "hang", "message": "ended after 1 s"}),
        (lambda case: os._exit(3), 30.0, {"outcome": "crash", "message": "exit code 3"}),
        (lambda case: sys.exit("gone"), 30.0, {"outcome": "crash", "message": "SystemExit: gone"}),
        (
            fails,
            30.0,
            {"outcome": "crash", "message": "ValueError: no file …/test_correctness_vs_autosp.py for 2 ranks"},
        ),
    ],
    ids=["hang", "death", "exit", "error"],
)
def test_every_ending_is_a_row(measure: Any, limit: float, expected: dict[str, str]) -> None:
    assert run(side(measure), CASES[0], limit) == expected


def test_the_table_says_what_happened() -> None:
    assert described({"outcome": "exact", "gradient_error": 2e-16, "loss_error": 0.0}) == "exact (2e-16)"
    assert (
        described(judged({"gradient_error": 0.5, "loss_error": None}))
        == "**silent**: gradient error 0.5, loss error NaN"
    )
    assert described({"outcome": "refused", "message": "ValueError: a | b"}) == "**refused**: ValueError: a \\| b"
    assert described({"all_to_alls": {"forward": 8, "backward": 13}}) == "8 all-to-alls forward, 13 backward"
    rows = [
        {"case": "a", "ranks": 2, "autosp": {"outcome": "not run"}, "ours": {"outcome": "exact", "gradient_error": 0.0}}
    ]
    assert markdown(rows).splitlines()[-1] == "| a | 2 | not run | exact (0e+00) |"


def test_sides_and_measures_are_those_of_the_cases() -> None:
    assert children.SIDES == ("autosp", "ours")
    assert {c.measure for c in CASES} == set(ours._MEASURES)
