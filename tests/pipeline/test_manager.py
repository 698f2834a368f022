"""The pass manager: nothing runs unless everything can, nothing is taken on a pass's word."""

import logging
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from autosp_ir.errors import LayoutError, PassError, PipelineError, UnsupportedError, VerifyError
from autosp_ir.ir.hashing import structural_hash
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_ir.pipeline import Pass, PassContext, PassManager
from autosp_ir.rewrite import ProgramBuilder
from tests.pipeline.toys import Cut, FoldRelu, Join, OnJoint, Whole, small_program


def function_pass(run: Callable[[Program, PassContext], None], **attributes: object) -> Pass:
    made: type[Pass] = type(
        "Toy", (Pass,), {"name": "toy", **attributes, "run": lambda self, program, ctx: run(program, ctx)}
    )
    return made()


def test_run_rewrites_a_clone_and_reports_what_happened() -> None:
    program = small_program()
    before, text = structural_hash(program), str(program)
    result = PassManager([FoldRelu, Cut()]).run(program, mesh={"sp": 4})
    assert (structural_hash(program), str(program)) == (before, text)
    assert program.facts == set()
    assert program.mesh == {}
    assert len(result.program.find("aten.relu")) == 1
    assert result.program.facts == {"folded", "cut"}
    assert result.program.mesh == {"sp": 4}
    assert result.statistics == {"fold-relu": {"folded": 1}, "cut": {}}
    assert set(result.timings) == {"fold-relu", "cut"}
    assert [r.name for r in result.trace] == ["fold-relu", "cut"]
    assert len(list(result.trace.rewrites)) == 1


def test_modified_comes_from_the_structure() -> None:
    result = PassManager([FoldRelu(), FoldRelu()]).run(small_program())
    assert [r.modified for r in result.trace] == [True, False]


def test_a_tensor_bound_anew_counts_as_modified() -> None:
    def rebind(program: Program, ctx: PassContext) -> None:
        program.tensors["w"] = torch.zeros(2, 3)

    assert PassManager([function_pass(rebind)]).run(small_program()).trace.records[0].modified


def test_remarks_carry_node_and_source_and_reach_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="autosp_ir.pipeline"):
        result = PassManager([FoldRelu()]).run(small_program())
    missed, applied = result.remarks
    assert (missed.kind, missed.node, missed.source) == ("missed", "relu", "model.py:7")
    assert (applied.kind, applied.node, applied.pass_name) == ("applied", "relu_1", "fold-relu")
    levels = {r.levelno for r in caplog.records if "relu" in r.getMessage() and "modified" not in r.getMessage()}
    assert levels == {logging.DEBUG, logging.INFO}


def test_an_unknown_kind_of_remark_is_an_error() -> None:
    with pytest.raises(PassError, match="no kind of remark"):
        PassContext().remark(cast(Any, "done"), None, "")


@pytest.mark.parametrize(
    ("pipeline", "reason", "hint"),
    [
        ([Cut(), FoldRelu()], "cut requires 'folded', which fold-relu provides", "put fold-relu before cut"),
        ([Cut()], "neither an earlier pass nor the program", "no known pass provides 'folded'"),
        ([FoldRelu(), Cut(), Whole()], "whole conflicts with 'cut', which cut provides", "leave one of cut and whole"),
        ([OnJoint(), Join()], "on-joint runs on joint programs, but the program is at", "put join before on-joint"),
        ([Join(), FoldRelu()], "but after join the program is at stage joint", "put fold-relu before join"),
        ([OnJoint()], "but the program is at stage forward", "differentiate"),
    ],
)
def test_the_whole_pipeline_is_checked_before_anything_runs(pipeline: list[Pass], reason: str, hint: str) -> None:
    with pytest.raises(PipelineError) as caught:
        PassManager(pipeline).run(small_program(), mesh={"sp": 2})
    assert reason in caught.value.reason
    if hint != "differentiate":
        assert hint in (caught.value.hint or "")


def test_nothing_runs_when_a_later_pass_cannot() -> None:
    ran: list[str] = []
    first = function_pass(lambda program, ctx: ran.append("first"))
    with pytest.raises(PipelineError):
        PassManager([first, Cut()]).run(small_program())
    assert ran == []


def test_facts_of_the_program_satisfy_and_conflict() -> None:
    program = small_program()
    program.facts.add("folded")
    done = PassManager([Cut()]).run(program, mesh={"sp": 2}).program
    with pytest.raises(PipelineError, match="holds for the program already"):
        PassManager([Whole()]).run(done)


def test_a_removed_fact_no_longer_satisfies() -> None:
    cut_later = type("CutLater", (Cut,), {"name": "cut-later", "stage": "joint"})
    with pytest.raises(PipelineError, match="no longer holds after join") as caught:
        PassManager([FoldRelu(), Join(), cut_later()]).run(small_program(), mesh={"sp": 2})
    assert "put cut-later before join" in str(caught.value)


def test_removed_facts_leave_the_program() -> None:
    result = PassManager([FoldRelu(), Join()], verify=False).run(small_program())
    assert result.program.facts == set()


def test_undeclared_facts_are_an_error() -> None:
    with pytest.raises(PassError, match="establishes 'sneaky' without declaring"):
        PassManager([function_pass(lambda program, ctx: program.facts.add("sneaky"))]).run(small_program())
    with pytest.raises(PassError, match="takes 'folded' away"):
        PassManager([FoldRelu(), function_pass(lambda program, ctx: program.facts.clear())]).run(small_program())


def test_an_undeclared_stage_is_an_error() -> None:
    def promote(program: Program, ctx: PassContext) -> None:
        program.stage = Join.stage_after(program.stage)

    with pytest.raises(PassError, match="left the program at stage joint") as caught:
        PassManager([function_pass(promote)]).run(small_program())
    assert caught.value.pass_name == "toy"


def test_a_crash_becomes_a_pass_error_that_names_pass_and_place() -> None:
    def crash(program: Program, ctx: PassContext) -> None:
        program.info["missing"]

    with pytest.raises(PassError, match=r"KeyError: 'missing' \(at .*test_manager") as caught:
        PassManager([function_pass(crash)]).run(small_program())
    assert caught.value.pass_name == "toy"
    assert isinstance(caught.value.__cause__, KeyError)


def test_errors_raised_on_purpose_keep_their_type_and_get_the_pass_name() -> None:
    def refuse(program: Program, ctx: PassContext) -> None:
        raise UnsupportedError("no convolutions", node=program.find("aten.relu")[0])

    with pytest.raises(UnsupportedError, match=r"\[toy\] no convolutions") as caught:
        PassManager([function_pass(refuse)]).run(small_program())
    assert "model.py:7" in str(caught.value)


def test_an_invalid_program_is_blamed_on_the_pass_that_left_it() -> None:
    def corrupt(program: Program, ctx: PassContext) -> None:
        first = program.find("aten.relu")[0]
        program.graph.move(first, before=program.graph.output_node)

    with pytest.raises(VerifyError) as caught:
        PassManager([FoldRelu(), function_pass(corrupt)]).run(small_program())
    assert caught.value.pass_name == "toy"
    PassManager([function_pass(corrupt)], verify=False).run(small_program())


def test_an_invalid_input_is_blamed_on_no_pass() -> None:
    program = small_program()
    relu = program.find("aten.relu")[0].result
    relu.type = TensorType((7, 7), torch.float32)
    with pytest.raises(VerifyError) as caught:
        PassManager([FoldRelu()]).run(program)
    assert caught.value.pass_name is None


def test_an_input_in_the_wrong_order_is_a_named_error() -> None:
    program = small_program()
    program.graph.move(program.find("aten.relu")[0], before=program.graph.output_node)
    with pytest.raises(VerifyError, match="read before it is defined"):
        PassManager([FoldRelu()]).run(program)


def test_effects_keep_their_order_across_a_pass() -> None:
    b = ProgramBuilder()
    x = b.input("x", (2, 3))
    first, second = b.aten.bernoulli(x), b.aten.rand_like(x)
    b.output(first, second)

    def swap(program: Program, ctx: PassContext) -> None:
        program.graph.move(program.graph.value(second.name).producer, before=program.graph.value(first.name).producer)

    with pytest.raises(VerifyError, match="moved across"):
        PassManager([function_pass(swap)]).run(b.build())


def test_layout_errors_are_verify_errors() -> None:
    assert issubclass(LayoutError, VerifyError)


@pytest.mark.parametrize("mesh", [{"sp": 0}, {"sp": True}, {1: 2}, {"sp": "4"}])
def test_a_malformed_mesh_is_refused(mesh: dict[str, int]) -> None:
    with pytest.raises(PipelineError, match="no mesh axis"):
        PassManager([]).run(small_program(), mesh=mesh)


def test_a_mesh_that_contradicts_the_program_is_refused() -> None:
    done = PassManager([FoldRelu(), Cut()]).run(small_program(), mesh={"sp": 4}).program
    with pytest.raises(PipelineError, match="written for sp=4"):
        PassManager([]).run(done, mesh={"sp": 2})
    with pytest.raises(PipelineError, match="without sp"):
        PassManager([]).run(done, mesh={"dp": 2})
    assert PassManager([]).run(done).program.mesh == {"sp": 4}


def test_what_is_no_pass_is_refused() -> None:
    with pytest.raises(PipelineError, match="is no pass"):
        PassManager(cast(Any, [lambda program, ctx: None]))


def test_strict_and_mesh_reach_the_pass() -> None:
    seen: list[tuple[bool, dict[str, int]]] = []
    probe = function_pass(lambda program, ctx: seen.append((ctx.strict, ctx.mesh)))
    PassManager([probe]).run(small_program(), mesh={"sp": 3}, strict=True)
    assert seen == [(True, {"sp": 3})]
