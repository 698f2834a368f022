"""Sums of half-precision gradients that are rounded once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autosp_ir as air
from autosp_ir.comm.chunk_loop import WHOLE


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


def _gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


_BODIES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "two chunks have one gradient": (lambda x, z, a, b: _gated(x + z, a, b), (0, 0, WHOLE, WHOLE)),
    "a chunk and a whole have one gradient": (lambda c, x, a, b: _gated(x + c, a, b), (WHOLE, 0, WHOLE, WHOLE)),
    "a transposed weight comes first": (
        lambda a, b, x: F.silu(F.linear(x, a.t().contiguous())) * F.linear(x, b),
        (WHOLE, WHOLE, 0),
    ),
}


@pytest.mark.parametrize("name", _BODIES)
def test_gradients_of_a_loop_whose_operands_share_sums(name: str) -> None:
    function, cuts = _BODIES[name]

    class Body(nn.Module):
        def forward(self, *operands: Tensor) -> Tensor:
            return function(*operands)

    torch.manual_seed(0)
    one_chunk = [torch.randn(32, 32).bfloat16() for _ in cuts]
    dims = {f"operands.{i}": cut for i, cut in enumerate(cuts) if cut != WHOLE}
    body = str(air.capture(Body(), tuple(one_chunk), seq_dims=dims))
    whole = [torch.randn(32 if cut == WHOLE else 128, 32).bfloat16().requires_grad_() for cut in cuts]
    (result,) = torch.ops.autosp.chunk_loop(whole, body, 4, list(cuts), [0], "eager")
    found = torch.autograd.grad(result.sum(), whole)
    wide = [x.detach().double().requires_grad_() for x in whole]
    chunks = zip(*(x.chunk(4) if cut != WHOLE else [x] * 4 for x, cut in zip(wide, cuts, strict=True)), strict=True)
    total = torch.cat([function(*chunk) for chunk in chunks]).sum()
    for gradient, exact in zip(found, torch.autograd.grad(total, wide), strict=True):
        assert float((gradient.double() - exact).norm() / exact.norm()) < 0.01
