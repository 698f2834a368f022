"""A joint program cut into a forward and a backward one, at the values that cross phases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Graph, Node, Phase, Value, map_values
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature
from autosp_ir.ir.types import ScalarType, TensorType
from autosp_ir.ir.verify import output_leaves


class SplitJoint(NamedTuple):
    """The two halves of a joint program.

    Args:
        forward: Every input but the tangents; the forward's outputs, then the saved values (`OutputKind.SAVED`).
        backward: The saved values (`InputKind.SAVED`, targets are names of forward outputs), the parameters, buffers
            and user inputs that it reads or returns the gradient of, and the tangents; the gradients. None when there
            is no gradient.
        saved: Names of the saved values: tensors, and sizes of dynamic dimensions.
    """

    forward: Program
    backward: Program | None
    saved: tuple[str, ...]


def split_joint(program: Program) -> SplitJoint:
    """Cut a joint or lowered program by phase.

    Args:
        program: Its forward-phase values that backward or recompute nodes read become the saved values; run `remat`
            to choose them.

    Returns:
        The forward and the backward program, both exportable.

    Raises:
        UnsupportedError: A value that is neither a tensor nor a number crosses from forward to backward.
    """
    leaves, specs = output_leaves(program.graph), program.signature.outputs
    gradients = [(s, v) for s, v in zip(specs, leaves, strict=True) if s.kind is OutputKind.GRADIENT]
    kept = [(s, v) for s, v in zip(specs, leaves, strict=True) if s.kind is not OutputKind.GRADIENT]
    saved = crossing_values(program)
    carried = [(OutputSpec(v.name, OutputKind.SAVED, v.name), v) for v in saved]
    forward_nodes = [n for n in program.graph.nodes if n.phase is Phase.FORWARD and n.op.kind != "output"]
    inputs = [s for s in program.signature.inputs if s.kind is not InputKind.TANGENT]
    forward = _program(program, inputs, (), forward_nodes, [*kept, *carried])
    if not gradients:
        return SplitJoint(forward, None, ())
    return SplitJoint(forward, _backward(program, saved, gradients), tuple(v.name for v in saved))


def crossing_values(program: Program) -> list[Value]:
    """The computed forward values that later phases read, in program order; inputs are not among them.

    Raises:
        UnsupportedError: One of them is neither a tensor nor a number.
    """
    gradients = {
        v
        for s, v in zip(program.signature.outputs, output_leaves(program.graph), strict=True)
        if s.kind is OutputKind.GRADIENT and isinstance(v, Value)
    }
    crossing = []
    for node in program.graph.nodes:
        if node.phase is not Phase.FORWARD or node.op.kind in ("placeholder", "output"):
            continue
        later = any(u.phase is not Phase.FORWARD and u.op.kind != "output" for u in node.users)
        if not later and node.result not in gradients:
            continue
        if node.op.kind == "get_attr":
            continue
        if not isinstance(node.result.type, TensorType | ScalarType):
            raise UnsupportedError(
                f"%{node.name} crosses from forward to backward but is neither a tensor nor a number",
                node=node,
                hint="read its elements with operator.getitem in the forward phase",
            )
        crossing.append(node.result)
    return crossing


def _backward(program: Program, saved: Sequence[Value], gradients: Sequence[tuple[OutputSpec, Any]]) -> Program:
    nodes = [n for n in program.graph.nodes if n.phase is not Phase.FORWARD and n.op.kind != "output"]
    read = {v.producer for n in nodes for v in n.operands}
    read |= {v.producer for _, v in gradients if isinstance(v, Value)}
    attributes = [n for n in program.graph.nodes if n in read and n.op.kind == "get_attr" and n.phase is Phase.FORWARD]
    wanted = {spec.target for spec, _ in gradients}
    inputs = [
        s
        for s in program.signature.inputs
        if s.kind is InputKind.TANGENT or s.target in wanted or program.graph.value(s.name).producer in read
    ]
    body = [*attributes, *(n for n in nodes if n.op.kind != "placeholder")]
    return _program(program, inputs, saved, body, gradients)


def _program(
    whole: Program,
    inputs: Sequence[InputSpec],
    saved: Sequence[Value],
    nodes: Iterable[Node],
    outputs: Sequence[tuple[OutputSpec, Any]],
) -> Program:
    """A program of copies of `nodes`, with placeholders for `inputs` and `saved` values."""
    graph = Graph()
    copies: dict[Value, Value] = {}
    specs: list[InputSpec] = []
    for value in saved:
        made = graph.create("placeholder", name=value.name, type=value.type, origin=value.producer.origin)
        copies[value] = made.result
        specs.append(InputSpec(made.name, InputKind.SAVED, value.name))
    for spec in inputs:
        _copy(graph, whole.graph.value(spec.name).producer, copies)
        specs.append(spec)
    for node in nodes:
        if node.op.kind != "placeholder":
            _copy(graph, node, copies)
    returned = tuple(copies[v] if isinstance(v, Value) else v for _, v in outputs)
    output = whole.graph.output_node
    graph.create("output", (returned,), phase=output.phase, origin=output.origin)
    half = Program(graph, Signature(specs, [s for s, _ in outputs]), whole.stage, whole.mesh)
    half.tensors, half.attrs = dict(whole.tensors), dict(whole.attrs)
    half.facts, half.info = set(whole.facts), dict(whole.info)
    half.capture, half.fake_mode = whole.capture, whole.fake_mode
    return half


def _copy(graph: Graph, node: Node, copies: dict[Value, Value]) -> None:
    made = graph.create(
        node.op,
        map_values(node.args, copies.__getitem__),
        map_values(dict(node.kwargs), copies.__getitem__),
        name=node.name,
        type=node.result.type,
        phase=node.phase,
        origin=node.origin,
        meta=node.meta,
    )
    copies[node.result] = made.result


__all__ = ["SplitJoint", "crossing_values", "split_joint"]
