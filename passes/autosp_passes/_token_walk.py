"""One walk over a forward program that moves it into token shards, shared by `pad-tokens` and `token-partition`.

The walk visits nodes in program order and knows, for every value, where it lives along the token axis: Invariant
(whole on every rank, true length), Shard (cut, or padded) or Partial. At each node it looks for placements of the
operands that the operation's own layout rule accepts, asked on an untouched copy in global shapes, and converts
operands on demand. When nothing is accepted it brings the operands back to Invariant and runs the operation whole.
So every program comes out right; what varies is how much of it stays sharded.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import sympy

from autosp_ir.analysis.token_axis import TokenFactors, token_factors, what_if
from autosp_ir.comm.rules.base import FILL_OPS
from autosp_ir.errors import PassError, UnsupportedError
from autosp_ir.ir.graph import Node, Value, map_values
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, Program
from autosp_ir.ir.types import INVARIANT, REPLICATE, Dim, Partial, Placement, ScalarType, Shard, TensorType, TupleType
from autosp_ir.pipeline.base import PassContext

Result = Placement | tuple[Placement | None, ...]
_SIZE_ARGUMENTS = {
    "aten.view": "size",
    "aten._unsafe_view": "size",
    "aten.reshape": "shape",
    "aten.expand": "size",
    "aten.narrow": "length",
    "aten.unflatten.int": "sizes",
}
_MOST_COMBINATIONS = 64


class TokenWalk(ABC):
    """The walk; subclasses say how a value is cut, made whole, and what to do with sums over tokens.

    Args:
        program: The forward program, rewritten in place.
        ctx: The pass context.
        axis: Name of the sequence axis.
        size: Number of ranks on it.
    """

    def __init__(self, program: Program, ctx: PassContext, axis: str, size: int) -> None:
        self.program = program
        self.ctx = ctx
        self.axis = axis
        self.size = size
        self.rewriter = ctx.rewriter(program)
        self.placed: dict[Value, Result] = {}
        self._forms: dict[tuple[Value, Placement, str], Value] = {}
        self._needs_grad: dict[Value, bool] = {}
        # Placements are asked on an untouched copy, where every shape is global and consistent.
        self.whole = program.clone()
        self.twin: dict[Node, Node] = dict(zip(program.graph.nodes, self.whole.graph.nodes, strict=True))
        self.factors: TokenFactors = token_factors(self.whole)

    # -- what subclasses decide ------------------------------------------------------------------------------------

    @abstractmethod
    def enter(self, value: Value, shard: Shard, *, fill: float | None, before: Node) -> Value:
        """Cut (or pad) a whole value along `shard`; `fill` is the value of padding rows where it matters."""

    @abstractmethod
    def leave(self, value: Value, placement: Placement, *, before: Node) -> Value:
        """Make a sharded or partial value whole."""

    @abstractmethod
    def scaled(self, extent: Any, *, before: Node) -> Any:
        """The local (or padded) extent of a global one that holds tokens; ints or scalar Values."""

    @abstractmethod
    def accepts(self, node: Node, placements: Mapping[Value, Placement], result: Result) -> bool:
        """Whether this plan is one that the pass can run."""

    def replicated(self, value: Value, *, before: Node) -> Value:
        """A whole value for use in sharded work."""
        del before
        return value

    def visit_special(self, node: Node) -> bool:
        """Handle operations whose meaning changes under the walk; True when handled."""
        del node
        return False

    def settled(self, node: Node, result: Result) -> Result:
        """The placement to record for a node that ran as planned."""
        del node
        return result

    # -- the walk --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Rewrite the whole program."""
        trainable = {s.name for s in self.program.signature.inputs if s.requires_grad}
        for node in list(self.program.graph.nodes):
            if node.op.kind == "output":
                self._visit_output(node)
                continue
            self._note_grad(node, trainable)
            if node.op.kind in ("placeholder", "get_attr") or not self.tensors(node):
                self.place(node, INVARIANT)
            elif node.is_op("operator.getitem"):
                self._visit_getitem(node)
            elif not self.visit_special(node):
                self._visit(node)
        self.rewriter.dead_code()

    def tensors(self, node: Node) -> list[Value]:
        """The distinct tensor (or tuple) operands of a node."""
        return [v for v in dict.fromkeys(node.operands) if isinstance(v.type, TensorType | TupleType)]

    def placement(self, value: Value) -> Placement:
        """Where a tensor value lives now; values made by the walk itself carry it in their type."""
        known = self.placed.get(value, INVARIANT)
        return known if isinstance(known, Placement) else INVARIANT

    def place(self, node: Node, result: Result) -> None:
        """Record where a node's result lives."""
        self.placed[node.result] = result

    def global_type(self, value: Value) -> TensorType:
        """The type of an original value before the walk."""
        return self.twin[value.producer].result.tensor_type

    def factors_of(self, value: Value) -> tuple[Shard, ...]:
        """Token factors of an original value."""
        twin = self.twin.get(value.producer)
        return self.factors.of(twin.result) if twin is not None else ()

    def needs_grad(self, value: Value) -> bool:
        """Whether a gradient flows through a value."""
        return self._needs_grad.get(value, False)

    def _note_grad(self, node: Node, trainable: set[str]) -> None:
        if node.op.kind == "placeholder":
            self._needs_grad[node.result] = node.name in trainable
            return
        kind = node.result.type
        # What a filled tensor reads is a shape alone.
        differentiable = node.op.name not in FILL_OPS and (
            not isinstance(kind, TensorType) or kind.dtype.is_floating_point
        )
        self._needs_grad[node.result] = differentiable and any(self.needs_grad(v) for v in node.operands)

    def _visit_getitem(self, node: Node) -> None:
        source = self.placed[node.operands[0]]
        element = source[node.args[1]] if isinstance(source, tuple) else source
        self.place(node, element if element is not None else INVARIANT)
        self._retype(node)

    def _visit_output(self, node: Node) -> None:
        for value in self.tensors(node):
            if not isinstance(self.placement(value), type(INVARIANT)):
                self.substitute(node, value, self.form(value, INVARIANT, before=node))

    def _visit(self, node: Node) -> None:
        moved = [v for v in self.tensors(node) if self._moved(v)]
        # `new_zeros` and its like read a dtype and a device: their sizes are arguments, those of the whole.
        sized = node.op.name in FILL_OPS and not node.op.name.endswith("_like")
        if sized or (not moved and not self._worth_entering(node)):
            self.place(node, INVARIANT)
            return
        for placements in self._candidates(node, bool(moved)):
            result = self._ask(node, placements)
            if result is None or not self._fits(node, result) or not self.accepts(node, placements, result):
                continue
            self.apply(node, placements, result)
            return
        if moved:
            self.run_whole(node)
        else:
            self.place(node, INVARIANT)

    def _moved(self, value: Value) -> bool:
        known = self.placed.get(value, INVARIANT)
        parts = known if isinstance(known, tuple) else (known,)
        return any(isinstance(p, Shard | Partial) for p in parts)

    def _worth_entering(self, node: Node) -> bool:
        """Index arithmetic stays whole; the first floating-point result that runs over tokens is where to cut."""
        kind = node.result.type
        if not isinstance(kind, TensorType) or not kind.dtype.is_floating_point:
            return False
        return any(self.factors_of(v) for v in self.tensors(node))

    def _candidates(self, node: Node, moved: bool) -> Iterator[dict[Value, Placement]]:
        """Placements of the operands to try, the most sharded first."""
        tensors = self.tensors(node)
        options = [self._options(node, v, moved) for v in tensors]
        for combination in itertools.islice(itertools.product(*options), _MOST_COMBINATIONS):
            yield dict(zip(tensors, combination, strict=True))
        if any(isinstance(self.placement(v), Partial) for v in tensors):
            summed = [
                [self._whole(v) if isinstance(p, Partial) else p for p in o]
                for v, o in zip(tensors, options, strict=True)
            ]
            for combination in itertools.islice(itertools.product(*summed), _MOST_COMBINATIONS):
                # With nothing cut the work is the same on every rank, so that no operand may become Replicate for it.
                if any(isinstance(p, Shard) for p in combination):
                    yield dict(zip(tensors, combination, strict=True))

    def _options(self, node: Node, value: Value, moved: bool) -> list[Placement]:
        here = self.placement(value)
        if isinstance(here, Shard | Partial):
            return [here]
        whole = self._whole(value)
        if node.op.has(Trait.POINTWISE) and moved:
            return [*self._aligned(node, value), whole]
        by_factor: list[Placement] = [f for f in self.factors_of(value) if self._cuttable(value, f)]
        return list(dict.fromkeys([*by_factor, whole, *self._aligned(node, value)]))

    def _whole(self, value: Value) -> Placement:
        """How a whole value enters work on cut ones."""
        return REPLICATE if self.needs_grad(value) else INVARIANT

    def _aligned(self, node: Node, value: Value) -> list[Placement]:
        """Cuts of a whole operand that line up, under broadcasting, with the sharded ones."""
        kind = self.twin[node].result.type
        if isinstance(kind, TupleType):
            kind = kind.elements[0]
        if not isinstance(kind, TensorType) or not isinstance(self.twin[value.producer].result.type, TensorType):
            return []
        rank, mine = kind.ndim, self.global_type(value)
        found: dict[Placement, None] = {}
        for other in self.tensors(node):
            here = self.placement(other)
            if not isinstance(here, Shard):
                continue
            theirs = self.global_type(other)
            dim = here.dim + (rank - theirs.ndim) - (rank - mine.ndim)
            if 0 <= dim < mine.ndim and mine.shape[dim] == theirs.shape[here.dim]:
                found[Shard(dim, here.outer)] = None
        return list(found)

    def _cuttable(self, value: Value, shard: Shard) -> bool:
        return self.divides(self.global_type(value).shape[shard.dim], shard.outer)

    def divides(self, extent: Dim, outer: Dim) -> bool:
        """Whether `outer` blocks of tokens of this total extent can be cut (or padded) evenly.

        A rank is left two tokens at least: a dimension of one is not told apart from the one next to it by a view.
        """
        if isinstance(extent, int) and isinstance(outer, int):
            tokens = extent // outer
            return extent % outer == 0 and tokens % self.size == 0 and (tokens > self.size or self.size == 1)
        coefficient, _ = sympy.sympify(extent / outer).as_coeff_Mul()
        return bool(coefficient.is_Integer and int(coefficient) % self.size == 0)

    def _ask(self, node: Node, placements: Mapping[Value, Placement]) -> Result | None:
        twins = {self.twin[v.producer].result: p for v, p in placements.items()}
        return what_if(self.twin[node], self.whole, twins, others=INVARIANT)

    def _fits(self, node: Node, result: Result) -> bool:
        """Whether every sharded result can be cut evenly in its global shape."""
        kind = self.twin[node].result.type
        kinds = kind.elements if isinstance(kind, TupleType) else (kind,)
        parts = result if isinstance(result, tuple) else (result,)
        return all(
            self.divides(k.shape[p.dim], p.outer)
            for k, p in zip(kinds, parts, strict=True)
            if isinstance(p, Shard) and isinstance(k, TensorType)
        )

    # -- rewriting -------------------------------------------------------------------------------------------------

    def apply(self, node: Node, placements: Mapping[Value, Placement], result: Result) -> None:
        """Convert the operands as planned and give the node its new type."""
        for value, wanted in placements.items():
            converted = self.form(value, wanted, before=node)
            if converted is not value:
                self.substitute(node, value, converted)
        if isinstance(result, Shard):
            self._localise_sizes(node, result)
        self.place(node, self.settled(node, result))
        self._retype(node)

    def run_whole(self, node: Node) -> None:
        """Bring every operand back to its whole and run the operation replicated.

        That is worth a remark where tokens are gathered; partial sums hold none any more, and are merely added up.
        """
        gathered = [v for v in self.tensors(node) if self._moved(v)]
        if not all(isinstance(self.placement(v), Partial) for v in gathered):
            self._report_whole(node, gathered)
        for value in gathered:
            self.substitute(node, value, self.form(value, INVARIANT, before=node))
        self.place(node, INVARIANT)

    def _report_whole(self, node: Node, gathered: list[Value]) -> None:
        names = ", ".join(f"%{v.name}" for v in gathered)
        reason = f"{node.op.name} has no rule that keeps its operands sharded over tokens; {names} made whole"
        if self.ctx.strict:
            raise UnsupportedError(
                reason,
                node=node,
                hint="drop strict=True to run this operation replicated, or register a layout rule for it",
            )
        self.ctx.remark("missed", node, reason)
        self.ctx.count("gathered", 1)

    def form(self, value: Value, wanted: Placement, *, before: Node, fill: float | None = None) -> Value:
        """`value` converted to a placement; conversions stand behind the producer and are made once."""
        here = self.placement(value)
        if here == wanted:
            return value
        key = (value, wanted, repr(fill))
        if key not in self._forms:
            self._forms[key] = self._converted(value, here, wanted, fill, self._behind(value, before))
        return self._forms[key]

    def _converted(self, value: Value, here: Placement, wanted: Placement, fill: float | None, at: Node) -> Value:
        if isinstance(here, Shard | Partial) and wanted == INVARIANT:
            return self.leave(value, here, before=at)
        if isinstance(here, Shard | Partial):
            whole = self.form(value, INVARIANT, before=at)
            self.placed.setdefault(whole, INVARIANT)
            return self.form(whole, wanted, before=at, fill=fill)
        if isinstance(wanted, Shard):
            return self.enter(value, wanted, fill=fill, before=at)
        return self.replicated(value, before=at)

    def _behind(self, value: Value, before: Node) -> Node:
        """The insertion point right behind a value's producer, so that every later reader can share the form."""
        node = value.producer.next
        while node is not None and node.op.kind == "placeholder":
            node = node.next
        return node if node is not None else before

    def substitute(self, node: Node, old: Value, new: Value) -> None:
        """Make one node read `new` in place of `old`."""

        def swap(value: Value) -> Value:
            return new if value is old else value

        self.rewriter.set_args(node, map_values(node.args, swap), map_values(dict(node.kwargs), swap))

    def _localise_sizes(self, node: Node, shard: Shard) -> None:
        name = _SIZE_ARGUMENTS.get(node.op.name)
        if name is None:
            return
        sizes = node.arg(name)
        dim = shard.dim
        if node.is_op("aten.unflatten.int"):
            dim -= node.arg("dim") % node.operands[0].tensor_type.ndim
        if not isinstance(sizes, tuple | list):
            split = node.arg("dim") % node.operands[0].tensor_type.ndim
            if split == shard.dim:
                self.rewriter.set_args(node, *node.with_arg(name, self.scaled(sizes, before=node)))
            return
        if not 0 <= dim < len(sizes) or sizes[dim] == -1:
            return
        changed = [self.scaled(s, before=node) if i == dim else s for i, s in enumerate(sizes)]
        self.rewriter.set_args(node, *node.with_arg(name, changed))

    def _retype(self, node: Node) -> None:
        """Re-infer the local type and check it against the global one: a wrong size must not pass."""
        result = self.placed[node.result]
        inferred = self.program.infer(node)
        self.rewriter.set_type(node.result, self.typed(inferred, result))
        twin = self.twin[node].result.type
        kinds = inferred.elements if isinstance(inferred, TupleType) else (inferred,)
        wholes = twin.elements if isinstance(twin, TupleType) else (twin,)
        parts = result if isinstance(result, tuple) else (result,) * len(kinds)
        for kind, whole, part in zip(kinds, wholes, parts, strict=True):
            if isinstance(kind, TensorType) and isinstance(whole, TensorType):
                self._check_shape(node, kind, whole, part)

    def _check_shape(self, node: Node, local: TensorType, whole: TensorType, part: Placement | None) -> None:
        expected = list(whole.shape)
        if isinstance(part, Shard):
            expected[part.dim] = self.local_extent(whole.shape[part.dim])
        pairs = zip(local.shape, expected, strict=False)
        wrong = local.ndim != whole.ndim or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
        if wrong:
            raise PassError(
                f"{node.op.name} was given local shape {list(local.shape)} but its layout {part} needs {expected}",
                node=node,
                hint="report this: a size argument of this operation is not localised",
            )

    def visit_size(self, node: Node) -> bool:
        """A size read from a cut value means the whole's size: read it from a user input instead."""
        source, dim = node.operands[0], node.arg("dim")
        here = self.placement(source)
        if not isinstance(here, Shard) or here.dim != dim % self.global_type(source).ndim:
            return False
        for name, value in user_inputs(self.program).items():
            token_dim = self.program.info.get("seq_dims", {}).get(name)
            if token_dim is None or self.global_type(source).shape[here.dim] != value.tensor_type.shape[token_dim]:
                continue
            self.rewriter.set_args(node, (value, token_dim))
            self.place(node, INVARIANT)
            return True
        return False

    @abstractmethod
    def local_extent(self, extent: Dim) -> Dim:
        """The extent that a rank holds of a global extent over tokens."""

    @abstractmethod
    def typed(self, kind: Any, result: Result) -> Any:
        """A type carrying the layout that stands for a placement."""

    # -- helpers for subclasses ------------------------------------------------------------------------------------

    def op(self, name: str, *args: Any, before: Node, origin: Node, **kwargs: Any) -> Value:
        """Create a node whose origin is `origin`."""
        with self.rewriter.before(before):
            return self.rewriter.create(name, args, kwargs, origin_from=origin)

    def blocked(self, value: Value, shard: Shard, *, before: Node) -> tuple[Value, int]:
        """A view of `value` in which the tokens have a dimension of their own, and that dimension.

        `[B*S, V]` with `Shard(0, outer=B)` becomes `[B, S, V]` and 1; `Shard(d)` is already so.
        """
        if shard.outer == 1:
            return value, shard.dim
        sizes = self.sizes(value, before=before)
        opened = [*sizes[: shard.dim], shard.outer, -1, *sizes[shard.dim + 1 :]]
        return self.op("aten.reshape", value, opened, before=before, origin=value.producer), shard.dim + 1

    def unblocked(self, value: Value, like: Value, shard: Shard, *, before: Node) -> Value:
        """The inverse of `blocked`, for a value whose token extent has changed."""
        if shard.outer == 1:
            return value
        sizes = self.sizes(like, before=before)
        merged = [-1 if i == shard.dim else s for i, s in enumerate(sizes)]
        return self.op("aten.reshape", value, merged, before=before, origin=like.producer)

    def sizes(self, value: Value, *, before: Node) -> list[Any]:
        """The local extents of a value: ints, or scalar Values where they are symbolic."""
        return [
            s if isinstance(s, int) else self.op("aten.sym_size.int", value, i, before=before, origin=value.producer)
            for i, s in enumerate(value.tensor_type.shape)
        ]

    def scalar_expr(self, extent: Any) -> Any:
        """The symbolic expression of a size: an int, or a scalar Value's expression."""
        if isinstance(extent, Value) and isinstance(extent.type, ScalarType):
            return extent.type.expr
        return extent


def check_mesh_axis(ctx: PassContext, axis: str, pass_name: str) -> int:
    """The size of a mesh axis.

    Raises:
        PassError: The mesh has no such axis.
    """
    if axis not in ctx.mesh:
        raise PassError(
            f"the mesh {dict(ctx.mesh)} has no axis {axis!r}",
            pass_name=pass_name,
            hint=f"run the pipeline with mesh={{{axis!r}: number_of_ranks}}, or give the pass another axis=",
        )
    return ctx.mesh[axis]


def user_inputs(program: Program) -> dict[str, Value]:
    """The user inputs by name."""
    return {s.target: program.graph.value(s.name) for s in program.signature.inputs if s.kind is InputKind.USER_INPUT}


def is_float(value: Value) -> bool:
    """Whether a value is a floating-point tensor."""
    return isinstance(value.type, TensorType) and value.type.dtype.is_floating_point
