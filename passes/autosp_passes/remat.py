"""`remat`: choose what the forward saves for the backward, and write the choice into the program.

Forward values that the backward needs and that are not saved are computed again, by copies of phase `recompute` in
front of their first reader. Afterwards the values that cross from forward to later phases are the saved set.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from autosp_ir.analysis.chunked import chunk_values
from autosp_ir.emit.partition import min_cut_saved
from autosp_ir.emit.split import crossing_values
from autosp_ir.errors import PassError
from autosp_ir.ir.graph import Node, Phase, Value, map_values
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, OutputKind, Program
from autosp_ir.ir.types import ScalarType, TensorType, TupleType
from autosp_ir.ir.verify import output_leaves
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.random_masks import replayed_masks
from autosp_ir.rewrite.rewriter import Rewriter

_NEVER_AGAIN = frozenset({Trait.COLLECTIVE, Trait.ATTENTION, Trait.RANDOM, Trait.MUTATES})
# Views that their schema does not declare.
_UNDECLARED_VIEWS = ("aten._unsafe_view",)


class Remat(Pass):
    """Decide the saved set of a joint program.

    Collectives, attention and random operations are never computed again; a dropout mask may be, from the state that
    was drawn for it, and gives the same. A view is taken again from its base, which
    shares its storage; views of parameters and inputs cost nothing. What `tile` made for one chunk of tokens is always
    computed again: keeping it for every chunk would keep the whole.
    """

    name = "remat"
    stage = "joint"
    requires = frozenset({"differentiated"})
    provides = frozenset({"rematerialised"})
    conflicts = frozenset({"rematerialised"})

    class Options(Pass.Options):
        """Options of `remat`."""

        policy: Literal["save-all", "min-cut"] = "min-cut"
        """`save-all` saves what autograd would; `min-cut` follows torch's partitioner: the fewest bytes that cheap
        operations can rebuild the rest from."""
        aggressive: bool = False
        """With `min-cut`: compute again whatever is no matrix product, attention or collective, reductions and long
        chains of pointwise operations included; torch's `aggressive_recomputation`."""

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place.

        Raises:
            PassError: The program has no backward yet, or torch's partitioner fails.
        """
        if not any(o.kind is OutputKind.GRADIENT for o in program.signature.outputs):
            ctx.remark("missed", None, "the program has no gradient, so nothing is saved")
            return
        rewriter = ctx.rewriter(program)
        again = set(chunk_values(program))
        if self.options.policy != "save-all":
            again |= replayed_masks(program)
        chosen = None if self.options.policy == "save-all" else min_cut_saved(program, again, self.options.aggressive)
        _Materialiser(program, rewriter, chosen, again).run()
        rewriter.dead_code()
        _report(program, ctx)


def _report(program: Program, ctx: PassContext) -> None:
    saved = crossing_values(program)
    ctx.count("saved_values", len(saved))
    ctx.count("recomputed_nodes", sum(n.phase is Phase.RECOMPUTE for n in program.graph.nodes))
    sizes = [v.type.numel * v.type.dtype.itemsize for v in saved if isinstance(v.type, TensorType)]
    if all(isinstance(s, int) for s in sizes):
        ctx.count("saved_bytes", sum(int(s) for s in sizes))


def _is_view(node: Node) -> bool:
    """Whether the node's result shares the storage of its first operand, or will once lowering erases identities."""
    if node.is_op("operator.getitem"):
        return bool(node.operands) and node.operands[0].producer.op.has(Trait.VIEW)
    return bool(node.op.traits & {Trait.VIEW, Trait.IDENTITY}) or node.is_op(*_UNDECLARED_VIEWS)


def view_root(value: Value) -> Value:
    """The value whose storage a view shares, through any chain of views; itself if it is none."""
    while _is_view(value.producer) and value.producer.operands:
        value = value.producer.operands[0]
    return value


def may_recompute(node: Node) -> bool:
    """Whether computing the node a second time is allowed: no collective, no attention, nothing random."""
    return not node.op.traits & _NEVER_AGAIN and "attention" not in node.op.name


class _Materialiser:
    """Writes a saved set into a joint program.

    Args:
        program: The joint program.
        rewriter: Rewrites it.
        chosen: The values to save; None saves every forward value that is needed.
        again: Values that are computed again, whatever is chosen, if that is allowed.
    """

    def __init__(
        self, program: Program, rewriter: Rewriter, chosen: set[Value] | None, again: Collection[Value] = ()
    ) -> None:
        self._program = program
        self._rewriter = rewriter
        self._save_all = chosen is None
        self._never_saved = {v for v in again if may_recompute(v.producer)}
        self._saved = {view_root(v) for v in chosen or ()} - self._never_saved
        self._again: dict[Value, Value] = {}
        self._deferred: set[Node] = set()

    def run(self) -> None:
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
        if _is_view(node):
            return False
        source = node.operands[0].producer if node.is_op("operator.getitem") and node.operands else node
        keep = self._save_all and value not in self._never_saved
        if not isinstance(value.type, TupleType) and (keep or not may_recompute(source)):
            self._saved.add(value)
            return True
        return False

    def _place(self, node: Node, reader: Node) -> None:
        if node in self._deferred:
            self._deferred.discard(node)
            self._rewriter.move(node, before=reader)
            self._swap_operands(node)
            return
        if not may_recompute(node):
            raise PassError(
                f"{node.op.name} would be computed twice", pass_name=Remat.name, hint="report this: it is never right"
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


__all__ = ["Remat", "may_recompute", "view_root"]
