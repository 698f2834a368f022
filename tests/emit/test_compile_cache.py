"""What is saved for the backward is part of the program: torch's compile cache cannot bring back another choice."""

from __future__ import annotations

import pytest
import torch

import autosp_ir as air
from tests.emit.steps import largest_error, measure
from tests.models import build

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def saved_bytes(loss: torch.Tensor) -> int:
    """Bytes that the step's one autograd node keeps."""
    node = loss.grad_fn
    while node is not None and not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    assert node is not None
    return sum(t.numel() * t.element_size() for t in node.saved_tensors)


def test_each_policy_holds_with_a_warm_cache() -> None:
    model, batch = build("llama-gqa", length=32)
    _, expected = measure(model, model, batch)
    kept = []
    for policy in ("save-all", "min-cut", "save-all", "min-cut"):
        torch._dynamo.reset()
        pipeline = air.DEFAULT_PIPELINE.replace("remat", f"remat{{policy={policy}}}")
        step = air.parallelize(model, batch, backend="inductor", pipeline=pipeline)
        kept.append(saved_bytes(step(**batch).loss))
        _, found = measure(model, step, batch)
        assert largest_error(found, expected) <= 1e-4
    assert kept[0] > kept[1]
    assert kept[2:] == kept[:2]
