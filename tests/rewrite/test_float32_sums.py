"""Sums of half-precision gradients that are rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autosp_ir as air


class Gated(nn.Module):
    """An MLP with a gate behind a norm: the gradient of what it reads is a sum of two products, and fused on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(64)
        self.gate, self.up = (nn.Linear(64, 256, bias=False) for _ in range(2))
        self.down = nn.Linear(256, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """A scalar of `[1, tokens, 64]`."""
        y = self.norm(x)
        z: Tensor = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return z.square().sum()


@pytest.mark.parametrize("loop_from", [99, 2])
def test_the_gradient_of_a_chunk_is_rounded_no_more_often_than_that_of_all_tokens(loop_from: int) -> None:
    model = Gated().bfloat16()
    x = torch.randn(1, 256, 64, dtype=torch.bfloat16, requires_grad=True)
    wide = Gated().double()
    wide.load_state_dict(model.state_dict())
    exact = x.detach().double().requires_grad_()
    wide(exact).backward()
    assert exact.grad is not None
    captured = air.capture(model, (x,), seq_dims={"x": 1})
    errors = []
    for tile in ("", f",tile{{chunks=8 loop_from={loop_from}}}"):
        program = air.PassManager(f"canonicalize{tile},differentiate{{decompose=true}}").run(captured.clone()).program
        (found,) = torch.autograd.grad(program.emit(backend="aot_eager")(x), x)
        errors.append(float((found.double() - exact.grad).norm() / exact.grad.norm()))
    whole, chunked = errors
    assert 1e-4 < chunked < 0.99 * whole
