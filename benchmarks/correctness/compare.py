"""What is compared: loss and gradients of a step, against those of the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Row = dict[str, Any]


class Step(NamedTuple):
    """What a training step gave.

    Args:
        loss: A float64 scalar.
        gradients: By the parameter's name; a parameter without one has zeros.
    """

    loss: Tensor
    gradients: dict[str, Tensor]


def loss_of(output: Any) -> Tensor:
    """The loss in a model's output, a dict or an output of transformers."""
    loss: Tensor = output["loss"]
    return loss


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, zeros where there is none, and take them away."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def dense_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Step:
    """Loss and gradients of the model as it is, eager, on the whole batch."""
    loss = loss_of(model(**batch))
    torch.autograd.backward(loss)
    return Step(loss.detach(), gradients_of(model))


def errors(found: Step, expected: Step) -> Row:
    """The relative error of the loss, and ‖g − h‖ / ‖h‖ over all parameters; None for what is not a number."""
    flat, reference = (
        torch.cat([step.gradients[n].double().flatten() for n in expected.gradients]) for step in (found, expected)
    )
    return {
        "loss_error": _number((found.loss - expected.loss).abs() / expected.loss.abs()),
        "gradient_error": _number((flat - reference).norm() / reference.norm()),
    }


def _number(value: Tensor) -> float | None:
    return float(f"{float(value):.3g}") if bool(value.isfinite()) else None
