"""A program as a networkx graph: a view for dominators, critical paths and min-cuts, not a storage."""

from __future__ import annotations

import networkx as nx

from autosp_ir.ir.printer import format_type
from autosp_ir.ir.program import Program


def to_networkx(program: Program) -> nx.MultiDiGraph[str]:
    """Build the view; changing it does not change the program.

    Args:
        program: The program; nested graphs are not part of the view.

    Returns:
        One node per IR node, by name, with the attributes `op`, `kind`, `type` (an IR type, None for the output),
        `text` (the type as text), `phase`, `module`, `source` and `position`; one edge per use, with the operand's
        `index`.
    """
    view: nx.MultiDiGraph[str] = nx.MultiDiGraph(stage=program.stage.value, mesh=dict(program.mesh))
    for position, node in enumerate(program.graph.nodes):
        kind = node.result.type if node.results else None
        view.add_node(
            node.name,
            op=node.op.name,
            kind=node.op.kind,
            type=kind,
            text=format_type(kind) if kind is not None else "",
            phase=node.phase.value,
            module=node.origin.module,
            source=node.origin.source,
            position=position,
        )
        for index, value in enumerate(node.operands):
            view.add_edge(value.name, node.name, index=index)
    return view


__all__ = ["to_networkx"]
