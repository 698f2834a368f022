"""One module before and after a rewrite, side by side: what stayed, what a pass removed, what it added."""

from __future__ import annotations

from collections import Counter

import graphviz

from autosp_ir.errors import AutoSPError
from autosp_ir.ir.graph import Node
from autosp_ir.ir.printer import format_type
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_ir.viz.dot import render_svg

_STAYED, _REMOVED, _ADDED = "#f4f4f4", "#f6c9a8", "#f7e08a"


def rewrite_dot(before: Program, after: Program, module: str) -> graphviz.Digraph:
    """Draw one module of two programs side by side.

    Args:
        before: The program before the rewrite.
        after: The program after it.
        module: Module path, such as `model.layers.0.self_attn`; submodules are included.

    Returns:
        The DOT source. Added operations are yellow with a bold frame, removed ones orange and dashed.

    Raises:
        AutoSPError: No node of `before` belongs to the module.
    """
    left, right = _inside(before, module), _inside(after, module)
    if not left:
        raise AutoSPError(f"no node belongs to the module {module!r}", hint="print the program to see module names")
    dot = graphviz.Digraph("rewrite", node_attr={"shape": "box", "style": "filled", "fontname": "Helvetica"})
    dot.attr(rankdir="TB", fontname="Helvetica", nodesep="0.2", ranksep="0.3")
    _side(dot, "before", left, _surplus(left, right), _REMOVED, "filled,dashed")
    _side(dot, "after", right, _surplus(right, left), _ADDED, "filled,bold")
    return dot


def rewrite_svg(before: Program, after: Program, module: str) -> str:
    """`rewrite_dot`, laid out as SVG.

    Raises:
        AutoSPError: The module is unknown, or Graphviz is not installed.
    """
    return render_svg(rewrite_dot(before, after, module).source)


def _inside(program: Program, module: str) -> list[Node]:
    def belongs(node: Node) -> bool:
        path = node.origin.module or ""
        return path == module or path.startswith(f"{module}.")

    return [n for n in program.graph.nodes if belongs(n) and n.op.kind not in ("placeholder", "output")]


def _surplus(nodes: list[Node], others: list[Node]) -> set[Node]:
    """Nodes whose name, operation or number is not matched on the other side."""
    budget = Counter((n.name, n.op.name) for n in others)
    surplus = set()
    for node in nodes:
        key = (node.name, node.op.name)
        if budget[key] > 0:
            budget[key] -= 1
        else:
            surplus.add(node)
    return surplus


def _side(dot: graphviz.Digraph, title: str, nodes: list[Node], changed: set[Node], fill: str, style: str) -> None:
    drawn = set(nodes)
    with dot.subgraph(name=f"cluster_{title}") as side:
        side.attr(label=title, style="rounded", color="#999999", fontsize="18")
        for node in nodes:
            touched = node in changed
            side.node(
                f"{title}/{node.name}",
                _label(node),
                fillcolor=fill if touched else _STAYED,
                style=style if touched else "filled",
                tooltip=node.origin.source or "",
            )
        for node in nodes:
            for value in dict.fromkeys(node.operands):
                if value.producer in drawn:
                    side.edge(f"{title}/{value.producer.name}", f"{title}/{node.name}")


def _label(node: Node) -> str:
    kind = node.result.type
    shown = format_type(kind) if isinstance(kind, TensorType) else ""
    return f"{node.op.name}\n{shown}" if shown else node.op.name


__all__ = ["rewrite_dot", "rewrite_svg"]
