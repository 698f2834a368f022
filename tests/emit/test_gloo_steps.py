"""Real gloo ranks, float32, against the dense model."""

from __future__ import annotations

import pytest

from tests.emit import steps
from tests.gloo import run_ranks
from tests.sampling import sampled

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(600)]
_TOLERANCE = 1e-5
_MODELS = ("llama-mha", "llama-gqa", "llama-mqa", "llama-tied", "qwen3", "mistral", "gpt2", "plain")


@pytest.mark.parametrize(
    ("backend", "world"),
    [("eager", 2), ("aot_eager", 2), ("aot_eager", 4), pytest.param("eager", 4, marks=pytest.mark.long)],
)
def test_one_step_equals_dense(world: int, backend: str) -> None:
    shapes = [{"length": 32}, {"length": 33, "ignored": 9}, {"length": 33, "batch_size": 3}]
    layers = {"num_hidden_layers": 1}
    cases = [(name, shapes[i % 3] | layers, {"backend": backend}) for i, name in enumerate(_MODELS)]
    for errors in run_ranks(steps.step_errors, world, cases, timeout=500.0):
        for case, (loss, gradient) in zip(cases, errors, strict=True):
            assert loss <= _TOLERANCE, (case, loss)
            assert gradient <= _TOLERANCE, (case, gradient)


def test_chunks_of_heads_and_tokens_equal_dense() -> None:
    pipeline = (
        "canonicalize,pad-tokens{multiple=4},token-partition,ulysses,head-chunk,tile{wide=1.5},differentiate,remat,"
        "grad-sync,lower-comm"
    )
    cases = [(name, {"length": 33}, {"pipeline": pipeline, "backend": "aot_eager"}) for name in ("llama-mha", "gpt2")]
    for errors in run_ranks(steps.step_errors, 2, cases, timeout=500.0):
        assert max(max(pair) for pair in errors) <= _TOLERANCE, errors


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_ten_optimizer_steps_stay_with_dense(backend: str) -> None:
    for errors in run_ranks(steps.training_errors, 2, "llama-gqa", backend, timeout=500.0):
        assert errors["SGD"] <= _TOLERANCE
        assert errors["AdamW"] <= max(3 * errors["AdamW drift"], _TOLERANCE), errors


@pytest.mark.parametrize("dynamic", sampled([None, True], 2))
def test_other_lengths(dynamic: bool | None) -> None:
    for errors in run_ranks(steps.lengths_errors, 2, dynamic, timeout=500.0):
        assert max(max(pair) for pair in errors) <= _TOLERANCE, errors


def test_loss_outside_the_model() -> None:
    for errors in run_ranks(steps.outside_loss, 2, timeout=300.0):
        assert max(max(pair) for pair in errors) <= _TOLERANCE, errors


def test_data_and_sequence_axes() -> None:
    assert max(run_ranks(steps.data_axis, 4, timeout=300.0)) <= _TOLERANCE


def test_external_gradient_sync_averages_to_dense() -> None:
    assert max(run_ranks(steps.external_sync, 2, timeout=300.0)) <= _TOLERANCE


def test_state_dict_travels_both_ways() -> None:
    assert all(run_ranks(steps.state_dict_travels, 2, timeout=300.0))
