"""`opt --trace`, `opt --diff` and `report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import autosp_ir as air
from autosp_ir.cli import app
from tests.viz.recorded import llama_program

PIPELINE = "canonicalize,pad-tokens,token-partition,ulysses"


@pytest.fixture
def program_file(tmp_path: Path) -> Path:
    path = tmp_path / "llama.ir"
    path.write_text(str(llama_program()))
    return path


def run(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_a_recorded_run_becomes_a_report(program_file: Path, tmp_path: Path) -> None:
    recorded, page = tmp_path / "run.json", tmp_path / "report.html"
    run("opt", str(program_file), "-p", PIPELINE, "--mesh", "sp=4", "--trace", str(recorded), "-o", str(tmp_path / "o"))
    shown, _ = run("report", str(recorded), "-o", str(page), "--json")
    facts = json.loads(shown)
    assert facts["passes"] == PIPELINE.split(",")
    assert facts["bytes"] == page.stat().st_size
    assert page.read_text().startswith("<!doctype html>")


def test_a_report_can_be_a_chrome_trace(program_file: Path, tmp_path: Path) -> None:
    recorded, events = tmp_path / "run.json", tmp_path / "events.json"
    run("opt", str(program_file), "-p", PIPELINE, "--mesh", "sp=4", "--trace", str(recorded), "-o", str(tmp_path / "o"))
    run("report", str(recorded), "-o", str(events))
    assert json.loads(events.read_text())["traceEvents"]


def test_opt_shows_what_passes_did(program_file: Path, tmp_path: Path) -> None:
    program, changes = run("opt", str(program_file), "-p", PIPELINE, "--mesh", "sp=4", "--diff")
    assert "+ %all_to_all" in changes
    assert air.parse(program).facts >= {"token-partitioned"}


def test_a_missing_recording_is_one_readable_error(tmp_path: Path) -> None:
    with pytest.raises(air.AutoSPError, match="opt … --trace"):
        CliRunner().invoke(app, ["report", str(tmp_path / "none.json")], catch_exceptions=False)
