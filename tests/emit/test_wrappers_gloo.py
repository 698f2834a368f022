"""FSDP2 around a step: what runs inside it is right, and what cannot is refused by name."""

from __future__ import annotations

import pytest

from tests.emit import wrappers
from tests.gloo import run_ranks

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(600)]


@pytest.mark.parametrize("which", ["step", "model"])
def test_other_lengths_and_modes_are_captured_inside_fsdp2(which: str) -> None:
    assert max(run_ranks(wrappers.other_batches_under_fsdp2, 2, which, timeout=300.0)) <= 1e-5


def test_fsdp2_may_cast_the_parameters() -> None:
    for error, dtypes in run_ranks(wrappers.lower_precision_under_fsdp2, 2, timeout=300.0):
        assert error <= 1e-3
        assert dtypes == "torch.float32"


def test_fsdp2_on_submodules_or_before_capture_is_refused() -> None:
    for found in run_ranks(wrappers.misplaced_fsdp2, 2, timeout=300.0):
        assert found["layers"][0] == "RuntimeMismatchError"
        assert "is a shard" in found["layers"][1] and "the step alone" in found["layers"][1]
        for when in ("model first", "layers first"):
            assert found[when][0] in ("CaptureError", "UnsupportedError"), found[when]
            assert "step" in found[when][1]
