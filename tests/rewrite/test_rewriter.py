"""The rewriter: insertion points, inference, origins, replacement, and the events it reports."""

import operator

import pytest
import torch

from autosp_ir.errors import LayoutError, TerminationError, VerifyError
from autosp_ir.ir.graph import Origin, Phase, Value
from autosp_ir.ir.program import InputKind, OutputKind, OutputSpec, Program
from autosp_ir.ir.types import Invariant, Partial, Shard, TensorType
from autosp_ir.rewrite import ProgramBuilder, RewriteEvent, Rewriter


@pytest.fixture
def program() -> Program:
    b = ProgramBuilder()
    x = b.input("x", (2, 3))
    with b.source("model.py:7", module="layers.0"):
        y = b.aten.relu(x)
        z = b.aten.neg(y)
    b.output(z=z)
    return b.build()


def names(program: Program) -> list[str]:
    return [n.op.name for n in program.graph.nodes]


def value(program: Program, name: str) -> Value:
    return program.graph.value(name)


def test_created_nodes_are_typed_and_inherit_source_and_phase_from_the_anchor(program: Program) -> None:
    anchor = value(program, "neg").producer
    anchor.phase = Phase.BACKWARD
    rewriter = Rewriter(program, "toy")
    with rewriter.before(anchor):
        made = rewriter.create("aten.sum.dim_IntList", (value(program, "relu"), [1]))
    assert made.type == TensorType((2,), torch.float32)
    assert made.producer.origin == Origin("model.py:7", "layers.0", ("toy",))
    assert made.producer.phase is Phase.BACKWARD
    assert names(program) == ["placeholder", "aten.relu", "aten.sum.dim_IntList", "aten.neg", "output"]


def test_origin_from_wins_over_the_anchor(program: Program) -> None:
    relu, neg = value(program, "relu").producer, value(program, "neg").producer
    relu.origin = Origin("other.py:1", "embed", ("first",))
    rewriter = Rewriter(program, "second")
    with rewriter.before(neg):
        made = rewriter.create("aten.abs", (relu.result,), origin_from=relu)
    assert made.producer.origin == Origin("other.py:1", "embed", ("first", "second"))


def test_after_keeps_the_order_of_creation(program: Program) -> None:
    relu = value(program, "relu")
    rewriter = Rewriter(program)
    with rewriter.after(relu.producer):
        first = rewriter.create("aten.abs", (relu,))
        rewriter.create("aten.exp", (first,))
    assert names(program) == ["placeholder", "aten.relu", "aten.abs", "aten.exp", "aten.neg", "output"]


def test_outside_any_insertion_point_nodes_go_in_front_of_the_output(program: Program) -> None:
    Rewriter(program).create("aten.abs", (value(program, "relu"),))
    assert names(program)[-2:] == ["aten.abs", "output"]


def test_an_operation_that_rejects_its_operands_leaves_no_node_behind(program: Program) -> None:
    rewriter = Rewriter(program)
    with pytest.raises(VerifyError, match=r"aten\.mm rejects"):
        rewriter.create("aten.mm", (value(program, "x"), value(program, "x")))
    assert "aten.mm" not in names(program)
    program.verify()


def test_a_pass_that_visits_what_it_makes_is_stopped_and_named(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autosp_ir.rewrite.rewriter._LEAST_CHANGES", 1000)
    rewriter = Rewriter(program, "runaway")
    with pytest.raises(TerminationError, match="runaway"):
        for node in program.graph.nodes:
            if node.op.kind == "call_function":
                with rewriter.after(node):
                    rewriter.create("aten.neg", node.args)


def test_replace_moves_readers_and_erases(program: Program) -> None:
    rewriter = Rewriter(program, "toy")
    relu = value(program, "relu").producer
    with rewriter.before(relu):
        made = rewriter.create("aten.gelu", (value(program, "x"),))
    rewriter.replace(relu, made)
    assert names(program) == ["placeholder", "aten.gelu", "aten.neg", "output"]
    assert relu.erased
    assert value(program, "neg").producer.origin.passes == ("toy",)
    program.verify()


def test_wrapping_a_value_does_not_make_a_cycle(program: Program) -> None:
    rewriter = Rewriter(program)
    relu = value(program, "relu")
    with rewriter.after(relu.producer):
        inner = rewriter.create("aten.abs", (relu,))
        outer = rewriter.create("aten.mul.Tensor", (rewriter.create("aten.exp", (inner,)), relu))
    rewriter.replace(relu, outer)
    assert names(program) == [
        "placeholder",
        "aten.relu",
        "aten.abs",
        "aten.exp",
        "aten.mul.Tensor",
        "aten.neg",
        "output",
    ]
    program.verify()


def test_replace_keeps_the_readers_it_is_told_to_keep(program: Program) -> None:
    rewriter = Rewriter(program)
    relu, neg = value(program, "relu"), value(program, "neg").producer
    rewriter.replace(relu, value(program, "x"), keep=(neg,))
    assert neg.operands == (relu,)


def test_a_placeholder_that_is_replaced_stays(program: Program) -> None:
    rewriter = Rewriter(program)
    x = value(program, "x")
    with rewriter.before(value(program, "relu").producer):
        made = rewriter.create("aten.ones", ([2, 3],))
    rewriter.replace(x, made)
    assert program.graph.inputs == [x.producer]
    assert not x.uses


def test_an_erased_insertion_point_is_a_named_error(program: Program) -> None:
    rewriter = Rewriter(program)
    relu = value(program, "relu").producer
    with rewriter.before(relu):
        rewriter.replace(relu, value(program, "x"))
        with pytest.raises(VerifyError, match="was erased"):
            rewriter.create("aten.abs", (value(program, "x"),))


def test_erase_refuses_a_value_that_is_read(program: Program) -> None:
    with pytest.raises(VerifyError, match="still read it"):
        Rewriter(program).erase(value(program, "relu").producer)


def test_clone_node_maps_operands_and_infers_again(program: Program) -> None:
    b = ProgramBuilder()
    x, y = b.input("x", (2, 3)), b.input("y", (5, 7))
    z = b.aten.relu(x)
    b.output(z)
    built = b.build()
    rewriter = Rewriter(built, "toy")
    same = rewriter.clone_node(z.producer, after=z.producer)
    other = rewriter.clone_node(z.producer, before=built.graph.output_node, mapping={x: y}, phase=Phase.RECOMPUTE)
    assert same.type == z.type
    assert same.name == "relu_1"
    assert other.type == TensorType((5, 7), torch.float32)
    assert other.producer.phase is Phase.RECOMPUTE
    assert other.producer.origin.passes == ("toy",)


def test_unpack_reads_every_result_behind_the_producer() -> None:
    b = ProgramBuilder()
    x = b.input("x", (2, 6))
    b.output(x)
    program = b.build()
    rewriter = Rewriter(program)
    chunks = rewriter.unpack(rewriter.create("aten.split.Tensor", (x, 2, 1)))
    assert [c.type for c in chunks] == [TensorType((2, 2), torch.float32)] * 3
    assert all(c.producer.op.target is operator.getitem for c in chunks)
    with pytest.raises(VerifyError, match="one result"):
        rewriter.unpack(x)


def test_reinfer_follows_changed_types_downstream_only_as_far_as_they_change() -> None:
    b = ProgramBuilder()
    x = b.input("x", (2, 8))
    kept = b.aten.abs(x)
    y = b.aten.relu(x)
    total = b.aten.sum.dim_IntList(y, [1])
    scaled = b.aten.neg(total)
    b.output(kept, scaled)
    program = b.build()
    rewriter = Rewriter(program, "toy")
    half = program.graph.create("aten.slice.Tensor", (x, 1, 0, 4), before=y.producer).result
    half.type = program.infer(half.producer)
    rewriter.set_args(y.producer, (half,))
    rewriter.reinfer([y.producer])
    assert y.type == TensorType((2, 4), torch.float32)
    assert total.type == TensorType((2,), torch.float32)
    assert scaled.producer.origin.passes == ()
    program.verify()


def test_set_arg_replaces_by_schema_name(program: Program) -> None:
    rewriter = Rewriter(program)
    made = rewriter.create("aten.sum.dim_IntList", (value(program, "relu"), [1]))
    rewriter.set_arg(made.producer, "keepdim", True)
    rewriter.reinfer([made.producer])
    assert made.type == TensorType((2, 1), torch.float32)


def test_inputs_and_outputs_keep_the_signature_in_step(program: Program) -> None:
    rewriter = Rewriter(program, "toy")
    table = torch.ones(2, 3)
    kind = TensorType((2, 3), torch.float32)
    made = rewriter.add_input(InputKind.CONSTANT, "layers.0.table", kind, tensor=table)
    total = rewriter.create("aten.add.Tensor", (value(program, "neg"), made))
    rewriter.set_outputs([(OutputSpec("sum", OutputKind.USER_OUTPUT, "sum"), total)])
    assert [s.target for s in program.signature.inputs] == ["x", "layers.0.table"]
    assert [s.name for s in program.signature.outputs] == ["sum"]
    assert program.tensors["layers.0.table"] is table
    program.verify()


def test_dead_code_goes_and_is_reported(program: Program) -> None:
    events: list[RewriteEvent] = []
    rewriter = Rewriter(program, "toy", [events.append])
    dead = rewriter.create("aten.abs", (value(program, "x"),))
    deader = rewriter.create("aten.exp", (dead,))
    rewriter.finish()
    assert rewriter.dead_code() == 2
    assert set(events[-1].removed) == {dead.producer.id, deader.producer.id}


def test_a_block_and_the_replacement_behind_it_are_one_event(program: Program) -> None:
    events: list[RewriteEvent] = []
    rewriter = Rewriter(program, "toy", [events.append])
    relu, neg = value(program, "relu").producer, value(program, "neg").producer
    with rewriter.before(relu):
        made = rewriter.create("aten.gelu", (value(program, "x"),))
    rewriter.replace(relu, made)
    with rewriter.before(neg):
        rewriter.create("aten.exp", (made,))
    rewriter.finish()
    first, second = events
    assert first.pass_name == "toy"
    assert first.removed == (relu.id,)
    assert first.created == (made.producer.id,)
    assert first.changed == (neg.id,)
    assert first.ms > 0
    assert first.rule.startswith(__file__ + ":")
    assert second.removed == ()


def test_what_comes_and_goes_within_a_rewrite_is_not_reported(program: Program) -> None:
    events: list[RewriteEvent] = []
    rewriter = Rewriter(program, "toy", [events.append])
    with rewriter.rewrite("try-and-drop"):
        made = rewriter.create("aten.abs", (value(program, "x"),))
        rewriter.erase(made.producer)
        rewriter.replace(value(program, "relu"), value(program, "x"))
    (event,) = events
    assert event.rule == "try-and-drop"
    assert event.created == ()
    assert len(event.removed) == 1


def test_replacements_that_create_nothing_are_events_of_their_own(program: Program) -> None:
    events: list[RewriteEvent] = []
    rewriter = Rewriter(program, "toy", [events.append])
    rewriter.replace(value(program, "relu"), value(program, "x"))
    rewriter.replace(value(program, "neg"), value(program, "x"))
    assert [len(e.removed) for e in events] == [1, 1]


def sharded_program() -> tuple[Program, Value, Value]:
    b = ProgramBuilder(mesh={"sp": 4})
    x = b.autosp.shard(b.input("x", (2, 32, 8)), 1, "sp", 4)
    y = b.aten.relu(x)
    out = b.aten.view(y, [2, 8, 4, 2])
    b.output(b.aten.neg(out))
    return b.build(), x, y


def test_layouts_follow_from_operands() -> None:
    program, x, y = sharded_program()
    rewriter = Rewriter(program, "toy")
    with rewriter.after(y.producer):
        heads = rewriter.create("autosp.all_to_all", (y, 2, 1, "sp", 4))
        total = rewriter.create("aten.sum.dim_IntList", (x, [1]))
        whole = rewriter.create("autosp.all_reduce", (total, "sp", 4))
    assert heads.tensor_type.layout["sp"] == Shard(2)
    assert total.tensor_type.layout["sp"] == Partial()
    assert whole.tensor_type.layout["sp"] == Invariant()


def test_a_layout_that_does_not_follow_is_refused_and_leaves_nothing() -> None:
    sharded, x, _ = sharded_program()
    rewriter = Rewriter(sharded)
    before = len(sharded.graph)
    with pytest.raises(LayoutError):
        rewriter.create("aten.softmax.int", (x, 1))
    assert len(sharded.graph) == before


def test_reinfer_moves_layouts_downstream() -> None:
    program, x, y = sharded_program()
    rewriter = Rewriter(program, "toy")
    with rewriter.before(y.producer):
        gathered = rewriter.create("autosp.all_gather", (x, 1, "sp", 4, "invariant"))
    rewriter.replace(x, gathered)
    view = program.find("aten.view")[0]
    rewriter.set_arg(view, "size", [2, 32, 4, 2])
    rewriter.reinfer([y.producer])
    assert y.tensor_type.shape == (2, 32, 8)
    last = program.find("aten.neg")[0].result.tensor_type
    assert (last.shape, last.layout["sp"]) == ((2, 32, 4, 2), Invariant())
    program.verify()


def test_a_given_layout_is_taken_as_it_is() -> None:
    program, _, _ = sharded_program()
    made = Rewriter(program).create("aten.ones", ([2, 8],), layout={"sp": Shard(1)})
    assert made.tensor_type.layout["sp"] == Shard(1)
