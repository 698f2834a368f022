from __future__ import annotations

from pathlib import Path

import pytest

from autosp_ir.errors import AutoSPError
from autosp_ir.ir.program import Program
from autosp_ir.ir.text import parse
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.testing import EquivalenceError, check_pass
from autosp_ir.testing.golden import UPDATE_VARIABLE
from tests.testing.toy_models import canonical, tokenwise


class Scale(Pass):
    """Multiply every linear's result by a factor: right only for 1."""

    name = "test-scale"

    class Options(Pass.Options):
        factor: float = 1.0

    def run(self, program: Program, ctx: PassContext) -> None:
        rewriter = ctx.rewriter(program)
        for node in program.find("aten.linear"):
            with rewriter.after(node):
                scaled = rewriter.create("aten.mul.Tensor", (node.result, self.options.factor))
            rewriter.replace(node, scaled)


@pytest.fixture
def text() -> str:
    return str(canonical(*tokenwise()))


def test_unbound_text_runs_on_random_tensors(text: str) -> None:
    result = check_pass("token-partition", before=text, world=4, expect={"all_reduce": 1, "autosp.all_reduce": 1})
    assert result.program.mesh == {"sp": 4}
    check_pass("differentiate", before=result.program)
    check_pass("token-partition,differentiate", before=canonical(*tokenwise()), world=2)


def test_symbolic_programs_get_a_length() -> None:
    from autosp_ir.capture.program import capture

    program = capture(*tokenwise(length=8), dynamic=True)
    program.facts.add("canonical")
    check_pass("pad-tokens,token-partition", before=program, world=4)


def test_wrong_numbers_are_found(text: str) -> None:
    check_pass(Scale(), before=text)
    with pytest.raises(EquivalenceError, match="gradient of"):
        check_pass(Scale(factor=1.0 + 1e-8), before=text)


def test_counts_are_checked(text: str) -> None:
    with pytest.raises(EquivalenceError, match=r"all_to_all: 0 instead of 4"):
        check_pass("token-partition", before=text, world=2, expect={"all_to_all": 4})


def test_golden_files_are_written_on_request_and_compared(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = tmp_path / "sub" / "scale.ir"
    monkeypatch.delenv(UPDATE_VARIABLE, raising=False)
    with pytest.raises(EquivalenceError, match="--update-golden"):
        check_pass(Scale, before=text, after=golden)
    monkeypatch.setenv(UPDATE_VARIABLE, "1")
    check_pass(Scale, before=text, after=golden)
    monkeypatch.delenv(UPDATE_VARIABLE)
    check_pass(Scale, before=text, after=golden)
    check_pass(Scale, before=text, after=golden.read_text())
    check_pass(Scale, before=text, after=parse(golden.read_text()))
    golden.write_text(golden.read_text().replace("1.0)", "2.0)"))
    with pytest.raises(EquivalenceError) as failure:
        check_pass(Scale, before=text, after=golden)
    assert "aten.mul.Tensor(%linear, 2.0)" in str(failure.value) and "+    %mul" in str(failure.value)


def test_files_are_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "before.ir"
    path.write_text(text)
    check_pass(Scale, before=path)
    check_pass(Scale, before=str(path))
    with pytest.raises(AutoSPError, match="does not exist"):
        check_pass(Scale, before=tmp_path / "other.ir")


def test_a_pytest_option_updates_golden_files(pytestconfig: pytest.Config) -> None:
    from autosp_ir.testing import plugin

    parser = pytest.Parser()
    plugin.pytest_addoption(parser)
    assert parser.parse_known_args(["--update-golden"]).update_golden is True
