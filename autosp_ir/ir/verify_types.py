"""Re-inference: the type every operation's own fake kernel gives must be the stored one, layouts aside."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from autosp_ir.errors import AutoSPError, VerifyError
from autosp_ir.ir.graph import Graph, Node
from autosp_ir.ir.printer import format_type
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import ObjectType, ScalarType, TensorType, TupleType, Type


def check_types(graph: Graph, program: Program) -> None:
    """Every value has a type, every getitem index is in range, and re-inferred types equal the stored ones."""
    shape_env = program.fake_mode.shape_env
    for node in graph.nodes:
        if node.op.kind == "output":
            continue
        stored = node.result.type
        if stored == ObjectType("untyped"):
            raise VerifyError(
                f"%{node.name} has no type", node=node, hint="pass type= to graph.create, or create it with a Rewriter"
            )
        if node.op.target is operator.getitem:
            _check_getitem(node)
        if any(_is_opaque(v.type) for v in node.operands):
            continue  # what an opaque object holds is unknown, so nothing can be inferred from it
        inferred = _inferred(node, program)
        if not same_type(stored, inferred, shape_env):
            raise VerifyError(
                f"%{node.name} is stored as {format_type(stored)} but {node.op.name} returns {format_type(inferred)}",
                node=node,
                hint="infer the type again after changing a node's operands (program.infer)",
            )


def _inferred(node: Node, program: Program) -> Type:
    """The type that follows from the operands; operands that an operation does not support make a program invalid."""
    try:
        return program.infer(node)
    except VerifyError:
        raise
    except AutoSPError as error:
        raise VerifyError(f"%{node.name}: {error.reason}", node=node, hint=error.hint) from error


def _is_opaque(kind: Type) -> bool:
    if isinstance(kind, TupleType):
        return any(_is_opaque(e) for e in kind.elements)
    return isinstance(kind, ObjectType)


def _check_getitem(node: Node) -> None:
    if len(node.args) != 2 or not node.operands:
        raise VerifyError("getitem takes a value and an index", node=node)
    source, index = node.operands[0].type, node.args[1]
    if not isinstance(source, TupleType) or not isinstance(index, int):
        return
    if not -len(source.elements) <= index < len(source.elements):
        raise VerifyError(
            f"%{node.name} reads result {index} of %{node.operands[0].name}, which has {len(source.elements)}",
            node=node,
            hint="results are counted from 0",
        )


def same_type(a: Type, b: Type, shape_env: ShapeEnv | None = None) -> bool:
    """Whether two types are equal, layouts aside; extents are compared as expressions.

    Args:
        a: The stored type.
        b: The inferred type; data-dependent extents in it are fresh symbols, which stand for any other such extent.
        shape_env: Knows what the symbols are equal to.
    """
    if isinstance(a, TensorType) and isinstance(b, TensorType):
        alike = a.dtype == b.dtype and _same_device(a.device, b.device) and len(a.shape) == len(b.shape)
        return alike and all(_same_extent(x, y, shape_env) for x, y in zip(a.shape, b.shape, strict=True))
    if isinstance(a, ScalarType) and isinstance(b, ScalarType):
        return a.kind == b.kind and (a.expr is None or b.expr is None or _same_extent(a.expr, b.expr, shape_env))
    if isinstance(a, TupleType) and isinstance(b, TupleType):
        return len(a.elements) == len(b.elements) and all(
            same_type(x, y, shape_env) for x, y in zip(a.elements, b.elements, strict=True)
        )
    return a == b


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index or 0) == (b.index or 0)


def _same_extent(a: Any, b: Any, shape_env: ShapeEnv | None) -> bool:
    if a == b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    left, right = sympy.sympify(a), sympy.sympify(b)
    if free_unbacked_symbols(right):
        return bool(free_unbacked_symbols(left))
    difference = left - right if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr) else sympy.nan
    return bool((shape_env.simplify(difference) if shape_env is not None else sympy.expand(difference)) == 0)


__all__ = ["check_types", "same_type"]
