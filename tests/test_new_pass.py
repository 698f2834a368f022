"""`autosp-ir new-pass`: what it writes is installed, listed, run and tested; and the commands' bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autosp_ir.cli import app
from autosp_ir.cli_authoring import scaffold
from autosp_ir.errors import PipelineError
from tests.test_plugin_package import ROOT, install, python


def test_a_scaffolded_package_works(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["new-pass", "drop-ones", "--output", str(tmp_path / "made"), "--json"])
    assert made.exit_code == 0, made.output
    assert "src/drop_ones/passes.py" in json.loads(made.stdout)["files"]
    environment = install(tmp_path / "made", tmp_path / "site")
    listed = python(["-m", "autosp_ir.cli", "passes", "--json"], environment, tmp_path)
    assert json.loads(listed.stdout)["drop-ones"]["origin"] == "drop_ones.passes:DropOnes"
    golden = str(ROOT / "tests" / "golden" / "block_captured.ir")
    ran = python(["-m", "autosp_ir.cli", "opt", golden, "-p", "canonicalize,drop-ones{limit=3}"], environment, tmp_path)
    assert ran.returncode == 0, ran.stderr
    tests = python(["-m", "pytest", "-q", "-p", "no:cacheprovider", "made/tests"], environment, tmp_path)
    assert tests.returncode == 0, tests.stdout + tests.stderr


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("DropOnes", "is no pass name", "'drop-ones'"),
        ("drop_ones", "is no pass name", "'drop-ones'"),
        ("3", "is no pass name", "'my-pass'"),
        ("ulysses", "installed already", "another name"),
        ("torch", "cannot be called 'torch'", "torch-pass"),
        ("class", "cannot be called 'class'", "class-pass"),
    ],
)
def test_names_that_cannot_be_used(tmp_path: Path, name: str, message: str, hint: str) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        scaffold(name, tmp_path / "made")
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "made").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(PipelineError, match="is not an empty folder"):
        scaffold("drop-ones", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_opt_reads_a_pipeline_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "line.toml").write_text('[[passes]]\nname = "ulysses"\noptions = { fuse = "qkv" }\n')
    golden = str(ROOT / "tests" / "golden" / "block_partitioned.ir")
    ran = CliRunner().invoke(app, ["opt", golden, "-p", str(tmp_path / "line.toml"), "--mesh", "sp=4"])
    assert ran.exit_code == 0, ran.output
    assert "autosp.all_to_all" in ran.stdout


def test_the_list_is_a_table_or_a_page(tmp_path: Path) -> None:
    table = CliRunner().invoke(app, ["passes"])
    assert table.exit_code == 0
    assert "ulysses" in table.stdout
    page = CliRunner().invoke(app, ["passes", "--markdown", "--output", str(tmp_path / "page.md")])
    assert page.exit_code == 0
    assert "## ulysses" in (tmp_path / "page.md").read_text()
