"""A picked logarithm of a probability is found along with the sums of its row, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autosp_ir._torch_compat import FakeTensorMode
from autosp_ir.emit.gathers import pick_along_with_sums

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def beside_its_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What cross-entropy and its backward are decomposed to."""
    shifted = logits - logits.amax(1, True)
    found = shifted - shifted.exp().sum(1, True).log()
    return found.gather(1, labels), found.exp()


def alone(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing else is read of what is gathered from: another kernel would read every element in vain."""
    shifted = logits - logits.amax(1, True)
    found = shifted - shifted.exp().sum(1, True).log()
    return found.gather(1, labels), logits


def after_its_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient cannot depend on what is picked later."""
    shifted = logits - logits.amax(1, True)
    found = shifted - shifted.exp().sum(1, True).log()
    powers = found.exp()
    return found.gather(1, labels), powers


def of_other_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing says that the logarithm of another sum is at least 0."""
    shifted = logits - logits.amax(1, True)
    found = shifted - (shifted.exp().sum(1, True) / 8).log()
    return found.gather(1, labels), found.exp()


def two_a_row(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """More than one element a row is not a sum over the row."""
    return beside_its_gradient(logits, torch.cat([labels, labels], 1))


def traced(step: Step, *values: Tensor) -> fx.GraphModule:
    """The step's graph with fake values, rewritten."""
    mode = FakeTensorMode()
    module = make_fx(step)(*(mode.from_tensor(v) for v in values))
    pick_along_with_sums(module.graph, mode)
    module.graph.lint()
    module.recompile()
    return module


def _sums(module: fx.GraphModule) -> int:
    return len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("special", [0.0, float("-inf"), float("inf"), float("nan"), 1e30])
def test_values_are_the_same_bit_for_bit(dtype: torch.dtype, special: float) -> None:
    torch.manual_seed(0)
    logits = (10 * torch.randn(6, 50)).to(dtype)
    labels = torch.randint(0, 50, (6, 1))
    logits[0, labels[0, 0]] = special
    logits[1, (labels[1, 0] + 1) % 50] = special
    logits[2, :] = special
    module = traced(beside_its_gradient, logits, labels)
    assert _sums(module) == 2
    for found, wanted in zip(module(logits, labels), beside_its_gradient(logits, labels), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("step", [alone, after_its_gradient, of_other_sums, two_a_row])
def test_anything_else_stays_a_gather(step: Step) -> None:
    logits, labels = torch.randn(6, 50), torch.randint(0, 50, (6, 1))
    module = traced(step, logits, labels)
    assert _sums(module) == 1
    for found, wanted in zip(module(logits, labels), step(logits, labels), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("label", [50, -1])
def test_a_label_that_is_out_of_range_stays_an_error(label: int) -> None:
    logits, labels = torch.randn(6, 50), torch.full((6, 1), label)
    module = traced(beside_its_gradient, logits, labels)
    with pytest.raises(RuntimeError, match="out of bounds"):
        module(logits, labels)
