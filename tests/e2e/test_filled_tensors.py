"""Filled tensors made like a value that needs a gradient need none: they read its shape alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.refusals.models import Between, batch
from tests.rivals.line import run_line


def memory_behind_zeros(x: Tensor) -> Tensor:
    """`[B, S, C]` reads a sum over its tokens that stands behind zeros, as chunked scans write their first state."""
    state = (x.transpose(1, 2) @ x)[:, None]
    states = torch.cat([torch.zeros_like(state), state], dim=1)
    return x @ states.sum(1)


def ones_beside_tokens(x: Tensor) -> Tensor:
    """`[B, S, C]` beside ones of its own shape."""
    return (torch.cat([x, torch.ones_like(x)], dim=2) ** 2)[..., : x.shape[2]]


@pytest.mark.parametrize("function", [memory_behind_zeros, ones_beside_tokens])
def test_they_join_what_is_cut_or_summed(function: Callable[[Tensor], Tensor]) -> None:
    line = run_line(Between(function), batch(), 2)
    assert "aten.cat" not in line.gathered
