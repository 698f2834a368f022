"""What may be computed again, and what is a view of what."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from autosp_ir.analysis.chunked import chunk_values
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, OutputKind, Program
from autosp_ir.rewrite.random_masks import replayed_masks

Rerun = Literal["attention", "collectives"]
_NEVER_AGAIN = frozenset({Trait.RANDOM, Trait.MUTATES})
# Views that their schema does not declare.
_UNDECLARED_VIEWS = ("aten._unsafe_view",)


def is_view(node: Node) -> bool:
    """Whether the node's result shares the storage of its first operand, or will once lowering erases identities."""
    if node.is_op("operator.getitem"):
        return bool(node.operands) and node.operands[0].producer.op.has(Trait.VIEW)
    return bool(node.op.traits & {Trait.VIEW, Trait.IDENTITY}) or node.is_op(*_UNDECLARED_VIEWS)


def view_root(value: Value) -> Value:
    """The value whose storage a view shares, through any chain of views; itself if it is none."""
    while is_view(value.producer) and value.producer.operands:
        value = value.producer.operands[0]
    return value


def may_recompute(node: Node, rerun: Collection[str] = ()) -> bool:
    """Whether computing the node a second time is allowed.

    Nothing random or written in place ever; attention and collectives only if `rerun` names them. A node that only
    takes an element of a tuple is judged by what makes the tuple.
    """
    node = _maker(node)
    if node.op.traits & _NEVER_AGAIN:
        return False
    attends = node.op.has(Trait.ATTENTION) or "attention" in node.op.name
    if attends and "attention" not in rerun:
        return False
    return not node.op.has(Trait.COLLECTIVE) or "collectives" in rerun


def _maker(node: Node) -> Node:
    """What computes the node's value: for an element of a tuple, what makes the tuple."""
    return node.operands[0].producer if node.is_op("operator.getitem") and node.operands else node


class Semantics:
    """Which nodes of a joint program may be computed again.

    Args:
        program: A joint program.
        rerun: Of attention and collectives, what may be.
        replay: Whether dropout masks larger than their state are made again from it.

    Attributes:
        never_saved: What is always computed again: values of single chunks of tokens, and replayed masks.
    """

    def __init__(self, program: Program, rerun: Collection[str] = (), *, replay: bool = True) -> None:
        self.rerun = frozenset(rerun)
        self._written = _written(program)
        again = set(chunk_values(program)) | (replayed_masks(program) if replay else set())
        self.never_saved = {v for v in again if self.may_recompute(v.producer)}

    def may_recompute(self, node: Node) -> bool:
        """See `may_recompute`; besides, what reads a value that is written later would read the new one."""
        if not may_recompute(node, self.rerun):
            return False
        return not self._written or not any(view_root(v) in self._written for v in _maker(node).operands)


def _written(program: Program) -> set[Value]:
    """Values whose storage the step writes: buffers that the forward updates, operands of operations in place."""
    targets = {o.target for o in program.signature.outputs if o.kind is OutputKind.BUFFER_MUTATION}
    found = {
        program.graph.value(s.name)
        for s in program.signature.inputs
        if s.kind is InputKind.BUFFER and s.target in targets
    }
    for node in program.graph.nodes:
        if node.op.has(Trait.MUTATES):
            found |= {view_root(v) for v in node.operands}
    return found


__all__ = ["Rerun", "Semantics", "is_view", "may_recompute", "view_root"]
