"""Checks around the rules: sizes of axes, lowered programs, stored layouts that no value can have, broken rules."""

from __future__ import annotations

import pytest
import torch

from autosp_ir.comm.inference import place
from autosp_ir.comm.layout import check_layouts, infer_layout
from autosp_ir.comm.layout_check import LOWERED, check_lowered, check_operator_axes
from autosp_ir.comm.rules import base
from autosp_ir.errors import AutoSPError, LayoutError, VerifyError
from autosp_ir.ir.program import Stage
from autosp_ir.ir.types import INVARIANT, PARTIAL, REPLICATE, Shard, TensorType, TupleType
from autosp_ir.rewrite.builder import ProgramBuilder

SP = "sp"
F64 = torch.float64


def test_an_operator_is_made_for_the_size_of_its_axis() -> None:
    b = ProgramBuilder(mesh={SP: 2})
    x = b.input("x", (4, 4), F64)
    b.output(y=b.autosp.all_gather(b.autosp.shard(x, 0, SP, 2), 0, SP, 2))
    program = b.build()
    check_operator_axes(program)
    for mesh in ({SP: 4}, {SP: 1}, {"dp": 2}):
        program.mesh = dict(mesh)
        with pytest.raises(LayoutError, match="is made for 2 rank"):
            check_operator_axes(program)


@pytest.mark.parametrize("op", ["all_reduce", "invariant_to_replicate", "all_gather", "all_to_all", "reduce_scatter"])
def test_a_lowered_program_holds_no_operator_that_lowering_replaces(op: str) -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.LOWERED)
    placement = {"all_gather": Shard(0), "all_to_all": Shard(0), "invariant_to_replicate": INVARIANT}.get(op, PARTIAL)
    dims = {"all_gather": (0,), "reduce_scatter": (0,), "all_to_all": (1, 0)}.get(op, ())
    x = b.input("x", (4, 4), F64, layout={SP: placement})
    made = b.call(f"autosp.{op}", (x, *dims, SP, 2))
    b.output(y=b.call("aten.clone", (made,)))
    check_lowered(b.program)
    b.program.facts.add(LOWERED)
    with pytest.raises(VerifyError, match=f"is still autosp.{op}"):
        check_lowered(b.program)


def test_a_lowered_program_may_read_the_rank() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.LOWERED, facts=[LOWERED])
    b.call("autosp.shard", (b.input("x", (4, 4), F64), 0, SP, 2))
    b.call("aten.relu", (b.input("y", (4, 4), F64),))
    check_lowered(b.program)


def test_a_stored_layout_must_fit_the_shape() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.LOWERED)
    blocks = b.autosp.shard(b.input("x", (2, 4, 8), F64), 1, SP, 2)
    exchanged = b.call("_c10d_functional.all_to_all_single", (blocks, [1, 1], [1, 1], SP), layout={SP: Shard(2, 3)})
    waited = b.call("_c10d_functional.wait_tensor", (exchanged,))
    b.output(y=waited)
    with pytest.raises(LayoutError, match="cannot be cut along"):
        check_layouts(b.program)


def test_a_forward_value_is_stored_as_it_follows_and_a_joint_one_may_be_either() -> None:
    for stage in (Stage.FORWARD, Stage.JOINT):
        b = ProgramBuilder(mesh={SP: 2}, stage=stage)
        value = b.call("aten.relu", (b.input("x", (4, 4), F64),))
        b.output(y=value)
        program = b.build()
        value.type = value.type.on_axis(SP, REPLICATE)
        if stage is Stage.JOINT:
            check_layouts(program)
            continue
        with pytest.raises(LayoutError, match="is stored as R"):
            check_layouts(program)


def test_an_operand_cut_along_a_dimension_that_it_lacks_is_refused() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (4, 4), F64)
    made = b.aten.relu(x).producer
    for dim in (2, -1):
        with pytest.raises(LayoutError, match="no dimension"):
            infer_layout(made, b.program, SP, placements={x: Shard(dim)})


def test_a_rule_places_every_result() -> None:
    pair = TupleType((TensorType((4,), F64), TensorType((4,), F64)))
    placed = place(pair, SP, (Shard(0), PARTIAL))
    assert isinstance(placed, TupleType)
    assert [e.layout[SP] for e in placed.elements if isinstance(e, TensorType)] == [Shard(0), PARTIAL]
    with pytest.raises(LayoutError, match=r"3 placement\(s\) for 2 results"):
        place(pair, SP, (Shard(0), PARTIAL, PARTIAL))


def test_results_of_a_tuple_have_layouts_of_their_own() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (4, 4), F64, layout={SP: Shard(0)})
    parts = b.call("aten.split.Tensor", (x, 2, 1))
    assert [p.type.layout[SP] for p in parts] == [Shard(0), Shard(0)]


def test_an_expansion_of_the_cut_dimension_is_refused() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (1, 4), F64, layout={SP: Shard(0)})
    with pytest.raises(LayoutError, match="would be expanded"):
        b.call("aten.expand", (x, [4, 4]))
    assert b.call("aten.expand", (x, [3, 1, 4])).type.layout[SP] == Shard(1)


@pytest.mark.parametrize(("shape", "accepted"), [((4,), True), ((1, 4), True), ((4, 4), False)])
def test_what_is_expanded_like_a_shard_must_not_be_whole_there(shape: tuple[int, ...], accepted: bool) -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    like = b.input("like", (4, 4), F64, layout={SP: Shard(0)})
    x = b.input("x", shape, F64)
    if accepted:
        assert b.call("aten.expand_as", (x, like)).type.layout[SP] == Shard(0)
        return
    with pytest.raises(LayoutError, match="whole along the dimension"):
        b.call("aten.expand_as", (x, like))


@pytest.mark.parametrize("made", ["number", "nothing"])
def test_an_output_without_a_layout_is_complete(made: str) -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (4, 4), F64)
    b.output(y=b.call("aten.sym_size.int", (x, 0)) if made == "number" else x)
    program = b.build()
    if made == "nothing":
        program.graph.output_node.set_args(((None,),))
    check_layouts(program)


def test_a_number_of_a_replicated_value_is_no_replicated_number() -> None:
    b = ProgramBuilder(mesh={SP: 2})
    w = b.autosp.invariant_to_replicate(b.parameter("w", (4, 4), F64), SP, 2)
    b.call("aten.sym_size.int", (w, 0))
    b.output(y=b.input("x", (4,), F64))
    check_layouts(b.build())


def test_what_a_program_returns_is_no_value_of_its_own() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (4, 4), F64, layout={SP: Shard(0)})
    b.output(y=x)
    assert infer_layout(b.build().graph.output_node, b.program, SP) == INVARIANT


def test_a_parameter_needs_its_gradient_summed_where_one_of_several_results_is_cut() -> None:
    b = ProgramBuilder(mesh={SP: 2})
    scores = b.autosp.shard(b.input("x", (8, 4), F64), 0, SP, 2)
    target = b.autosp.shard(b.input("t", (8,), torch.int64), 0, SP, 2)
    weight = b.parameter("w", (4,), F64)
    with pytest.raises(LayoutError, match="%w is Invariant, needs a gradient"):
        b.call("aten.nll_loss_forward", (scores, target, weight, 0, -100))


def test_a_rule_is_given_to_an_operation_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "RULES", {})
    for name in ("mine.softcap", "autosp.al_reduce"):
        with pytest.raises(AutoSPError, match=name):
            base.rule(name)(lambda ctx: INVARIANT)
    base.rule("aten.of_another_release")(lambda ctx: INVARIANT)
    assert list(base.RULES) == ["aten.of_another_release"]
