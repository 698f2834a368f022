"""The layout check: stored layouts follow and outputs are complete. `comm.layout` explains the algebra."""

from __future__ import annotations

from autosp_ir.comm.inference import GradientFlow, checked_axes, infer_layout
from autosp_ir.comm.rules.attention import unresolved_axes
from autosp_ir.comm.rules.base import Outcome, cuttable, stored_placement, whole
from autosp_ir.errors import LayoutError, UnsupportedError, VerifyError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, OutputKind, OutputSpec, Program, Stage
from autosp_ir.ir.types import Partial, Replicate, Shard, TensorType, TupleType
from autosp_ir.ir.verify import nested_graphs, output_leaves, register_check

LOWERED = "comm-lowered"
"""The fact that lowering establishes: layout operators that move data are gone."""

_MOVING = ("autosp.all_reduce", "autosp.all_gather", "autosp.reduce_scatter", "autosp.all_to_all")


@register_check
def check_layouts(program: Program) -> None:
    """Infer every layout again and compare it with the stored one; then check the outputs.

    Raises:
        LayoutError: A layout does not follow from the operands', or an output is not complete on every rank.
    """
    axes = checked_axes(program)
    flow = GradientFlow(program)
    # Half a program: what its other half saved was placed there.
    given = {s.name for s in program.signature.inputs if s.kind is InputKind.SAVED}
    for node in program.graph.nodes:
        if not node.results or node.name in given:
            continue
        for axis in axes:
            stored = stored_placement(node.result, axis)
            inferred = infer_layout(node, program, axis, hint=stored, flow=flow)
            _compare(node, axis, stored, inferred, strict=program.stage is Stage.FORWARD)
    for axis in axes:
        check_outputs(program, axis, flow)


@register_check
def check_masks_are_read(program: Program) -> None:
    """Every state that canonicalize drew for a mask is still read through one: a lost mask is a lost dropout.

    Raises:
        VerifyError: A mask is gone.
    """
    if "canonical" not in program.facts:
        return
    for node in program.graph.nodes:
        if not node.is_op("autosp.random_state") or node.arg("unread"):
            continue
        if not any(u.is_op("autosp.keep_mask") and u.result.uses for u in node.users):
            raise VerifyError(
                f"nothing reads the dropout mask of %{node.name} any more, so its dropout is lost",
                node=node,
                hint="hand `dropout` and `keep` of an attention on to what replaces it, or set unread=True on a state "
                "whose dropout nothing needs",
            )


@register_check
def check_operator_axes(program: Program) -> None:
    """Every operator over an axis was made for the size that the mesh gives this axis, 1 for an axis it lacks.

    Along an axis that the mesh lacks nothing else is checked, so that a slice would pass for a whole value.

    Raises:
        LayoutError: An operator names another size.
    """
    for graph in (program.graph, *(graph for _, graph in nested_graphs(program))):
        for node in graph.nodes:
            size = node.arg("size") if node.op.name.startswith("autosp.") else None
            axis = node.arg("axis")
            if size is None or size == program.mesh.get(axis, 1):
                continue
            raise LayoutError(
                f"%{node.name} = {node.op.name} is made for {size} rank(s) on axis {axis!r}, but the mesh "
                f"{program.mesh} has {program.mesh.get(axis, 1)}",
                node=node,
                hint="name an axis of the mesh and its size, or give the program the mesh it was partitioned for",
            )


def _compare(node: Node, axis: str, stored: Outcome, inferred: Outcome, *, strict: bool) -> None:
    kinds = node.result.type.elements if isinstance(node.result.type, TupleType) else (node.result.type,)
    have = stored if isinstance(stored, tuple) else (stored,)
    want = inferred if isinstance(inferred, tuple) else (inferred,) * len(kinds)
    for kind, a, b in zip(kinds, have, want, strict=True):
        if not isinstance(kind, TensorType) or a is None or b is None:
            continue
        if a != b and (strict or not (whole(a) and whole(b))):
            raise LayoutError(
                f"%{node.name} is stored as {a} along axis {axis!r}, but {b} follows from its operands",
                node=node,
                hint="infer the layout again after a rewrite, or insert the collective that turns one into the other",
            )
        if isinstance(a, Shard) and not cuttable(kind, a):
            raise LayoutError(
                f"%{node.name} has local shape {list(kind.shape)}, which cannot be cut along {a}",
                node=node,
                hint="a shard names an existing dimension, and its outer factor divides that dimension",
            )


def check_outputs(program: Program, axis: str, flow: GradientFlow) -> None:
    """Refuse outputs that are not complete on every rank.

    Args:
        program: The program, its layouts inferred.
        axis: The mesh axis to look at.
        flow: Gradient reachability of the program.

    Raises:
        LayoutError: An output is a shard or a partial sum, or Replicate where a gradient enters.
    """
    for leaf, spec in zip(output_leaves(program.graph), program.signature.outputs, strict=True):
        if isinstance(leaf, Value) and isinstance(leaf.type, TensorType):
            _check_output(program, axis, leaf, spec, flow)


def _check_output(program: Program, axis: str, value: Value, spec: OutputSpec, flow: GradientFlow) -> None:
    placement = value.tensor_type.layout[axis]
    if spec.kind is OutputKind.SAVED or (isinstance(placement, Partial) and _summed_outside(program, spec)):
        return
    if not whole(placement):
        raise LayoutError(
            f"output {spec.name!r} leaves the program as {placement} along axis {axis!r}, not complete on every rank",
            node=value.producer,
            hint="complete it with autosp.all_reduce (a partial sum) or autosp.all_gather (a shard)",
        )
    if program.stage is Stage.FORWARD and isinstance(placement, Replicate) and flow.reaches(value):
        raise LayoutError(
            f"output {spec.name!r} is Replicate along axis {axis!r}: its gradient would be counted once per rank",
            node=value.producer,
            hint="return an Invariant value: end in autosp.all_reduce or autosp.all_gather(to='invariant')",
        )


def _summed_outside(program: Program, spec: OutputSpec) -> bool:
    """Whether an output is a parameter gradient that the trainer reduces, by DDP or FSDP."""
    if spec.kind is not OutputKind.GRADIENT or program.info.get("grad_sync") != "external":
        return False
    return program.signature.input(InputKind.PARAMETER, spec.target) is not None


@register_check(stages=[Stage.LOWERED])
def check_lowered(program: Program) -> None:
    """A program that is said to be lowered holds no layout operator that lowering has to replace.

    Raises:
        VerifyError: It does.
    """
    if LOWERED not in program.facts:
        return
    for node in program.graph.nodes:
        if node.is_op(*_MOVING) or (node.op.name.startswith("autosp.") and node.op.has(Trait.IDENTITY)):
            raise VerifyError(
                f"%{node.name} is still {node.op.name}, but the program is said to be {LOWERED!r}",
                node=node,
                hint="let the pass that provides the fact rewrite every such node, or refuse the program",
            )


def check_emittable(program: Program) -> None:
    """Refuse a program whose attention is still cut along the tokens.

    Raises:
        UnsupportedError: Some attention is unresolved; the hint names the strategy passes.
    """
    for node in program.graph.nodes:
        # One that nothing reads was resolved by a pass that left the dead node behind.
        if not node.op.has(Trait.ATTENTION) or not node.users:
            continue
        if unresolved_axes(node):
            raise UnsupportedError(
                f"%{node.name} attends over tokens that are cut between ranks, and no pass has resolved it",
                node=node,
                hint="run a strategy pass such as `ulysses` behind token-partition",
            )
