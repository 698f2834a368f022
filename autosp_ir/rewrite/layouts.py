"""Types and layouts of what a rewrite creates or changes."""

from __future__ import annotations

from autosp_ir.comm.layout import GradientFlow, infer_layout, place
from autosp_ir.ir.graph import Node
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import Invariant, Layout, Placement, TensorType, TupleType, Type, map_tensors


def infer_typed(
    node: Node, program: Program, *, layout: Layout | None = None, hint: Type | None = None, flow: GradientFlow
) -> Type:
    """Infer a node's type and layout, and store it.

    Args:
        node: A node whose operands have types.
        program: Its program; without a mesh every layout is Invariant.
        layout: The layout of every tensor, instead of the inferred one.
        hint: A type whose layout decides where several layouts hold.
        flow: Gradient reachability of the program.

    Returns:
        The stored type.

    Raises:
        VerifyError: The operation rejects its operands. LayoutError when no layout follows.
    """
    kind = program.infer(node)
    # Layout rules read the new shape from the node.
    node.result.type = kind
    if layout is not None:
        kind = map_tensors(kind, lambda t: t.with_layout(layout))
    else:
        for axis in program.mesh:
            wanted = _placements(hint, axis) if hint is not None else None
            kind = place(kind, axis, infer_layout(node, program, axis, hint=wanted, flow=flow))
    node.result.type = kind
    return kind


def layouts_of(kind: Type) -> list[Layout]:
    """The layout of every tensor in a type, in order."""
    if isinstance(kind, TensorType):
        return [kind.layout]
    if isinstance(kind, TupleType):
        return [layout for element in kind.elements for layout in layouts_of(element)]
    return []


def _placements(kind: Type, axis: str) -> Placement | tuple[Placement | None, ...] | None:
    if isinstance(kind, TensorType):
        return kind.layout[axis]
    if isinstance(kind, TupleType):
        return tuple(e.layout[axis] if isinstance(e, TensorType) else None for e in kind.elements)
    return Invariant()
