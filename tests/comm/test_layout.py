"""The layout algebra on small programs: what the checker demands of Invariant and Replicate, outputs, and hints."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from autosp_ir.comm.layout import check_emittable, check_layouts, infer_layout, infer_layouts
from autosp_ir.errors import LayoutError, UnsupportedError
from autosp_ir.ir.graph import Node, Phase, Value
from autosp_ir.ir.ops import OpDef
from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.types import INVARIANT, PARTIAL, REPLICATE, Layout, Placement, ScalarType, Shard, TensorType
from autosp_ir.rewrite.builder import ProgramBuilder
from autosp_ir.sim.lockstep import simulate

SP = "sp"


def place(**placements: Placement) -> Layout:
    return Layout(placements)


class Small:
    """x [2, 8, 4] cut along its tokens, and a parameter w [4, 4]."""

    def __init__(self, **settings: Any) -> None:
        self.b = ProgramBuilder(mesh={SP: 4}, **settings)
        self.x = self.b.input("x", (2, 8, 4), torch.float64)
        self.w = self.b.parameter("w", (4, 4), torch.float64)
        self.cut = self.b.autosp.shard(self.x, 1, SP, 4)

    def replicated(self) -> Value:
        value: Value = self.b.autosp.invariant_to_replicate(self.w, SP, 4)
        return value


def node(value: Value) -> Node:
    return value.producer


# -- Invariant and Replicate -----------------------------------------------------------------------------------------


def test_a_parameter_that_meets_a_shard_must_be_replicated() -> None:
    s = Small()
    with pytest.raises(LayoutError, match="Invariant, needs a gradient") as error:
        s.b.aten.linear(s.cut, s.w)
    assert "invariant_to_replicate" in str(error.value)
    assert s.b.aten.linear(s.cut, s.replicated()).type.layout == place(sp=Shard(1))


def test_a_buffer_may_meet_a_shard_as_it_is() -> None:
    s = Small()
    table = s.b.buffer("table", (4,), torch.float64)
    assert s.b.aten.mul.Tensor(s.cut, table).type.layout[SP] == Shard(1)


def test_what_needs_no_gradient_may_meet_a_shard() -> None:
    s = Small()
    detached = s.b.aten.detach(s.b.aten.mul.Tensor(s.w, 2.0))
    assert s.b.aten.matmul(s.cut, detached).type.layout[SP] == Shard(1)


def test_what_has_no_gradient_is_cut_all_the_same() -> None:
    s = Small()
    ids = s.b.autosp.shard(s.b.input("ids", (2, 8), torch.int64), 1, SP, 4)
    assert s.b.aten.add.Tensor(ids, 1).type.layout[SP] == Shard(1)
    assert s.b.aten.sum(ids).type.layout[SP] == PARTIAL


def test_a_comparison_with_a_parameter_has_no_gradient() -> None:
    s = Small()
    positive = s.b.aten.gt.Scalar(s.b.aten.select.int(s.w, 0, 0), 0)
    assert s.b.aten.masked_fill.Scalar(s.cut, positive, 0.0).type.layout[SP] == Shard(1)


def test_a_gradient_passes_by_one_of_several_results() -> None:
    s = Small()
    largest, _ = s.b.aten.topk(s.w, 2)
    with pytest.raises(LayoutError, match="Invariant, needs a gradient"):
        s.b.aten.matmul(s.cut, largest)


def test_replicated_values_stay_replicated() -> None:
    s = Small()
    doubled = s.b.aten.mul.Tensor(s.replicated(), 2.0)
    assert doubled.type.layout[SP] == REPLICATE
    with pytest.raises(LayoutError, match="needs a gradient"):
        s.b.aten.add.Tensor(doubled, s.w)


def test_an_identity_may_not_be_doubled() -> None:
    s = Small()
    with pytest.raises(LayoutError, match="takes an Invariant value"):
        s.b.autosp.invariant_to_replicate(s.replicated(), SP, 4)


def test_a_replicated_value_may_not_be_cut_or_returned() -> None:
    s = Small()
    with pytest.raises(LayoutError, match="takes an Invariant value"):
        s.b.autosp.shard(s.replicated(), 0, SP, 4)
    s.b.output(y=s.replicated())
    with pytest.raises(LayoutError, match="counted once per rank"):
        check_layouts(s.b.build())


def test_an_expanded_parameter_is_no_shard_of_its_own() -> None:
    s = Small()
    bias = s.b.parameter("bias", (1, 1, 4), torch.float64)
    made = s.b.program.graph.create("aten.expand", (bias, [2, 2, 4]), type=TensorType((2, 2, 4), torch.float64))
    with pytest.raises(LayoutError, match="needs a gradient"):
        infer_layout(made, s.b.program, SP, hint=Shard(1))


def test_joint_programs_know_no_replicate() -> None:
    s = Small(stage=Stage.JOINT)
    assert s.replicated().type == s.w.type
    assert s.b.aten.linear(s.cut, s.w).type.layout[SP] == Shard(1)


# -- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("complete", "message"), [(False, "leaves the program as P"), (True, "")])
def test_a_loss_must_be_complete(complete: bool, message: str) -> None:
    s = Small()
    loss = s.b.aten.sum(s.b.aten.linear(s.cut, s.replicated()))
    s.b.output(loss=s.b.autosp.all_reduce(loss, SP, 4) if complete else loss)
    program = s.b.build()
    if complete:
        check_layouts(program)
        return
    with pytest.raises(LayoutError, match=message):
        check_layouts(program)


def test_a_sharded_output_must_be_gathered() -> None:
    s = Small()
    s.b.output(y=s.cut)
    with pytest.raises(LayoutError, match=r"leaves the program as S\(1\)"):
        check_layouts(s.b.build())


@pytest.mark.parametrize("external", [False, True])
def test_a_partial_gradient_may_leave_only_for_a_trainer_that_sums_it(external: bool) -> None:
    s = Small(stage=Stage.JOINT, info={"grad_sync": "external" if external else "in_graph"})
    rows = s.b.aten.view(s.cut, [4, 4])
    gradient = s.b.aten.mm(s.b.aten.t(rows), rows)
    assert gradient.type.layout[SP] == PARTIAL
    s.b.output(loss=s.b.aten.sum(s.w))
    s.b.gradient("w", gradient)
    program = s.b.build()
    if external:
        check_layouts(program)
        return
    with pytest.raises(LayoutError, match="grad of w"):
        check_layouts(program)


@pytest.mark.parametrize("stage", [Stage.FORWARD, Stage.JOINT])
def test_a_stored_layout_that_does_not_follow_is_refused(stage: Stage) -> None:
    s = Small(stage=stage)
    doubled = s.b.aten.mul.Tensor(s.cut, 2.0)
    s.b.output(y=s.b.autosp.all_gather(doubled, 1, SP, 4))
    program = s.b.build()
    check_layouts(program)
    for wrong in (INVARIANT, REPLICATE, PARTIAL, Shard(0), Shard(1, 2)):
        doubled.type = doubled.tensor_type.on_axis(SP, wrong)
        with pytest.raises(LayoutError, match=f"%{doubled.name} is stored as"):
            check_layouts(program)


def test_inputs_are_whole() -> None:
    b = ProgramBuilder(mesh={SP: 2})
    x = b.input("x", (4,), layout={SP: Shard(0)})
    b.output(y=b.autosp.all_gather(x, 0, SP, 2))
    with pytest.raises(LayoutError, match="%x is stored as"):
        check_layouts(b.build())


# -- where a shard goes ----------------------------------------------------------------------------------------------


def joint(size: int = 2) -> ProgramBuilder:
    return ProgramBuilder(mesh={SP: size}, stage=Stage.JOINT)


def value_of(
    b: ProgramBuilder, shape: tuple[object, ...], placement: Placement, dtype: torch.dtype = torch.float64
) -> Value:
    """A value of a local shape, placed as a rule test needs it."""
    return b.input(f"v{len(b.program.graph)}", shape, dtype, layout={SP: placement})


def asked(
    b: ProgramBuilder, op: str, *args: object, shape: tuple[object, ...], hint: Placement | None = None
) -> object:
    """What a rule says of a node of a known local shape."""
    made = b.program.graph.create(op, args, type=TensorType(shape, torch.float64))
    return infer_layout(made, b.program, SP, hint=hint)


@pytest.mark.parametrize(
    ("before", "cut", "after", "expected"),
    [
        ((2, 4, 8), Shard(1), (8, 8), Shard(0, 2)),
        ((8, 8), Shard(0, 2), (2, 4, 8), Shard(1)),
        ((2, 4, 8), Shard(2), (2, 4, 2, 4), Shard(2)),
        ((2, 4, 8), Shard(0), (64,), Shard(0)),
        ((1, 4, 8), Shard(1), (1, 4, 2, 4), Shard(1)),
        ((1, 4, 8), Shard(1), (4, 8), Shard(0)),
        ((2, 1, 8), Shard(1), (2, 1, 2, 4), Shard(1)),
    ],
)
def test_views_carry_the_shard(before: tuple[int, ...], cut: Shard, after: tuple[int, ...], expected: Shard) -> None:
    b = joint()
    assert asked(b, "aten.view", value_of(b, before, cut), list(after), shape=after) == expected


def test_a_view_that_cuts_the_factor_is_refused() -> None:
    b = joint()
    with pytest.raises(LayoutError, match="not a factor"):
        asked(b, "aten.view", value_of(b, (3, 4), Shard(1)), [2, 6], shape=(2, 6))


def test_an_ambiguous_view_needs_a_hint() -> None:
    b = joint()
    heads = value_of(b, (2, 4, 1, 8), Shard(2))
    with pytest.raises(LayoutError, match="may stand in several dimensions"):
        asked(b, "aten.view", heads, [2, 4, 8], shape=(2, 4, 8))
    for hint in (Shard(2), Shard(1, 4)):
        assert asked(b, "aten.view", heads, [2, 4, 8], shape=(2, 4, 8), hint=hint) == hint
    with pytest.raises(LayoutError, match="may stand in several dimensions"):
        asked(b, "aten.view", heads, [2, 4, 8], shape=(2, 4, 8), hint=Shard(0))


def test_views_with_symbolic_extents() -> None:
    b = joint()
    batch, tokens = sympy.symbols("b s", positive=True, integer=True)
    x = value_of(b, (batch, tokens, 8), Shard(1))
    assert asked(b, "aten.view", x, [-1, 8], shape=(batch * tokens, 8)) == Shard(0, batch)
    flat = value_of(b, (batch * tokens, 8), Shard(0, batch))
    assert asked(b, "aten.view", flat, [-1, 8], shape=(batch, tokens, 2, 4)) == Shard(1)
    with pytest.raises(LayoutError):
        asked(b, "aten.view", value_of(b, (3, tokens, 8), Shard(1)), [2, -1], shape=(2, 12 * tokens))


def test_a_constant_fits_any_shard_and_a_counter_does_not() -> None:
    b = joint()
    x = value_of(b, (4, 8), Shard(0))
    ones = b.aten.full([4, 1], 1.0, dtype=torch.float64)
    assert b.aten.add.Tensor(x, b.aten.expand(ones, [4, 8])).type.layout[SP] == Shard(0)
    with pytest.raises(LayoutError, match="must be cut like the other operands"):
        b.aten.add.Tensor(x, b.aten.view(b.aten.arange(4), [4, 1]))


def test_an_expanded_gradient_takes_the_shard_of_the_forward_operand() -> None:
    b = joint()
    x = value_of(b, (2, 4), Shard(1))
    g = value_of(b, (), INVARIANT)
    total = b.aten.sum(x)
    with b.phase("backward"):
        spread = b.call("aten.expand", (g, [2, 4]), layout={})
        product = b.call("aten.mul.Tensor", (spread, x), layout={})
    for made in (total, spread):
        made.producer.meta["seq_nr"] = 7
    b.output(loss=b.autosp.all_reduce(total, SP, 2))
    program = b.build()
    x.producer.op = OpDef("test.source", None, "call_function", layout_rule=lambda ctx: Shard(1))
    infer_layouts(program)
    assert spread.type.layout[SP] == Shard(1)
    assert product.type.layout[SP] == Shard(1)


@pytest.mark.parametrize("known_by", ["number", "partner"])
def test_an_expanded_gradient_is_placed_like_a_value_of_its_shape(known_by: str) -> None:
    b = joint()

    def source(shape: tuple[int, ...], placement: Placement) -> Value:
        made = value_of(b, shape, placement)
        made.producer.op = OpDef("test.source", None, "call_function", layout_rule=lambda ctx: placement)
        return made

    x, wide, other, g = (
        source(*s) for s in (((2, 4), Shard(1)), ((2, 4, 8), Shard(0)), ((2, 4), Shard(0)), ((), INVARIANT))
    )
    # Of what the forward node reads one has the shape; what stands behind differentiation tells nothing.
    forward = b.aten.sum(x)
    forward.producer.op = OpDef("test.pair", None, "call_function", layout_rule=lambda ctx: PARTIAL)
    forward.producer.set_args((x, wide), {})
    with b.phase("backward"):
        earlier = b.call("aten.clone", (other,))
        spread = b.call("aten.expand", (g, [2, 4]), layout={})
        if known_by == "partner":
            b.call("aten.mul.Tensor", (spread, x), layout={})
    if known_by == "number":
        for made in (forward, earlier, spread):
            made.producer.meta["seq_nr"] = 7
    infer_layouts(b.program)
    assert spread.type.layout[SP] == Shard(1)


def test_an_expanded_gradient_that_nothing_tells_the_length_of_is_refused() -> None:
    b = joint()
    g = value_of(b, (), INVARIANT)
    with b.phase("backward"), pytest.raises(LayoutError, match="one rank's length or the whole model's"):
        b.aten.expand(g, [2, 4])
    assert b.aten.expand(g, [2, 4]).type.layout[SP] == INVARIANT


def test_an_expanded_partial_sum_is_no_shard() -> None:
    b = joint()
    terms = value_of(b, (4,), PARTIAL)
    assert asked(b, "aten.expand", terms, [3, 4], shape=(3, 4), hint=Shard(1)) == PARTIAL
    with pytest.raises(LayoutError, match="along a dimension that is cut"):
        asked(b, "aten.expand", terms, [3, 4], shape=(3, 4), hint=Shard(0))


def test_a_number_that_measures_a_shard_stays_out_of_arithmetic() -> None:
    b = joint()
    tokens = sympy.Symbol("s", positive=True, integer=True)
    x = value_of(b, (2, tokens), Shard(1))
    local = b.program.graph.create("aten.sym_size.int", (x, 1), type=ScalarType("int", tokens)).result
    made = b.program.graph.create("aten.div.Tensor", (x, local), type=x.type)
    with pytest.raises(LayoutError, match="measures a sharded dimension"):
        infer_layout(made, b.program, SP)


def test_an_operation_without_a_rule_takes_whole_operands_only() -> None:
    b = joint()
    assert b.aten.cdist(value_of(b, (2, 3), INVARIANT), value_of(b, (2, 3), INVARIANT)).type.layout[SP] == INVARIANT
    with pytest.raises(LayoutError, match="has no layout rule"):
        b.aten.cdist(value_of(b, (2, 3), Shard(0)), value_of(b, (2, 3), Shard(0)))


def test_random_numbers_are_not_the_same_on_every_rank() -> None:
    b = joint()
    x = value_of(b, (4, 4), INVARIANT)
    with pytest.raises(LayoutError, match="draw other numbers"):
        b.aten.rand_like(x)
    with pytest.raises(LayoutError, match="a mask of its own"):
        b.aten.dropout(x, 0.5, True)
    assert b.aten.dropout(x, 0.0, True).type.layout[SP] == INVARIANT


def test_other_axes_do_not_feel_a_collective() -> None:
    b = ProgramBuilder(mesh={"dp": 2, SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (4, 4, 8), torch.float64, layout={"dp": Shard(0), SP: Shard(1)})
    moved = b.autosp.all_to_all(x, 2, 1, SP, 2)
    assert moved.type.layout == Layout({"dp": Shard(0), SP: Shard(2)})
    with pytest.raises(LayoutError, match="two axes at once"):
        b.autosp.all_gather(b.input("y", (4, 4), layout={"dp": Shard(0), SP: Shard(0)}), 0, SP, 2)


# -- attention -------------------------------------------------------------------------------------------------------


def attention(stage: Stage, placement: Placement, facts: tuple[str, ...] = ()) -> tuple[Program, Node]:
    b = ProgramBuilder(mesh={SP: 2}, stage=stage, facts=facts)
    q, k, v = (value_of(b, (2, heads, 8, 4), placement) for heads in (4, 2, 2))
    out, _ = b.autosp.attention(q, k, v, causal=True)
    return b.program, out.producer.operands[0].producer


@pytest.mark.parametrize("stage", [Stage.FORWARD, Stage.JOINT])
@pytest.mark.parametrize("dim", [0, 1])
def test_attention_over_a_batch_or_over_heads_is_local(stage: Stage, dim: int) -> None:
    program, made = attention(stage, Shard(dim))
    assert infer_layout(made, program, SP) == (Shard(dim), Shard(dim))
    check_emittable(program)


def test_attention_over_cut_tokens_waits_for_a_strategy() -> None:
    program, made = attention(Stage.FORWARD, Shard(2))
    assert infer_layout(made, program, SP) == (Shard(2), Shard(2))
    with pytest.raises(UnsupportedError, match="no pass has resolved it") as error:
        check_emittable(program)
    assert "ulysses" in str(error.value)
    with pytest.raises(LayoutError, match="still cut along the tokens"):
        attention(Stage.FORWARD, Shard(2), facts=("attention-resolved",))
    with pytest.raises(LayoutError, match="still cut along the tokens"):
        attention(Stage.JOINT, Shard(2))


def test_attention_cut_along_the_head_width_is_refused() -> None:
    with pytest.raises(LayoutError, match="cannot run cut along"):
        attention(Stage.FORWARD, Shard(3))


# -- collectives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_layout_operator_does_what_its_layout_says(ranks: int) -> None:
    b = ProgramBuilder(mesh={SP: ranks})
    x = b.input("x", (2, 8, 4), torch.float64)
    cut = b.autosp.shard(x, 1, SP, ranks)
    moved = b.autosp.all_to_all(cut, 2, 1, SP, ranks)
    back = b.autosp.all_to_all(moved, 1, 2, SP, ranks)
    total = b.aten.sum.dim_IntList(b.aten.mul.Tensor(back, 2.0), [1])
    scattered = b.autosp.reduce_scatter(total, 1, SP, ranks)
    b.output(
        whole=b.autosp.all_gather(cut, 1, SP, ranks),
        again=b.autosp.all_gather(back, -2, SP, ranks),
        total=b.autosp.all_reduce(total, SP, ranks),
        pieces=b.autosp.all_gather(scattered, 1, SP, ranks),
    )
    program = b.build()
    check_layouts(program)
    batch = {"x": torch.randn(2, 8, 4, dtype=torch.float64)}
    outputs = simulate(program, batch).outputs[-1]
    torch.testing.assert_close(outputs["whole"], batch["x"])
    torch.testing.assert_close(outputs["again"], batch["x"])
    torch.testing.assert_close(outputs["total"], 2 * batch["x"].sum(1))
    torch.testing.assert_close(outputs["pieces"], 2 * batch["x"].sum(1))


@pytest.mark.parametrize(
    ("op", "placement", "message"),
    [
        (("all_gather", 0), Shard(1), "gathers dimension 0"),
        (("all_gather", 0), Shard(0, 2), "gathers dimension 0"),
        (("all_gather", 0), PARTIAL, "gathers dimension 0"),
        (("reduce_scatter", 0), Shard(0), "not a partial sum"),
        (("all_reduce",), INVARIANT, "not a partial sum"),
        (("all_to_all", 1, 0), Shard(1), "completes dimension 0"),
        (("shard", 0), Shard(0), "takes an Invariant value"),
        (("shard", 0), PARTIAL, "takes an Invariant value"),
        (("invariant_to_replicate",), Shard(0), "takes an Invariant value"),
    ],
)
def test_collectives_refuse_other_layouts(op: tuple[object, ...], placement: Placement, message: str) -> None:
    b = joint()
    x = value_of(b, (4, 4), placement)
    with pytest.raises(LayoutError, match=message):
        b.call(f"autosp.{op[0]}", (x, *op[1:], SP, 2))


def test_lowered_collectives_are_placed_exactly() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.LOWERED)
    partial = value_of(b, (2, 4), PARTIAL)
    cut = value_of(b, (2, 3, 4), Shard(2))

    def waited(op: str, *args: object) -> Placement:
        started = b.call(f"_c10d_functional.{op}", args)
        placement: Placement = b.call("_c10d_functional.wait_tensor", (started,)).type.layout[SP]
        return placement

    assert waited("all_reduce", partial, "sum", SP) == INVARIANT
    assert waited("reduce_scatter_tensor", partial, "sum", 2, SP) == Shard(0)
    assert waited("all_gather_into_tensor", cut, 2, SP) == INVARIANT
    assert waited("all_to_all_single", cut, [1, 1], [1, 1], SP) == Shard(1)
    with pytest.raises(LayoutError, match="reduction by 'avg'"):
        waited("all_reduce", partial, "avg", SP)
    with pytest.raises(LayoutError, match="blocks of different lengths"):
        waited("all_to_all_single", value_of(b, (4, 4), Shard(1)), [1, 3], [3, 1], SP)
    with pytest.raises(LayoutError, match="behind the block dimension"):
        waited("all_to_all_single", value_of(b, (2, 4), Shard(0)), [1, 1], [1, 1], SP)


def test_who_starts_an_exchange_says_where_the_ranks_stand() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.LOWERED)
    blocks = value_of(b, (2, 3, 4, 6), Shard(2))
    for hint in (Shard(1), Shard(2), Shard(3), Shard(0, 2)):
        exchanged = ("_c10d_functional.all_to_all_single", blocks, [1, 1], [1, 1], SP)
        assert asked(b, *exchanged, shape=(2, 3, 4, 6), hint=hint) == hint
    for impossible in (Shard(0), Shard(4)):
        assert asked(b, *exchanged, shape=(2, 3, 4, 6), hint=impossible) == Shard(1)


def test_an_axis_of_one_rank_says_nothing_once_its_collectives_are_erased() -> None:
    b = ProgramBuilder(mesh={SP: 1}, stage=Stage.LOWERED)
    x = b.input("x", (4,), torch.float64)
    b.output(loss=b.call("aten.sum", (x,), layout={SP: PARTIAL}))
    check_layouts(b.build())


def test_phases_do_not_matter_to_a_rule() -> None:
    b = joint()
    x = value_of(b, (4, 4), Shard(0))
    with b.phase(Phase.RECOMPUTE):
        assert b.aten.silu(x).type.layout[SP] == Shard(0)
