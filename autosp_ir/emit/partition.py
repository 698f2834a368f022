"""What torch's min-cut partitioner would save of a joint program."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from autosp_ir._torch_compat import force_fx_name, mark_must_recompute, mark_must_save, min_cut_saved_names
from autosp_ir.emit.fx_export import export_graph
from autosp_ir.errors import PassError
from autosp_ir.ir.graph import Value
from autosp_ir.ir.ops import Trait, op_for_target
from autosp_ir.ir.program import InputKind, OutputKind, Program

_LASTING = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT)


def min_cut_saved(
    program: Program,
    never: Collection[Value] = (),
    always: Collection[Value] = (),
    *,
    budget: float = 1.0,
    aggressive: bool = False,
) -> set[Value]:
    """The values that torch's partitioner would save for the backward: the fewest bytes to rebuild the rest from.

    Args:
        program: A joint program, outputs of the forward in front of the gradients. It is not changed.
        never: Values that must be computed again.
        always: Values that must not be.
        budget: Torch's `activation_memory_budget`, a part of what it saves by itself; below 1 it also computes costly
            operations again, those that it knows no price of first.
        aggressive: Compute again whatever is no matrix product, attention or the like.

    Returns:
        Values of the program, inputs among them. Parameters, buffers and constants count as free.

    Raises:
        PassError: The partitioner fails.
    """
    exported = export_graph(program)
    values = _renamed(program, exported)
    for node in exported.graph.nodes:
        # A chunk itself is a view of what was cut; torch knows no view with several results and may save it.
        value = values.get(node.name)
        if value is not None and value in never and not value.producer.is_op("operator.getitem"):
            mark_must_recompute(node)
        elif value is not None and (value in always or _of_chunks(value)):
            mark_must_save(node)
    _erase_identities(exported.graph)
    kinds = [s.kind for s in program.signature.inputs]
    kept = sum(o.kind is not OutputKind.GRADIENT for o in program.signature.outputs)
    try:
        static = [i for i, kind in enumerate(kinds) if kind in _LASTING]
        names = min_cut_saved_names(exported, kept, static, budget=budget, aggressive=aggressive)
    except Exception as error:  # any torch failure becomes a named error
        raise PassError(
            f"torch's partitioner failed: {type(error).__name__}: {error}", hint="use remat{policy=save-all}"
        ) from error
    return {values[n] for n in names if n in values}


def _renamed(program: Program, exported: fx.GraphModule) -> dict[str, Value]:
    """Give the exported nodes the names and targets that the partitioner relies on; returns the value of each name."""
    kinds = {s.name: s.kind for s in program.signature.inputs}
    values: dict[str, Value] = {}
    for position, (node, fx_node) in enumerate(zip(program.graph.nodes, exported.graph.nodes, strict=True)):
        # Where the partitioner makes placeholders of values, FX would alter names that are not in snake case.
        force_fx_name(fx_node, f"value_{position}")
        if node.results:
            values[fx_node.name] = node.result
        if node.op.kind == "placeholder":
            # It tells tangents from other inputs by their targets.
            role = "tangents" if kinds[node.name] is InputKind.TANGENT else "primals"
            fx_node.target = f"{role}_{position}"
    return values


def _of_chunks(value: Value) -> bool:
    """Whether to rebuild a value is to run all chunks of a region, which torch holds for free.

    The chunks of an unchunk are marked to be computed again, and of a loop it does not know that it multiplies.
    """
    node = value.producer
    made_by = node.operands[0].producer if node.is_op("operator.getitem") and node.operands else node
    return node.is_op("autosp.unchunk") or made_by.is_op("autosp.chunk_loop")


def _erase_identities(graph: fx.Graph) -> None:
    """Lowering erases identity operators: saving the result of one saves its operand."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_for_target(node.target).has(Trait.IDENTITY):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


__all__ = ["min_cut_saved"]
