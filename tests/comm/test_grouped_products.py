"""Grouped products in the dtypes that torch's kernel rejects."""

from __future__ import annotations

import pytest
import torch

from autosp_ir.comm.grouped_products import grouped_product
from autosp_ir.doctor import Verdict, diagnose
from autosp_ir.errors import UnsupportedError
from tests.models.architectures import small

torch.set_num_threads(1)

# Sizes that torch's kernel aligns to.
GROUPS, ROWS, INNER, COLUMNS = 3, 16, 16, 32
SHAPES = {
    "rows in groups": ((ROWS, INNER), (GROUPS, INNER, COLUMNS)),
    "columns in groups": ((GROUPS, ROWS, INNER), (INNER, COLUMNS)),
    "contracted in groups": ((ROWS, INNER), (INNER, COLUMNS)),
    "all in groups": ((GROUPS, ROWS, INNER), (GROUPS, INNER, COLUMNS)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_float64_agrees_with_the_kernel(case: str) -> None:
    torch.manual_seed(0)
    left, right = (torch.randn(shape, dtype=torch.bfloat16) for shape in SHAPES[case])
    last = COLUMNS if case == "columns in groups" else ROWS
    offs = None if case == "all in groups" else torch.tensor([4, 4, last], dtype=torch.int32)
    kernel = grouped_product(left, right, offs)
    ours = grouped_product(left.double(), right.double(), offs)
    assert ours.shape == kernel.shape
    torch.testing.assert_close(ours, kernel.double(), rtol=2e-2, atol=2e-2)


def test_what_lies_behind_the_last_group_is_zero() -> None:
    left, right = torch.ones(6, 2, dtype=torch.float64), torch.ones(2, 2, 3, dtype=torch.float64)
    found = grouped_product(left, right, torch.tensor([1, 4], dtype=torch.int32))
    assert found.tolist() == [[2.0] * 3] * 4 + [[0.0] * 3] * 2


def test_a_bias_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="bias"):
        grouped_product(torch.ones(2, 2), torch.ones(1, 2, 2), None, torch.ones(2))


def test_experts_in_bfloat16_are_compared_in_float64() -> None:
    model, batch = small("mixtral", dtype=torch.bfloat16)
    finding = diagnose(model, batch, (2,)).on(2)
    assert finding.verdict is Verdict.EXACT_WITH_GATHERS and finding.error is not None and finding.error < 1e-10
