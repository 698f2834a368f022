"""The IR into FX: `export_graph` is the exact inverse of `capture.fx_import`, `executable` is for running.

`meta["val"]` is kept where it still agrees with the value's type, and made anew where a pass changed the type or made
the node.
"""

from __future__ import annotations

import builtins
import itertools
import keyword
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from autosp_ir._torch_compat import FakeTensorMode, force_fx_name
from autosp_ir.errors import AutoSPError, VerifyError
from autosp_ir.ir.fx_record import FxRecord, record_of, without_record
from autosp_ir.ir.graph import Graph, Node, Value, map_values
from autosp_ir.ir.infer import fake_of
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import ObjectType, Type, type_of, without_layout

_STRICT_VIEWS = ("aten.view", "aten._unsafe_view")
# Names that FX's generated code itself refers to.
_RESERVED = frozenset({"torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "self", "slice", "getattr"})


def export_graph(program: Program | Graph) -> fx.GraphModule:
    """Export a program as FX: the graph that was imported, node for node, with what passes changed.

    Args:
        program: A program, or a graph without `get_attr` and `call_module` nodes.

    Returns:
        A graph module with one FX node per IR node: the same operation, target, arguments, name and meta.

    Raises:
        AutoSPError: An attribute that the graph reads is not bound.
    """
    whole = program if isinstance(program, Program) else Program(program)
    return _Exporter(whole, runnable=False).export(whole.graph, "")


def executable(program: Program) -> fx.GraphModule:
    """Export a program for running: flat positional inputs, and views that hold whatever the strides.

    The IR types carry no strides, and a rewrite may change those of a value. `aten.view` and `aten._unsafe_view`
    therefore become `aten.reshape`, which is the same view wherever a view is possible.

    Args:
        program: Any program; every `get_attr` target must be bound.

    Returns:
        A graph module that takes one argument per placeholder and returns the output node's argument.

    Raises:
        AutoSPError: An attribute that the graph reads is not bound.
    """
    return _Exporter(program, runnable=True).export(program.graph, "")


class _Exporter:
    def __init__(self, program: Program, runnable: bool) -> None:
        self.attrs = program.attrs
        self.program = program
        self.runnable = runnable

    def export(self, graph: Graph, prefix: str) -> fx.GraphModule:
        """One graph as a graph module; `prefix` is its path among the attributes."""
        out = fx.Graph()
        made: dict[Value, fx.Node] = {}
        held: dict[str, Any] = {}
        for node in graph.nodes:
            if node.op.kind in ("get_attr", "call_module"):
                path = str(node.args[0]) if node.op.kind == "get_attr" else str(node.op.target)
                held[path] = self._attribute(path, prefix, node)
            exported = self._node(out, node, made)
            if node.results:
                made[node.result] = exported
        record = record_of(graph.output_node.meta)
        if record.calling is not None and not self.runnable and _arity(graph) == record.arity:
            out.set_codegen(record.calling)
        return fx.GraphModule(held, out)

    def _attribute(self, path: str, prefix: str, node: Node) -> Any:
        found = self.attrs.get(f"{prefix}{path}")
        if found is None:
            raise AutoSPError(
                f"the graph reads the attribute {path!r}, which the program does not hold",
                node=node,
                hint="a program parsed from text holds no objects: import it from its FX graph, or set program.attrs",
            )
        return self.export(found, f"{prefix}{path}.") if isinstance(found, Graph) else found

    def _node(self, out: fx.Graph, node: Node, made: Mapping[Value, fx.Node]) -> fx.Node:
        record = record_of(node.meta)
        args, kwargs = map_values(node.args, made.__getitem__), map_values(dict(node.kwargs), made.__getitem__)
        if node.op.kind == "get_attr":
            args = ()
        name = _legal_name(node, record)
        exported = out.create_node(
            node.op.kind, self._target(node, record), args, dict(kwargs), name, record.annotation
        )
        if exported.name != name:
            force_fx_name(exported, name)
        exported.meta = self._meta(node, record)
        return exported

    def _target(self, node: Node, record: FxRecord) -> Any:
        if node.op.kind == "placeholder":
            return record.target or node.name
        if node.op.kind == "output":
            return "output"
        if node.op.kind == "get_attr":
            return str(node.args[0])
        if self.runnable and node.op.name in _STRICT_VIEWS:
            return torch.ops.aten.reshape.default
        return node.op.target

    def _meta(self, node: Node, record: FxRecord) -> dict[str, Any]:
        meta = without_record(node.meta)
        if not node.results:
            return meta
        _refresh_val(meta, node.result.type, record, self.program.fake_mode)
        if node.origin.stack and "stack_trace" not in meta:
            meta["stack_trace"] = node.origin.stack
        if node.origin.module and "nn_module_stack" not in meta and node.origin.passes:
            meta["nn_module_stack"] = {node.origin.module: (node.origin.module, "")}
        return meta


def _refresh_val(meta: dict[str, Any], kind: Type, record: FxRecord, fake_mode: FakeTensorMode) -> None:
    """Make `meta["val"]` agree with the IR type."""
    if "val" not in meta and not record.has_val:
        return
    plain = without_layout(kind)
    if isinstance(plain, ObjectType) or ("val" in meta and type_of(meta["val"]) == plain):
        return
    try:
        with fake_mode, torch.no_grad():
            meta["val"] = fake_of(plain, fake_mode)
    except VerifyError:
        meta.pop("val", None)


def _legal_name(node: Node, record: FxRecord) -> str:
    """The node's name, or a free one if it would hide something that FX's generated code refers to."""
    if node.op.kind == "output":
        return record.name or "output"
    name = node.name
    # FX itself hides builtins only under names that export took from the user's arguments.
    imported = record != FxRecord() or "val" in node.meta
    if not keyword.iskeyword(name) and name not in _RESERVED and (imported or not hasattr(builtins, name)):
        return name
    taken = {n.name for n in node.graph.nodes}
    return next(free for i in itertools.count(1) if (free := f"{name}_{i}") not in taken)


def _arity(graph: Graph) -> tuple[int, int]:
    leaves = 0

    def count(structure: Any) -> None:
        nonlocal leaves
        if isinstance(structure, tuple | list):
            for item in structure:
                count(item)
        elif isinstance(structure, Mapping):
            count(list(structure.values()))
        else:
            leaves += 1

    count(graph.output_node.args)
    return len(graph.inputs), leaves


__all__ = ["executable", "export_graph"]
