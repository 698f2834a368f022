"""What is saved for the backward is part of the program: torch's compile cache cannot bring back another choice.

Nor what was compiled when the operators gave results in other strides, of which that cache knows nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autosp_ir as air
from autosp_ir.emit import inductor
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


def test_operators_of_another_version_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("llama-gqa", length=32, num_hidden_layers=1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits = []
    for version in ("first", "first", "second"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        monkeypatch.setattr(inductor, "_version_of_operators", lambda version=version: version)
        step = air.parallelize(model, batch, backend="inductor")
        measure(model, step, batch)
        hits.append(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
    assert hits == [0, 2, 0], "the forward and the backward"
