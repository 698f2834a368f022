"""Break a program on purpose: every collective erased, doubled, swapped or turned to another dimension.

A layout check is worth what it catches. `mutations` lists every small way to get the communication of a program wrong,
and `check_mutations` asks for each whether inferring the layouts again finds it:

    report = check_mutations(program)
    assert not report.survivors
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from autosp_ir.comm.inference import checked_axes
from autosp_ir.comm.layout import GradientFlow, infer_layout, place
from autosp_ir.comm.layout_check import check_outputs
from autosp_ir.comm.rules.base import stored_placement
from autosp_ir.errors import LayoutError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.types import Invariant, Replicate

_IDENTITY = "autosp.invariant_to_replicate"
_DIM_ARGUMENTS = ("dim", "split_dim", "concat_dim")
_COMMUNICATIONS = (
    _IDENTITY,
    "autosp.shard",
    "autosp.all_gather",
    "autosp.reduce_scatter",
    "autosp.all_reduce",
    "autosp.all_to_all",
)


@dataclass(frozen=True)
class Mutation:
    """One way to get one communication wrong.

    Args:
        kind: erase, double, swap or dim.
        node: Name of the node.
        op: What it becomes, for a swap.
        arguments: Changed arguments by schema name.
    """

    kind: str
    node: str
    op: str | None = None
    arguments: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        changed = ", ".join(f"{k}={v}" for k, v in self.arguments)
        return (
            f"{self.kind} %{self.node}" + (f" -> {self.op}" if self.op else "") + (f" ({changed})" if changed else "")
        )


@dataclass
class MutationReport:
    """What became of the mutations.

    Attributes:
        total: How many were tried, by kind.
        caught: How many raised a LayoutError, by kind.
        survivors: The others.
    """

    total: Counter[str] = field(default_factory=Counter)
    caught: Counter[str] = field(default_factory=Counter)
    survivors: list[Mutation] = field(default_factory=list)


def mutations(program: Program) -> Iterator[Mutation]:
    """Every mutation that changes what a program means.

    In a joint program an identity changes no value, so erasing, doubling or adding one is left out there, and so is
    the target of an all-gather.

    Args:
        program: A forward or joint program with layouts.
    """
    strict = program.stage is Stage.FORWARD
    for node in program.graph.nodes:
        if node.op.name not in _COMMUNICATIONS:
            continue
        silent = node.is_op(_IDENTITY) and not strict
        if not silent:
            yield Mutation("erase", node.name)
            yield Mutation("double", node.name)
        yield from _swaps(node, strict=strict)
        yield from _wrong_dims(node)


def _swaps(node: Node, *, strict: bool) -> Iterator[Mutation]:
    for op in _COMMUNICATIONS:
        # Outside a forward program, to become an identity is to be erased.
        if op == node.op.name or (op == _IDENTITY and not strict):
            continue
        yield Mutation("swap", node.name, op=op)
    if node.is_op("autosp.all_to_all"):
        swapped = (("split_dim", node.arg("concat_dim")), ("concat_dim", node.arg("split_dim")))
        yield Mutation("swap", node.name, arguments=swapped)
    if node.is_op("autosp.all_gather") and strict:
        other = "replicate" if node.arg("to") == "invariant" else "invariant"
        yield Mutation("swap", node.name, arguments=(("to", other),))


def _wrong_dims(node: Node) -> Iterator[Mutation]:
    ndim = node.operands[0].tensor_type.ndim
    own = {name: node.arg(name) % ndim for name in _DIM_ARGUMENTS if node.arg(name) is not None}
    for name in own:
        for dim in range(ndim):
            if dim not in own.values():
                yield Mutation("dim", node.name, arguments=((name, dim),))


@contextmanager
def broken(program: Program, mutation: Mutation) -> Iterator[Node]:
    """Break one communication of a program for the length of the context, in place.

    Args:
        program: Mended at the end, its types included.
        mutation: From `mutations(program)`.

    Yields:
        The first node that the mutation concerns.
    """
    graph = program.graph
    node = graph.value(mutation.node).producer
    arguments = {n: (n.args, n.kwargs) for n in (node, *node.users)}
    types = {n: n.result.type for n in graph.nodes if n.results}
    start, made = _break(program, node, mutation)
    try:
        yield start
    finally:
        for changed, (args, kwargs) in arguments.items():
            changed.set_args(args, kwargs)
        if made is not None:
            graph.erase(made)
        for typed, kind in types.items():
            typed.result.type = kind


def _break(program: Program, node: Node, mutation: Mutation) -> tuple[Node, Node | None]:
    """Apply a mutation; returns where it starts to show, and the node created."""
    if mutation.kind == "erase":
        users = node.users
        node.result.replace_all_uses_with(node.operands[0])
        return users[0] if users else program.graph.output_node, None
    if mutation.kind == "double":
        again = program.graph.create(node.op, node.args, node.kwargs, type=node.result.type, after=node)
        node.result.replace_all_uses_with(again.result)
        again.replace_operand(node.operands[0], node.result)
        return again, again
    if mutation.op is not None:
        made = program.graph.create(mutation.op, _arguments(node, mutation.op), type=node.result.type, after=node)
        node.result.replace_all_uses_with(made.result)
        return made, made
    for name, value in mutation.arguments:
        node.set_args(*node.with_arg(name, value))
    return node, None


def _arguments(node: Node, op: str) -> tuple[Any, ...]:
    """Arguments for another communication of the same value along the same axis."""
    value: Value = node.operands[0]
    ndim = value.tensor_type.ndim
    dim = next((node.arg(n) for n in ("dim", "concat_dim") if node.arg(n) is not None), 0)
    group = (node.arg("axis"), node.arg("size"))
    if op in (_IDENTITY, "autosp.all_reduce"):
        return (value, *group)
    if op == "autosp.all_to_all":
        return (value, (dim + 1) % max(ndim, 1), dim, *group)
    return (value, dim, *group)


def check_mutations(program: Program) -> MutationReport:
    """Try every mutation and infer the layouts behind it again, from the broken node on.

    Shapes are left as they were: the layouts alone must show the mistake.

    Args:
        program: A program whose layouts hold.

    Returns:
        How many were tried and caught, and which survived.
    """
    report = MutationReport()
    subject = program.clone()
    for mutation in list(mutations(subject)):
        report.total[mutation.kind] += 1
        with broken(subject, mutation) as start:
            try:
                _infer_from(subject, start)
            except LayoutError:
                report.caught[mutation.kind] += 1
            else:
                report.survivors.append(mutation)
    return report


def _infer_from(program: Program, start: Node) -> None:
    flow = GradientFlow(program)
    axes = checked_axes(program)
    node: Node | None = start
    while node is not None:
        for axis in axes if node.results else ():
            stored = stored_placement(node.result, axis)
            # A stored whole value is no hint: the mistake may have made it anything.
            known = None if isinstance(stored, Invariant | Replicate) else stored
            outcome = infer_layout(node, program, axis, hint=known, flow=flow)
            node.result.type = place(node.result.type, axis, outcome)
        node = node.next
    for axis in axes:
        check_outputs(program, axis, flow)
