"""Dropout in emitted steps: dense masks from the dense model's generator, and what is checked of generators."""

from __future__ import annotations

import pytest
import torch

import autosp_ir as air
from tests.e2e.dropouts import Dropping, batch_of
from tests.emit import draws
from tests.gloo import run_ranks

_TOLERANCE = 1e-5


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_rank_draws_what_the_dense_model_draws(backend: str) -> None:
    """Steps, and the generator behind them, are those of the dense model; so are the masks that Inductor compiles."""
    for loss, gradient, stands in draws.dense_masks(0, 1, backend):
        assert loss <= _TOLERANCE and gradient <= _TOLERANCE and stands


@pytest.mark.gloo
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_ranks_draw_what_the_dense_model_draws(backend: str) -> None:
    for found in run_ranks(draws.dense_masks, 2, backend):
        for loss, gradient, stands in found:
            assert loss <= _TOLERANCE and gradient <= _TOLERANCE and stands, found


@pytest.mark.gloo
@pytest.mark.long
def test_compiled_ranks_draw_what_the_dense_model_draws() -> None:
    for found in run_ranks(draws.dense_masks, 2, "inductor", timeout=500.0):
        for loss, gradient, stands in found:
            assert loss <= _TOLERANCE and gradient <= _TOLERANCE and stands, found


@pytest.mark.gloo
def test_ranks_that_are_seeded_apart() -> None:
    for dense, own, whole in run_ranks(draws.different_seeds, 2):
        for name, message in (dense, whole):
            assert name == "RuntimeMismatchError", (name, message)
            assert "the generator of cpu on rank(s) [1]" in message and "torch.manual_seed(seed)" in message
        # What every rank draws for itself needs no agreement.
        assert own == ("", "")


@pytest.mark.gloo
def test_a_rank_that_draws_a_number_for_itself_between_steps() -> None:
    for first, second in run_ranks(draws.drift, 2):
        assert first == ("", "")
        assert second[0] == "RuntimeMismatchError" and "draw nothing between steps" in second[1]


@pytest.mark.gloo
def test_a_seed_gives_the_same_steps() -> None:
    everyone = run_ranks(draws.from_a_seed, 2)
    for first, again in everyone:
        assert first == again and len(set(first)) == 3
    # One global loss, whatever each rank drew.
    assert everyone[0] == everyone[1]


def test_another_probability_or_mode_of_a_module_is_another_program() -> None:
    model, batch = Dropping(), batch_of()
    step = air.parallelize(model, batch, backend="aot_eager", rng="global")
    for change in (lambda: setattr(model.residual, "p", 0.5), model.residual.eval, model.eval):
        change()
        losses = []
        for forward in (model, step):
            torch.manual_seed(0)
            losses.append(float(forward(**batch).detach()))
        assert abs(losses[0] - losses[1]) <= _TOLERANCE * abs(losses[0])
