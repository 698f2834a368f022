import copy
import operator
from typing import Any

import pytest
import torch
from torch import fx, nn

from autosp_ir.capture.fx_import import import_graph
from autosp_ir.emit.fx_export import executable, export_graph
from autosp_ir.errors import ImportGraphError
from autosp_ir.ir.graph import Graph
from autosp_ir.ir.program import InputKind, OutputKind
from autosp_ir.ir.types import ObjectType, ScalarType, TensorType, TupleType

from ..emit.fx_equality import assert_same_graph


class TorchLevel(nn.Module):
    """Methods, submodules, attributes, builtins, nested results, keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 4), nn.GELU())])
        self.register_buffer("mask", torch.ones(8))

    def forward(self, input: torch.Tensor, *rest: Any, scale: float = 2.0) -> Any:
        x = self.lin(input) * self.mask + getattr(input, "dtype").itemsize  # noqa: B009 - FX traces it as a call
        x = self.blocks[0](x).view(input.size(0), -1).transpose(0, 1)
        first, second = x.split([4, 4], dim=0)
        y = torch.cat([first, second], dim=0)[1:, None, ...]
        z = torch.nn.functional.pad(self.blocks[1](y.squeeze(1).T[:, :8].new_zeros(2, 8)), (0, 1), value=scale)
        return {"loss": z.sum(dim=[0, 1], keepdim=False), "state": (y, [z, None, 3])}


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.count = nn.Buffer(torch.zeros(()))

    def forward(self, ids: torch.Tensor, *, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            self.count.copy_(self.count + 1)
            positions = torch.arange(ids.shape[1])
        x = self.norm(self.embed(ids)) + positions[None, :, None]
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        logits = out @ self.embed.weight.T
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def graph_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    graph_module: fx.GraphModule = program.graph_module
    return graph_module


def exported(dynamic: bool) -> fx.GraphModule:
    ids = torch.randint(0, 11, (2, 6))
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {"ids": {1: length}, "labels": {1: length}} if dynamic else None
    program = torch.export.export(
        Decoder(),
        (ids,),
        {"labels": ids.clone()},
        dynamic_shapes=shapes,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=dynamic,
    )
    return graph_of(program)


def test_torch_level_graph_round_trips_and_runs() -> None:
    model = TorchLevel()
    gm = fx.symbolic_trace(model)
    program = import_graph(gm)
    assert_same_graph(gm, export_graph(program))
    x = torch.randn(2, 8)
    for after in (export_graph(program), executable(program)):
        torch.testing.assert_close(after(x), model(x))


def test_torch_level_signature_and_example_types() -> None:
    gm = fx.symbolic_trace(TorchLevel())
    program = import_graph(gm, (torch.randn(2, 8),))
    assert [(i.target, i.kind) for i in program.signature.inputs] == [
        ("input", InputKind.USER_INPUT),
        ("scale", InputKind.USER_INPUT),
        ("rest", InputKind.USER_INPUT),
    ]
    assert [o.name for o in program.signature.outputs] == ["loss", "state"]
    assert program.signature.outputs[0].kind is OutputKind.USER_OUTPUT
    view = program.find("method.view")[0].result
    assert isinstance(view.type, TensorType) and view.type.shape == (2, 8)
    assert isinstance(program.find("method.split")[0].result.type, TupleType)
    assert_same_graph(gm, export_graph(program))


def test_untyped_values_stay_untyped() -> None:
    program = import_graph(fx.symbolic_trace(TorchLevel()))
    assert program.find("method.view")[0].result.type == ObjectType("untyped")


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_graph_round_trips(dynamic: bool) -> None:
    gm = exported(dynamic)
    program = import_graph(gm)
    assert_same_graph(gm, export_graph(program))
    assert_same_graph(gm, export_graph(program.clone()))
    scalars = [n for n in program.graph.nodes if n.results and isinstance(n.result.type, ScalarType)]
    assert bool(scalars) is dynamic
    sources = {n.origin.source for n in program.graph.nodes if n.op.schema is not None}
    assert len(sources) > 4
    assert all(s is None or s.startswith("test_fx_import.py:") for s in sources)
    assert "qkv" in {n.origin.module for n in program.find("aten.linear")}


def test_unlifted_export_keeps_its_calling_convention() -> None:
    ids = torch.randint(0, 11, (2, 6))
    gm = torch.export.export(Decoder().eval(), (ids,), {"labels": ids.clone()}, strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    after = export_graph(import_graph(gm))
    assert_same_graph(gm, after)
    torch.testing.assert_close(after(ids, labels=ids), gm(ids, labels=ids))


def test_nested_graphs_round_trip() -> None:
    class Conditional(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = torch.cond(x.sum() > 0, lambda a: a.sin() * torch.tensor([2.0]), lambda a: a.cos(), (x,))
            assert isinstance(chosen, torch.Tensor)
            return chosen

    gm: fx.GraphModule = torch.export.export(Conditional(), (torch.ones(3),), strict=False).graph_module
    program = import_graph(gm)
    nested = [v for v in program.attrs.values() if isinstance(v, Graph)]
    assert len(nested) == 2
    assert any(n.is_op("aten.cos") for g in nested for n in g.nodes)
    after = export_graph(program)
    assert_same_graph(gm, after)
    torch.testing.assert_close(after(torch.ones(3)), gm(torch.ones(3)))


def test_names_that_python_knows_are_kept() -> None:
    class Odd(nn.Module):
        def forward(self, input: torch.Tensor, output: torch.Tensor, max: torch.Tensor) -> torch.Tensor:
            return input + output.sum() * max

    gm = torch.export.export(Odd(), tuple(torch.ones(2) * i for i in range(3)), strict=False).graph_module
    assert_same_graph(gm, export_graph(import_graph(gm)))


def test_every_operation_name_resolves_to_its_target() -> None:
    from autosp_ir.ir.ops import _resolve

    for gm in (fx.symbolic_trace(TorchLevel()), exported(dynamic=True)):
        for node in import_graph(gm).graph.nodes:
            if node.op.kind == "call_function":
                assert _resolve(node.op.name)[0] is node.op.target or _resolve(node.op.name)[0] == node.op.target


def test_missing_output_is_refused() -> None:
    graph = fx.Graph()
    graph.call_function(operator.neg, (graph.placeholder("x"),))
    with pytest.raises(ImportGraphError, match="no output node"):
        import_graph(fx.GraphModule({}, graph))


def test_missing_attribute_is_refused() -> None:
    gm = fx.symbolic_trace(TorchLevel())
    del gm.mask
    with pytest.raises(ImportGraphError, match="'mask'"):
        import_graph(gm)


def test_use_before_definition_is_refused() -> None:
    gm = copy.deepcopy(fx.symbolic_trace(nn.ReLU()))
    relu = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "output"))
    late = gm.graph.call_function(operator.neg, (relu,))
    relu.append(late)
    relu.replace_all_uses_with(late)
    late.args = (relu,)
    relu.args = (late,)
    with pytest.raises(ImportGraphError, match="not defined in front"):
        import_graph(gm)


def test_example_inputs_that_do_not_run_are_refused() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 4)))
    with pytest.raises(ImportGraphError, match="do not run"):
        import_graph(gm, (torch.randn(2, 7),))
    with pytest.raises(ImportGraphError, match="2 example inputs"):
        import_graph(gm, (torch.randn(2, 8), torch.randn(2)))
