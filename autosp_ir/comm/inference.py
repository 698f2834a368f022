"""Layout inference: one node, or a whole program in one pass. `comm.layout` explains the algebra."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from autosp_ir.comm import rules  # attaches the rules
from autosp_ir.comm.rules.attention import unresolved_axes
from autosp_ir.comm.rules.base import (
    EXACT,
    FILL_OPS,
    WHOLE,
    Outcome,
    RuleContext,
    refuse_unless_whole,
    stored_placement,
    whole,
)
from autosp_ir.errors import LayoutError
from autosp_ir.ir.graph import Node, Phase, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.types import (
    INVARIANT,
    REPLICATE,
    Invariant,
    Placement,
    Replicate,
    Shard,
    TensorType,
    TupleType,
    Type,
)

_BUILTINS = ("placeholder", "get_attr")
_NO_GRADIENT = frozenset({"aten.detach", "aten.detach_copy"}) | FILL_OPS
_NO_RULE = "gather the operand with autosp.all_gather first, or give the operation a rule with air.layout_rule(name)"
_TO_REPLICATE = "pass it through autosp.invariant_to_replicate first, so that its gradient is summed over the ranks"


_SIZES = ("size", "shape", "sizes", "input_sizes")
_SLICES = ("aten.slice.Tensor", "aten.slice_copy.Tensor")
_MEASURE_WHOLE = "measure the value before it is cut, or give the result its shard when it is created"


class GradientFlow:
    """Which values a gradient reaches; answers are kept for the life of the object.

    Args:
        program: A forward program, unchanged while this is in use.
    """

    def __init__(self, program: Program) -> None:
        self._trainable = {s.name for s in program.signature.inputs if s.requires_grad}
        self._known: dict[Value, bool] = {}

    def reaches(self, value: Value) -> bool:
        """Whether `value` is differentiable with respect to a parameter or input that wants a gradient."""
        visited: set[Value] = set()
        stack = [value]
        while stack:
            seen = stack.pop()
            if seen in visited or self._known.get(seen) is False or not _differentiable(seen.type):
                continue
            visited.add(seen)
            if self._known.get(seen) or (seen.producer.op.kind == "placeholder" and seen.name in self._trainable):
                self._known[value] = True
                return True
            if seen.producer.op.name not in _NO_GRADIENT:
                stack.extend(seen.producer.operands)
        self._known.update(dict.fromkeys(visited, False))
        return False


def _differentiable(kind: Type) -> bool:
    if isinstance(kind, TupleType):
        return any(_differentiable(e) for e in kind.elements)
    return isinstance(kind, TensorType) and (kind.dtype.is_floating_point or kind.dtype.is_complex)


def infer_layout(
    node: Node,
    program: Program,
    axis: str,
    *,
    placements: Mapping[Value, Outcome] | None = None,
    hint: Outcome | None = None,
    flow: GradientFlow | None = None,
) -> Outcome:
    """The placement of a node's result along one mesh axis.

    Args:
        node: A node whose operands have types.
        program: Its program; forward programs are placed strictly.
        axis: The mesh axis; it need not be in the mesh when every placement is given.
        placements: Hypothetical operand placements in place of the stored ones; shapes may then be global.
        hint: The wanted result where several hold.
        flow: Gradient reachability of the program, to share between calls.

    Returns:
        A placement, or one per element of a tuple result.

    Raises:
        LayoutError: No layout follows; the message says which operand is in the way.
    """
    if node.op.kind in _BUILTINS or not node.results:
        return WHOLE
    ctx = RuleContext(node, program, axis, placements=placements, hint=hint)
    # Brackets behind a tensor index its dimensions: that is an operation like any other, and has no rule.
    if node.is_op("operator.getitem") and not isinstance(node.operands[0].type, TensorType):
        return _element(ctx)
    _check_operands(ctx)
    outcome = _outcome(ctx)
    _check_numbers(ctx, outcome)
    if program.stage is not Stage.FORWARD:
        return _each(outcome, lambda p: INVARIANT if whole(p) else p)
    if node.op.name in EXACT:
        return outcome
    return _strict(ctx, outcome, flow or GradientFlow(program))


def _check_operands(ctx: RuleContext) -> None:
    for value in ctx.tensors:
        placement = ctx.placement(value)
        if isinstance(placement, Shard) and not 0 <= placement.dim < value.tensor_type.ndim:
            ctx.fail(f"%{value.name} has no dimension {placement.dim} to be cut along")


def _outcome(ctx: RuleContext) -> Outcome:
    op = ctx.node.op
    if op.layout_rule is not None:
        made: Outcome = op.layout_rule(ctx)
        return made
    if op.has(Trait.RANDOM) and ctx.size > 1 and not _probability_is_zero(ctx):
        ctx.fail("each rank would draw other numbers", "remove the random operation, or set its probability to 0")
    if op.has(Trait.POINTWISE) and not op.has(Trait.MUTATES):
        return rules.pointwise.pointwise(ctx)
    return refuse_unless_whole(ctx, "the operation has no layout rule, so every operand must be whole", _NO_RULE)


def _check_numbers(ctx: RuleContext, outcome: Outcome) -> None:
    """Refuse a result made with one rank's number, unless the number is the length of the result's cut dimension.

    A whole value, or a sum of one, would have extents or numbers of one rank's shard. So would a shard: only along
    the dimension that is cut does the whole model have another length.
    """
    if not isinstance(ctx.node.result.type, TensorType | TupleType):
        return
    measured = ctx.local_extents()
    if not measured:
        return
    placements = flat(outcome)
    if not all(isinstance(p, Shard) for p in placements):
        ctx.fail(f"%{measured[0].name} measures a sharded dimension, and the result is not cut", _MEASURE_WHOLE)
    for shard in placements:
        if isinstance(shard, Shard) and (wrong := _misplaced(ctx, measured, shard)) is not None:
            ctx.fail(
                f"%{wrong.name} measures a sharded dimension and is not the length of the result's dimension "
                f"{shard.dim}, which is cut",
                _MEASURE_WHOLE,
            )


def _misplaced(ctx: RuleContext, measured: Sequence[Value], shard: Shard) -> Value | None:
    """A measured number that is anything but the length of the cut dimension, or is no part of the whole one."""
    node = ctx.node
    sizes = next((s for name in _SIZES if isinstance(s := node.arg(name), tuple | list)), ())
    position = shard.dim - (ctx.dim(ctx.tensors[0]) if node.is_op("aten.unflatten.int") else 0)
    places = [sizes[position]] if 0 <= position < len(sizes) else []
    # The rule of slices judges where they end; that of their gradient does so along the cut dimension.
    if node.is_op(*_SLICES) or (node.is_op("aten.slice_backward") and ctx.dim(ctx.tensors[0]) == shard.dim):
        places.append(node.arg("end"))
    left = list(measured)
    for place in places:
        index = next((i for i, v in enumerate(left) if v is place), None)
        if index is not None and ctx.is_local_length(left[index]):
            del left[index]
    return left[0] if left else None


def _probability_is_zero(ctx: RuleContext) -> bool:
    return any(ctx.arg(name) == 0 for name in ("p", "dropout_p", "dropout"))


def _element(ctx: RuleContext) -> Outcome:
    source = ctx.stored(ctx.node.operands[0])
    if not isinstance(source, tuple):
        return source
    element = source[ctx.node.args[1]]
    return element if element is not None else WHOLE


def _each(outcome: Outcome, fn: Callable[[Placement], Placement]) -> Outcome:
    if isinstance(outcome, tuple):
        return tuple(None if p is None else fn(p) for p in outcome)
    return fn(outcome)


def _strict(ctx: RuleContext, outcome: Outcome, flow: GradientFlow) -> Outcome:
    """Decide between Invariant and Replicate, and refuse Invariant values whose gradient would stay partial."""
    operands = [v for v in ctx.node.operands if isinstance(v.type, TensorType | TupleType)]
    placements = [p for v in operands for p in flat(ctx.stored(v))]
    replicated = any(isinstance(p, Replicate) for p in placements)
    outcome = _each(outcome, lambda p: (REPLICATE if replicated else INVARIANT) if whole(p) else p)
    varies = any(not isinstance(p, Invariant) for p in flat(outcome))
    if not varies or not _differentiable(ctx.node.result.type) or ctx.node.op.name in FILL_OPS:
        return outcome
    # A strategy pass places the bias of attention that is unresolved, and until then nothing runs.
    waits = ctx.node.is_op("autosp.attention") and ctx.axis in unresolved_axes(ctx.node)
    waiting = ctx.node.arg("bias") if waits else None
    for value in operands:
        if value is waiting:
            continue
        if all(isinstance(p, Invariant) for p in flat(ctx.stored(value))) and flow.reaches(value):
            ctx.fail(f"%{value.name} is Invariant, needs a gradient, and is used in rank-dependent work", _TO_REPLICATE)
    return outcome


def flat(outcome: Outcome) -> list[Placement]:
    """The placements of an outcome, elements without one left out."""
    return [p for p in outcome if p is not None] if isinstance(outcome, tuple) else [outcome]


# -- whole programs --------------------------------------------------------------------------------------------------


class _Hints:
    """Hints for backward nodes.

    They come from the forward nodes that they differentiate, matched by `meta["seq_nr"]`, or from placed values of the
    same shape that they are combined with element by element.
    """

    def __init__(self, program: Program) -> None:
        self._forward: dict[int, list[Node]] = defaultdict(list)
        self._position = program.graph.index()
        if program.stage is Stage.FORWARD:
            return
        for node in program.graph.nodes:
            number = node.meta.get("seq_nr")
            if number is not None and node.phase is Phase.FORWARD:
                self._forward[number].append(node)

    def of(self, node: Node, axis: str) -> Outcome | None:
        """The stored shard of the node itself, or the placement of a forward value of the same shape."""
        stored = stored_placement(node.result, axis)
        if any(not whole(p) for p in flat(stored)):
            return stored
        if node.phase is Phase.FORWARD:
            return None
        forward = self._forward.get(node.meta.get("seq_nr", -1), [])
        return (
            _agreed(node, axis, [v for n in forward for v in n.operands])
            or _agreed(node, axis, [v for n in forward for v in n.results])
            or _agreed(node, axis, self._partners(node))
        )

    def _partners(self, node: Node) -> list[Value]:
        """Values placed before `node` that an elementwise operation combines with it."""
        return [
            v
            for user in node.users
            if user.op.has(Trait.POINTWISE)
            for v in user.operands
            if self._position[v.producer] < self._position[node]
        ]


def _agreed(node: Node, axis: str, values: Iterable[Value]) -> Placement | None:
    kind = node.result.type
    if not isinstance(kind, TensorType):
        return None
    found = {
        v.type.layout[axis] for v in values if isinstance(v.type, TensorType) and tuple(v.type.shape) == kind.shape
    }
    return found.pop() if len(found) == 1 else None


def checked_axes(program: Program) -> list[str]:
    """The mesh axes along which layouts mean something.

    Lowering erases collectives over one rank, after which every layout of that axis says the same.
    """
    return [a for a, size in program.mesh.items() if size > 1 or program.stage is not Stage.LOWERED]


def infer_layouts(program: Program, axes: Iterable[str] | None = None, *, inputs: bool = True) -> None:
    """Infer and store the layout of every value, in program order.

    Args:
        program: A program with a mesh and with types; its types are updated in place.
        axes: Mesh axes to place; all of them by default.
        inputs: Whether inputs are placed too, whole as they are on every rank; False leaves them as they are.

    Raises:
        LayoutError: Some node has no layout.
    """
    hints = _Hints(program)
    flow = GradientFlow(program)
    names = checked_axes(program) if axes is None else list(axes)
    for node in program.graph.nodes:
        if not node.results or (node.op.kind == "placeholder" and not inputs):
            continue
        for axis in names:
            outcome = infer_layout(node, program, axis, hint=hints.of(node, axis), flow=flow)
            node.result.type = place(node.result.type, axis, outcome)


def place(kind: Type, axis: str, outcome: Outcome) -> Type:
    """A type with one axis of its layout set; the elements of a tuple one by one.

    Raises:
        LayoutError: The number of placements differs from the number of elements.
    """
    if isinstance(kind, TensorType):
        single = outcome[0] if isinstance(outcome, tuple) else outcome
        return kind if single is None else kind.on_axis(axis, single)
    if not isinstance(kind, TupleType):
        return kind
    many = outcome if isinstance(outcome, tuple) else (outcome,) * len(kind.elements)
    if len(many) != len(kind.elements):
        raise LayoutError(
            f"a layout rule gave {len(many)} placement(s) for {len(kind.elements)} results",
            hint="return one placement per result of the operation, None where it is no tensor",
        )
    return TupleType(tuple(e if p is None else place(e, axis, p) for e, p in zip(kind.elements, many, strict=True)))
