"""Gradients of gradients: exact where autograd has the backward, refused by name where an emitted step has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autosp_ir as air
from tests.models import build
from tests.passes.test_tile import wide

torch.set_num_threads(1)


def penalised(module: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a loss with a penalty on its gradients."""
    model.zero_grad()
    output = module(**batch)
    loss = output if isinstance(output, Tensor) else output.loss
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    (loss + 1000 * sum(g.pow(2).sum() for g in gradients)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pipeline", [None, "canonicalize,tile{chunks=4}"])
def test_autograd_differentiates_what_it_ran_itself(pipeline: str | None) -> None:
    model, batch = wide()
    model.double()
    expected = penalised(model, model, batch)
    found = penalised(air.parallelize(model, batch, backend="eager", pipeline=pipeline), model, batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_an_emitted_backward_is_not_taken_for_a_constant(backend: Any) -> None:
    model, batch = wide()
    step = air.parallelize(model, batch, backend=backend)
    with pytest.raises(air.UnsupportedError, match="first derivatives only"):
        penalised(step, model, batch)


def test_gradients_that_are_kept_with_a_graph_are_right_as_they_are() -> None:
    model, batch = wide()
    step = air.parallelize(model, batch, backend="aot_eager")
    found = torch.autograd.grad(step(**batch), list(model.parameters()), create_graph=True)
    expected = torch.autograd.grad(model(**batch), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert one.requires_grad
        torch.testing.assert_close(one.detach(), other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("canonicalize", "through attention"),
        ("canonicalize,tile{chunks=8 loop_from=2 wide=1.4}", "loop over chunks|attention"),
    ],
)
def test_what_autograd_cannot_differentiate_twice_says_so(pipeline: str, reason: str) -> None:
    model, batch = build("llama-gqa", length=32, num_hidden_layers=1)
    step = air.parallelize(model, batch, backend="eager", pipeline=pipeline)
    with pytest.raises(air.UnsupportedError, match=reason):
        penalised(step, model, batch)


def test_a_loop_over_chunks_says_so() -> None:
    model, batch = wide()
    step = air.parallelize(model, batch, backend="eager", pipeline="canonicalize,tile{chunks=8 loop_from=2}")
    with pytest.raises(air.UnsupportedError, match="loop over chunks"):
        penalised(step, model, batch)
