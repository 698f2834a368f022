"""A model through the default line on simulated ranks, exact, and how much of it stayed sharded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import autosp_ir as air
from autosp_ir.ir.graph import Node
from autosp_ir.testing import DenseReference, Equivalence

torch.set_num_threads(1)

_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.convolution")


@dataclass
class Line:
    """One model on a number of ranks.

    Args:
        result: What the passes made of it.
        equivalence: How far it is from the dense model; checked already.
    """

    result: air.PassResult
    equivalence: Equivalence

    @property
    def gathered(self) -> list[str]:
        """The operations that run whole because they cannot keep their tokens cut, in order."""
        missed = [r.message for r in self.result.remarks if r.kind == "missed" and r.pass_name == "token-partition"]
        return [m.group(1) for text in missed if (m := re.match(r"(\S+) has no rule", text)) is not None]

    @property
    def whole_products(self) -> list[str]:
        """Matrix products of the forward that every rank computes on all tokens, by name."""
        return [n.name for n in self._products() if isinstance(n.result.tensor_type.layout["sp"], air.Invariant)]

    @property
    def attentions(self) -> list[air.Placement]:
        """Where the queries of each forward attention are cut."""
        nodes = [n for n in self.result.program.find("autosp.attention") if n.phase is air.Phase.FORWARD]
        return [n.arg("q").tensor_type.layout["sp"] for n in nodes]

    def count(self, operation: str, phase: air.Phase | None = None) -> int:
        """How many nodes of an operation there are."""
        nodes = self.result.program.find(operation)
        return sum(phase is None or n.phase is phase for n in nodes)

    def _products(self) -> list[Node]:
        nodes = self.result.program.graph.nodes
        return [n for n in nodes if n.is_op(*_PRODUCTS) and n.phase is air.Phase.FORWARD]


def run_line(
    model: nn.Module, batch: Any, ranks: int = 2, pipeline: str = air.DEFAULT_PIPELINE, **settings: Any
) -> Line:
    """Capture, partition and lower a model; loss, outputs and every gradient are the dense model's.

    Args:
        model: The model.
        batch: The batch.
        ranks: Size of the sequence axis.
        pipeline: Passes to run.
        settings: Of `capture`.
    """
    reference = DenseReference.of(model, batch, **settings)
    result = air.PassManager(pipeline).run(reference.program, mesh={"sp": ranks})
    return Line(result, reference.check(result.program))


def run_sharded(model: nn.Module, batch: Any, ranks: int = 2, **settings: Any) -> Line:
    """As `run_line`, asserting that nothing was gathered and that every product and attention is sharded."""
    line = run_line(model, batch, ranks, **settings)
    assert line.gathered == []
    assert line.whole_products == []
    assert all(p == air.Shard(1) for p in line.attentions)
    return line
