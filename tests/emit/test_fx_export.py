from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from autosp_ir.capture.fx_import import import_graph
from autosp_ir.emit.fx_export import executable, export_graph
from autosp_ir.errors import AutoSPError
from autosp_ir.ir.graph import Graph, Origin
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_ir.sim.fuzz import random_graph
from tests.emit.fx_equality import assert_same_graph

FUZZED = 500
CHUNK = 100


def exported() -> fx.GraphModule:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.lin(x).view(2, 3, 6).transpose(0, 1)
            return y.relu()

    gm: fx.GraphModule = torch.export.export(Model(), (torch.randn(6, 4),), strict=False).graph_module
    return gm


@pytest.mark.parametrize("start", range(0, FUZZED, CHUNK))
def test_fuzzed_graphs_round_trip(start: int) -> None:
    for seed in range(start, start + CHUNK):
        gm = export_graph(random_graph(seed))
        again = export_graph(import_graph(gm))
        assert_same_graph(gm, again)


def test_fuzzed_graphs_run_the_same_in_every_form() -> None:
    for seed in range(20):
        program = random_graph(seed)
        generator = torch.Generator().manual_seed(seed)
        inputs = [
            torch.rand(n.result.tensor_type.shape, generator=generator)
            if n.result.tensor_type.dtype.is_floating_point
            else torch.zeros(n.result.tensor_type.shape, dtype=n.result.tensor_type.dtype)
            for n in program.graph.inputs
        ]
        for got, expected in zip(executable(program)(*inputs), export_graph(program)(*inputs), strict=True):
            torch.testing.assert_close(got, expected, equal_nan=True)


def test_what_a_pass_made_is_exported_with_value_and_origin() -> None:
    program = import_graph(exported())
    rewriter = Rewriter(program, "my-pass")
    linear = program.find("aten.linear")[0]
    with rewriter.after(linear):
        made = rewriter.create("aten.mul.Tensor", (linear.result, 2.0))
    rewriter.replace(linear, made)
    nodes = {n.name: n for n in export_graph(program).graph.nodes}
    value = nodes[made.name].meta["val"]
    assert isinstance(value, FakeTensor)
    assert tuple(value.shape) == (6, 6)
    assert nodes[made.name].meta["stack_trace"] == linear.origin.stack
    assert list(nodes[made.name].meta["nn_module_stack"]) == ["lin"]
    assert nodes["view"].args[0] is nodes[made.name]


def test_values_follow_types() -> None:
    program = import_graph(exported())
    relu = program.find("aten.relu")[0].result
    stale = relu.producer.meta["val"]
    kept = next(n for n in export_graph(program).graph.nodes if n.name == relu.name).meta["val"]
    assert kept is stale
    relu.type = TensorType((3, 1, 6), torch.float32)
    fresh = next(n for n in export_graph(program).graph.nodes if n.name == relu.name).meta["val"]
    assert tuple(fresh.shape) == (3, 1, 6)
    assert relu.producer.meta["val"] is stale


def test_executable_views_hold_for_any_strides() -> None:
    program = import_graph(exported())
    runnable = executable(program)
    assert torch.ops.aten.reshape.default in {n.target for n in runnable.graph.nodes}
    graph = Graph()
    x = graph.create("placeholder", name="x", type=TensorType((2, 3), torch.float32))
    transposed = graph.create("aten.t", (x.result,), type=TensorType((3, 2), torch.float32))
    flat = graph.create("aten.view", (transposed.result, [6]), type=TensorType((6,), torch.float32))
    graph.create("output", ((flat.result,),))
    value = torch.arange(6.0).view(2, 3)
    torch.testing.assert_close(executable(Program(graph))(value)[0], value.t().reshape(6))


def test_a_name_that_hides_python_is_given_another() -> None:
    graph = Graph()
    x = graph.create("placeholder", name="x", type=TensorType((4,), torch.float32))
    first = graph.create("aten.neg", (x.result,), name="slice", type=TensorType((4,), torch.float32))
    second = graph.create("aten.neg", (first.result,), name="class", type=TensorType((4,), torch.float32))
    graph.create("output", (second.result,), origin=Origin())
    gm = export_graph(Program(graph))
    torch.testing.assert_close(gm(torch.ones(4)), torch.ones(4))


def test_an_unbound_attribute_is_named() -> None:
    graph = Graph()
    weight = graph.create("get_attr", ("weight",), type=TensorType((4,), torch.float32))
    graph.create("output", (weight.result,))
    with pytest.raises(AutoSPError, match="'weight'"):
        export_graph(graph)


def test_program_method_is_the_same_export() -> None:
    gm = exported()
    assert_same_graph(gm, import_graph(gm).to_graph_module())
