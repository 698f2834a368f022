"""Text and verifier on the programs of real models, at every stage."""

from __future__ import annotations

import pytest

from autosp_ir.capture.program import capture
from autosp_ir.ir.program import Program
from autosp_ir.ir.text import parse, structurally_equal
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.pipeline.spec import DEFAULT_PIPELINE
from autosp_passes.differentiate import Differentiate
from tests.models import ZOO, build


def check(program: Program) -> None:
    text = str(program)
    parsed = parse(text)
    assert structurally_equal(parsed, program) is None
    assert str(parsed) == text
    program.verify()
    parsed.verify()


@pytest.mark.parametrize("name", ZOO)
def test_captured_programs_read_back_and_verify(name: str) -> None:
    model, batch = build(name)
    check(capture(model, batch))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "plain"])
def test_symbolic_programs_read_back_and_verify(name: str) -> None:
    model, batch = build(name)
    program = capture(model, batch, dynamic=True)
    assert "symbols: " in str(program)
    check(program)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "plain"])
def test_joint_programs_read_back_and_verify(name: str) -> None:
    model, batch = build(name)
    program = PassManager([Differentiate()]).run(capture(model, batch)).program
    assert "\n  backward:\n" in str(program)
    check(program)


def test_every_stage_of_the_default_pipeline_reads_back_and_verifies() -> None:
    model, batch = build("llama-gqa")
    program = capture(model, batch)
    for name in DEFAULT_PIPELINE.split(","):
        program = PassManager(name).run(program, mesh={"sp": 2}).program
        check(program)
    assert "{sp: S(1)}" in str(program)
    assert "_c10d_functional.wait_tensor" in str(program)
