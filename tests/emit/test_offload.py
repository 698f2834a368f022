"""An emitted step that offloads, in one process on the CPU: right, also with two forwards before a backward."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import graph, lowering

import autosp_ir as air
from autosp_ir._torch_compat import TorchDispatchMode
from autosp_ir.analysis.liveness import liveness
from autosp_ir.comm.host_memory import OFFLOAD, RELOAD, WAIT_COPY
from autosp_ir.emit import inductor
from autosp_ir.emit.parallelize import Backend
from autosp_ir.emit.pins import pinning_pass
from autosp_ir.testing.memory import measured_peak
from tests.emit.late_copies import late_copies
from tests.emit.steps import gradients, largest_error, loss_of, measure
from tests.emit.written import without_kernels, written_code
from tests.models import build
from tests.sampling import sampled

torch.set_num_threads(1)
_OFFLOAD = "offload{device=cpu host_link=nvlink-c2c smallest=0}"
_LINE = "canonicalize,pad-tokens,token-partition,ulysses,differentiate,remat{policy=save-all},grad-sync,lower-comm"


class Chain(nn.Module):
    """Products and tangents hyperbolic, each of which saves its result."""

    def __init__(self, depth: int = 5, width: int = 16) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(width, width) / 4 for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = (x @ weight).tanh()
        return x.square().mean()


def chain() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Chain(), {"x": torch.randn(2, 24, 16)}


def check(model: nn.Module, step: nn.Module, batch: dict[str, Tensor]) -> None:
    other = {n: x.flip(1) for n, x in batch.items()}
    for each in (batch, other):
        found, expected = measure(model, step, each), measure(model, model, each)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert largest_error(found[1], expected[1]) <= 1e-4
    results = []
    for forward in (step, model):
        model.zero_grad()
        first, second = loss_of(forward(**batch)), loss_of(forward(**other))
        (first + 2 * second).backward()
        results.append(gradients(model))
    assert largest_error(*results) <= 1e-4
    once = measure(model, model, batch)[1]
    model.zero_grad()
    loss = loss_of(step(**batch))
    loss.backward(retain_graph=True)
    loss.backward()
    assert largest_error(gradients(model), {n: 2 * g for n, g in once.items()}) <= 1e-4


def test_step_by_step() -> None:
    model, batch = build("llama-gqa", batch_size=2, length=64, num_hidden_layers=1)
    check(model, air.parallelize(model, batch, backend="aot_eager", pipeline=f"{_LINE},{_OFFLOAD}"), batch)


def operations(code: str) -> list[str]:
    """Products and copies in the order in which the code calls them."""
    called = re.findall(r"extern_kernels\.(mm)\(|= torch\.ops\.autosp\.(\w+)\.default\(", code)
    return [product or copy for product, copy in called]


def compiled(pinned: bool) -> tuple[nn.Module, nn.Module, dict[str, Tensor], list[list[str]]]:
    """A step and what it runs in which order; one without pins is for reading alone."""
    model, batch = chain()
    pinning = pinning_pass if pinned else lambda *_: None
    kernels = nullcontext() if pinned else without_kernels()
    with written_code() as written, kernels, mock.patch.object(inductor, "pinning_pass", pinning):
        step = air.parallelize(model, batch, backend="inductor", pipeline=f"{_LINE},{_OFFLOAD}", seq_dims={"x": 1})
    return model, step, batch, [operations(code) for code in written if "autosp." in code]


def expected_operations(step: Any) -> list[list[str]]:
    (program,) = step.autosp_runtime.programs
    kinds = {"aten.mm": "mm"} | {op: op.removeprefix("autosp.") for op in (OFFLOAD, RELOAD, WAIT_COPY)}
    halves: list[list[str]] = [[], []]
    for node in program.graph.nodes:
        if node.op.name in kinds:
            halves[node.phase is not air.Phase.FORWARD].append(kinds[node.op.name])
    return halves


def test_compiled_in_the_order_of_the_program() -> None:
    model, step, batch, found = compiled(pinned=True)
    check(model, step, batch)
    assert found == expected_operations(step)


def test_without_pins_the_order_is_another() -> None:
    _, step, _, found = compiled(pinned=False)
    assert found != expected_operations(step)


_TILED = (
    "canonicalize,pad-tokens{multiple=4},token-partition,ulysses,tile{chunks=4 wide=1.5},differentiate{decompose=true},"
    "remat,early-loss-gradient,grad-sync,lower-comm,overlap{fused=true device=cpu host_link=nvlink-c2c}"
)


def _tiled(batch_size: int = 1, backend: Backend = "inductor") -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    model, batch = build("llama-gqa", batch_size=batch_size, length=128, num_hidden_layers=2)
    with torch._inductor.config.patch(fx_graph_cache=False):
        step = air.parallelize(model, batch, backend=backend, pipeline=f"{_TILED},{_OFFLOAD}")
    return model, step, batch


@pytest.mark.parametrize(
    ("batch_size", "backend"),
    sampled([(2, "aot_eager"), (1, "inductor"), (2, "inductor")], 3),
)
def test_copies_may_take_until_their_wait(batch_size: int, backend: Backend) -> None:
    model, step, batch = _tiled(batch_size, backend)
    with late_copies() as awaited:
        check(model, step, batch)
    assert sum(awaited) > 0


def test_a_copy_that_is_read_too_early_is_noticed() -> None:
    x = torch.randn(4)
    with late_copies():
        started = torch.ops.autosp.offload(x)
        assert started.isnan().all()
        x.zero_()
        host = torch.ops.autosp.wait_copy(started, x)
        assert host.isnan().all(), "a wait does not wait for the host"
        coming = torch.ops.autosp.reload(host, device=x.device)
        assert not host.any() and coming.isnan().all()
        assert not torch.ops.autosp.wait_copy(coming, host).any()


def test_operands_in_strides_of_their_own_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its tag Inductor copies what a copy reads, once for the start and once for the wait."""
    inner = lowering.maybe_layout_constraints

    def constraints(operator: Any) -> Any:
        mine = operator in (torch.ops.autosp.offload.default, torch.ops.autosp.wait_copy.default)
        return lowering.constrain_to_fx_strides if mine else inner(operator)

    monkeypatch.setattr(graph, "maybe_layout_constraints", constraints)
    _, step, batch = _tiled()
    with pytest.raises(air.UnsupportedError, match="another source"):
        step(**batch)


def test_host_memory_is_not_given_other_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is told which, Inductor has the host copy what the device still writes."""
    monkeypatch.setattr(inductor, "name_strides", lambda graph: None)
    _, step, batch = _tiled()
    with pytest.raises(air.UnsupportedError, match="was not offloaded"):
        loss_of(step(**batch)).backward()


def test_the_device_holds_what_is_predicted() -> None:
    model, batch = build("llama-gqa", batch_size=2, length=64, num_hidden_layers=1)
    peaks = []
    for passes in (_LINE, f"{_LINE},{_OFFLOAD}"):
        program = air.PassManager(passes).run(air.capture(model, batch), mesh={"sp": 1}).program
        measured = measured_peak(program.emit(backend="aot_eager"), batch)
        assert measured == pytest.approx(liveness(program).peak_bytes, rel=0.02)
        peaks.append(measured)
    assert peaks[1] < 0.8 * peaks[0]


class _Offloaded(TorchDispatchMode):
    """Where host memory was filled."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.autosp.offload.default:
            self.addresses.add(result.data_ptr())
        return result


def chain_step(**settings: Any) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    model, batch = chain()
    pipeline = f"{_LINE},{_OFFLOAD}"
    step = air.parallelize(model, batch, backend="aot_eager", pipeline=pipeline, seq_dims={"x": 1}, **settings)
    return model, step, batch


def test_hooks_of_autograd_see_nothing_of_host_memory() -> None:
    """They would read it while the device still writes."""
    _, step, batch = chain_step()
    seen: set[int] = set()

    def pack(x: Tensor) -> Tensor:
        seen.add(x.data_ptr())
        return x

    with _Offloaded() as offloaded, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(step(**batch))
    assert seen and len(offloaded.addresses) >= 3 and not seen & offloaded.addresses
    loss.backward()


def test_what_is_not_finite_is_traced_past_copies() -> None:
    model, step, batch = chain_step(check_finite=True)
    check(model, step, batch)
    last = list(model.parameters())[-1]
    with torch.no_grad():
        last[0, 0] = torch.inf
    loss = loss_of(step(**batch))
    with pytest.raises(air.NonFiniteError, match=r"in the backward .*aten\.mm"):
        loss.backward()
    with torch.no_grad():
        last[:] = torch.nan
    with pytest.raises(air.NonFiniteError, match=r"in the forward .*parameter weights\.4"):
        step(**batch)
