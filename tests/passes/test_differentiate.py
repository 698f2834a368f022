from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn

import autosp_ir.comm.ops  # noqa: F401  (registers torch.ops.autosp)
from autosp_ir.capture.fx_import import import_graph
from autosp_ir.emit.fx_export import export_graph
from autosp_ir.errors import AutoSPError, PassError, UnsupportedError
from autosp_ir.ir.graph import Phase
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Stage
from autosp_ir.ir.types import Layout, Shard, TensorType
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.sim.lockstep import simulate
from tests.emit.fx_equality import assert_same_graph
from tests.passes.joints import (
    TinyDecoder,
    assert_same_results,
    autograd_results,
    decoder,
    decoder_batch,
    decoder_tangents,
    forward_program,
    run_joint,
)
from tests.sim.programs import dense_gradients, mlp_inputs, parallel_mlp, traced

torch.set_num_threads(1)


def differentiated(program: Program) -> Program:
    return PassManager("differentiate").run(program).program


@pytest.fixture(scope="module")
def model() -> TinyDecoder:
    return decoder()


@pytest.fixture(scope="module")
def joint(model: TinyDecoder) -> Program:
    return differentiated(forward_program(model, decoder_batch()))


def test_gradients_are_autograds(model: TinyDecoder, joint: Program) -> None:
    batch, tangents = decoder_batch(), decoder_tangents()
    assert_same_results(run_joint(joint, batch, tangents), autograd_results(model, batch, tangents))


def test_signature_names_everything(joint: Program) -> None:
    assert joint.stage is Stage.JOINT
    assert "differentiated" in joint.facts
    tangents = [i for i in joint.signature.inputs if i.kind is InputKind.TANGENT]
    assert [(t.name, t.target) for t in tangents] == [("tangent_out0", "out0"), ("tangent_out1", "out1")]
    gradients = [o.target for o in joint.signature.outputs if o.kind is OutputKind.GRADIENT]
    assert gradients == ["embed.weight", "norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "gate.weight", "scale"]
    assert joint.signature.input(InputKind.PARAMETER, "gate.bias") is not None


def test_phases_and_origins(joint: Program) -> None:
    forward = [n for n in joint.graph.nodes if n.phase is Phase.FORWARD]
    tangents = {i.name for i in joint.signature.inputs if i.kind is InputKind.TANGENT}
    assert all(v.producer.phase is Phase.FORWARD for n in forward for v in n.operands)
    assert not any(n.name in tangents for n in forward)
    backward = [n for n in joint.graph.nodes if n.phase is Phase.BACKWARD and n.op.schema is not None]
    assert {n.origin.module for n in backward} >= {"qkv", "norm", "gate", "embed"}
    assert all(n.origin.source is not None for n in backward)
    assert all(n.origin.passes == ("differentiate",) for n in backward)
    assert all("seq_nr" in n.meta and "custom" not in n.meta for n in backward)
    assert not joint.find("aten.detach")


def test_joint_round_trips(joint: Program) -> None:
    gm = export_graph(joint)
    assert_same_graph(gm, export_graph(import_graph(gm)))


def test_dynamic_length(model: TinyDecoder) -> None:
    length = torch.export.Dim("length", min=2, max=64)
    dynamic = {"ids": {1: length}, "labels": {1: length}, "scale": None}
    program = differentiated(forward_program(model, decoder_batch(), dynamic))
    gm = export_graph(program)
    assert_same_graph(gm, export_graph(import_graph(gm)))
    for size in (6, 13):
        batch, tangents = decoder_batch(size), decoder_tangents(size)
        assert_same_results(run_joint(program, batch, tangents), autograd_results(model, batch, tangents))


def test_ambient_modes_do_not_leak_into_the_trace(model: TinyDecoder, joint: Program) -> None:
    program = forward_program(model, decoder_batch())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        other = differentiated(program)
    assert str(other) == str(joint)


@pytest.mark.parametrize("functional", [False, True])
def test_buffers_that_the_forward_writes_have_no_gradient(functional: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(self.lin(x)).square().sum()
            return result

    model = Normed().double()
    batch = {"x": torch.randn(5, 4, dtype=torch.float64)}
    result = differentiated(forward_program(model, batch, functional=functional))
    written = [o.target for o in result.signature.outputs if o.kind is OutputKind.BUFFER_MUTATION]
    assert set(written) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    name = next(o.name for o in result.signature.outputs if o.kind is OutputKind.USER_OUTPUT)
    tangents = {name: torch.tensor(1.0, dtype=torch.float64)}
    assert [i.target for i in result.signature.inputs if i.kind is InputKind.TANGENT] == [name]
    got = run_joint(result, batch, tangents)
    assert_same_results(got, autograd_results(model, batch, tangents))
    torch.testing.assert_close(got["norm.running_mean"], model.norm.running_mean)


def test_outputs_that_share_storage_keep_their_gradients() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = x * self.weight
            return y, y.view(-1), self.weight

    model = Shared()
    batch = {"x": torch.randn(3, 4, dtype=torch.float64)}
    shapes = {"out0": (3, 4), "out1": (12,), "out2": (3, 4)}
    tangents = {n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items()}
    program = differentiated(forward_program(model, batch))
    assert_same_results(run_joint(program, batch, tangents), autograd_results(model, batch, tangents))


def test_torch_level_graph_with_its_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    model[0].bias.requires_grad_(False)
    x = torch.randn(3, 4, dtype=torch.float64)
    program = differentiated(import_graph(fx.symbolic_trace(model), (x,)))
    batch, tangents = {"input": x}, {"out0": torch.ones(3, 1, dtype=torch.float64)}
    got = run_joint(program, batch, tangents)
    out = model(x)
    out.sum().backward()
    expected = {f"grad of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_results(got, {"out0": out.detach(), **expected})


def test_nothing_to_differentiate() -> None:
    model = nn.Linear(4, 2).double().requires_grad_(False)
    batch = {"input": torch.randn(3, 4, dtype=torch.float64)}
    result = PassManager("differentiate").run(forward_program(model, batch))
    assert not [o for o in result.program.signature.outputs if o.kind is OutputKind.GRADIENT]
    assert [r.kind for r in result.remarks] == ["missed"]
    torch.testing.assert_close(run_joint(result.program, batch, {})["out0"], model(batch["input"]))


def test_a_forward_that_writes_its_input_is_refused() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x.add_(1) * w

    program = import_graph(fx.symbolic_trace(forward), (torch.ones(2), torch.ones(2)))
    first, second = program.signature.inputs
    program.signature.inputs = [first, InputSpec(second.name, second.kind, second.target, True)]
    with pytest.raises(UnsupportedError, match="no meaning in the IR"):
        differentiated(program)


def test_torch_failures_are_named() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.mm, (x, x)),))
    gm = fx.GraphModule({}, graph)
    program = import_graph(gm)
    program.graph.value("x").type = TensorType((2, 3), torch.float32)
    program.signature.inputs = [InputSpec("x", InputKind.USER_INPUT, "x", True)]
    with pytest.raises(AutoSPError) as caught:
        PassManager("differentiate", verify=False).run(program)
    assert isinstance(caught.value, PassError)
    assert caught.value.hint


def test_layout_operators_bring_their_backward_and_layouts() -> None:
    inputs = mlp_inputs()
    program = traced(parallel_mlp(4), inputs, {"sp": 4})
    from autosp_ir.comm.layout import infer_layouts

    infer_layouts(program)
    result = differentiated(program)
    counts = Counter((n.op.name, str(n.phase)) for n in result.graph.nodes if n.op.has(Trait.COLLECTIVE))
    assert counts == {
        ("autosp.all_to_all", "forward"): 4,
        # The batch needs no gradient, so nothing flows through the first all-to-all.
        ("autosp.all_to_all", "backward"): 2,
        ("autosp.all_reduce", "forward"): 1,
        ("autosp.all_reduce", "backward"): 2,
    }
    sharded = result.find("autosp.shard")
    assert sharded[0].result.tensor_type.layout == Layout({"sp": Shard(1)})
    loss, gradients = dense_gradients(inputs)
    sim = simulate(result, {"x": inputs["x"]})
    torch.testing.assert_close(sim.loss, loss, rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sim.grads[name], gradient, rtol=0, atol=1e-12)


def test_outputs_that_are_numbers_or_none_stay() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.argmax()

    program = import_graph(fx.symbolic_trace(forward), (torch.ones(3),))
    program.signature.inputs = [InputSpec("x", InputKind.USER_INPUT, "x", True)]
    program.signature.outputs = [
        OutputSpec("out0", OutputKind.USER_OUTPUT, "out0"),
        OutputSpec("best", OutputKind.USER_OUTPUT, "best"),
    ]
    result = differentiated(program)
    assert [o.name for o in result.signature.outputs] == ["out0", "best", "grad of x"]
    assert [i.target for i in result.signature.inputs if i.kind is InputKind.TANGENT] == ["out0"]
