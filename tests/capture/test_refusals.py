"""What cannot be captured soundly is refused by name, with the user's line and a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autosp_ir.capture.export import trace_module
from autosp_ir.errors import AutoSPError, CaptureError, UnsupportedError
from tests.models import build

torch.set_num_threads(1)


class Rounds(torch.autograd.Function):
    """A straight-through estimator: its backward is not what export would record."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def custom_backward(y: Tensor) -> Tensor:
    apply: Callable[[Tensor], Tensor] = Rounds.apply
    return apply(y)


def hooked(y: Tensor) -> Tensor:
    y.register_hook(lambda g: g * 2)
    return y


def decided(y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y


def as_number(y: Tensor) -> Tensor:
    return y * int(y.detach().sum().item())


def selected(y: Tensor) -> Tensor:
    return y[y > 0]


def outside_torch(y: Tensor) -> Tensor:
    return y * float(y.detach().numpy().sum())


def reentrant(y: Tensor) -> Tensor:
    out: Tensor = checkpoint(torch.relu, y, use_reentrant=True)
    return out


def random(y: Tensor) -> Tensor:
    return y + torch.randn_like(y)


def hidden_write(y: Tensor) -> Tensor:
    with torch.no_grad():
        y.mul_(2)
    return y


def write_through_detach(y: Tensor) -> Tensor:
    y.detach().mul_(2)
    return y


class Applies(nn.Module):
    """A linear layer and a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, 4]` to whatever the function returns."""
        return self.function(self.linear(x))


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (custom_backward, UnsupportedError, "Rounds"),
        (hooked, UnsupportedError, "gradient hook"),
        (decided, CaptureError, "depends on values"),
        (as_number, CaptureError, "depends on values"),
        (selected, CaptureError, "shape of aten.index"),
        (outside_torch, CaptureError, "numpy"),
        (reentrant, UnsupportedError, "use_reentrant=False"),
        (random, UnsupportedError, "random"),
        (hidden_write, UnsupportedError, "in place"),
        (write_through_detach, UnsupportedError, "in place"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_refused_by_name(function: Callable[[Tensor], Tensor], error: type[AutoSPError], words: str) -> None:
    with pytest.raises(error) as raised:
        trace_module(Applies(function), (torch.randn(2, 6, 4),), seq_dims={"x": 1})
    message = str(raised.value)
    assert words in message and "What you can do:" in message
    if function not in (outside_torch, reentrant):
        assert "test_refusals.py" in message, "the message shows the user's line"


def test_hooks_and_functions_work_again_after_a_refusal() -> None:
    with pytest.raises(UnsupportedError):
        trace_module(Applies(hooked), (torch.randn(2, 6, 4),), seq_dims={"x": 1})
    y = torch.ones(2, requires_grad=True)
    seen: list[Tensor] = []
    custom_backward(y * 1).sum().backward()
    y.register_hook(seen.append)
    y.sum().backward()
    assert len(seen) == 1 and y.grad is not None


def test_backward_hooks_of_modules_are_refused() -> None:
    model = Applies(torch.relu)
    model.linear.register_full_backward_hook(lambda *args: None)
    with pytest.raises(UnsupportedError, match="backward hook"):
        trace_module(model, (torch.randn(2, 6, 4, requires_grad=True),), seq_dims={"x": 1})


def test_random_numbers_name_the_module() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.RReLU()), (torch.randn(2, 6, 4),)
    with pytest.raises(UnsupportedError, match=r"rrelu.* in 1 draws"):
        trace_module(model, batch, seq_dims={"input": 1})
    trace_module(model.eval(), batch, seq_dims={"input": 1})


def test_wrapped_models_are_refused() -> None:
    with pytest.raises(CaptureError, match="DataParallel"):
        trace_module(nn.DataParallel(Applies(torch.relu)), (torch.randn(2, 6, 4),), seq_dims={"x": 1})


def test_a_length_that_the_code_fixes_is_no_symbol() -> None:
    def fixed(y: Tensor) -> Tensor:
        return y + torch.zeros(6, 4)

    with pytest.raises(CaptureError, match="symbolic sequence length"):
        trace_module(Applies(fixed), (torch.randn(2, 6, 4),), seq_dims={"x": 1}, dynamic=True)


def test_a_written_input_is_refused() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return x * 2

    with pytest.raises(UnsupportedError, match="writes to"):
        trace_module(Writes(), (torch.randn(2, 6, 4),), seq_dims={"x": 1})


def test_the_models_own_errors_are_shown() -> None:
    model, batch = build("llama-gqa")
    with pytest.raises(CaptureError, match="exactly one of input_ids"):
        trace_module(model, {"labels": batch["labels"], "attention_mask": torch.ones(1, 32)}, seq_dims={"labels": 1})
