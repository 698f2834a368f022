"""Programs as Graphviz pictures: modules as clusters, layouts as colours."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import graphviz

from autosp_ir.errors import AutoSPError, UnsupportedError
from autosp_ir.ir.graph import Node, Phase
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.printer import format_type
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import Partial, Placement, Replicate, Shard, TensorType, TupleType, Type

COLORS = {Shard: "#bfe3c6", Replicate: "#cfe0f5", Partial: "#f6c9a8"}
"""Fill by the first placement that is not Invariant; light enough to keep black text readable in greyscale."""
_PLAIN, _COLLECTIVE = "#f4f4f4", "#f7e08a"
_BORDERS = {Phase.FORWARD: "#444444", Phase.BACKWARD: "#8a2be2", Phase.RECOMPUTE: "#c04040"}


def to_dot(program: Program, module: str | None = None, depth: int | None = None) -> graphviz.Digraph:
    """Draw the dataflow.

    Args:
        program: The program; nested graphs are one box each.
        module: Draw only this module, with the values that enter and leave it.
        depth: Draw modules nested deeper than this as one box each; None draws every operation.

    Returns:
        The DOT source, in a graphviz object.

    Raises:
        AutoSPError: No node belongs to `module`.
    """
    return _Drawer(program, module, depth).draw()


@dataclass
class _Cluster:
    """A module in the drawing: its boxes and its submodules."""

    boxes: dict[str, list[Node]] = field(default_factory=dict)
    children: dict[str, _Cluster] = field(default_factory=dict)

    def child(self, path: list[str]) -> _Cluster:
        """The cluster at a path below this one, made when missing."""
        return self.children.setdefault(path[0], _Cluster()).child(path[1:]) if path else self


class _Drawer:
    def __init__(self, program: Program, module: str | None, depth: int | None) -> None:
        self.program = program
        self.base = module.split(".") if module else []
        self.depth = depth
        self.box_of: dict[Node, str] = {}
        self.root = _Cluster()

    def draw(self) -> graphviz.Digraph:
        dot = graphviz.Digraph("program", node_attr={"shape": "box", "style": "filled", "fontname": "Helvetica"})
        dot.attr(rankdir="TB", fontname="Helvetica")
        inside = [n for n in self.program.graph.nodes if self._inside(n)]
        if not inside:
            known = sorted({n.origin.module for n in self.program.graph.nodes if n.origin.module})
            raise AutoSPError(
                f"no node belongs to the module {'.'.join(self.base)!r}",
                hint=f"the modules are {', '.join(known[:12])}{' …' if len(known) > 12 else ''}",
            )
        for node in inside:
            self._place(node)
        self._emit(dot, self.root, "")
        self._border(dot, inside)
        self._edges(dot)
        return dot

    def _path(self, node: Node) -> list[str]:
        return node.origin.module.split(".") if node.origin.module else []

    def _inside(self, node: Node) -> bool:
        return self._path(node)[: len(self.base)] == self.base

    def _place(self, node: Node) -> None:
        path = self._path(node)[len(self.base) :]
        if self.depth is not None and len(path) > self.depth:
            shown, box = path[: self.depth], "/".join(["module", *path[: self.depth + 1]])
        else:
            shown, box = path, f"%{node.name}"
        self.box_of[node] = box
        self.root.child(shown).boxes.setdefault(box, []).append(node)

    def _emit(self, dot: graphviz.Digraph, cluster: _Cluster, path: str) -> None:
        for box, nodes in cluster.boxes.items():
            self._box(dot, box, nodes)
        for name, child in cluster.children.items():
            inner = f"{path}.{name}" if path else name
            with dot.subgraph(name=f"cluster_{inner}") as sub:
                sub.attr(label=name, style="rounded", color="#999999")
                self._emit(sub, child, inner)

    def _box(self, dot: graphviz.Digraph, box: str, nodes: list[Node]) -> None:
        if box.startswith("module/"):
            collectives = sum(n.op.has(Trait.COLLECTIVE) for n in nodes)
            detail = f"{len(nodes)} operations" + (f", {collectives} collectives" if collectives else "")
            dot.node(box, f"{box.rpartition('/')[2]}\n{detail}", fillcolor=_COLLECTIVE if collectives else _PLAIN)
            return
        (node,) = nodes
        dot.node(box, _label(node), fillcolor=_fill(node), color=_BORDERS[node.phase], tooltip=node.origin.source or "")

    def _border(self, dot: graphviz.Digraph, inside: list[Node]) -> None:
        """The values that enter and leave the drawn module, faded."""
        for node in inside:
            neighbours = [v.producer for v in node.operands] + node.users
            for neighbour in neighbours:
                if neighbour not in self.box_of:
                    self.box_of[neighbour] = f"%{neighbour.name}"
                    dot.node(f"%{neighbour.name}", _label(neighbour), style="dashed", fontcolor="#777777")

    def _edges(self, dot: graphviz.Digraph) -> None:
        for tail, head in dict.fromkeys(self._pairs()):
            dot.edge(tail, head)

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for node, box in self.box_of.items():
            for value in node.operands:
                tail = self.box_of.get(value.producer)
                if tail is not None and tail != box and (self._inside(node) or self._inside(value.producer)):
                    yield tail, box


def _label(node: Node) -> str:
    if node.op.kind == "output":
        return "output"
    if node.op.kind == "placeholder":
        return f"%{node.name}\n{format_type(node.result.type)}"
    return f"{node.op.name}\n%{node.name}: {format_type(node.result.type)}"


def _fill(node: Node) -> str:
    if node.op.has(Trait.COLLECTIVE):
        return _COLLECTIVE
    first = next(_placements(node.result.type), None) if node.results else None
    return COLORS.get(type(first), _PLAIN) if first is not None else _PLAIN


def _placements(kind: Type) -> Iterator[Placement]:
    if isinstance(kind, TensorType):
        yield from kind.layout.values()
    elif isinstance(kind, TupleType):
        for element in kind.elements:
            yield from _placements(element)


def render_svg(source: str) -> str:
    """Lay DOT source out as SVG with Graphviz, else with the copy that pygraphviz brings.

    Raises:
        UnsupportedError: Neither is installed.
    """
    if shutil.which("dot") is not None:
        return str(graphviz.Source(source).pipe(format="svg", encoding="utf-8"))
    if importlib.util.find_spec("pygraphviz") is not None:
        import pygraphviz

        return bytes(pygraphviz.AGraph(string=source).draw(format="svg", prog="dot")).decode()
    raise UnsupportedError(
        "Graphviz is not installed, so DOT cannot be laid out as SVG",
        hint="pip install 'autosp-ir[viz]', or install Graphviz (apt install graphviz), "
        "or write to_dot().source to a file and render it elsewhere",
    )


@dataclass(frozen=True)
class Drawing:
    """A picture that shows itself as SVG in a notebook and as DOT source in a terminal.

    Args:
        source: DOT source.
    """

    source: str

    def svg(self) -> str:
        """The picture as SVG.

        Raises:
            UnsupportedError: Graphviz is not installed.
        """
        return render_svg(self.source)

    def save(self, path: str | Path) -> Path:
        """Write the picture: SVG for a path ending in `.svg`, DOT source otherwise.

        Raises:
            UnsupportedError: SVG is wanted and Graphviz is not installed.
        """
        target = Path(path)
        target.write_text(self.svg() if target.suffix == ".svg" else self.source)
        return target

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        try:
            return {"image/svg+xml": self.svg(), "text/plain": self.source}
        except UnsupportedError as error:
            return {"text/plain": f"{error}\n\n{self.source}"}

    def __str__(self) -> str:
        return self.source


__all__ = ["COLORS", "Drawing", "render_svg", "to_dot"]
