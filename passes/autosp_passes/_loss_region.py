"""The part of a backward between the gradient of a loss and what the chunks of the loss hand on."""

from __future__ import annotations

import torch

from autosp_ir.analysis.chunked import chunk_parts
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_passes._linearity import is_linear

# A sum over chunks stays in the region through these.
_RESHAPES = ("aten._to_copy", "prims.convert_element_type", "aten.permute", "aten.t", "aten.view")


class LossRegion:
    """What depends on the gradient of a loss, linearly, up to where the chunks of the loss come together again.

    Args:
        program: A joint program with its recomputation written out.
        tangent: The gradient of the loss.

    Attributes:
        scale: The number that everything in the region is linear in, as the region reads it.
        nodes: The region in program order.
        handed_on: What the rest of the program reads of it.
        chunks: The numbers of its chunks, in the order of the backward.
        culprit: The node to name when there is a reason to stay.
    """

    def __init__(self, program: Program, tangent: Value) -> None:
        self._parts = chunk_parts(program)
        self._tiled = "tiled" in program.facts
        self._tangent = tangent
        self.culprit: Node | None = None
        self.scale = tangent
        while [u.op.name for u in self.scale.users] == ["autosp.invariant_to_replicate"]:
            self.scale = next(iter(self.scale.users)).result
        self.nodes = self._in_front_of_chunks(self._grow(program))
        inside = set(self.nodes)
        self.handed_on = [
            n.result for n in self.nodes if self._behind_chunks(n) and any(u not in inside for u in n.result.users)
        ]
        self.chunks = list(dict.fromkeys(c for n in self.nodes if (c := self.chunk_of(n)) is not None))

    def chunk_of(self, node: Node) -> int | None:
        """The one chunk that a node belongs to, or None."""
        found = self._parts.get(node, ())
        return next(iter(found)) if len(found) == 1 else None

    def reason_to_stay(self) -> str | None:
        """Why the region cannot be moved into the forward, or None."""
        if not _is_number(self._tangent):
            return "an output of more than one number: its gradient has to be there first"
        if len(self.chunks) < 2:
            if self._tiled:
                return "its backward does not run in chunks: its tokens are not summed inside the chunks of tile"
            return "its backward does not run in chunks: run tile before differentiate"
        inside = set(self.nodes)
        for node in self.nodes:
            if node.result.tensor_type.dtype is torch.float16:
                self.culprit = node
                return "float16: small gradients vanish unless they are scaled first"
        for value in self.handed_on:
            if self.chunk_of(value.producer) is not None:
                self.culprit = next(u for u in value.users if u not in inside)
                return f"{self.culprit.op.name} is not known to be linear in the gradient of the loss"
        return None

    def _grow(self, program: Program) -> list[Node]:
        dependent: set[Value] = {self._tangent, self.scale}
        inside: dict[Value, Node] = {}
        linear = {self.scale}
        for node in program.graph.nodes:
            moving = [v for v in node.operands if v in dependent]
            if not moving or node.op.kind == "output":
                continue
            dependent.add(node.result)
            if node.result is not self.scale and linear.issuperset(moving) and self._belongs(node, moving):
                linear.add(node.result)
                inside[node.result] = node
        return list(inside.values())

    def _belongs(self, node: Node, moving: list[Value]) -> bool:
        """Whether the node is linear and part of a chunk, a sum of chunks, or made of numbers alone."""
        if not is_linear(node, moving) or any(v.producer.is_op("autosp.unchunk") for v in moving):
            return False
        if node.is_op("autosp.unchunk"):
            return True
        parts = self._parts[node]
        if len(parts) > 1:
            return node.is_op("aten.add.Tensor", "autosp.addmm_float32", *_RESHAPES)
        return bool(parts) or all(_is_number(v) for v in node.operands if v not in moving)

    def _behind_chunks(self, node: Node) -> bool:
        return bool(self._parts[node]) or node.is_op("autosp.unchunk")

    def _in_front_of_chunks(self, nodes: list[Node]) -> list[Node]:
        """Without the numbers that lead to no chunk."""
        needed: set[Node] = set()
        for node in reversed(nodes):
            if node in needed or self._behind_chunks(node):
                needed.update((node, *(v.producer for v in node.operands)))
        return [n for n in nodes if n in needed]


def _is_number(value: Value) -> bool:
    return not isinstance(value.type, TensorType) or value.type.numel == 1


__all__ = ["LossRegion"]
