"""Layouts of what a rewrite creates, one mesh axis at a time."""

from __future__ import annotations

from autosp_ir.ir.graph import Node
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import Layout, Placement, TensorType, TupleType, Type


def layouts_of(kind: Type) -> list[Layout]:
    """The layout of every tensor in a type, in order."""
    if isinstance(kind, TensorType):
        return [kind.layout]
    if isinstance(kind, TupleType):
        return [layout for element in kind.elements for layout in layouts_of(element)]
    return []


def inferred_layouts(node: Node, program: Program) -> Type:
    """The node's type with the layouts that follow from its operands; unchanged without a mesh.

    Raises:
        LayoutError: No layout follows.
    """
    if not program.mesh:
        return node.result.type
    from autosp_ir.comm.layout import infer_layout

    kind = node.result.type
    for axis in program.mesh:
        kind = _placed(kind, axis, infer_layout(node, program, axis))
    return kind


def _placed(kind: Type, axis: str, placement: Placement | tuple[Placement | None, ...] | None) -> Type:
    if isinstance(kind, TensorType):
        single = placement[0] if isinstance(placement, tuple) else placement
        return kind.on_axis(axis, single) if single is not None else kind
    if isinstance(kind, TupleType):
        many = placement if isinstance(placement, tuple) else (placement,) * len(kind.elements)
        return TupleType(tuple(_placed(e, axis, p) for e, p in zip(kind.elements, many, strict=True)))
    return kind
