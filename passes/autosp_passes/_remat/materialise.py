"""Writes a saved set into a joint program."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from autosp_ir.errors import PassError
from autosp_ir.ir.graph import Node, Phase, Value, map_values
from autosp_ir.ir.program import InputKind, OutputKind, Program
from autosp_ir.ir.types import ScalarType, TupleType
from autosp_ir.ir.verify import output_leaves
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._remat.rules import Semantics, is_view, view_root


class Materialiser:
    """Writes a saved set into a joint program.

    Args:
        program: The joint program.
        rewriter: Rewrites it.
        chosen: The values to save; views save their base. None saves every forward value that is needed.
        semantics: What may be computed again. What it calls so is never saved; what may not be computed again
            is saved where the backward needs it, chosen or not.
    """

    def __init__(
        self, program: Program, rewriter: Rewriter, chosen: Collection[Value] | None, semantics: Semantics
    ) -> None:
        self._program = program
        self._rewriter = rewriter
        self._save_all = chosen is None
        self._may = semantics.may_recompute
        self._never_saved = semantics.never_saved
        self._saved = {view_root(v) for v in chosen or ()} - self._never_saved
        self._again: dict[Value, Value] = {}
        self._deferred: set[Node] = set()

    def run(self) -> None:
        """Order the program, and put copies of what is not saved in front of their first readers.

        Raises:
            PassError: Something that may not run twice would have to.
        """
        self._extend_forward()
        main = self._partition()
        output = self._program.graph.output_node
        for node in main:
            self._supply(node, node.operands)
            self._swap_operands(node)
        self._supply(output, self._gradient_leaves(), deferred_only=True)

    def _swap_operands(self, node: Node) -> None:
        if any(v in self._again for v in node.operands):

            def again(value: Value) -> Value:
                return self._again.get(value, value)

            self._rewriter.set_args(node, map_values(node.args, again), map_values(dict(node.kwargs), again))

    def _gradient_leaves(self) -> list[Value]:
        leaves = output_leaves(self._program.graph)
        specs = self._program.signature.outputs
        return [
            leaf
            for leaf, spec in zip(leaves, specs, strict=True)
            if spec.kind is OutputKind.GRADIENT and isinstance(leaf, Value)
        ]

    def _extend_forward(self) -> None:
        """What is saved is computed in the forward, even if only the backward reads it."""
        stack = [v.producer for v in self._saved]
        while stack:
            node = stack.pop()
            if node.phase is Phase.FORWARD:
                continue
            self._rewriter.set_phase(node, Phase.FORWARD)
            stack.extend(v.producer for v in node.operands)

    def _partition(self) -> list[Node]:
        """Put the forward in front; returns the nodes behind it that depend on a tangent, in order."""
        dependent = _dependents(self._program)
        nodes = [n for n in self._program.graph.nodes if n.op.kind not in ("placeholder", "output")]
        main = [n for n in nodes if n in dependent]
        self._deferred = {n for n in nodes if n not in dependent and n.phase is not Phase.FORWARD}
        late = next((n for n in nodes if n.phase is not Phase.FORWARD), None)
        seen = False
        for node in nodes:
            seen = seen or node is late
            if seen and late is not None and node.phase is Phase.FORWARD:
                self._rewriter.move(node, before=late)
        return main

    def _supply(self, reader: Node, wanted: Iterable[Value], deferred_only: bool = False) -> None:
        """Make everything that `reader` reads exist in front of it: moved there, computed again, or saved."""
        stack: list[tuple[Value, bool]] = [(v, False) for v in reversed(list(wanted))]
        while stack:
            value, ready = stack.pop()
            node = value.producer
            if value in self._again or (node not in self._deferred and (deferred_only or self._stays(value))):
                continue
            if not ready:
                stack.append((value, True))
                stack.extend((v, False) for v in reversed(node.operands))
                continue
            self._place(node, reader)

    def _stays(self, value: Value) -> bool:
        """Whether later phases read the value itself: a later value, an input, a number, or saved."""
        node = value.producer
        if node.phase is not Phase.FORWARD or node.op.kind in ("placeholder", "get_attr"):
            return True
        if isinstance(value.type, ScalarType) or value in self._saved:
            return True
        if is_view(node):
            return False
        keep = self._save_all and value not in self._never_saved
        if not isinstance(value.type, TupleType) and (keep or not self._may(node)):
            self._saved.add(value)
            return True
        return False

    def _place(self, node: Node, reader: Node) -> None:
        if node in self._deferred:
            self._deferred.discard(node)
            self._rewriter.move(node, before=reader)
            self._swap_operands(node)
            return
        if not is_view(node) and not self._may(node):
            raise PassError(
                f"{node.op.name} would be computed twice", node=node, pass_name="remat", hint="report this: it is wrong"
            )
        copy = self._rewriter.clone_node(node, before=reader, mapping=self._again, phase=Phase.RECOMPUTE)
        self._again[node.result] = copy


def _dependents(program: Program) -> set[Node]:
    """The nodes that depend on a tangent."""
    tangents = {s.name for s in program.signature.inputs if s.kind is InputKind.TANGENT}
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.name in tangents or any(v.producer in found for v in node.operands):
            found.add(node)
    return found


__all__ = ["Materialiser"]
