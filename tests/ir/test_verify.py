"""Each rule of the verifier, broken once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
import torch.distributed._functional_collectives

import autosp_ir.comm.ops
from autosp_ir._torch_compat import declare_symbol
from autosp_ir.errors import LayoutError, VerifyError
from autosp_ir.ir import verify
from autosp_ir.ir.graph import Graph, Node, Phase
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature, Stage
from autosp_ir.ir.types import INVARIANT, NoneType, ObjectType, ScalarType, Shard, TupleType
from autosp_ir.ir.verify import check_effects, effect_order, register_check, verify_program
from autosp_ir.ir.verify_comm import check_same_on_every_rank
from autosp_ir.sim.fuzz import random_graph
from tests.ir.programs import find, linear, node, tensor

assert autosp_ir.comm.ops  # registers the autosp:: operators


def broken(program: Program, message: str, kind: type[VerifyError] = VerifyError) -> VerifyError:
    with pytest.raises(kind, match=message) as caught:
        program.verify()
    return caught.value


def test_valid_programs_verify() -> None:
    linear().verify()
    for seed in range(60):
        random_graph(seed).verify()


# Structure -----------------------------------------------------------------------------------------------------------


def test_an_operand_must_be_defined_in_front() -> None:
    program = linear()
    program.graph.move(find(program, "split"), after=find(program, "half"))
    error = broken(program, "%split is read before it is defined")
    assert "--> %half" in str(error)
    assert "What you can do: move the definition" in str(error)


def test_operands_of_another_graph_are_refused() -> None:
    program = linear()
    find(program, "half").set_args((linear().graph.value("split"), 1))
    broken(program, "%split belongs to another graph")


def test_an_erased_value_may_not_be_read() -> None:
    program = linear()
    extra = program.graph.create("aten.neg", (program.graph.value("x"),), type=tensor(2, 6, 4), name="extra")
    value = extra.result
    program.graph.erase(extra)
    find(program, "linear").set_args((value, program.graph.value("weight")))
    broken(program, "%extra was erased but is still read")


def test_arguments_and_operands_must_agree() -> None:
    program = linear()
    find(program, "linear").args = (program.graph.value("x"), program.graph.value("x"))
    broken(program, "the operand list differs from the arguments")


def test_use_lists_must_be_exact() -> None:
    program = linear()
    program.graph.value("x")._users.clear()
    broken(program, "the use list of %x does not match")


def test_names_must_be_unique() -> None:
    program = linear()
    program.graph.value("half").name = "split"
    broken(program, "two values are called %split")


def test_a_result_must_name_its_producer() -> None:
    program = linear()
    program.graph.value("half").producer = find(program, "x")
    broken(program, "%half names <x = placeholder> as its producer")


def test_a_node_defines_one_value() -> None:
    program = linear()
    find(program, "total").results.append(program.graph.value("half"))
    broken(program, "defines 2 values")


def test_placeholders_come_first() -> None:
    program = linear()
    program.graph.move(program.graph.create("placeholder", type=tensor(), name="late"), after=find(program, "total"))
    broken(program, "placeholder %late stands behind other nodes")


def test_there_is_one_output_at_the_end() -> None:
    program = linear()
    program.graph.move(program.graph.output_node, before=find(program, "total"))
    broken(program, "the output node is not the last node")
    program.graph.erase(program.graph.output_node)
    broken(program, "the graph has 0 output nodes")


def test_what_a_program_returns_stands_in_its_list() -> None:
    program = linear()
    program.graph._output = linear().graph.output_node
    broken(program, "graph.output_node is not the output node in the list")


# Signature -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.inputs.reverse(), r"lists the inputs \['x', 'weight'\] but the placeholders are"),
        (lambda s: s.inputs.pop(), r"lists the inputs \['weight'\]"),
        (lambda s: s.outputs.append(s.outputs[0]), "lists 2 outputs but the graph returns 1"),
        (
            lambda s: s.outputs.__setitem__(0, OutputSpec("m", OutputKind.BUFFER_MUTATION, "mean")),
            "is the mutation of 'mean', which is no input",
        ),
        (
            lambda s: s.outputs.__setitem__(0, OutputSpec("g", OutputKind.GRADIENT, "bias")),
            "is the gradient of 'bias', which is no input",
        ),
        (
            lambda s: s.outputs.__setitem__(0, OutputSpec("g", OutputKind.GRADIENT, "proj.weight")),
            "is a gradient, but the program is at stage forward",
        ),
    ],
)
def test_the_signature_matches_the_graph(change: Callable[[Signature], None], message: str) -> None:
    program = linear()
    change(program.signature)
    broken(program, message)


# Types ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("linear", tensor(2, 6, 9), r"%linear is stored as f32\[2, 6, 9\] but aten.linear returns f32\[2, 6, 8\]"),
        ("linear", tensor(2, 6, 8, dtype=torch.float64), r"is stored as f64\[2, 6, 8\]"),
        ("linear", tensor(2, 6, 8, device="cuda:0"), r"is stored as f32\[2, 6, 8\]@cuda:0"),
        ("total", tensor(1), r"is stored as f32\[1\] but aten.sum.dim_IntList returns f32\[\]"),
        ("split", TupleType((tensor(2, 6, 4),)), "%split is stored as"),
        ("half", NoneType(), "is stored as None"),
        ("total", ScalarType("float"), "is stored as float"),
        ("total", ObjectType("untyped"), "%total has no type"),
    ],
)
def test_stored_types_are_the_inferred_ones(name: str, kind: Any, message: str) -> None:
    program = linear()
    program.graph.value(name).type = kind
    broken(program, message)


def test_layouts_are_no_part_of_the_comparison() -> None:
    program = linear()
    program.mesh = {"sp": 2}
    program.graph.value("x").type = tensor(2, 6, 4, sp=INVARIANT)
    program.verify()


def test_an_operation_that_rejects_its_operands_is_named() -> None:
    program = linear()
    find(program, "linear").set_args((program.graph.value("weight"), program.graph.value("x")))
    broken(program, "aten.linear rejects its operands")


@pytest.mark.parametrize("index", [2, -3])
def test_a_getitem_stays_in_range(index: int) -> None:
    program = linear()
    find(program, "half").set_args((program.graph.value("split"), index))
    broken(program, f"%half reads result {index} of %split, which has 2")


def test_extents_are_compared_as_expressions() -> None:
    length = sympy.Symbol("s0", integer=True, positive=True)
    graph = Graph()
    x = node(graph, "placeholder", tensor(length, 4), name="x")
    made = node(graph, "aten.cat", tensor(length + length, 4), [x, x], name="made")
    graph.create("output", ((made,),))
    signature = Signature([InputSpec("x", InputKind.USER_INPUT, "x")], [OutputSpec("o", OutputKind.USER_OUTPUT, "o")])
    program = Program(graph, signature)
    declare_symbol(program.fake_mode.shape_env, length, 8, 2, None)
    program.verify()
    made.type = tensor(length + 1, 4)
    broken(program, r"stored as f32\[s0 \+ 1, 4\] but aten.cat returns f32\[2\*s0, 4\]")
    made.type = tensor(16, 4)
    broken(program, r"stored as f32\[16, 4\] but aten.cat returns f32\[2\*s0, 4\]")
    known = program.fake_mode.shape_env
    assert known is not None
    torch._check(known.create_symintnode(length, hint=8) == 8)
    program.verify()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tensor(2, 6, 4, tp=Shard(1)), "names the axis 'tp', which the mesh"),
        (tensor(2, 6, 4, sp=Shard(3)), "has 3 dimensions but is sharded along dimension 3"),
        (tensor(2, 6, 4, sp=Shard(-1)), "sharded along dimension -1"),
    ],
)
def test_layouts_name_axes_and_dimensions_that_exist(kind: Any, message: str) -> None:
    program = linear()
    program.mesh = {"sp": 2}
    program.graph.value("x").type = kind
    broken(program, message, LayoutError)


def test_nested_graphs_are_verified() -> None:
    program = linear()
    nested = linear().graph
    nested.value("half").type = tensor(9)
    program.attrs["body"] = nested
    broken(program, r"in nested graph 'body': %half is stored as f32\[9\]")


# Phases and effects --------------------------------------------------------------------------------------------------


def joint() -> Program:
    program = linear()
    program.stage = Stage.JOINT
    return program


def test_forward_reads_nothing_of_the_backward() -> None:
    program = joint()
    find(program, "linear").phase = Phase.BACKWARD
    broken(program, "%split is of phase forward but reads %linear of phase backward")
    find(program, "split").phase = Phase.RECOMPUTE
    broken(program, "%split is of phase recompute but reads %linear of phase backward")


def test_a_forward_program_has_one_phase() -> None:
    program = linear()
    find(program, "total").phase = Phase.BACKWARD
    broken(program, "%total is of phase backward, but the program is at stage forward")


def with_noise(program: Program) -> tuple[Node, Node]:
    graph = program.graph
    settings = {"dtype": torch.float32}
    first = graph.create("aten.rand", ([2],), settings, type=tensor(2), name="first")
    return first, graph.create("aten.rand", ([2],), settings, type=tensor(2), name="second")


def test_random_numbers_are_not_drawn_again() -> None:
    program = joint()
    first, _ = with_noise(program)
    program.verify()
    first.phase = Phase.RECOMPUTE
    broken(program, "%first is recomputed, but aten.rand gives another result")


def test_nothing_is_recomputed_across_a_mutation() -> None:
    program = joint()
    graph = program.graph
    view = graph.create("aten.view", (graph.value("x"), [-1]), type=tensor(48), name="flat")
    graph.create("aten.add_.Tensor", (view.result, 1), type=tensor(48), name="added")
    graph.create("aten.neg", (graph.value("x"),), type=tensor(2, 6, 4), name="again", phase=Phase.RECOMPUTE)
    broken(program, "%again is recomputed from %x, which %added has overwritten")


def test_effects_keep_their_order() -> None:
    program = joint()
    first, second = with_noise(program)
    order = effect_order(program)
    assert order == ("first", "second")
    verify_program(program, before=order)
    program.graph.move(second, before=first)
    with pytest.raises(VerifyError, match="%second has an effect and was moved across another one"):
        verify_program(program, before=order)
    program.graph.erase(first)
    check_effects(program, before=order)


# Collectives ---------------------------------------------------------------------------------------------------------


def lowered() -> tuple[Program, Node, Node]:
    program = linear()
    program.stage, program.mesh = Stage.LOWERED, {"sp": 2}
    graph = program.graph
    total = graph.value("total")
    start = graph.create("_c10d_functional.all_reduce", (total, "sum", "sp"), type=tensor(), name="start")
    wait = graph.create("_c10d_functional.wait_tensor", (start.result,), type=tensor(), name="wait")
    graph.output_node.set_args(((wait.result,),))
    return program, start, wait


@pytest.fixture
def only_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks that other rooms registered."""
    monkeypatch.setattr(verify, "_registered", [])


@pytest.mark.usefixtures("only_structure")
class TestCollectives:
    def test_a_start_with_one_wait_is_fine(self) -> None:
        lowered()[0].verify()

    def test_a_start_needs_a_wait(self) -> None:
        program, _, wait = lowered()
        program.graph.output_node.set_args(((program.graph.value("total"),),))
        program.graph.erase(wait)
        broken(program, "the collective started by %start is awaited never")

    def test_a_start_is_awaited_once(self) -> None:
        program, start, _ = lowered()
        program.graph.create("_c10d_functional.wait_tensor", (start.result,), type=tensor())
        broken(program, "started by %start is awaited 2 times")

    def test_nothing_reads_an_unfinished_result(self) -> None:
        program, start, _ = lowered()
        program.graph.create("aten.neg", (start.result,), type=tensor())
        broken(program, "aten.neg reads %start, which _c10d_functional.all_reduce has only started")

    def test_a_wait_waits_for_a_start(self) -> None:
        program, _, _ = lowered()
        program.graph.create(
            "_c10d_functional.wait_tensor", (program.graph.value("total"),), type=tensor(), name="idle"
        )
        broken(program, "%idle waits for %total, which starts no collective")

    def test_every_result_of_a_coalesced_start_is_awaited(self) -> None:
        program, _, _ = lowered()
        graph = program.graph
        both = [graph.value("total"), graph.value("total")]
        pair = TupleType((tensor(), tensor()))
        start = node(graph, "_c10d_functional.all_reduce_coalesced", pair, both, "sum", "sp", name="many")
        first = node(graph, "operator.getitem", tensor(), start, 0)
        node(graph, "_c10d_functional.wait_tensor", tensor(), first)
        broken(program, "result 1 of the start %many is never awaited")
        second = node(graph, "operator.getitem", tensor(), start, 1)
        node(graph, "_c10d_functional.wait_tensor", tensor(), second)
        program.verify()
        node(graph, "operator.getitem", tensor(), start, 1, name="twice")
        broken(program, "%twice reads the unfinished results of %many")

    def test_a_number_of_the_rank_is_no_attribute_of_a_collective(self) -> None:
        program, _, _ = lowered()
        graph = program.graph
        rank = node(graph, "autosp.axis_index", tensor(dtype=torch.int64), "sp", 2)
        more = node(graph, "aten.add.Tensor", tensor(dtype=torch.int64), rank, 1)
        dim = node(
            graph, "aten._local_scalar_dense", ScalarType("int", sympy.Symbol("u0", integer=True)), more, name="d"
        )
        node(graph, "autosp.shard", tensor(1, 6, 4), graph.value("x"), 0, "sp", 2)
        program.verify()
        node(graph, "autosp.reduce_scatter", tensor(2, 6, 2), graph.value("half"), dim, "sp", 2)
        broken(program, "%d depends on the rank and is an attribute of the collective autosp.reduce_scatter")

    def test_a_number_that_one_operand_takes_from_the_rank_depends_on_it(self) -> None:
        program, _, _ = lowered()
        graph = program.graph
        rank = node(graph, "autosp.axis_index", tensor(dtype=torch.int64), "sp", 2)
        start, extent = (
            node(graph, "aten._local_scalar_dense", ScalarType("int", sympy.Symbol(f"u{i}", integer=True)), source)
            for i, source in enumerate((node(graph, "aten.zeros", tensor(dtype=torch.int64), []), rank))
        )
        node(graph, "autosp.reduce_scatter", tensor(2, 6, 2), graph.value("half"), start, "sp", 2)
        check_same_on_every_rank(program)
        both = node(graph, "operator.add", ScalarType("int", None), start, extent, name="both")
        node(graph, "autosp.reduce_scatter", tensor(2, 6, 2), graph.value("half"), both, "sp", 2)
        with pytest.raises(VerifyError, match="%both depends on the rank"):
            check_same_on_every_rank(program)

    def test_an_extent_of_the_rank_is_not_sent(self) -> None:
        program, _, _ = lowered()
        graph = program.graph
        extent = sympy.Symbol("u0", integer=True)
        rank = node(graph, "autosp.axis_index", tensor(dtype=torch.int64), "sp", 2)
        count = node(graph, "aten._local_scalar_dense", ScalarType("int", extent), rank)
        ones = node(graph, "aten.ones", tensor(extent), [count], name="ones")
        node(graph, "autosp.all_reduce", tensor(extent), ones, "sp", 2)
        with pytest.raises(VerifyError, match="the extent of %ones depends on the rank"):
            check_same_on_every_rank(program)

    def test_what_is_equal_on_every_rank_again_may_be_used(self) -> None:
        program, _, _ = lowered()
        graph = program.graph
        rank = node(graph, "autosp.axis_index", tensor(dtype=torch.int64), "sp", 2)
        total = node(graph, "autosp.all_reduce", tensor(dtype=torch.int64), rank, "sp", 2)
        dim = node(graph, "aten._local_scalar_dense", ScalarType("int", sympy.Symbol("u0", integer=True)), total)
        node(graph, "autosp.reduce_scatter", tensor(2, 6, 2), graph.value("half"), dim, "sp", 2)
        check_same_on_every_rank(program)

    def test_a_branch_over_a_collective_does_not_depend_on_the_rank(self) -> None:
        program, _, _ = lowered()
        graph = program.graph
        branch = lowered()[0].graph
        assert any(n.op.has(Trait.COLLECTIVE) for n in branch.nodes)
        program.attrs["branch"] = branch
        rank = node(graph, "autosp.axis_index", tensor(dtype=torch.int64), "sp", 2)
        test = node(graph, "aten.eq.Scalar", tensor(dtype=torch.bool), rank, 0)
        body = node(graph, "get_attr", ObjectType("Graph"), "branch", name="branch")
        operands = (graph.value("weight"), graph.value("x"))
        node(graph, "hop.cond", TupleType((tensor(),)), test, body, body, operands, name="cond")
        broken(program, "%cond branches on the rank, and the branch %branch holds collectives")

    def test_a_loop_over_a_collective_depends_on_the_rank_in_none_of_its_operands(self) -> None:
        program, _, _ = lowered()
        graph = program.graph
        program.attrs["body"] = lowered()[0].graph
        rank = node(graph, "autosp.axis_index", tensor(dtype=torch.int64), "sp", 2)
        body = node(graph, "get_attr", ObjectType("Graph"), "body", name="body")
        loop = graph.create("hop.while_loop", (body, body, (graph.value("x"),)), type=TupleType((tensor(2, 6, 4),)))
        check_same_on_every_rank(program)
        loop.set_args((body, body, (graph.value("x"), rank)), {})
        with pytest.raises(VerifyError, match="branches on the rank"):
            check_same_on_every_rank(program)


# Registered checks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    checks: list[Any] = []
    monkeypatch.setattr(verify, "_registered", checks)
    yield checks


def test_other_rooms_add_checks_for_their_stages(registry: list[Any]) -> None:
    @register_check(stages=[Stage.JOINT])
    def refuses(program: Program) -> None:
        raise LayoutError(f"no {program.stage}")

    register_check(refuses, stages=[Stage.JOINT])
    assert len(registry) == 1
    linear().verify()
    broken(joint(), "no joint", LayoutError)


# Speed ---------------------------------------------------------------------------------------------------------------


def test_two_thousand_nodes_of_repeated_layers_verify_in_a_second() -> None:
    graph = Graph()
    weight = node(graph, "placeholder", tensor(16, 16), name="w")
    x = node(graph, "placeholder", tensor(2, 8, 16), name="x")
    names = [InputSpec("w", InputKind.PARAMETER, "w"), InputSpec("x", InputKind.USER_INPUT, "x")]
    for _ in range(250):
        linear_ = node(graph, "aten.linear", tensor(2, 8, 16), x, weight)
        view = node(graph, "aten.view", tensor(2, 8, 4, 4), linear_, [2, 8, 4, 4])
        heads = node(graph, "aten.transpose.int", tensor(2, 4, 8, 4), view, 1, 2)
        soft = node(graph, "aten.softmax.int", tensor(2, 4, 8, 4), heads, -1)
        back = node(graph, "aten.transpose.int", tensor(2, 8, 4, 4), soft, 1, 2)
        flat = node(graph, "aten.reshape", tensor(2, 8, 16), back, [2, 8, -1])
        act = node(graph, "aten.gelu", tensor(2, 8, 16), flat, kwargs={"approximate": "tanh"})
        x = node(graph, "aten.add.Tensor", tensor(2, 8, 16), act, x)
    graph.create("output", ((x,),))
    program = Program(graph, Signature(names, [OutputSpec("o", OutputKind.USER_OUTPUT, "o")]))
    start = time.process_time()
    program.verify()
    assert len(graph) > 2000
    assert time.process_time() - start < 1.0
