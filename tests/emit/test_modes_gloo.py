"""Modes, buffers that the model writes, frozen parameters and several programs, on two ranks."""

from __future__ import annotations

import pytest

from tests.emit import modes
from tests.gloo import run_ranks

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(300)]
_TOLERANCE = 1e-5


@pytest.mark.parametrize(("backend", "frozen"), [("aot_eager", True), ("eager", False)])
def test_modes_buffers_and_frozen_parameters(backend: str, frozen: bool) -> None:
    for errors in run_ranks(modes.counted, 2, backend, frozen):
        assert max(errors.values()) <= _TOLERANCE, errors


def test_several_programs_in_one_process() -> None:
    assert max(run_ranks(modes.several_programs, 2)) <= _TOLERANCE
