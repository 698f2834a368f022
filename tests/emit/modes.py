"""Modes, buffers, frozen parameters and several programs, on every rank of a group."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autosp_ir as air
from tests.emit.steps import gradients, largest_error, loss_of
from tests.models import build

_CALLS = ((True, True, 8), (True, False, 8), (False, True, 8), (False, False, 9), (True, True, 9))
"""Training or not, under autograd or not, and the length."""


class Counting(nn.Module):
    """Keeps statistics over all tokens in buffers while it trains, and reads them when it does not.

    Args:
        frozen: Whether the embedding is trained.
    """

    seen: Tensor
    mean: Tensor

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.embed.requires_grad_(not frozen)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Ids `[B, S]` to a loss."""
        h = self.embed(x)
        if self.training:
            self.seen += x.numel()
            with torch.no_grad():
                self.mean.lerp_(h.mean((0, 1)), 0.25)
        h = self.norm((h - self.mean).mT).mT
        return {"loss": F.cross_entropy(self.head(h).flatten(0, 1), x.flatten())}


def _x(length: int) -> Tensor:
    return torch.arange(2 * length).mul(7).remainder(16).view(2, length)


def counted(rank: int, world: int, backend: Any, frozen: bool) -> dict[str, float]:
    """Training, evaluation and no_grad in turn: errors of losses, gradients and buffers against a dense twin."""
    model = Counting(frozen)
    twin = copy.deepcopy(model)
    step = air.parallelize(model, {"x": _x(8)}, seq_dims={"x": 1}, backend=backend)
    losses = 0.0
    for training, recorded, length in (
        (True, True, 8),
        (True, False, 8),
        (False, True, 8),
        (False, False, 9),
        (True, True, 9),
    ):
        for module in (step, twin):
            module.train(training)
        with torch.set_grad_enabled(recorded):
            found, expected = (module(x=_x(length))["loss"] for module in (step, twin))
        assert found.requires_grad == expected.requires_grad == recorded
        losses = max(losses, abs(float(found.detach()) - float(expected.detach())))
        if recorded:
            found.backward()
            expected.backward()
    assert int(model.get_buffer("seen")) == 2 * (8 + 8 + 9)
    return {
        "losses": losses,
        "gradients": largest_error(gradients(model), gradients(twin)),
        "buffers": max(
            float((a - b).abs().max())
            for a, b in zip(model.buffers(), twin.buffers(), strict=True)
            if a.is_floating_point()
        ),
    }


def several_programs(rank: int, world: int) -> float:
    """Two models and two pipelines of one, forwards before backwards, in another order: the largest error."""
    first, batch = build("llama-gqa", length=16, num_hidden_layers=1)
    second, other = build("gpt2", length=17, num_hidden_layers=1)
    expected = []
    for model, given in ((first, batch), (second, other)):
        loss_of(model(**given)).backward()
        expected.append(gradients(model))
        model.zero_grad()
    steps = [
        (air.parallelize(first, batch, backend="aot_eager"), batch),
        (air.parallelize(second, other, backend="aot_eager"), other),
        (air.parallelize(first, batch, backend="eager"), batch),
    ]
    losses = [loss_of(step(**given)) for step, given in steps]
    for loss in (losses[1], losses[2], losses[0]):
        loss.backward()
    halves = {n: g / 2 for n, g in gradients(first).items()}
    return max(largest_error(halves, expected[0]), largest_error(gradients(second), expected[1]))
