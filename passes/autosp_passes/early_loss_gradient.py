"""`early-loss-gradient`: compute the gradient of a tiled loss right behind each of its chunks, in the forward.

A tiled loss keeps no logits, so the backward computes them again: one more product with the largest matrix of the
model. But all that the backward of a loss needs from outside is the gradient of the loss itself, one number, in which
everything behind it is linear. So each chunk's gradient is computed for the number 1 while its logits are there; the
forward hands on the gradients of the hidden states and of the head, and the backward multiplies them by the number.
The idea is that of fused linear cross-entropy kernels (Liger, arXiv 2410.10989), here for any loss that `tile` cuts.
"""

from __future__ import annotations

from collections.abc import Iterable

from autosp_ir.ir.graph import Node, Phase, Value, map_values
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, Program, Stage
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._looped_loss import compute_together, looped_losses, reason_to_stay
from autosp_passes._loss_region import LossRegion

_UNMOVABLE = frozenset({Trait.RANDOM, Trait.MUTATES})


class EarlyLossGradient(Pass):
    """Move the backward of a tiled loss into the forward, chunk by chunk, so that no logits are computed twice.

    Needs `tile` and `remat` before it. Only losses of one number are moved, and none in float16: there the number is
    the scale that keeps small gradients from vanishing and has to go in first. A loss that stays gets a remark.
    """

    name = "early-loss-gradient"
    stage = Stage.JOINT
    requires = frozenset({"rematerialised"})
    provides = frozenset({"loss-gradient-early"})
    conflicts = frozenset({"loss-gradient-early", "offloaded"})

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place."""
        rewriter = ctx.rewriter(program)
        names = {s.name for s in program.signature.inputs if s.kind is InputKind.TANGENT}
        tangents = [n for n in program.graph.nodes if n.name in names]
        looped = _compute_loops_early(program, ctx, rewriter, tangents)
        for node in [n for n in tangents if n not in looped]:
            region = LossRegion(program, node.result)
            mover = _Mover(program, rewriter, region)
            reason = region.reason_to_stay() or mover.reason_to_stay()
            if reason is not None:
                ctx.remark("missed", region.culprit or node, reason)
            elif rewriter.allows(node):
                with rewriter.rewrite("early loss gradient"):
                    mover.run()
                rewriter.dead_code()
                ctx.remark("applied", node, f"the gradient of {len(region.chunks)} chunks is computed in the forward")
                ctx.count("chunks", len(region.chunks))


def _compute_loops_early(program: Program, ctx: PassContext, rewriter: Rewriter, tangents: Iterable[Node]) -> set[Node]:
    """Let losses that run in a loop give their gradients in the forward.

    Returns:
        The tangents of these losses, moved or not.
    """
    served: set[Node] = set()
    for loss in list(looped_losses(program)):
        chunks, sources = loss.forward.arg("chunks"), _behind(loss.arrives) & set(tangents)
        node = next(iter(sources), loss.backward)
        served |= sources
        reason = reason_to_stay(loss)
        if reason is not None:
            ctx.remark("missed", loss.backward, reason)
        elif rewriter.allows(loss.backward):
            with rewriter.rewrite("early loss gradient"):
                compute_together(loss, rewriter)
            rewriter.dead_code()
            ctx.remark("applied", node, f"the gradient of a loop over {chunks} chunks is computed in the forward")
            ctx.count("chunks", chunks)
    return served


def _behind(value: Value) -> set[Node]:
    """What a value of the backward depends on, down to the forward."""
    found: set[Node] = set()
    stack = [value.producer]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            deeper = node.phase is not Phase.FORWARD
            stack.extend(v.producer for v in node.operands if deeper)
    return found


class _Mover:
    """Writes the region into the forward, where each chunk follows its own logits.

    Args:
        program: The joint program.
        rewriter: Rewrites it.
        region: What to move.
    """

    def __init__(self, program: Program, rewriter: Rewriter, region: LossRegion) -> None:
        self._rewriter = rewriter
        self._region = region
        self._forward = [n for n in program.graph.nodes if n.phase is Phase.FORWARD and n.op.kind != "output"]
        self._known: dict[str, Value] = {}
        self._copies: dict[Value, Value] = {}
        self._number_forward()
        # The tangents, which no phase orders, may stand in front of the whole forward.
        behind = (n for n in program.graph.nodes if n.phase is not Phase.FORWARD and n.op.kind != "placeholder")
        self._end = next(behind, program.graph.output_node)
        read = self._values_read()
        self._chunked = self._chunk_nodes(read)
        self._behind = _downstream(self._chunked) - self._chunked
        self._read = {v.producer for v in read}

    def reason_to_stay(self) -> str | None:
        """Why the region cannot be moved into the forward, or None."""
        for node in self._forward:
            if node in self._behind and node in self._read:
                self._region.culprit = node
                return "its backward reads a sum over all chunks"
            if node in self._behind | self._chunked and node.op.traits & _UNMOVABLE:
                self._region.culprit = node
                return f"{node.op.name} cannot be moved"
        return None

    def run(self) -> None:
        """Write the region; what it replaces stays behind as dead code."""
        scale = self._region.scale
        kind = scale.tensor_type
        with self._rewriter.before(self._end):
            one = self._rewriter.create(
                "aten.full",
                (list(kind.shape), 1.0),
                {"dtype": kind.dtype, "device": kind.device},
                type=kind,
                phase=Phase.FORWARD,
            )
        self._copies[scale] = one
        order = {chunk: place for place, chunk in enumerate(self._region.chunks)}
        written: set[int] = set()
        for node in self._region.nodes:
            chunk = self._region.chunk_of(node)
            if chunk is not None and chunk not in written:
                written.add(chunk)
                self._move(n for n in self._forward if n in self._chunked and self._region.chunk_of(n) == chunk)
            self._copy(node)
        self._move(n for n in self._forward if n in self._chunked and self._region.chunk_of(n) not in order)
        self._move(n for n in self._forward if n in self._behind)
        for value in self._region.handed_on:
            self._hand_on(value)

    def _number_forward(self) -> None:
        """Find the forward values that equal others, such as the transposed weight of each chunk."""
        for node in self._forward:
            if node.op.kind == "call_function" and not node.op.traits & _UNMOVABLE:
                first = self._known.setdefault(_key(node, self._copies), node.result)
                if first is not node.result:
                    self._copies[node.result] = first

    def _move(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            self._rewriter.move(node, before=self._end)

    def _copy(self, node: Node) -> None:
        """Copy a node of the backward into the forward, behind what it reads."""
        stack = [node]
        while stack:
            current = stack[-1]
            missing = [v.producer for v in current.operands if self._in_forward(v) is None]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            if self._in_forward(current.result) is None:
                mapping = {v: found for v in current.operands if (found := self._in_forward(v)) is not None}
                self._copies[current.result] = self._rewriter.clone_node(
                    current, before=self._end, mapping=mapping, phase=Phase.FORWARD
                )

    def _in_forward(self, value: Value) -> Value | None:
        """The value itself if the forward has it, or what equals it there."""
        node = value.producer
        if value in self._copies:
            return self._copies[value]
        if node.phase is Phase.FORWARD or node.op.kind in ("placeholder", "get_attr"):
            return value
        found = self._known.get(_key(node, self._copies))
        if found is not None:
            self._copies[value] = found
        return found

    def _values_read(self) -> set[Value]:
        """The forward values that the region will read, directly or through what is computed again."""
        inside = {n.result for n in self._region.nodes} | {self._region.scale}
        found: set[Value] = set()
        for node in self._ancestors(inside):
            value = self._in_forward(node.result)
            if value is not None:
                found.add(value)
        return found

    def _ancestors(self, inside: set[Value]) -> list[Node]:
        """What the region reads that is not in the region, down to the forward; operands come first."""
        done: dict[Node, None] = {}
        stack = [v.producer for n in self._region.nodes for v in n.operands if v not in inside]
        while stack:
            node = stack[-1]
            deeper = node.phase is not Phase.FORWARD and node.op.kind != "placeholder"
            missing = [v.producer for v in node.operands if v.producer not in done] if deeper else []
            if missing:
                stack.extend(missing)
                continue
            done[stack.pop()] = None
        return list(done)

    def _chunk_nodes(self, read: set[Value]) -> set[Node]:
        """The forward nodes of the chunks whose values the region reads."""
        found: set[Node] = set()
        stack = [v.producer for v in read]
        while stack:
            node = stack.pop()
            if node in found or node.phase is not Phase.FORWARD or self._region.chunk_of(node) is None:
                continue
            found.add(node)
            stack.extend(v.producer for v in node.operands)
            stack.extend(u for u in node.users if u.results)
        return found

    def _hand_on(self, value: Value) -> None:
        """The rest of the backward reads the copy, times the number."""
        outside = [u for u in value.users if u not in set(self._region.nodes)]
        order = self._rewriter.graph.index()
        scale = self._region.scale
        with self._rewriter.before(min(outside, key=order.__getitem__)):
            if scale.tensor_type.ndim:
                # A loss of shape [1] would decide the shape and the dtype of the product.
                scale = self._rewriter.create("aten.view", (scale, []), phase=Phase.BACKWARD)
            scaled = self._rewriter.create(
                "aten.mul.Tensor",
                (self._copies[value], scale),
                type=value.type,
                phase=Phase.BACKWARD,
                origin_from=value.producer,
            )
        self._rewriter.replace(value, scaled, keep=tuple(self._region.nodes))


def _downstream(nodes: set[Node]) -> set[Node]:
    """The forward nodes that depend on any of these, and these."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in found or node.phase is not Phase.FORWARD or node.op.kind == "output":
            continue
        found.add(node)
        stack.extend(node.users)
    return found


def _key(node: Node, mapping: dict[Value, Value]) -> str:
    """What a node computes, as text: nodes of one key compute the same."""

    def name(value: Value) -> str:
        return f"%{mapping.get(value, value).name}"

    return f"{node.op.name}{map_values(node.args, name)}{map_values(dict(node.kwargs), name)}"


__all__ = ["EarlyLossGradient"]
