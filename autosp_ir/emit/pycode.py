"""Programs as Python source: a function over torch operators, with types as comments.

The source runs when every operation is a torch operator: `exec` it and call `program(*inputs)`.
"""

from __future__ import annotations

import builtins
import keyword
import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from autosp_ir._torch_compat import is_operator
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Graph, Node, Phase, Value
from autosp_ir.ir.literals import TORCH_CONSTANTS, object_path
from autosp_ir.ir.ops import OpDef, op_for_target
from autosp_ir.ir.printer import format_origin, format_type
from autosp_ir.ir.program import Program

_RESERVED = frozenset({"torch", "aten", "operator", "attrs", "modules", "program", *keyword.kwlist, *dir(builtins)})
_IMPORTABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def to_python(program: Program) -> str:
    """Write a program as Python.

    Args:
        program: Any program. Nested graphs become functions in front of it; other attributes are read from a
            dictionary `attrs`, submodules from `modules`.

    Returns:
        Python source. The inputs of `program` stand in the order of the signature.

    Raises:
        UnsupportedError: An attribute or operation has no Python notation.
    """
    # A graph is written behind the graphs it may call, which were imported after it.
    nested = [(k, g) for k, g in reversed(program.attrs.items()) if isinstance(g, Graph)]
    functions = [_Function(program, g, f"{k}.").source(_graph_function(k)) for k, g in nested]
    functions.append(_Function(program, program.graph, "").source("program"))
    mesh = f", mesh {program.mesh}" if program.mesh else ""
    imports = sorted(_imports([program.graph, *(g for _, g in nested)]))
    head = [f'"""Stage {program.stage}{mesh}."""', "\n".join([*imports, "", "aten = torch.ops.aten"])]
    return "\n\n".join(head) + "\n\n\n" + "\n\n\n".join(functions) + "\n"


def _imports(graphs: list[Graph]) -> set[str]:
    lines = {"import torch"}
    for node in (n for g in graphs for n in g.nodes):
        module = node.op.name.rpartition(".")[0]
        known = module.startswith("torch") or module == "builtins" or not _IMPORTABLE.fullmatch(node.op.name)
        if node.op.kind == "call_function" and not is_operator(node.op.target) and not known:
            lines.add(f"import {module}")
    return lines


def _graph_function(path: str) -> str:
    return "graph_" + re.sub(r"\W", "_", path)


class _Function:
    """One graph as a Python function.

    Args:
        program: Holds the attributes.
        graph: The graph.
        prefix: Its path among the attributes, with a dot behind it; empty for the program's own graph.
    """

    def __init__(self, program: Program, graph: Graph, prefix: str) -> None:
        self.program = program
        self.graph = graph
        self.prefix = prefix
        self.names: dict[Value, str] = {}

    def source(self, title: str) -> str:
        """The function's text."""
        functions = {_graph_function(k) for k, g in self.program.attrs.items() if isinstance(g, Graph)}
        taken = {n.name for n in self.graph.nodes}
        for value in (v for n in self.graph.nodes for v in n.results):
            self.names[value] = value.name
            while self.names[value] in _RESERVED | functions or (
                self.names[value] != value.name and self.names[value] in taken
            ):
                self.names[value] += "_"
        return "\n".join(self._lines(title))

    def _lines(self, title: str) -> Iterator[str]:
        yield f"def {title}("
        for node in self.graph.inputs:
            yield f"    {self.names[node.result]},  # {format_type(node.result.type)}"
        yield "):"
        where, phase = "", Phase.FORWARD
        for node in self.graph.nodes:
            if node.op.kind == "placeholder":
                continue
            if node.phase is not phase and node.op.kind != "output":
                phase = node.phase
                yield f"    # ---- {phase.value}"
            origin = format_origin(node.origin)
            if origin and origin != where:
                yield f"    # {origin}"
            where = origin
            yield f"    {self._statement(node)}"

    def _statement(self, node: Node) -> str:
        if node.op.kind == "output":
            return f"return {self._literal(node.args[0] if len(node.args) == 1 else node.args)}"
        return f"{self.names[node.result]} = {self._call(node)}  # {format_type(node.result.type)}"

    def _call(self, node: Node) -> str:
        if node.op.kind == "get_attr":
            path = f"{self.prefix}{node.args[0]}"
            return _graph_function(path) if isinstance(self.program.attrs.get(path), Graph) else f"attrs[{path!r}]"
        keywords = [f"{k}={self._literal(v)}" for k, v in node.kwargs.items()]
        arguments = [*(self._literal(a) for a in node.args), *keywords]
        if node.op.kind == "call_method":
            return f"{arguments[0]}.{node.op.target}({', '.join(arguments[1:])})"
        callee = f"modules[{str(node.op.target)!r}]" if node.op.kind == "call_module" else _target(node.op)
        return f"{callee}({', '.join(arguments)})"

    def _literal(self, item: Any) -> str:
        if isinstance(item, Value):
            return self.names[item]
        if isinstance(item, tuple):
            return f"({', '.join(self._literal(i) for i in item)}{',' if len(item) == 1 else ''})"
        if isinstance(item, list):
            return f"[{', '.join(self._literal(i) for i in item)}]"
        if isinstance(item, dict):
            return "{" + ", ".join(f"{self._literal(k)}: {self._literal(v)}" for k, v in item.items()) + "}"
        if isinstance(item, slice):
            return f"slice({self._literal(item.start)}, {self._literal(item.stop)}, {self._literal(item.step)})"
        if isinstance(item, float) and not math.isfinite(item):
            return f'float("{item}")'
        if item is None or item is ... or type(item) in (bool, int, float, str):
            return repr(item)
        if isinstance(item, complex):
            return f"complex({self._literal(item.real)}, {self._literal(item.imag)})"
        if isinstance(item, torch.device):
            return f"torch.device({str(item)!r})"
        if isinstance(item, TORCH_CONSTANTS):
            return str(item)
        if is_operator(item):
            return _target(op_for_target(item))
        path = object_path(item)
        if path is not None:
            module, _, qualified = path.partition(":")
            return f"__import__({module!r}, fromlist=['']).{qualified}"
        raise UnsupportedError(
            f"the attribute {item!r} of type {type(item).__name__} has no Python notation",
            hint="pass plain numbers, strings, containers, dtypes, devices or importable objects as attributes",
        )


def _target(op: OpDef) -> str:
    if op.schema is not None:
        overload = "" if op.name.count(".") > 1 else ".default"
        prefix = "" if op.name.startswith("aten.") else "torch.ops."
        return f"{prefix}{op.name}{overload}"
    if is_operator(op.target):
        return f"torch.ops.higher_order.{op.name.removeprefix('hop.')}"
    if _IMPORTABLE.fullmatch(op.name):
        return op.name.removeprefix("builtins.")
    raise UnsupportedError(
        f"the operation {op.name!r} cannot be named in Python", hint="give the function a name of its own in a module"
    )


__all__ = ["to_python"]
