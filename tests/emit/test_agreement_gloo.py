"""Ranks that do not begin the same step, weights that differ, and values that are not finite: named on every rank."""

from __future__ import annotations

import pytest

from tests.emit import agreeing
from tests.gloo import run_ranks

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(300)]


def test_batches_that_differ_after_the_first_step() -> None:
    for found in run_ranks(agreeing.later_batches, 2):
        assert found["shape"][0] == "RuntimeMismatchError"
        assert "labels on rank(s) [1] ([1, 12] int64, not [1, 16] int64)" in found["shape"][1]
        assert found["after"] == ("", "")
        assert found["content"][0] == "RuntimeMismatchError" and "labels on rank(s) [1]" in found["content"][1]
        assert found["grad mode"][0] == "RuntimeMismatchError" and "torch.is_grad_enabled" in found["grad mode"][1]
        assert "input_idz on rank(s) [1] ([1, 16] int64, not absent)" in found["argument"][1]


def test_programs_that_differ() -> None:
    """The batch is the same and so is every check of it: their collectives would pass for each other's."""
    for found in run_ranks(agreeing.programs_that_differ, 2):
        for name in ("order", "order again", "pipeline", "schedule"):
            kind, text = found[name]
            assert kind == "RuntimeMismatchError", found
            assert "the program on rank(s) [1]" in text, text
        assert found["after"][0] == found["spare"][0] == "", found


def test_weights_that_differ() -> None:
    for found in run_ranks(agreeing.weights_that_differ, 2):
        for name, words in (("seeds", "same weights"), ("gradients", "averaged over the ranks")):
            assert found[name][0] == "RuntimeMismatchError", found[name]
            assert "parameter" in found[name][1] and words in found[name][1]


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_what_is_not_finite_is_traced_to_rank_and_operation(backend: str) -> None:
    for found in run_ranks(agreeing.not_finite, 2, backend):
        assert found["forward"][0] == "NonFiniteError", found
        assert "first of all rank 1: %" in found["forward"][1] and "rank 0:" not in found["forward"][1]
        assert "agreeing.py" in found["forward"][1]
        assert found["forward of others"] == found["backward of others"] == ("", "")
        if backend == "eager":
            continue
        assert found["backward"][0] == "NonFiniteError", found
        assert "gradient of embed.weight" in found["backward"][1] and "first of all rank 1: %" in found["backward"][1]
