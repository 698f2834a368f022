"""The verifier: every rule that a program keeps at its stage, checked after every pass. It fails closed.

Structure and types are checked here; other rooms add their rules with `register_check`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from autosp_ir.errors import LayoutError, VerifyError
from autosp_ir.ir.graph import Graph, Node, Phase, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Check, InputKind, OutputKind, Program, Stage
from autosp_ir.ir.types import Shard, tensors_of
from autosp_ir.ir.verify_comm import check_same_on_every_rank, check_waits
from autosp_ir.ir.verify_types import check_types


@dataclass(frozen=True)
class _Registered:
    check: Check
    stages: frozenset[Stage]


_registered: list[_Registered] = []


@overload
def register_check(check: Check, *, stages: Collection[Stage] | None = None) -> Check: ...


@overload
def register_check(check: None = None, *, stages: Collection[Stage] | None = None) -> Callable[[Check], Check]: ...


def register_check(
    check: Check | None = None, *, stages: Collection[Stage] | None = None
) -> Check | Callable[[Check], Check]:
    """Add a rule to the verifier; usable as a decorator.

    Args:
        check: Raises `VerifyError` (or `LayoutError`) when a program breaks the rule. Structure and types hold when
            it runs.
        stages: The stages at which the rule holds; None means all.

    Returns:
        The check.
    """

    def register(rule: Check) -> Check:
        if all(known.check is not rule for known in _registered):
            _registered.append(_Registered(rule, frozenset(stages if stages is not None else Stage)))
        return rule

    return register if check is None else register(check)


def verify_program(program: Program, before: Sequence[str] | None = None) -> None:
    """Check every rule that holds at the program's stage, nested graphs included.

    Args:
        program: The program.
        before: `effect_order` of the program before it was rewritten; surviving effects must keep that order.

    Raises:
        VerifyError: A rule is broken; the message names the node.
        LayoutError: A layout is broken.
    """
    check_structure(program.graph)
    check_signature(program)
    check_phases(program)
    check_waits(program.graph)
    check_same_on_every_rank(program)
    for name, nested in nested_graphs(program):
        try:
            check_structure(nested)
            check_types(nested, program)
            check_waits(nested)
        except VerifyError as error:
            raise type(error)(f"in nested graph {name!r}: {error}") from error
    check_types(program.graph, program)
    check_layout_axes(program)
    check_effects(program, before)
    for registered in _registered:
        if program.stage in registered.stages:
            registered.check(program)


def nested_graphs(program: Program) -> Iterator[tuple[str, Graph]]:
    """The graphs of higher-order regions, by the name that `get_attr` nodes use."""
    return ((name, graph) for name, graph in program.attrs.items() if isinstance(graph, Graph))


def check_structure(graph: Graph) -> None:
    """Names unique, one output at the end, placeholders first, definitions before uses, use lists exact."""
    nodes = list(graph.nodes)
    _check_output(graph, nodes)
    seen: dict[str, Node] = {}
    defined: dict[Value, Node] = {}
    body = False
    for node in nodes:
        body = body or node.op.kind != "placeholder"
        if body and node.op.kind == "placeholder":
            raise VerifyError(
                f"placeholder %{node.name} stands behind other nodes",
                node=node,
                hint="move it in front of the body with graph.move",
            )
        _check_operands(node, defined)
        if node.op.kind != "output" and len(node.results) != 1:
            raise VerifyError(f"{node.op.name} defines {len(node.results)} values; every node defines one", node=node)
        for value in node.results:
            if value.name in seen or graph.value(value.name) is not value:
                raise VerifyError(
                    f"two values are called %{value.name}", node=node, hint="create nodes with graph.create"
                )
            if value.producer is not node:
                raise VerifyError(f"%{value.name} names {value.producer!r} as its producer", node=node)
            seen[value.name] = node
            defined[value] = node
    _check_use_lists(nodes)


def _check_output(graph: Graph, nodes: list[Node]) -> None:
    outputs = [n for n in nodes if n.op.kind == "output"]
    if len(outputs) != 1:
        raise VerifyError(
            f"the graph has {len(outputs)} output nodes, it needs exactly one",
            hint="create it with graph.create('output', (values,))",
        )
    if nodes[-1] is not outputs[0]:
        raise VerifyError("the output node is not the last node", node=outputs[0], hint="insert nodes in front of it")
    if graph.output_node is not outputs[0]:
        raise VerifyError("graph.output_node is not the output node in the list", node=outputs[0])


def _check_operands(node: Node, defined: dict[Value, Node]) -> None:
    if node.op.kind == "placeholder" and node.operands:
        raise VerifyError(f"placeholder %{node.name} reads values", node=node)
    if _flatten(node.args) + _flatten(dict(node.kwargs)) != list(node.operands):
        raise VerifyError("the operand list differs from the arguments", node=node, hint="change them with set_args")
    for value in node.operands:
        if value in defined:
            continue
        if value.producer.graph is not node.graph:
            raise VerifyError(f"%{value.name} belongs to another graph", node=node, hint="clone values with the graph")
        if value.producer.erased:
            raise VerifyError(f"%{value.name} was erased but is still read", node=node)
        raise VerifyError(
            f"%{value.name} is read before it is defined", node=node, hint="move the definition in front of the use"
        )


def _flatten(item: Any) -> list[Value]:
    """The Values among nested arguments, found independently of the graph's own bookkeeping."""
    if isinstance(item, Value):
        return [item]
    if isinstance(item, dict):
        return [v for i in item.values() for v in _flatten(i)]
    if isinstance(item, slice):
        return _flatten((item.start, item.stop, item.step))
    if isinstance(item, tuple | list):
        return [v for i in item for v in _flatten(i)]
    return []


def _check_use_lists(nodes: list[Node]) -> None:
    actual: dict[Value, Counter[Node]] = {}
    for node in nodes:
        for value in node.operands:
            actual.setdefault(value, Counter())[node] += 1
    for node in nodes:
        for value in node.results:
            if value._users != actual.get(value, {}):
                raise VerifyError(
                    f"the use list of %{value.name} does not match the nodes that read it",
                    node=node,
                    hint="change arguments with set_args and replace_all_uses_with only",
                )


def output_leaves(graph: Graph) -> list[Any]:
    """The flat leaves of the output: Values and constants (None for an absent gradient)."""

    def leaves(item: Any) -> list[Any]:
        if isinstance(item, tuple | list):
            return [leaf for i in item for leaf in leaves(i)]
        if isinstance(item, dict):
            return [leaf for i in item.values() for leaf in leaves(i)]
        return [item]

    node = graph.output_node
    return [leaf for arg in node.args for leaf in leaves(arg)]


def check_signature(program: Program) -> None:
    """One input spec per placeholder and one output spec per output leaf, in order, with targets that exist."""
    names = [n.name for n in program.graph.inputs]
    specified = [s.name for s in program.signature.inputs]
    if names != specified:
        raise VerifyError(
            f"the signature lists the inputs {specified} but the placeholders are {names}",
            hint="keep signature.inputs in step with the placeholders, in the same order",
        )
    targets = Counter((s.kind is InputKind.TANGENT, s.target) for s in program.signature.inputs)
    twice = next((target for (_, target), count in targets.items() if count > 1), None)
    if twice is not None:
        raise VerifyError(
            f"two inputs of the program are called {twice!r}",
            hint="give every parameter, buffer and user input a name of its own",
        )
    leaves, outputs = output_leaves(program.graph), program.signature.outputs
    if len(leaves) != len(outputs):
        raise VerifyError(
            f"the signature lists {len(outputs)} outputs but the graph returns {len(leaves)}",
            node=program.graph.output_node,
            hint="keep signature.outputs in step with the output node",
        )
    differentiable = {s.target for s in program.signature.inputs if s.kind is not InputKind.TANGENT}
    buffers = {s.target for s in program.signature.inputs if s.kind is InputKind.BUFFER}
    for output in outputs:
        known = {OutputKind.GRADIENT: differentiable, OutputKind.BUFFER_MUTATION: buffers}.get(output.kind)
        if known is not None and output.target not in known:
            raise VerifyError(
                f"output {output.name!r} is the {output.kind.value} of {output.target!r}, which is no input",
                node=program.graph.output_node,
                hint="name the parameter, input or buffer by its signature target",
            )
        if output.kind is OutputKind.GRADIENT and program.stage is Stage.FORWARD:
            raise VerifyError(f"output {output.name!r} is a gradient, but the program is at stage forward")


_READABLE = {
    Phase.FORWARD: {Phase.FORWARD},
    Phase.RECOMPUTE: {Phase.FORWARD, Phase.RECOMPUTE},
    Phase.BACKWARD: set(Phase),
}


def check_phases(program: Program) -> None:
    """Forward nodes read forward values only, recomputed ones no gradients; a forward program has one phase."""
    for node in program.graph.nodes:
        if node.op.kind == "output":
            continue
        if program.stage is Stage.FORWARD and node.phase is not Phase.FORWARD:
            raise VerifyError(f"%{node.name} is of phase {node.phase}, but the program is at stage forward", node=node)
        for value in node.operands:
            if value.producer.phase not in _READABLE[node.phase]:
                raise VerifyError(
                    f"%{node.name} is of phase {node.phase} but reads %{value.name} of phase {value.producer.phase}",
                    node=node,
                    hint="give the node the phase in which its operands exist",
                )


def check_layout_axes(program: Program) -> None:
    """Layouts name axes of the mesh and dimensions of the tensor."""
    for node in program.graph.nodes:
        for kind in (t for v in node.results for t in tensors_of(v.type)):
            for axis, placement in kind.layout.items():
                if axis not in program.mesh:
                    raise LayoutError(
                        f"the layout of %{node.name} names the axis {axis!r}, which the mesh {program.mesh} lacks",
                        node=node,
                        hint="set program.mesh before giving values layouts",
                    )
                if isinstance(placement, Shard) and not 0 <= placement.dim < kind.ndim:
                    raise LayoutError(
                        f"%{node.name} has {kind.ndim} dimensions but is sharded along dimension {placement.dim}",
                        node=node,
                        hint="name the dimension counted from the front",
                    )


def _has_effect(node: Node) -> bool:
    if node.op.kind in ("placeholder", "get_attr", "output") or node.op.has(Trait.COLLECTIVE):
        return False
    return not node.op.has(Trait.PURE) and not node.op.has(Trait.VIEW)


def effect_order(program: Program) -> tuple[str, ...]:
    """Names of the nodes with effects (random numbers, mutation, unknown), in order; collectives aside."""
    return tuple(n.name for n in program.graph.nodes if _has_effect(n))


def check_effects(program: Program, before: Sequence[str] | None = None) -> None:
    """Surviving effects keep their order; nothing random, mutating or mutated is recomputed."""
    order = effect_order(program)
    if before is not None:
        kept = [name for name in before if name in set(order)]
        now = [name for name in order if name in set(kept)]
        moved = next((b for a, b in zip(kept, now, strict=True) if a != b), None)
        if moved is not None:
            raise VerifyError(
                f"%{moved} has an effect and was moved across another one",
                node=program.graph.value(moved).producer,
                hint="keep the order of random and mutating operations, or their results change",
            )
    _check_recomputation(program)


def _check_recomputation(program: Program) -> None:
    roots: dict[Value, Value] = {}
    mutated: dict[Value, Node] = {}
    for node in program.graph.nodes:
        if node.phase is Phase.RECOMPUTE and (node.op.has(Trait.RANDOM) or node.op.has(Trait.MUTATES)):
            raise VerifyError(
                f"%{node.name} is recomputed, but {node.op.name} gives another result the second time",
                node=node,
                hint="save the value instead of recomputing it",
            )
        for value in node.operands:
            writer = mutated.get(roots.get(value, value))
            if writer is not None and node.phase is Phase.RECOMPUTE:
                raise VerifyError(
                    f"%{node.name} is recomputed from %{value.name}, which %{writer.name} has overwritten",
                    node=node,
                    hint="save the value instead of recomputing it across a mutation",
                )
        if node.op.has(Trait.VIEW) and node.operands:
            roots[node.result] = roots.get(node.operands[0], node.operands[0])
        if node.op.has(Trait.MUTATES) and node.operands:
            mutated[roots.get(node.operands[0], node.operands[0])] = node


__all__ = ["check_effects", "check_structure", "effect_order", "nested_graphs", "register_check", "verify_program"]
