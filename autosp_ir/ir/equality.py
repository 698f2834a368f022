"""Structural equality of programs, with the first difference in words."""

from __future__ import annotations

import json
from typing import Any

from autosp_ir.ir.graph import Graph, Node
from autosp_ir.ir.literals import same_attribute
from autosp_ir.ir.program import Program


def structurally_equal(a: Program, b: Program) -> str | None:
    """Compare operations, arguments, types, layouts, phases, names, signature, stage, mesh, facts and info.

    Origins, FX metadata, bound tensors and bound objects are not compared.

    Args:
        a: One program.
        b: Another.

    Returns:
        The first difference, readable; None when there is none.
    """
    for what, mine, other in _headers(a, b):
        if mine != other:
            return f"{what}: {mine} against {other}"
    return _graph_difference(a.graph, b.graph) or _nested_difference(a, b)


def _headers(a: Program, b: Program) -> list[tuple[str, Any, Any]]:
    return [
        ("stage", a.stage.value, b.stage.value),
        ("mesh", a.mesh, b.mesh),
        ("facts", sorted(a.facts), sorted(b.facts)),
        ("info", _json(a.info), _json(b.info)),
        ("signature inputs", a.signature.inputs, b.signature.inputs),
        ("signature outputs", a.signature.outputs, b.signature.outputs),
    ]


def _json(info: Any) -> str:
    return json.dumps(info, sort_keys=True, default=repr)


def _nested_difference(a: Program, b: Program) -> str | None:
    mine, other = ({k: g for k, g in p.attrs.items() if isinstance(g, Graph)} for p in (a, b))
    if mine.keys() != other.keys():
        return f"nested graphs: {sorted(mine)} against {sorted(other)}"
    for name, graph in mine.items():
        difference = _graph_difference(graph, other[name])
        if difference is not None:
            return f"in nested graph {name!r}: {difference}"
    return None


def _graph_difference(a: Graph, b: Graph) -> str | None:
    for position, (mine, other) in enumerate(zip(a.nodes, b.nodes, strict=False)):
        what = _node_difference(mine, other)
        if what is not None:
            return f"node {position}, {what}:\n  {mine.describe(0)}\nagainst\n  {other.describe(0)}"
    return None if len(a) == len(b) else f"{len(a)} nodes against {len(b)}"


def _node_difference(a: Node, b: Node) -> str | None:
    if a.op is not b.op:
        return "operation"
    if a.name != b.name:
        return "name"
    if not same_attribute(a.args, b.args) or not same_attribute(dict(a.kwargs), dict(b.kwargs)):
        return "arguments"
    if a.results and a.result.type != b.result.type:
        return "type"
    return None if a.phase is b.phase else "phase"


__all__ = ["structurally_equal"]
