"""No value of a causal model runs over tokens twice: nothing of size S×S, before or after partitioning."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import fx

from autosp_ir.analysis.token_axis import token_factors
from autosp_ir.capture.program import capture
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import tensors_of
from autosp_ir.ir.verify import nested_graphs
from autosp_ir.pipeline import PassManager
from tests.e2e.line import partitioned
from tests.models import ZOO, build

# Prime, and neither it nor what becomes of it on 4 ranks is another extent of a zoo model.
LENGTH, RANKS = 37, 4
PADDED = 40
TOKEN_EXTENTS = frozenset({LENGTH, LENGTH - 1, PADDED, PADDED // RANKS})


def with_two_token_extents(program: Program) -> list[str]:
    """Values, also in nested graphs, of which two dimensions have an extent that only tokens have."""
    graphs = [program.graph, *(graph for _, graph in nested_graphs(program))]
    return [
        f"%{value.name}: {kind}"
        for graph in graphs
        for node in graph.nodes
        for value in node.results
        for kind in tensors_of(value.type)
        if sum(extent in TOKEN_EXTENTS for extent in kind.shape) > 1
    ]


def exported_shapes(module: fx.GraphModule) -> Iterator[tuple[int, ...]]:
    for node in module.graph.nodes:
        found = node.meta.get("val")
        for leaf in found if isinstance(found, tuple | list) else [found]:
            if hasattr(leaf, "shape"):
                yield tuple(leaf.shape)


@pytest.mark.parametrize("name", ZOO)
def test_nothing_runs_over_tokens_twice(name: str) -> None:
    model, batch = build(name, length=LENGTH, ignored=3)
    captured = capture(model, batch)
    canonical = PassManager("canonicalize").run(captured).program
    assert canonical.find("autosp.attention")
    assert token_factors(canonical).with_two_axes() == []
    lowered = partitioned(captured, RANKS)
    assert with_two_token_extents(lowered) == []
    shapes = list(exported_shapes(lowered.to_graph_module()))
    assert shapes and all(sum(extent in TOKEN_EXTENTS for extent in shape) <= 1 for shape in shapes)


def test_the_check_finds_a_score_matrix() -> None:
    class Scores(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x @ x.transpose(1, 2)) @ x

    captured = capture(Scores(), {"x": torch.randn(2, LENGTH, 8)}, seq_dims={"x": 1})
    assert len(with_two_token_extents(captured)) == 2
    assert len(token_factors(captured).with_two_axes()) == 2
