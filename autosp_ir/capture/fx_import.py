"""FX graphs into the IR, one node for one node, so that `emit.fx_export` can undo it exactly.

Any graph is accepted: torch-level or ATen, with methods, submodules, nested graphs and SymInts. Types come from the
tensors that FX recorded (`meta["val"]` or `meta["example_value"]`), else from a run on fake inputs, else they stay
untyped; nothing is guessed.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from autosp_ir._torch_compat import FakeTensorMode, fx_calling_convention, is_fake
from autosp_ir.errors import ImportGraphError
from autosp_ir.ir.fx_record import FxRecord, with_record
from autosp_ir.ir.graph import Graph, Origin, Phase, Value
from autosp_ir.ir.ops import op_for_target
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature
from autosp_ir.ir.types import ObjectType, Type, type_of

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_TORCH_ROOT = os.path.dirname(torch.__file__) + os.sep
_TORCH_MODULES = os.path.dirname(nn.__file__) + os.sep
_NO_MODULE = "_empty_nn_module_stack"  # what export records when it knows none
_UNTYPED = ObjectType("untyped")


def import_graph(gm: fx.GraphModule, example_inputs: Sequence[Any] | None = None) -> Program:
    """Import any FX graph as a forward-stage program.

    Args:
        gm: A torch-level or ATen graph.
        example_inputs: One value per placeholder, in order; gives types to nodes that FX has not typed.

    Returns:
        A program whose placeholders are user inputs, in order, and whose output leaves are `out0`, `out1`, … or the
        keys of a dictionary.

    Raises:
        ImportGraphError: The graph is malformed, an attribute is missing, or it rejects the example inputs.
    """
    types = _run_on_examples(gm, example_inputs) if example_inputs is not None else {}
    imported = import_fx(gm.graph, gm, types)
    program = Program(imported.graph, _signature_of(gm.graph))
    program.attrs = imported.attrs
    if (mode := _fake_mode(gm)) is not None:
        program.fake_mode = mode
    return program


@dataclass
class Imported:
    """An imported graph.

    Args:
        graph: The IR graph.
        attrs: Targets of `get_attr` and `call_module` nodes by path; a graph module read by `get_attr` is a `Graph`,
            whose own attributes stand under its path.
        values: The IR value of every FX node that has one.
    """

    graph: Graph
    attrs: dict[str, Any] = field(default_factory=dict)
    values: dict[fx.Node, Value] = field(default_factory=dict)


def import_fx(graph: fx.Graph, owner: nn.Module | None = None, types: Mapping[fx.Node, Type] | None = None) -> Imported:
    """Import an FX graph, keeping names, arguments and meta.

    Args:
        graph: The FX graph.
        owner: The module that holds the targets of `get_attr` and `call_module`; the graph's own when None.
        types: Types of nodes that carry no recorded value.

    Returns:
        The IR graph, its attributes, and the value of every FX node.

    Raises:
        ImportGraphError: The graph is malformed or an attribute is missing.
    """
    imported = Imported(Graph())
    _import_nodes(graph, owner if owner is not None else graph.owning_module, types or {}, imported, prefix="")
    return imported


def _import_nodes(
    graph: fx.Graph, owner: nn.Module | None, types: Mapping[fx.Node, Type], into: Imported, prefix: str
) -> None:
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            path = str(node.target)
            found = _attribute(owner, path, node)
            if isinstance(found, fx.GraphModule) and path not in called:
                _import_nested(found, f"{prefix}{path}", into)
            else:
                into.attrs[f"{prefix}{path}"] = found
        _import_node(node, into, types)
    if not any(n.op == "output" for n in graph.nodes):
        raise ImportGraphError(
            "the FX graph has no output node", hint="finish the graph with graph.output(...) before importing it"
        )


def _import_nested(module: fx.GraphModule, path: str, into: Imported) -> None:
    if path in into.attrs:
        return
    nested = Imported(Graph(), into.attrs)
    into.attrs[path] = nested.graph
    _import_nodes(module.graph, module, {}, nested, prefix=f"{path}.")


def _import_node(node: fx.Node, into: Imported, types: Mapping[fx.Node, Type]) -> None:
    def value(used: fx.Node) -> Value:
        found = into.values.get(used)
        if found is None:
            raise ImportGraphError(
                f"{node.format_node()} reads {used.name!r}, which is not defined in front of it",
                hint="graph.lint() names the first broken node; sort the graph topologically",
            )
        return found

    op = op_for_target(node.target, node.op)
    args = (str(node.target),) if node.op == "get_attr" else _map_nodes(node.args, value)
    made = into.graph.create(
        op,
        args,
        _map_nodes(node.kwargs, value),
        name=node.name,
        type=_type_of_node(node, into, types),
        phase=Phase.FORWARD,
        origin=origin_of(node),
        meta=with_record(node.meta, _record_of(node)),
    )
    if node.op == "output":
        return
    if made.name != node.name:
        raise ImportGraphError(
            f"the FX name {node.name!r} is taken or is no identifier", hint="give every FX node a name of its own"
        )
    into.values[node] = made.result


def _record_of(node: fx.Node) -> FxRecord:
    has_val = "val" in node.meta
    if node.op == "placeholder" and node.target != node.name:
        return FxRecord(target=str(node.target), annotation=node.type, has_val=has_val)
    if node.op != "output":
        return FxRecord(annotation=node.type, has_val=has_val)
    arity = (sum(n.op == "placeholder" for n in node.graph.nodes), len(list(_leaves(node.args))))
    name = node.name if node.name != "output" else None
    return FxRecord(
        name=name, annotation=node.type, has_val=has_val, calling=fx_calling_convention(node.graph), arity=arity
    )


def _type_of_node(node: fx.Node, into: Imported, types: Mapping[fx.Node, Type]) -> Type:
    for key in ("val", "example_value"):
        if key in node.meta:
            return _checked_type(node, node.meta[key])
    if node in types:
        return types[node]
    if node.op == "get_attr":
        held = into.attrs.get(str(node.target))
        return _checked_type(node, held) if isinstance(held, torch.Tensor) else ObjectType(type(held).__name__)
    return _UNTYPED


def _checked_type(node: fx.Node, value: Any) -> Type:
    try:
        return type_of(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImportGraphError(
            f"{node.format_node()} holds a value of {type(value).__name__} that has no IR type: {error}",
            hint="the IR types dense tensors, numbers, tuples and None",
        ) from error


def _map_nodes(structure: Any, fn: Any) -> Any:
    return torch.fx.node.map_arg(structure, fn)


def _attribute(owner: nn.Module | None, path: str, node: fx.Node) -> Any:
    found: Any = owner
    for part in path.split("."):
        if not hasattr(found, part):
            raise ImportGraphError(
                f"{node.format_node()} reads {path!r}, which {type(owner).__name__} does not have",
                hint="import a GraphModule that owns the attributes its graph reads",
            )
        found = getattr(found, part)
    return found


# Where a node comes from ---------------------------------------------------------------------------------------------


def origin_of(node: fx.Node) -> Origin:
    """The source line and module path that FX recorded; a backward node takes its forward node's."""
    stack = node.meta.get("stack_trace")
    modules = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    text = stack if isinstance(stack, str) else None
    return Origin(_source(text) if text else None, _module_path(modules) if modules else None, (), text)


@functools.lru_cache(maxsize=4096)
def _source(stack: str) -> str | None:
    """The innermost frame outside torch, else inside a module of torch's, as `llama.py:243`."""
    frames = _FRAME.findall(stack)
    own = [f for f in frames if not f[0].startswith((_TORCH_ROOT, "torch/"))]
    own = own or [f for f in frames if f[0].startswith(_TORCH_MODULES)]
    return f"{os.path.basename(own[-1][0])}:{own[-1][1]}" if own else None


def _module_path(modules: Mapping[str, Any]) -> str | None:
    """The innermost module's path, `model.layers.0.self_attn`, without dynamo's and export's decorations."""
    for entry in reversed(list(modules.values())):
        path = str(entry[0] if isinstance(entry, tuple) else entry)
        path = re.sub(r"^L\['self'\]\.?|^self\.", "", path)
        path = re.sub(r"\['?(\w+)'?\]", r".\1", re.sub(r"@\d+$", "", path))
        path = path.replace("_modules.", "").strip(".")
        if path and not path.startswith(_NO_MODULE):
            return path
    return None


# Types from example inputs -------------------------------------------------------------------------------------------


def _fake_mode(gm: fx.GraphModule) -> FakeTensorMode | None:
    """The fake-tensor mode of the values that FX recorded, None when it recorded none."""
    for node in gm.graph.nodes:
        for leaf in _leaves([node.meta.get("val"), node.meta.get("example_value")]):
            if isinstance(leaf, torch.Tensor) and is_fake(leaf):
                fake: Any = leaf
                mode: FakeTensorMode = fake.fake_mode
                return mode
    return None


def _leaves(structure: Any) -> Iterator[Any]:
    if isinstance(structure, tuple | list):
        for item in structure:
            yield from _leaves(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from _leaves(item)
    else:
        yield structure


class _TypeRecorder(fx.Interpreter):
    """Runs a graph and keeps every node's type, without touching its meta."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.types: dict[fx.Node, Type] = {}
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        result = super().run_node(n)
        if n.op != "output":
            self.types[n] = type_of(result)
        return result


def _run_on_examples(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Mapping[fx.Node, Type]:
    wanted = sum(n.op == "placeholder" for n in gm.graph.nodes)
    if len(example_inputs) > wanted:
        raise ImportGraphError(
            f"{len(example_inputs)} example inputs were given for {wanted} placeholders",
            hint="pass one value per placeholder, in the graph's order",
        )
    mode = _fake_mode(gm) or FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    recorder = _TypeRecorder(gm)

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or is_fake(value):
            return value
        return mode.from_tensor(value, static_shapes=True)

    try:
        with mode, torch.no_grad():
            recorder.run(*(fake(v) for v in example_inputs), enable_io_processing=False)
    except Exception as error:  # whatever the graph's own code raises
        where = recorder.current.format_node() if recorder.current is not None else "the graph"
        raise ImportGraphError(
            f"the example inputs do not run: {where}: {type(error).__name__}: {error}",
            hint="pass example inputs of the shapes and dtypes that the graph was traced with",
        ) from error
    return recorder.types


def _signature_of(graph: fx.Graph) -> Signature:
    inputs = [
        InputSpec(n.name, InputKind.USER_INPUT, str(n.target).lstrip("*")) for n in graph.nodes if n.op == "placeholder"
    ]
    output = next(n for n in graph.nodes if n.op == "output")
    result = output.args[0]
    names = list(result) if isinstance(result, dict) else [f"out{i}" for i, _ in enumerate(_leaves(result))]
    return Signature(inputs, [OutputSpec(str(n), OutputKind.USER_OUTPUT, str(n)) for n in names])


__all__ = ["Imported", "import_fx", "import_graph", "origin_of"]
