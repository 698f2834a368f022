"""Autocast is captured as torch runs it: the same casts, the same kernels, the same bits on one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autosp_ir as air
from autosp_ir._torch_compat import FakeTensorMode, TorchDispatchMode, exact_autocast, pytree_map
from autosp_ir.capture.info import CaptureInfo
from autosp_ir.testing.eager import run_eagerly
from autosp_ir.testing.equivalence import DenseReference
from tests.models import build

torch.set_num_threads(1)

BF16 = torch.bfloat16
Function = Callable[["Parts", Tensor], Any]


def autocast(**settings: Any) -> torch.autocast:
    return torch.autocast("cpu", dtype=BF16, **settings)


class Parts(nn.Module):
    """Applies a function that may use two layers and a norm."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.function(self, x).float().square().mean()
        return loss


def check_bits(model: nn.Module, batch: Any, around: Any = None, **settings: Any) -> air.Program:
    """Capture under an autocast; the program on one rank gives the model's outputs and gradients bit for bit."""
    with around or contextlib.nullcontext():
        program = air.capture(model, batch, **settings)
    assert isinstance(program.capture, CaptureInfo)
    dense = run_eagerly(model, program.capture, batch)
    found = air.simulate(program, batch, tangents=dense.tangents)
    for name, output in dense.outputs.items():
        assert torch.equal(found.outputs[0][name], output), name
    assert found.grads.keys() >= dense.gradients.keys()
    for name, gradient in dense.gradients.items():
        assert gradient.dtype == found.grads[name].dtype and torch.equal(found.grads[name], gradient), name
    return program


def casts(program: air.Program) -> int:
    return sum(node.is_op("aten.to.dtype", "aten._to_copy") for node in program.graph.nodes)


@pytest.mark.parametrize("name", ["plain", "gpt2", "llama-mha"])
def test_models_under_autocast_bit_for_bit(name: str) -> None:
    model, batch = build(name, length=16)
    program = check_bits(model, batch, autocast())
    assert casts(program) > casts(air.capture(model, batch))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "gpt2", "llama-gqa"])
def test_models_under_autocast_on_several_ranks(name: str) -> None:
    """In float64, where casts to bfloat16 hide no mistake; and the capture in its own precision."""
    model, batch = build(name, length=33, ignored=3)
    with autocast():
        dense = DenseReference.of(model, batch)
    for world in (2, 4):
        result = air.PassManager(air.DEFAULT_PIPELINE).run(dense.program, mesh={"sp": world})
        assert not [r for r in result.remarks if r.kind == "missed"]
        dense.check(result.program)


def test_gradients_of_narrowed_parameters_are_summed_in_float32() -> None:
    model, batch = build("plain", length=32)
    with autocast():
        program = air.capture(model, batch)
    result = air.PassManager("canonicalize,token-partition,ulysses").run(program, mesh={"sp": 2})
    opened = result.program.find("autosp.invariant_to_replicate")
    assert opened and {n.result.tensor_type.dtype for n in opened} == {torch.float32}


class Kernels(TorchDispatchMode):
    """What torch runs, with the dtypes of the operands; casts, views and copies left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moves = ("_to_copy", "clone", "detach", "lift", "prim", "alias")
        if not func.is_view and not any(word in str(func) for word in moves):
            self.calls.append(repr((str(func), pytree_map(lambda a: getattr(a, "dtype", None), args))))
        return func(*args, **(kwargs or {}))


def mixture(parts: Parts, x: Tensor) -> Any:
    """Operators that autocast narrows, widens, lets be, and brings to one dtype."""
    h = parts.first(x)
    scores = torch.einsum("bij,bkj->bik", h, x).softmax(-1)
    h = torch.cat([scores @ x, F.rms_norm(h, (8,))], dim=-1) + 1
    h = F.conv1d(h.transpose(1, 2), parts.first.weight[None, :, None, 0].expand(4, -1, -1).repeat(1, 2, 1))
    y = F.prelu(h, torch.tensor(0.1)).exp().cumsum(1)
    z = F.mse_loss(h, h.detach() * 2, reduction="none") + F.smooth_l1_loss(y, h.float(), reduction="none")
    return torch.addcmul(z, y, z) + F.cosine_similarity(y, z, dim=1)[:, None] + torch.stack([y, y.float()]).sum(0)


@pytest.mark.parametrize("name", ["plain", "mixture"])
def test_kernels_and_dtypes_are_those_of_the_eager_run(name: str) -> None:
    model, batch = build("plain", length=16) if name == "plain" else (Parts(mixture), {"x": torch.randn(2, 6, 8)})
    with torch.no_grad():
        with autocast(), Kernels() as eager:
            model(**batch)
        with autocast():
            program = air.capture(model, batch, seq_dims=None if name == "plain" else {"x": 1})
        bound = {**program.tensors, **batch}
        with Kernels() as captured:
            program.to_graph_module()(*(bound[spec.target] for spec in program.signature.inputs))
    wanted = [call for call in eager.calls if not call.startswith("('aten.scaled_dot")]
    assert captured.calls == wanted and any("bfloat16" in call for call in wanted)


def test_the_mixture_bit_for_bit() -> None:
    check_bits(Parts(mixture), {"x": torch.randn(2, 6, 8)}, autocast(), seq_dims={"x": 1})


# Regions of the model's own ------------------------------------------------------------------------------------------


def enabled_region(parts: Parts, x: Tensor) -> Any:
    with autocast():
        y = parts.first(x)
    assert y.dtype == BF16
    return parts.second(y.float())


def nested_regions(parts: Parts, x: Tensor) -> Any:
    with autocast():
        y = parts.first(x)
        with torch.autocast("cpu", enabled=False):
            y = parts.norm(y.float() + parts.second(x))
        with torch.autocast("cpu", dtype=torch.float16):
            y = parts.second(y)
    return y


def region_without_gradients(parts: Parts, x: Tensor) -> Any:
    with torch.no_grad(), autocast():
        scale = parts.second(x).amax()
    with autocast():
        return parts.first(x) * scale


def written_in_place(parts: Parts, x: Tensor) -> Any:
    with autocast():
        y = parts.second(parts.first(x))
        y += x
        y[:, 1:].mul_(2)
    return parts.norm(y.float()).add_(x)


def used_twice(parts: Parts, x: Tensor) -> Any:
    with autocast():
        y = parts.first(parts.first(x))
    with autocast():
        return y + parts.first(x) + parts.first(parts.first(x))


REGIONS = [enabled_region, nested_regions, region_without_gradients, written_in_place, used_twice]


@pytest.mark.parametrize("ambient", [False, True], ids=["alone", "under autocast"])
@pytest.mark.parametrize("function", REGIONS)
def test_regions_bit_for_bit(function: Function, ambient: bool) -> None:
    x = torch.randn(2, 6, 8, requires_grad=True)
    check_bits(Parts(function), {"x": x}, autocast() if ambient else None, seq_dims={"x": 1})


def weight_casts(function: Function) -> int:
    program = air.capture(Parts(function), {"x": torch.randn(2, 6, 8)}, seq_dims={"x": 1})
    weight = next(s.name for s in program.signature.inputs if s.target == "first.weight")
    return sum(user.is_op("aten.to.dtype") for user in program.graph.value(weight).users)


def test_a_parameter_is_cast_once_per_outermost_region() -> None:
    assert weight_casts(used_twice) == 2
    with autocast():
        assert weight_casts(used_twice) == 1
    with autocast(cache_enabled=False):
        assert weight_casts(used_twice) == 5


@pytest.mark.parametrize("function", REGIONS)
def test_regions_on_several_ranks(function: Function) -> None:
    model, batch = Parts(function), {"x": torch.randn(2, 8, 8)}
    program = air.capture(model, batch, seq_dims={"x": 1})
    result = air.PassManager(air.DEFAULT_PIPELINE).run(program, mesh={"sp": 2})
    air.testing.assert_equivalent(model, result.program, batch)


def no_grad_inside(parts: Parts, x: Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        with torch.no_grad():
            scale = parts.second(x).amax()
        return parts.first(x) * scale


def enable_grad_inside(parts: Parts, x: Tensor) -> Any:
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.enable_grad():
        y = parts.first(x)
    return y + x


def no_grad_inside_a_nested_region(parts: Parts, x: Tensor) -> Any:
    with torch.autocast("cpu", enabled=False), autocast(), torch.no_grad():
        scale = parts.second(x).amax()
    return parts.first(x) * scale


@pytest.mark.parametrize("function", [no_grad_inside, enable_grad_inside, no_grad_inside_a_nested_region])
@pytest.mark.parametrize("ambient", [False, True])
def test_gradients_switched_inside_a_region_are_refused(function: Function, ambient: bool) -> None:
    """torch.export loses the switch: the gradient would be wrong without a word."""
    with (
        autocast() if ambient else contextlib.nullcontext(),
        pytest.raises(air.UnsupportedError, match="switched off or on inside") as raised,
    ):
        air.capture(Parts(function), {"x": torch.randn(2, 6, 8)}, seq_dims={"x": 1})
    assert "detach" in str(raised.value)


# States --------------------------------------------------------------------------------------------------------------


def test_float32_autocast_and_float64_models_have_no_casts() -> None:
    model, batch = build("plain", length=16)
    without = str(air.capture(model, batch))
    with exact_autocast({"cpu": torch.float32}):
        assert str(air.capture(model, batch)) == without
    model, batch = build("plain", length=16, dtype=torch.float64)
    without = str(air.capture(model, batch))
    with autocast():
        assert str(air.capture(model, batch)) == without


def test_a_symbolic_length() -> None:
    model, batch = Parts(nested_regions), {"x": torch.randn(2, 8, 8)}
    with autocast():
        fixed, program = (air.capture(model, batch, seq_dims={"x": 1}, dynamic=d) for d in (False, True))
    assert casts(program) == casts(fixed)
    result = air.PassManager(air.DEFAULT_PIPELINE).run(program, mesh={"sp": 2})
    air.testing.assert_equivalent(model, result.program, {"x": torch.randn(2, 12, 8)})


def test_passes_do_not_see_the_autocast_around_them() -> None:
    model, batch = build("plain", length=16)
    program = air.capture(model, batch)
    manager = air.PassManager("canonicalize,token-partition,ulysses")
    without = manager.run(program, mesh={"sp": 2})
    with autocast():
        within = manager.run(program, mesh={"sp": 2})
        simulated = air.simulate(within.program, batch)
    assert str(within.program) == str(without.program)
    assert torch.equal(simulated.loss, air.simulate(without.program, batch).loss)


# CUDA's own rules, on fake tensors -----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A head with a loss; its weights are fake CUDA tensors, which have no gradient on a machine without CUDA."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 8, device="cuda"), requires_grad=False)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(F.layer_norm(F.linear(x, self.weight.t() @ self.weight), (8,)), self.weight)
        return self.loss(logits, labels) + logits.softmax(-1).sum()


def on_fake_cuda(loss: Callable[[Tensor, Tensor], Tensor]) -> list[tuple[str, torch.dtype | None]]:
    """Operators and the dtypes of their first operands."""
    with FakeTensorMode():
        model = Classifier(loss)
        batch = {"x": torch.empty(6, 8, device="cuda"), "labels": torch.empty(6, dtype=torch.int64, device="cuda")}
    with exact_autocast({"cuda": BF16}):
        program = air.capture(model, batch, seq_dims={"x": 0, "labels": 0})
    nodes = [n for n in program.graph.nodes if n.op.kind == "operator" or n.op.name.startswith("aten.")]
    return [(n.op.name, n.operands[0].tensor_type.dtype) for n in nodes]


def test_cuda_computes_the_log_softmax_of_a_cross_entropy_in_bfloat16() -> None:
    found = on_fake_cuda(F.cross_entropy)
    assert ("aten.linear", BF16) in found and ("aten.layer_norm", torch.float32) in found
    assert ("aten.log_softmax.int", BF16) in found and ("aten.nll_loss_nd", torch.float32) in found
    assert ("aten.softmax.int", torch.float32) in found and ("aten.sum", torch.float32) in found


def test_what_casts_cannot_express_is_refused() -> None:
    def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    with pytest.raises(air.UnsupportedError, match=r"cross_entropy_loss.*torch.autocast\('cuda'.*") as raised:
        on_fake_cuda(smoothed)
    assert ".float()" in str(raised.value) and "test_autocast.py" in str(raised.value)


def test_operators_that_torch_bans_are_refused() -> None:
    def banned(logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy(logits.sigmoid().float(), logits.float())

    with pytest.raises(air.CaptureError, match="refuses under autocast") as raised:
        on_fake_cuda(banned)
    assert "with_logits" in str(raised.value)
