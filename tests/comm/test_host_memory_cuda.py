"""Copies beside compute on a GPU: nothing reads too early, and nothing is reused under a running copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import autosp_ir as air
from autosp_ir.comm import host_memory
from autosp_ir.emit.parallelize import Backend
from tests.emit.steps import gradients, largest_error, loss_of, measure
from tests.models import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
operators = torch.ops.autosp
_BIG = 1 << 24


def work() -> Tensor:
    """Keeps the compute stream busy for some milliseconds."""
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        a = a @ a * 1e-2
    return a


def test_a_copy_waits_for_its_value_and_comes_back_whole() -> None:
    for seed in range(5):
        work()
        x = torch.full((_BIG,), float(seed), device="cuda")
        started = operators.offload(x)
        host = operators.wait_copy(started, x)
        assert host.is_pinned() and host.device.type == "cpu"
        del x, started
        torch.full((_BIG,), -1.0, device="cuda")
        coming = operators.reload(host, device=torch.device("cuda"))
        back = operators.wait_copy(coming, host)
        assert torch.equal(back, torch.full((_BIG,), float(seed), device="cuda"))


@pytest.mark.parametrize(
    "view", [lambda x: x[:, ::2], lambda x: x[:, :1000], lambda x: x.t()[::3], lambda x: x[:1].expand(512, -1)]
)
def test_any_strides_come_back(view: Callable[[Tensor], Tensor]) -> None:
    """Torch copies between different strides through memory that it does not wait for."""
    for seed in range(5):
        busy = work()
        whole = torch.full((4096, 4096), float(seed), device="cuda") + 0 * busy
        x = view(whole)
        host = operators.wait_copy(operators.offload(x), x)
        back = operators.wait_copy(operators.reload(host, device=torch.device("cuda")), host)
        assert back.shape == x.shape and bool((back == seed).all())


def test_memory_is_not_reused_under_a_running_copy() -> None:
    """The block of the source goes to whoever asks next, right behind the wait."""
    for seed in range(5):
        x = torch.full((_BIG,), float(seed), device="cuda")
        address = x.data_ptr()
        host = operators.wait_copy(operators.offload(x), x)
        del x
        again = torch.full((_BIG,), -1.0, device="cuda")
        assert again.data_ptr() == address
        torch.cuda.synchronize()
        assert bool((host == seed).all())


def test_pinned_memory_is_reused_only_when_free() -> None:
    x, y = (torch.full((_BIG,), value, device="cuda") for value in (1.0, 2.0))
    first = operators.wait_copy(operators.offload(x), x)
    second = operators.wait_copy(operators.offload(y), y)
    assert first.data_ptr() != second.data_ptr(), "two forwards before a backward"
    back = operators.wait_copy(operators.reload(first, device=torch.device("cuda")), first)
    address = first.data_ptr()
    del first
    torch.cuda.synchronize()
    third = operators.wait_copy(operators.offload(back), back)
    assert third.data_ptr() == address
    torch.cuda.synchronize()
    assert bool((third == 1).all()) and bool((second == 2).all())


def test_a_start_whose_wait_never_comes_is_forgotten() -> None:
    operators.offload(torch.ones(_BIG, device="cuda"))
    torch.cuda.synchronize()
    x = torch.ones(8, device="cuda")
    operators.wait_copy(operators.offload(x), x)
    assert not any(copy.tensors for copy in host_memory._running.values())


_PLAIN = "canonicalize,pad-tokens,token-partition,ulysses,differentiate,remat{policy=save-all},grad-sync,lower-comm"
_TILED = (
    "canonicalize,pad-tokens{multiple=4},token-partition,ulysses,tile{chunks=4 wide=1.5},differentiate{decompose=true},"
    "remat,early-loss-gradient,grad-sync,lower-comm,overlap{fused=true}"
)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("passes", [_PLAIN, _TILED], ids=["plain", "tiled"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_step_is_right_and_holds_less(batch_size: int, passes: str, backend: Backend) -> None:
    model, batch = build("llama-gqa", batch_size=batch_size, length=2048)
    model, batch = model.cuda(), {n: x.cuda() for n, x in batch.items()}
    expected = measure(model, model, batch)
    peaks = []
    for offload in ("", ",offload{smallest=0 device=cpu host_link=nvlink-c2c}"):
        step = air.parallelize(model, batch, backend=backend, pipeline=f"{passes}{offload}")
        found = measure(model, step, batch)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            found = measure(model, step, batch)
        peaks.append(torch.cuda.max_memory_allocated())
        assert abs(found[0] - expected[0]) <= 1e-4 * abs(expected[0])
        assert largest_error(found[1], expected[1]) <= 1e-3
        model.zero_grad()
        losses = [loss_of(step(**batch)) for _ in range(2)]
        torch.stack(losses).sum().backward()
        twice = {n: 2 * g for n, g in expected[1].items()}
        assert largest_error(gradients(model), twice) <= 1e-3
    assert peaks[1] < peaks[0]
