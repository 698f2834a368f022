"""`autosp-ir opt` from the command line."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn
from typer.testing import CliRunner, Result

from autosp_ir.cli import app, main
from autosp_ir.cli_opt import _Progress
from autosp_ir.errors import AutoSPError, PipelineError, UnsupportedError
from autosp_ir.ir.program import Program
from autosp_ir.ir.text import parse
from autosp_ir.pipeline import Instrument, Pass, PassManager
from tests.pipeline import failing_passes
from tests.pipeline.planted import GOLDEN, layers

LINE = "canonicalize,token-partition,ulysses"
BLOCK = str(GOLDEN / "block_captured.ir")


def opt(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["opt", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def run(*arguments: str) -> Result:
    result = opt(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def report(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return found


def test_ir_in_and_ir_out(tmp_path: Path) -> None:
    shown = run(BLOCK, "-p", LINE, "--mesh", "sp=4")
    assert len(parse(shown.stdout).find("autosp.all_to_all")) == 4
    written = run(BLOCK, "-p", LINE, "--mesh", "sp=4", "-o", str(tmp_path / "after.ir"))
    assert "nodes written to" in written.stdout
    again = run(str(tmp_path / "after.ir"), "-p", "differentiate")  # the mesh is the program's own
    assert parse(again.stdout).mesh == {"sp": 4}


def test_time_stats_and_remarks_go_to_the_error_stream() -> None:
    result = run(BLOCK, "-p", LINE, "--mesh", "sp=4", "--time", "--stats", "--remarks")
    parse(result.stdout)
    for shown in ("token-partition", "repeats-folded", "attentions", "+4 autosp.all_to_all", "[ulysses] applied"):
        assert shown in result.stderr
    assert "[ulysses] applied" not in run(BLOCK, "-p", LINE, "--mesh", "sp=4").stderr


def test_dumps_are_numbered(tmp_path: Path) -> None:
    run(BLOCK, "-p", LINE, "--mesh", "sp=4", "--dump-dir", str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00-input.ir",
        "01-canonicalize.ir",
        "02-token-partition.ir",
        "03-ulysses.ir",
    ]


def test_json_holds_all_of_it(tmp_path: Path) -> None:
    found = report(BLOCK, "-p", LINE, "--mesh", "sp=4")
    assert [p["pass"] for p in found["passes"]] == ["canonicalize", "token-partition", "ulysses"]
    assert found["rules"]["canonicalize"]["repeats-folded"]["hits"] == 1
    assert {"statistics", "operations", "remarks", "program"} <= found.keys()
    written = report(BLOCK, "-p", LINE, "--mesh", "sp=4", "-o", str(tmp_path / "after.ir"))
    assert "program" not in written
    assert parse((tmp_path / "after.ir").read_text()).mesh == {"sp": 4}


def test_passes_are_skipped_by_name() -> None:
    program = parse(run(BLOCK, "-p", LINE, "--mesh", "sp=4", "--skip", "ulysses").stdout)
    assert not program.find("autosp.all_to_all")
    refused = opt(BLOCK, "-p", LINE, "--mesh", "sp=4", "--skip", "token-partition")
    assert isinstance(refused.exception, PipelineError)
    assert "requires 'token-partitioned'" in str(refused.exception)


def test_verification_can_be_left_out() -> None:
    broken = [BLOCK, "--load", "tests.pipeline.failing_passes", "-p", "breaks-a-type"]
    assert isinstance(opt(*broken).exception, AutoSPError)
    run(*broken, "--no-verify")


def test_a_failure_is_written_and_replayed(tmp_path: Path) -> None:
    path = tmp_path / "failure.repro"
    line = ("-p", "canonicalize,fails-at-attention", "--load", failing_passes.__name__, "--reproducer", str(path))
    result = opt(BLOCK, *line)
    assert isinstance(result.exception, UnsupportedError)
    assert str(path) in str(result.exception)
    replayed = opt("--reproduce", str(path))
    assert replayed.exit_code == 1
    assert "it fails as written down" in replayed.stderr
    told = opt("--reproduce", str(path), "--json")
    assert told.exit_code == 1
    assert json.loads(told.stdout)["same"] is True


def test_bisection_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "layers.ir"
    path.write_text(str(layers(6)))
    line = (str(path), "--load", failing_passes.__name__, "-p", "canonicalize,multiplies-tanh")
    shown = run(*line, "--bisect", "! grep -q sigmoid").stdout
    assert "first bad pass: multiplies-tanh" in shown
    assert "first bad rewrite: rewrite 3 of multiplies-tanh: alias (" in shown
    assert "aten.sigmoid" in shown
    found = report(*line, "--bisect", "! grep -q sigmoid")
    assert found["rewrite"]["index"] == 3
    failing = run(BLOCK, "--load", failing_passes.__name__, "-p", "canonicalize,breaks-a-type", "--bisect", "").stdout
    assert "first bad pass: breaks-a-type" in failing
    good = opt(*line, "--bisect", "true")
    assert isinstance(good.exception, PipelineError)


def test_loading_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    for source in ("no.such.module", str(tmp_path / "none.py")):
        result = opt(BLOCK, "-p", LINE, "--load", source)
        assert isinstance(result.exception, PipelineError)
        assert "cannot be loaded" in str(result.exception)


@pytest.mark.parametrize("arguments", [[], [BLOCK], ["-p", LINE]])
def test_nothing_to_run_is_named(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["autosp-ir", "opt", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "autosp-ir: there is nothing to run" in capsys.readouterr().err


def test_progress_names_the_pass_that_runs() -> None:
    screen = StringIO()
    with Progress(TextColumn("{task.description}"), console=Console(file=screen, force_terminal=True)) as progress:
        shown = _Progress(progress)
        PassManager("canonicalize", instruments=[shown, Refreshed(progress)]).run(layers(2))
    assert "canonicalize, 9 nodes" in screen.getvalue()
    assert "done" in screen.getvalue()


class Refreshed(Instrument):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def before_pass(self, pass_: Pass, program: Program) -> None:
        self.progress.refresh()


def test_help_lists_the_flags() -> None:
    shown = run("--help").stdout
    for flag in ("--time", "--stats", "--verify", "--dump-dir", "--skip", "--bisect", "--reproduce", "--json"):
        assert flag in shown
