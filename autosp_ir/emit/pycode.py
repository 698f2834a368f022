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
from autosp_ir.ir.graph import Graph, Node, Value
from autosp_ir.ir.literals import TORCH_CONSTANTS, object_path
from autosp_ir.ir.ops import OpDef
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
    functions = [
        "\n".join(_function(_identifier(name), graph, program))
        for name, graph in reversed(program.attrs.items())
        if isinstance(graph, Graph)
    ]
    functions.append("\n".join(_function("program", program.graph, program)))
    imports = sorted(_imports(program))
    mesh = f", mesh {program.mesh}" if program.mesh else ""
    head = [f'"""Stage {program.stage}{mesh}."""', "\n".join([*imports, "", "aten = torch.ops.aten"])]
    return "\n\n".join(head) + "\n\n\n" + "\n\n\n".join(functions) + "\n"


def _graphs(program: Program) -> Iterator[Graph]:
    yield program.graph
    yield from (g for g in program.attrs.values() if isinstance(g, Graph))


def _imports(program: Program) -> set[str]:
    lines = {"import torch"}
    for node in (n for g in _graphs(program) for n in g.nodes):
        head, _, rest = node.op.name.partition(".")
        if node.op.kind == "call_function" and not is_operator(node.op.target) and head not in ("torch", "builtins"):
            module = node.op.name.rpartition(".")[0] if rest else head
            lines.add(f"import {module}")
    return lines


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return f"{name}_" if name in _RESERVED else name


def _function(title: str, graph: Graph, program: Program) -> Iterator[str]:
    yield f"def {title}("
    for node in graph.inputs:
        yield f"    {_identifier(node.name)},  # {format_type(node.result.type)}"
    yield "):"
    where, phase = "", None
    for node in graph.nodes:
        if node.op.kind == "placeholder":
            continue
        origin = format_origin(node.origin)
        if node.phase is not phase and phase is not None and node.op.kind != "output":
            yield f"    # ---- {node.phase.value}"
        phase = node.phase
        if origin and origin != where:
            yield f"    # {origin}"
        where = origin
        yield f"    {_statement(node, program)}"


def _statement(node: Node, program: Program) -> str:
    if node.op.kind == "output":
        return f"return {_literal(node.args[0]) if len(node.args) == 1 else _literal(node.args)}"
    return f"{_identifier(node.name)} = {_call(node, program)}  # {format_type(node.result.type)}"


def _call(node: Node, program: Program) -> str:
    if node.op.kind == "get_attr":
        path = str(node.args[0])
        return _identifier(path) if isinstance(program.attrs.get(path), Graph) else f"attrs[{path!r}]"
    positional = [_literal(a) for a in node.args]
    arguments = ", ".join([*positional, *(f"{k}={_literal(v)}" for k, v in node.kwargs.items())])
    if node.op.kind == "call_method":
        return f"{positional[0]}.{node.op.target}({arguments.removeprefix(positional[0]).removeprefix(', ')})"
    if node.op.kind == "call_module":
        return f"modules[{str(node.op.target)!r}]({arguments})"
    return f"{_target(node.op)}({arguments})"


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


def _literal(item: Any) -> str:
    if isinstance(item, Value):
        return _identifier(item.name)
    if isinstance(item, tuple):
        return f"({', '.join(_literal(i) for i in item)}{',' if len(item) == 1 else ''})"
    if isinstance(item, list):
        return f"[{', '.join(_literal(i) for i in item)}]"
    if isinstance(item, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in item.items()) + "}"
    if isinstance(item, slice):
        return f"slice({_literal(item.start)}, {_literal(item.stop)}, {_literal(item.step)})"
    if isinstance(item, float) and not math.isfinite(item):
        return f'float("{item}")'
    if item is None or item is ... or type(item) in (bool, int, float, str, complex):
        return repr(item)
    if isinstance(item, torch.device):
        return f"torch.device({str(item)!r})"
    if isinstance(item, TORCH_CONSTANTS):
        return str(item)
    path = object_path(item)
    if path is not None:
        module, _, qualified = path.partition(":")
        return f"__import__({module!r}, fromlist=['']).{qualified}"
    raise UnsupportedError(
        f"the attribute {item!r} of type {type(item).__name__} has no Python notation",
        hint="pass plain numbers, strings, containers, dtypes, devices or importable objects as attributes",
    )


__all__ = ["to_python"]
