"""Steps under autocast: what one computes, when another is captured, and what the caller's autocast may not change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autosp_ir as air
from autosp_ir.emit.parallelize import Backend
from tests.emit.steps import gradients, loss_of
from tests.gloo import run_ranks
from tests.models import build

torch.set_num_threads(1)

Gradients = dict[str, Tensor]


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def measure(model: nn.Module, forward: Callable[..., Any], batch: dict[str, Tensor], *, on: bool) -> Gradients:
    """Gradients of a step whose forward alone runs under autocast, with the loss among them."""
    model.zero_grad()
    with autocast() if on else contextlib.nullcontext():
        loss = loss_of(forward(**batch))
    loss.backward()
    return {**gradients(model), "the loss": loss.detach()}


def distance(found: Gradients, exact: Gradients) -> dict[str, float]:
    assert found.keys() == exact.keys() and all(found[n].dtype == exact[n].dtype for n in exact)
    return {n: float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact if float(exact[n].norm()) > 1e-6}


def errors_under_autocast(rank: int, world: int, name: str, backend: Backend) -> tuple[float, float, float, float]:
    """Largest and mean error of the dense autocast step against float32, then of the parallel one."""
    settings = {"num_hidden_layers": 1} if backend == "inductor" else {}
    model, batch = build(name, length=33, batch_size=2, **settings)
    exact = measure(model, model, batch, on=False)
    with autocast():
        step = air.parallelize(model, batch, backend=backend)
    dense = distance(measure(model, model, batch, on=True), exact)
    parallel = distance(measure(model, step, batch, on=True), exact)
    return (
        max(dense.values()), sum(dense.values()) / len(dense),
        max(parallel.values()), sum(parallel.values()) / len(parallel),
    )  # fmt: skip


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [("plain", "aot_eager"), ("llama-gqa", "eager"), pytest.param("llama-gqa", "inductor", marks=pytest.mark.long)],
)
def test_two_ranks_are_as_precise_as_the_dense_autocast_run(name: str, backend: Backend) -> None:
    for worst, mean, found_worst, found_mean in run_ranks(errors_under_autocast, 2, name, backend, timeout=300.0):
        assert 1e-3 < worst < 5e-2, "the dense run is in bfloat16"
        assert found_worst <= 1.5 * worst and found_mean <= 1.2 * mean


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_rank_is_the_dense_autocast_run_bit_for_bit(backend: Backend) -> None:
    model, batch = build("plain", length=16)
    dense = measure(model, model, batch, on=True)
    with autocast():
        step = air.parallelize(model, batch, backend=backend)
    found = measure(model, step, batch, on=True)
    assert found.keys() == dense.keys() and all(torch.equal(found[n], dense[n]) for n in dense)
    with autocast():  # a backward under autocast is the same backward
        model.zero_grad()
        loss_of(step(**batch)).backward()
    assert all(torch.equal(g, dense[n]) for n, g in gradients(model).items())


class Regions(nn.Module):
    """A region that autocast leaves alone: its backward is in float32, whatever surrounds it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """The loss of `[B, S, 8]`."""
        y = self.first(x).float()
        with torch.autocast("cpu", enabled=False):
            loss: Tensor = self.second(y).square().mean()
        return loss


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_regions_without_autocast_stay_without(backend: Backend) -> None:
    model, batch = Regions(), {"x": torch.randn(2, 6, 8)}
    dense = measure(model, model, batch, on=True)
    with autocast():
        step = air.parallelize(model, batch, backend=backend, seq_dims={"x": 1})
    found = measure(model, step, batch, on=True)
    assert all(torch.equal(found[n], dense[n]) for n in dense)


def test_each_autocast_has_its_program() -> None:
    model, batch = Regions(), {"x": torch.randn(2, 6, 8)}
    step = air.parallelize(model, batch, backend="eager", seq_dims={"x": 1})
    runtime: Any = step.autosp_runtime
    for on, programs in ((False, 1), (True, 2), (False, 2), (True, 2)):
        found = measure(model, step, batch, on=on)
        assert len(runtime.programs) == programs
        dense = measure(model, model, batch, on=on)
        assert all(torch.equal(found[n], dense[n]) for n in dense)


def test_the_autocast_of_another_device_is_none() -> None:
    model, batch = Regions(), {"x": torch.randn(2, 6, 8)}
    step = air.parallelize(model, batch, backend="eager", seq_dims={"x": 1}, dynamic=False)
    torch.set_autocast_enabled("cuda", True)
    try:
        step(**batch)
    finally:
        torch.set_autocast_enabled("cuda", False)
