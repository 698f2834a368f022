"""`token-partition`: one program for one device becomes the program of one rank, cut along the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autosp_ir.errors import PassError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import InputKind, Program
from autosp_ir.ir.types import INVARIANT, REPLICATE, Dim, Partial, Placement, Shard, TupleType, map_tensors
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.random_masks import drawn_per_rank, own_part
from autosp_passes._means import split_means
from autosp_passes._token_walk import Result, TokenWalk, check_mesh_axis

_TOKENS = Shard(2)


class TokenPartition(Pass):
    """Cut every token-wise value over a mesh axis.

    Integer index arithmetic (positions, the label shift, padding) stays whole and is cut at the last cheap point.
    Parameters that meet sharded work pass through `autosp.invariant_to_replicate`, so their gradients are complete.
    A mean over tokens becomes a local sum over the global count. An operation that cannot keep the shard gathers its
    operands and runs replicated, with a remark; `strict` refuses it instead. Attention over cut tokens is left
    unresolved for a strategy pass such as `ulysses`.
    """

    name = "token-partition"
    stage = "forward"
    requires = frozenset({"canonical"})
    provides = frozenset({"token-partitioned"})
    # A chunk is a part of what a rank holds: of a whole sequence it is other tokens than of the ranks' shards.
    conflicts = frozenset({"token-partitioned", "tiled"})

    class Options(Pass.Options):
        """Options of `token-partition`."""

        axis: str = "sp"
        """Mesh axis that holds the token shards."""

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place.

        Raises:
            PassError: The mesh has no such axis, or the token count is not divisible by its size.
        """
        axis = self.options.axis
        size = check_mesh_axis(ctx, axis, self.name)
        _check_divisible(program, size)
        program.mesh = dict(ctx.mesh)
        split_means(program, ctx.rewriter(program))
        PartitionWalk(program, ctx, axis, size).run()
        program.info["sp_axis"] = axis


def _check_divisible(program: Program, size: int) -> None:
    if size == 1 or "padded" in program.facts:
        return
    for spec in program.signature.inputs:
        dim = program.info.get("seq_dims", {}).get(spec.target)
        if spec.kind is not InputKind.USER_INPUT or dim is None:
            continue
        extent = program.graph.value(spec.name).tensor_type.shape[dim]
        if not isinstance(extent, int) or extent % size:
            tokens = f"{extent} tokens" if isinstance(extent, int) else "a symbolic number of tokens"
            raise PassError(
                f"{spec.target} has {tokens}, which {size} ranks do not divide",
                pass_name=TokenPartition.name,
                hint="run pad-tokens before token-partition",
            )


class PartitionWalk(TokenWalk):
    """The token walk whose shards are slices on ranks."""

    def enter(self, value: Value, shard: Shard, *, fill: float | None, before: Node) -> Value:
        """Own slice of a whole value; of a mask that ranks may draw apart, one of its own."""
        del fill
        if drawn_per_rank(value) is not None and isinstance(shard.outer, int):
            return self._own_mask(value, shard, shard.outer, before)
        opened, dim = self.blocked(value, shard, before=before)
        cut = self.op("autosp.shard", opened, dim, self.axis, self.size, before=before, origin=value.producer)
        return self.unblocked(cut, value, shard, before=before)

    def _own_mask(self, mask: Value, shard: Shard, outer: int, before: Node) -> Value:
        shape = [
            self.scaled(extent, before=before) if dim == shard.dim else extent
            for dim, extent in enumerate(mask.producer.arg("shape"))
        ]
        with self.rewriter.before(before):
            return own_part(self.rewriter, mask, shape, shard.dim, self.axis, self.size, outer)

    def leave(self, value: Value, placement: Placement, *, before: Node) -> Value:
        """All-gather a shard, or sum a partial value."""
        origin = value.producer
        if isinstance(placement, Partial):
            return self.op("autosp.all_reduce", value, self.axis, self.size, before=before, origin=origin)
        shard = placement if isinstance(placement, Shard) else Shard(0)
        opened, dim = self.blocked(value, shard, before=before)
        gathered = self.op("autosp.all_gather", opened, dim, self.axis, self.size, before=before, origin=origin)
        return self.unblocked(gathered, value, shard, before=before)

    def replicated(self, value: Value, *, before: Node) -> Value:
        """A whole value used in rank-dependent work: its gradient is summed over ranks.

        The gradient of a parameter that is narrowed, as under autocast, is summed in the parameter's own dtype: in the
        narrow one every rank would add a rounding error.
        """
        cast = value.producer
        if self._narrows_parameter(cast):
            whole = self.form(cast.operands[0], REPLICATE, before=before)
            return self.op(cast.op.name, whole, *cast.args[1:], before=before, origin=cast, **dict(cast.kwargs))
        return self.op(
            "autosp.invariant_to_replicate", value, self.axis, self.size, before=before, origin=value.producer
        )

    def _narrows_parameter(self, cast: Node) -> bool:
        if not cast.is_op("aten.to.dtype", "aten._to_copy"):
            return False
        source = cast.operands[0]
        narrower = cast.result.tensor_type.dtype.itemsize < source.tensor_type.dtype.itemsize
        return narrower and source.producer.op.kind == "placeholder" and self.needs_grad(source)

    def scaled(self, extent: Any, *, before: Node) -> Any:
        """One rank's part of a global extent."""
        if isinstance(extent, int):
            return extent // self.size
        return self.op("operator.floordiv", extent, self.size, before=before, origin=before)

    def local_extent(self, extent: Dim) -> Dim:
        """One rank's part of a global extent."""
        return extent // self.size

    def accepts(self, node: Node, placements: Mapping[Value, Placement], result: Result) -> bool:
        """Start sharding only where something stays sharded; a sum over tokens that nothing cut yet stays whole."""
        parts = result if isinstance(result, tuple) else (result,)
        already = any(self._moved(v) for v in self.tensors(node))
        return already or any(isinstance(p, Shard) for p in parts)

    def typed(self, kind: Any, result: Result) -> Any:
        """The type with the placement on this axis."""
        if isinstance(kind, TupleType):
            parts = result if isinstance(result, tuple) else (result,) * len(kind.elements)
            return TupleType(tuple(self.typed(k, p or INVARIANT) for k, p in zip(kind.elements, parts, strict=True)))
        if not isinstance(result, Placement):
            return kind
        return map_tensors(kind, lambda t: t.on_axis(self.axis, result))

    def visit_special(self, node: Node) -> bool:
        """Attention over tokens stays unresolved; sizes of cut values are those of the whole."""
        if node.is_op("autosp.attention"):
            return self._visit_attention(node)
        if node.is_op("aten.sym_size.int"):
            return self.visit_size(node)
        if node.is_op("aten.slice.Tensor") and all(u.op.kind == "output" for u in node.users):
            return self._visit_returned(node)
        return False

    def _visit_returned(self, node: Node) -> bool:
        """What is returned must be whole anyway, so cutting padding off it is no missed opportunity."""
        source = node.operands[0]
        here = self.placement(source)
        if not isinstance(here, Shard) or here.dim != node.arg("dim") % self.global_type(source).ndim:
            return False
        self.substitute(node, source, self.form(source, INVARIANT, before=node))
        self.place(node, INVARIANT)
        return True

    def _visit_attention(self, node: Node) -> bool:
        qkv = [node.arg("q"), node.arg("k"), node.arg("v")]
        lengths = [self.global_type(v).shape[2] for v in qkv]
        over_tokens = all(self._runs_over_tokens(v) for v in qkv)
        if not over_tokens or any(n != lengths[0] for n in lengths):
            return False
        # Masks and segment ids stay whole: a strategy pass decides what each rank needs of them.
        placements: dict[Value, Placement] = dict.fromkeys(qkv, _TOKENS)
        for value in self.tensors(node):
            if value in placements:
                continue
            whole = self.form(value, INVARIANT, before=node)
            if whole is not value:
                self.substitute(node, value, whole)
        self.apply(node, placements, (_TOKENS, _TOKENS))
        return True

    def _runs_over_tokens(self, value: Value) -> bool:
        if self.placement(value) == _TOKENS:
            return True
        return _TOKENS in self.factors_of(value) and self._cuttable(value, _TOKENS)
