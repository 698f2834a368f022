"""Functions that run on every rank of the dropout tests."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import autosp_ir as air
from autosp_ir.emit.parallelize import Rng
from tests.e2e.dropouts import Dropping, batch_of
from tests.e2e.test_dropout import Pooled
from tests.emit.steps import Measured, largest_error, measure
from tests.refusals.bodies import Met, met

Errors = tuple[float, float, bool]


def errors(found: Measured, expected: Measured) -> tuple[float, float]:
    """Relative error of the loss, and the largest of the gradients."""
    return abs(found[0] - expected[0]) / abs(expected[0]), largest_error(found[1], expected[1])


def dense_masks(rank: int, world: int, backend: Any, rng: Rng = "global") -> list[Errors]:
    """Two training steps from one seed: errors against dense, and whether the generator stands where dense leaves it.

    Dropout of probabilities in separate operators draws the same masks wherever the dense model runs.
    """
    model, batch = Dropping("heads"), batch_of(13)
    step = air.parallelize(model, batch, backend=backend, rng=rng)
    runs: list[list[tuple[Measured, Tensor]]] = []
    for forward in (model, step):
        torch.manual_seed(7)
        runs.append([(measure(model, forward, batch), torch.get_rng_state()) for _ in range(2)])
    return [(*errors(b, a), torch.equal(t, s)) for (a, s), (b, t) in zip(*runs, strict=True)]


def different_seeds(rank: int, world: int) -> tuple[Met, Met, Met]:
    """Steps of ranks that are seeded apart: dense masks, masks of their own, and of a value that ranks hold whole."""
    model, batch = Dropping(), batch_of()
    pooled = Pooled(), {"x": torch.ones(2, 16, 8)}
    steps = [
        (batch, air.parallelize(model, batch, backend="aot_eager", rng="global")),
        (batch, air.parallelize(model, batch, backend="aot_eager")),
        (pooled[1], air.parallelize(*pooled, backend="aot_eager", seq_dims={"x": 1})),
    ]
    found = []
    for given, step in steps:
        torch.manual_seed(rank)
        found.append(met(partial(step, **given)))
    return found[0], found[1], found[2]


def drift(rank: int, world: int) -> tuple[Met, Met]:
    """Two steps with dense masks; between them the last rank draws a number for itself."""
    model, batch = Dropping(), batch_of()
    step = air.parallelize(model, batch, backend="aot_eager", rng="global")
    torch.manual_seed(0)
    first = met(lambda: step(**batch))
    if rank == world - 1:
        torch.rand(1)
    return first, met(lambda: step(**batch))


def from_a_seed(rank: int, world: int) -> tuple[list[float], list[float]]:
    """Losses of three steps with masks of one's own, twice from one seed."""
    model, batch = Dropping(), batch_of()
    step = air.parallelize(model, batch, backend="aot_eager")
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([float(step(**batch).detach()) for _ in range(3)])
    return runs[0], runs[1]
