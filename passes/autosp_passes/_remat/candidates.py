"""Known rules for what to save, as candidates beside the solver's own choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from autosp_ir.analysis.cost import is_costed
from autosp_ir.emit.partition import min_cut_saved
from autosp_ir.ir.graph import Node, Phase, Value
from autosp_ir.ir.program import Program
from autosp_passes._remat.model import Outcome, StepModel
from autosp_passes._remat.repeats import Repeats
from autosp_passes._remat.rules import Semantics

Rule = Literal["save-all", "autosp-sac", "min-cut"]


def rule_saved(program: Program, semantics: Semantics, rule: str, aggressive: bool = False) -> set[Value] | None:
    """The values that a rule saves; None for everything.

    `min-cut` is torch's partitioner. `autosp-sac` is the same with matrix products computed again, which is cheap where
    attention takes most of the time; the rule of AutoSP.

    Args:
        program: A joint program.
        semantics: What may be computed again.
        rule: `save-all`, `autosp-sac` or `min-cut`.
        aggressive: With torch's `aggressive_recomputation`.

    Raises:
        PassError: torch's partitioner fails.
    """
    if rule == "save-all":
        return None
    never = set(semantics.never_saved)
    if rule == "autosp-sac":
        never |= {n.result for n in program.graph.nodes if _is_product(n) and semantics.may_recompute(n)}
    return min_cut_saved(program, never, aggressive=aggressive)


def _is_product(node: Node) -> bool:
    return node.phase is Phase.FORWARD and is_costed(node) and "attention" not in node.op.name


def checkpointed(model: StepModel, repeats: Repeats) -> frozenset[int]:
    """What enters each layer; everything else is computed again, as far as it may be."""
    kept = set()
    for i, (layer, _) in repeats.place.items():
        for operand in model.operands[i]:
            root = model.root[operand]
            home = repeats.place.get(root)
            if (home is None or home[0] < layer) and model.savable(root):
                kept.add(root)
    for i in range(len(model.nodes)):
        if i not in repeats.place and model.forward[i]:
            for operand in model.operands[i]:
                root = model.root[operand]
                if root in repeats.place and model.savable(root):
                    kept.add(root)
    return frozenset(kept)


def mixed(
    model: StepModel, repeats: Repeats, cheap: Outcome, small: Outcome, peak: float
) -> Iterator[tuple[int, Outcome]]:
    """Layers by the rule `cheap`, as many as fit, the others by `small`; every split that was tried."""
    low, high = 0, repeats.layers
    while low < high:
        middle = (low + high + 1) // 2
        outcome = model.play(_split(repeats, cheap.saved, small.saved, middle))
        yield middle, outcome
        low, high = (middle, high) if outcome.peak <= peak else (low, middle - 1)


def _split(repeats: Repeats, cheap: frozenset[int], small: frozenset[int], last: int) -> frozenset[int]:
    """The last `last` layers, whose values are freed first, by `cheap`."""
    border = repeats.layers - last

    def is_late(i: int) -> bool:
        return i in repeats.place and repeats.place[i][0] >= border

    return frozenset([i for i in cheap if is_late(i)] + [i for i in small if not is_late(i)])


__all__ = ["Rule", "checkpointed", "mixed", "rule_saved"]
