"""Functions that run on every rank of the emission tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import autosp_ir as air
from tests.models import build


def loss_of(output: Any) -> Tensor:
    """The loss of a model's output: the output itself for plain models."""
    loss: Tensor = output.loss if hasattr(output, "loss") else output
    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by canonical name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(rank: int, world: int, name: str, settings: dict[str, Any], options: dict[str, Any]) -> Any:
    """Loss and gradients of one sequence-parallel step."""
    torch.set_num_threads(1)
    model, batch = build(name, **settings)
    step = air.parallelize(model, batch, **options)
    loss = loss_of(step(**batch))
    loss.backward()
    return float(loss.detach()), gradients(model)


def train(rank: int, world: int, name: str, settings: dict[str, Any], options: dict[str, Any], kind: str) -> Any:
    """Parameters after ten steps of an optimizer."""
    torch.set_num_threads(1)
    model, batch = build(name, **settings)
    forward = air.parallelize(model, batch, **options) if options else model
    return optimise(model, forward, batch, kind)


def optimise(model: nn.Module, forward: nn.Module, batch: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Ten optimizer steps on one batch."""
    rates = {"SGD": 1e-1, "AdamW": 1e-3}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=rates[kind])
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(forward(**batch)).backward()
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}
