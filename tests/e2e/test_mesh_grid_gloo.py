"""A sample of the grid on two and four gloo ranks, float32."""

from __future__ import annotations

import pytest

from tests.e2e import grid_gloo
from tests.gloo import run_ranks

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(600)]
_TOLERANCE = 1e-5

CELLS: dict[int, list[grid_gloo.Cell]] = {
    2: [("grouped", "odd", "empty-shard", 2, 1), ("multi-head", "even", "right-pad", 1, 1)],
    4: [("one-kv-head", "odd", "packed", 2, 2), ("grouped", "even", "left-pad", 1, 2)],
}


@pytest.mark.parametrize("world", CELLS)
def test_micro_batches_and_data_groups_add_up_to_the_dense_step(world: int) -> None:
    for errors in run_ranks(grid_gloo.cell_errors, world, CELLS[world], timeout=500.0):
        for cell, (loss, gradient) in zip(CELLS[world], errors, strict=True):
            assert loss <= _TOLERANCE, (cell, loss)
            assert gradient <= _TOLERANCE, (cell, gradient)
