"""The captured graph is the model: same loss and gradients, in the model's own precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autosp_ir.capture.export import trace_module
from autosp_ir.capture.info import Captured
from autosp_ir.capture.program import capture
from autosp_ir.ir.program import InputKind, OutputKind
from tests.models import ZOO, build

torch.set_num_threads(1)


def run(captured: Captured, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the captured graph on the model's own tensors."""
    inputs = [
        batch[s.target] if s.kind is InputKind.USER_INPUT else captured.tensors[s.target] for s in captured.input_specs
    ]
    outputs = captured.graph_module(*inputs)
    return {s.target: t for s, t in zip(captured.output_specs, outputs, strict=True)}


def assert_same_step(model: nn.Module, captured: Captured, batch: dict[str, Tensor]) -> None:
    expected, found = model(**batch)["loss"], run(captured, batch)["loss"]
    parameters = list(model.parameters())
    torch.testing.assert_close(found, expected)
    wanted, given = (torch.autograd.grad(loss, parameters) for loss in (expected, found))
    scale = max(float(g.abs().max()) for g in wanted)
    for want, got in zip(wanted, given, strict=True):
        assert float((want - got).abs().max()) <= 1e-6 * scale


@pytest.mark.parametrize("name", ZOO)
def test_static_capture_equals_the_model(name: str) -> None:
    model, batch = build(name, batch_size=3, length=33, ignored=5)
    captured = trace_module(model, batch)
    assert_same_step(model, captured, batch)
    assert [s.target for s in captured.output_specs] == ["loss"], "logits are dead code"
    parameters = [s.target for s in captured.input_specs if s.kind is InputKind.PARAMETER]
    assert parameters == [n for n, _ in model.named_parameters()], "tied weights once, canonical names"


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "plain"])
def test_dynamic_capture_serves_other_lengths(name: str) -> None:
    model, batch = build(name, length=32)
    captured = trace_module(model, batch, dynamic=True)
    assert_same_step(model, captured, batch)
    _, longer = build(name, length=47, ignored=4)
    assert_same_step(model, captured, longer)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_causal_model_has_no_mask_left(dynamic: bool) -> None:
    model, batch = build("llama-gqa", length=32)
    program = capture(model, batch, dynamic=dynamic)
    program.verify()
    assert len(program.find("autosp.attention")) == 2
    for node in program.find("autosp.attention"):
        assert (node.arg("causal"), node.arg("bias"), node.arg("window")) == (True, None, None)
        assert node.arg("k").tensor_type.shape[1] == 2, "keys are captured unexpanded"
    assert program.info["batch_facts"] == {}


def test_origins_name_line_and_module() -> None:
    model, batch = build("llama-gqa")
    program = capture(model, batch)
    (first, _) = program.find("autosp.attention")
    assert first.origin.source is not None and first.origin.source.startswith("modeling_llama.py:")
    assert first.origin.module == "model.layers.0.self_attn"


def test_capture_leaves_the_model_alone() -> None:
    model, batch = build("llama-gqa")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    capture(model, batch)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_one_tensor_passed_twice_stays_two_inputs() -> None:
    model, batch = build("llama-gqa")
    batch["labels"] = batch["input_ids"]
    captured = trace_module(model, batch)
    assert [i.name for i in captured.info.inputs] == ["input_ids", "labels"]
    other = {"input_ids": batch["input_ids"], "labels": torch.roll(batch["labels"], 3, dims=1)}
    assert_same_step(model, captured, other)


def test_frozen_parameters_ask_for_no_gradient() -> None:
    model, batch = build("llama-gqa")
    model.get_parameter("model.norm.weight").requires_grad_(False)
    specs = {s.target: s.requires_grad for s in trace_module(model, batch).input_specs}
    assert specs["model.norm.weight"] is False and specs["lm_head.weight"] is True


def test_fake_weights() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    real, batch = build("llama-gqa")
    with FakeTensorMode():
        model = type(real)(real.config)
    program = capture(model, batch)
    program.verify()
    assert all(n.arg("causal") for n in program.find("autosp.attention"))


def test_half_precision() -> None:
    model, batch = build("llama-gqa", dtype=torch.bfloat16)
    captured = trace_module(model, batch)
    torch.testing.assert_close(run(captured, batch)["loss"], model(**batch)["loss"], rtol=2e-2, atol=2e-2)


class Counting(nn.Module):
    """Writes to its buffers, in place and by assignment, inside and outside no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.steps: Tensor
        self.mean: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))
        self.table = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, 4]` to the same."""
        y = self.linear(x)
        with torch.no_grad():
            self.steps += 1
            self.mean.mul_(0.9).add_(y.mean((0, 1)), alpha=0.1)
        y += self.table
        y[:, 0] = 0.0
        shifted: Tensor = y - self.mean
        return shifted


def test_mutation_becomes_outputs() -> None:
    torch.manual_seed(0)
    model, x = Counting(), torch.randn(2, 6, 4)
    captured = trace_module(model, (x,), seq_dims={"x": 1})
    mutated = [s.target for s in captured.output_specs if s.kind is OutputKind.BUFFER_MUTATION]
    assert sorted(mutated) == ["mean", "steps"]
    assert "table" in {s.target for s in captured.input_specs if s.kind is InputKind.CONSTANT} or captured.tensors
    found = run(captured, {"x": x})
    expected = model(x)
    torch.testing.assert_close(found["out0"], expected)
    torch.testing.assert_close(found["mean"], model.mean)
    assert int(found["steps"]) == int(model.steps) == 1
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    given = torch.autograd.grad(found["out0"].square().sum(), list(model.parameters()))
    torch.testing.assert_close(given, wanted)


class StopsGradients(nn.Module):
    """Gradients flow through neither `detach` nor `no_grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, 4]` to a scalar."""
        y: Tensor = self.linear(x)
        with torch.no_grad():
            weight = y.square() + 1
            scale = weight.mean()
            with torch.enable_grad():
                y = y + weight
        return (weight * y).sum() * scale + (y.detach() * y).sum()


def test_no_grad_regions_stop_gradients() -> None:
    torch.manual_seed(0)
    model, x = StopsGradients(), torch.randn(2, 6, 4)
    captured = trace_module(model, (x,), seq_dims={"x": 1})
    expected, found = model(x), run(captured, {"x": x})["out0"]
    wanted, given = (torch.autograd.grad(loss, list(model.parameters())) for loss in (expected, found))
    torch.testing.assert_close(given, wanted)
