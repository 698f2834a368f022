"""A failing pass writes one file that replays the failure in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import autosp_ir as air
from autosp_ir.errors import AutoSPError, ParseError, PassError, PipelineError, UnsupportedError, VerifyError
from autosp_ir.pipeline import PassManager
from autosp_ir.pipeline.reproduce import VARIABLE, read_reproducer
from tests.models.plain import plain_decoder
from tests.pipeline import failing_passes
from tests.pipeline.planted import MESH, block, layers
from tests.pipeline.toys import FoldRelu, small_program

assert failing_passes  # registers them

PIPELINE = "canonicalize,fails-at-attention{least=1},token-partition"


def failed(target: Path, pipeline: str = PIPELINE, kind: type[AutoSPError] = UnsupportedError) -> AutoSPError:
    with pytest.raises(kind) as caught:
        PassManager(pipeline, reproducer=target).run(block(), mesh=MESH)
    return caught.value


def in_a_fresh_process(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    code = "from autosp_ir.cli import main; main()"
    command = [sys.executable, "-c", code, "opt", "--reproduce", str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_file_says_what_failed_and_on_what(tmp_path: Path) -> None:
    path = tmp_path / "failure.repro"
    error = failed(path)
    assert str(path) in str(error.hint)
    assert "--reproduce" in str(error)
    header, text = read_reproducer(path)
    assert path.read_text().startswith("autosp-ir-reproducer 1\n")
    assert header.pass_text == "fails-at-attention"
    assert header.pipeline == "canonicalize,fails-at-attention,token-partition"
    assert (header.mesh, header.strict, header.verify, header.error) == (MESH, False, True, "UnsupportedError")
    assert "1 attentions" in header.reason
    assert header.defined_in.endswith("failing_passes.py")
    assert header.versions["autosp_ir"] == air.__version__
    assert air.parse(text) == PassManager("canonicalize").run(block(), mesh=MESH).program


def test_it_replays_here(tmp_path: Path) -> None:
    failed(tmp_path / "failure.repro")
    replay = air.reproduce(tmp_path / "failure.repro")
    assert isinstance(replay.error, UnsupportedError)
    assert replay.same
    assert "fails as written down" in str(replay)


def test_it_replays_in_a_fresh_process(tmp_path: Path) -> None:
    path = tmp_path / "failure.repro"
    failed(path)
    replayed = in_a_fresh_process(path, "--load", failing_passes.__file__)
    assert replayed.returncode == 1
    assert "[fails-at-attention] 1 attentions on {'sp': 4}" in replayed.stderr
    unknown = in_a_fresh_process(path)
    assert unknown.returncode == 2
    assert f"--load {failing_passes.__file__}" in unknown.stderr


def test_a_built_in_pass_needs_nothing_loaded(tmp_path: Path) -> None:
    given = block()
    with pytest.raises(UnsupportedError, match="query heads"):
        PassManager("canonicalize,token-partition,ulysses", reproducer=tmp_path).run(given, mesh={"sp": 3})
    (path,) = tmp_path.glob("ulysses-*.repro")
    replayed = in_a_fresh_process(path)
    assert replayed.returncode == 1
    assert "4 query heads cannot be spread over 3 ranks" in replayed.stderr


def test_what_the_verifier_finds_replays_too(tmp_path: Path) -> None:
    error = failed(tmp_path / "failure.repro", "canonicalize,breaks-a-type", VerifyError)
    assert error.pass_name == "breaks-a-type"
    assert air.reproduce(tmp_path / "failure.repro").same


def test_values_are_drawn_from_the_seed(tmp_path: Path) -> None:
    model, batch = plain_decoder(length=8)
    with pytest.raises(PassError, match="is not zero"):
        PassManager("fails-at-values", reproducer=tmp_path / "failure.repro").run(air.capture(model, batch))
    header, _ = read_reproducer(tmp_path / "failure.repro")
    assert header.tensors
    assert air.reproduce(tmp_path / "failure.repro").same


def test_it_says_when_it_no_longer_fails_or_fails_differently(tmp_path: Path) -> None:
    path = tmp_path / "failure.repro"
    failed(path)
    text = path.read_text()
    path.write_text(text.replace('"pass_text": "fails-at-attention"', '"pass_text": "fails-at-attention{least=9}"'))
    replay = air.reproduce(path)
    assert replay.error is None
    assert replay.result is not None
    assert "no longer fails" in str(replay)
    assert in_a_fresh_process(path, "--load", failing_passes.__file__).returncode == 0
    path.write_text(text.replace("1 attentions on", "another reason: 1 attentions on"))
    replay = air.reproduce(path)
    assert replay.error is not None
    assert not replay.same
    assert "fails differently" in str(replay)


def test_the_environment_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "failures"))
    for _ in range(2):
        with pytest.raises(UnsupportedError):
            PassManager(PIPELINE).run(block(), mesh=MESH)
    assert len(list((tmp_path / "failures").glob("fails-at-attention-*.repro"))) == 2
    with pytest.raises(UnsupportedError) as caught:
        PassManager(PIPELINE, reproducer=False).run(block(), mesh=MESH)
    assert "--reproduce" not in str(caught.value)


def test_success_writes_nothing(tmp_path: Path) -> None:
    PassManager([FoldRelu()], reproducer=tmp_path).run(small_program())
    assert not list(tmp_path.iterdir())


def test_a_program_without_text_does_not_hide_the_error(tmp_path: Path) -> None:
    program = block()
    program.info["object"] = object()
    with pytest.raises(UnsupportedError, match="attentions") as caught:
        PassManager(PIPELINE, reproducer=tmp_path).run(program, mesh=MESH)
    assert "no reproducer could be written" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("autosp-ir-reproducer 1", "autosp-ir-reproducer 2"), "has format version 2"),
        (lambda text: text.replace("autosp-ir-reproducer", "autosp"), "expected `autosp-ir-reproducer 1`"),
        (lambda text: "", "expected `autosp-ir-reproducer 1`"),
        (lambda text: text[: text.index("program:")], "the program is missing"),
        (lambda text: text.replace('"strict": false', '"strict": 7 7'), "the header is malformed"),
        (lambda text: text.replace('"seed": 0', '"seed": "x"'), "seed: "),
        (lambda text: text.replace('  "pass_name": "fails-at-attention",\n', ""), "pass_name: "),
        (lambda text: text.replace("autosp-ir 1", "autosp-ir 99"), "format version 99"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "failure.repro"
    failed(path)
    assert callable(change)
    path.write_text(change(path.read_text()))
    with pytest.raises(ParseError, match=message) as caught:
        air.reproduce(path)
    assert caught.value.hint


def test_a_missing_file_and_an_unknown_pass_are_named(tmp_path: Path) -> None:
    with pytest.raises(AutoSPError, match="cannot be read"):
        air.reproduce(tmp_path / "none.repro")
    failed(tmp_path / "failure.repro")
    text = (tmp_path / "failure.repro").read_text().replace("fails-at-attention", "unheard-of")
    (tmp_path / "other.repro").write_text(text)
    with pytest.raises(PipelineError, match="unheard-of") as caught:
        air.reproduce(tmp_path / "other.repro")
    assert "failing_passes.py" in str(caught.value.hint)


def test_skipping_a_pass_by_name() -> None:
    manager = PassManager("canonicalize,fails-at-attention,token-partition", skip=["fails-at-attention"])
    assert [p.name for p in manager.passes] == ["canonicalize", "token-partition"]
    assert "token-partitioned" in manager.run(block(), mesh=MESH).program.facts
    with pytest.raises(PipelineError, match="no pass of the pipeline is called 'ulises'") as caught:
        PassManager("canonicalize,ulysses", skip=["ulises"])
    assert "did you mean 'ulysses'" in str(caught.value)
    assert len(PassManager("multiplies-tanh", skip=["multiplies-tanh"]).run(layers(2)).program.find("aten.tanh")) == 2
