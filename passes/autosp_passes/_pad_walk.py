"""The walk of `pad-tokens`: rows that change nothing, and what reads the true length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import INVARIANT, Dim, Partial, Placement, Shard, TensorType
from autosp_ir.pipeline.base import PassContext
from autosp_ir.rewrite.random_masks import drawn_per_rank, of_shape
from autosp_passes._token_walk import Result, TokenWalk, user_inputs

_TOKENS = Shard(2)
_PAD_SEGMENT = -1
# Sums over tokens that are linear in every operand that runs over them.
_LINEAR_SUMS = frozenset(
    {
        "aten.sum",
        "aten.sum.dim_IntList",
        "aten.sum_to_size",
        "aten.mm",
        "aten.bmm",
        "aten.matmul",
        "aten.mv",
        "aten.dot",
        "aten.einsum",
    }
)


def padded_length(length: int, size: int, multiple: int = 1) -> int:
    """The least length that leaves every rank the same number of tokens: a multiple of `multiple`, and two at least.

    Where a rank holds one token, views are ambiguous.
    """
    granule = size * multiple
    return max(2 * size, -(-length // granule) * granule)


class PadWalk(TokenWalk):
    """The token walk whose shards are padded rows: Shard means padded, Invariant means true length."""

    def __init__(self, program: Program, ctx: PassContext, axis: str, size: int, multiple: int = 1) -> None:
        super().__init__(program, ctx, axis, size)
        self.multiple = multiple
        self.length: Any = self.factors.length
        self._anchor = self._first_computation()
        self._count, self._padded = self._lengths()
        self._valid_rows: Value | None = None
        self._row_index: Value | None = None
        self._zeroed: dict[Value, Value] = {}

    def divides(self, extent: Dim, outer: Dim) -> bool:
        """Whether the extent is `outer` blocks of exactly the tokens."""
        return bool(extent == outer * self.length)

    def _first_computation(self) -> Node:
        return next(n for n in self.program.graph.nodes if n.op.kind != "placeholder")

    def _make(self, name: str, *args: Any, **kwargs: Any) -> Value:
        return self.op(name, *args, before=self._anchor, origin=self._anchor, **kwargs)

    def _lengths(self) -> tuple[Any, Any]:
        """True and padded token count: ints, or scalar Values when the length is symbolic."""
        if isinstance(self.length, int):
            return self.length, padded_length(self.length, self.size, self.multiple)
        name, value = next((n, v) for n, v in user_inputs(self.program).items() if n in self.program.info["seq_dims"])
        count = self._make("aten.sym_size.int", value, self.program.info["seq_dims"][name])
        granule = self.size * self.multiple
        up = self._make("operator.add", count, granule - 1)
        return count, self._make("operator.mul", self._make("operator.floordiv", up, granule), granule)

    def _behind(self, value: Value, before: Node) -> Node:
        """Padded inputs stand behind the row numbers, which are counted in front of the first computation."""
        return self._anchor if value.producer.op.kind == "placeholder" else super()._behind(value, before)

    @property
    def row_index(self) -> Value:
        """int64 `[padded]`: the true row that each padded row reads; padding repeats the last token."""
        if self._row_index is None:
            last = self._count - 1 if isinstance(self._count, int) else self._make("operator.sub", self._count, 1)
            self._row_index = self._make("aten.clamp", self._rows(), None, last)
        return self._row_index

    @property
    def valid_rows(self) -> Value:
        """Bool `[padded]`: whether a row is a real token."""
        if self._valid_rows is None:
            self._valid_rows = self._make("aten.lt.Scalar", self._rows(), self._count)
        return self._valid_rows

    def _rows(self) -> Value:
        device = next(iter(user_inputs(self.program).values())).tensor_type.device
        return self._make("aten.arange", self._padded, dtype=torch.int64, device=device, pin_memory=False)

    def enter(self, value: Value, shard: Shard, *, fill: float | None, before: Node) -> Value:
        """Pad a value of true length. A mask that nobody else draws is drawn at the padded length instead."""
        if drawn_per_rank(value) is not None:
            return self._longer_mask(value, shard, before)
        opened, dim = self.blocked(value, shard, before=before)
        origin = value.producer
        padded = self.op("aten.index_select", opened, dim, self.row_index, before=before, origin=origin)
        if fill is not None:
            padded = self._masked(padded, dim, fill, before)
        return self.unblocked(padded, value, shard, before=before)

    def _longer_mask(self, mask: Value, shard: Shard, before: Node) -> Value:
        shape = [
            self.scaled(extent, before=before) if dim == shard.dim else extent
            for dim, extent in enumerate(mask.producer.arg("shape"))
        ]
        with self.rewriter.before(before):
            return of_shape(self.rewriter, mask, shape)

    def _masked(self, value: Value, dim: int, fill: float, before: Node) -> Value:
        origin = value.producer
        shape = [1] * value.tensor_type.ndim
        shape[dim] = -1
        mask = self.op("aten.reshape", self.valid_rows, shape, before=before, origin=origin)
        return self.op("aten.where.ScalarOther", mask, value, fill, before=before, origin=origin)

    def leave(self, value: Value, placement: Placement, *, before: Node) -> Value:
        """Cut a padded value back to the true length."""
        shard = placement if isinstance(placement, Shard) else Shard(0)
        opened, dim = self.blocked(value, shard, before=before)
        cut = self.op("aten.slice.Tensor", opened, dim, 0, self._count, before=before, origin=value.producer)
        return self.unblocked(cut, value, shard, before=before)

    def scaled(self, extent: Any, *, before: Node) -> Any:
        """The padded extent of a global one."""
        if isinstance(extent, int):
            return extent // self.length * self._padded
        whole = self.op("operator.floordiv", extent, self._count, before=before, origin=before)
        return self.op("operator.mul", whole, self._padded, before=before, origin=before)

    def local_extent(self, extent: Dim) -> Dim:
        """The padded extent of a global one."""
        return extent // self.length * self.scalar_expr(self._padded)

    def accepts(self, node: Node, placements: Mapping[Value, Placement], result: Result) -> bool:
        """A sum over tokens is accepted where zeros in the padding rows of one operand take them out of it."""
        parts = result if isinstance(result, tuple) else (result,)
        if not any(isinstance(p, Partial) for p in parts):
            return any(isinstance(p, Shard) for p in parts)
        return node.op.name in _LINEAR_SUMS and any(self._moved(v) for v in self.tensors(node))

    def apply(self, node: Node, placements: Mapping[Value, Placement], result: Result) -> None:
        """As planned; a sum over tokens reads zeros in the padding rows."""
        super().apply(node, placements, result)
        if not isinstance(result, Partial):
            return
        for value in self.tensors(node):
            here = self.placement(value)
            if isinstance(here, Shard):
                self.substitute(node, value, self._zeros(value, here, node))
                return

    def _zeros(self, value: Value, shard: Shard, node: Node) -> Value:
        if value not in self._zeroed:
            at = self._behind(value, node)
            opened, dim = self.blocked(value, shard, before=at)
            masked = self._masked(opened, dim, 0.0, at)
            self._zeroed[value] = self.unblocked(masked, value, shard, before=at)
        return self._zeroed[value]

    def settled(self, node: Node, result: Result) -> Result:
        """A masked sum over padded rows is the true sum."""
        if isinstance(result, tuple):
            return tuple(INVARIANT if isinstance(p, Partial) else p for p in result)
        return INVARIANT if isinstance(result, Partial) else result

    def typed(self, kind: Any, result: Result) -> Any:
        """Padding changes no layout."""
        del result
        return kind

    def visit_special(self, node: Node) -> bool:
        """Attention and losses know about padding; sizes mean the true length."""
        if node.is_op("autosp.attention"):
            return self._visit_attention(node)
        if node.is_op("aten.cross_entropy_loss", "aten.nll_loss_nd") and self._moved(node.operands[0]):
            return self._visit_loss(node)
        if node.is_op("aten.sym_size.int"):
            return self.visit_size(node)
        return False

    def _visit_attention(self, node: Node) -> bool:
        qkv = [node.arg("q"), node.arg("k"), node.arg("v")]
        padded = all(self.placement(v) == _TOKENS for v in qkv)
        bias = node.arg("bias")
        if not padded or (bias is not None and not self._covers_scores(bias)):
            if any(self._moved(v) for v in self.tensors(node)):
                self.run_whole(node)
                return True
            return False
        segments = node.arg("segment_ids")
        if bias is not None:
            self.substitute(node, bias, self._padded_bias(node, bias))
        if (not node.arg("causal") and bias is None) or segments is not None:
            self.rewriter.set_args(node, *node.with_arg("segment_ids", self._segments(node, segments)))
        keep = node.arg("keep")
        if keep is not None:
            self.substitute(node, keep, self._padded_keep(node, keep))
        self.place(node, (_TOKENS, _TOKENS))
        self._retype(node)
        return True

    def _padded_keep(self, node: Node, keep: Value) -> Value:
        """A dropout mask of padded queries and keys; what it says of padding is read by nobody."""
        rows = self.form(keep, Shard(2), before=node)
        self.placed[rows] = INVARIANT
        return self.form(rows, Shard(3), before=node)

    def _covers_scores(self, bias: Value) -> bool:
        """Whether a bias has rows (or one for all) and a column for every token."""
        shape = self.global_type(bias).shape
        return len(shape) > 1 and shape[-1] == self.length and shape[-2] in (1, self.length)

    def _padded_bias(self, node: Node, bias: Value) -> Value:
        """A bias or mask over padded tokens that hides the padding keys; padding queries read the last row."""
        kind = self.global_type(bias)
        rows, columns = Shard(kind.ndim - 2), Shard(kind.ndim - 1)
        hidden = False if kind.dtype == torch.bool else -math.inf
        here = self.placement(bias)
        if here == rows:
            return self._once(bias, columns, hidden, lambda at: self.enter(bias, columns, fill=hidden, before=at))
        if here == columns:
            # Padding columns repeat the last key, and must be hidden.
            bias = self._once(bias, columns, hidden, lambda at: self._masked(bias, columns.dim, hidden, at))
        else:
            bias = self.form(bias, INVARIANT, before=node)
        if kind.shape[-2] != 1:
            padded = bias
            bias = self._once(padded, rows, None, lambda at: self.enter(padded, rows, fill=None, before=at))
        if here == columns:
            return bias
        whole = bias
        return self._once(whole, columns, hidden, lambda at: self.enter(whole, columns, fill=hidden, before=at))

    def _once(self, value: Value, shard: Shard, fill: float | None, made: Callable[[Node], Value]) -> Value:
        """A form of a bias, made behind it and shared by all of its readers."""
        key = (value, shard, f"bias {fill!r}")
        if key not in self._forms:
            self._forms[key] = made(self._behind(value, value.producer))
        return self._forms[key]

    def _segments(self, node: Node, segments: Value | None) -> Value:
        """Segment ids `[B, padded]` with the padding rows in a segment of their own."""
        if segments is not None:
            whole = self.form(segments, INVARIANT, before=node)
            self.placed.setdefault(whole, INVARIANT)
            return self.form(whole, Shard(1), before=node, fill=_PAD_SEGMENT)
        batch = node.arg("q").tensor_type.shape[0]
        ids = self._make("aten._to_copy", self.valid_rows, dtype=torch.int64)
        return self._make("aten.expand", self._make("aten.unsqueeze", ids, 0), [batch, -1])

    def _visit_loss(self, node: Node) -> bool:
        logits, target = node.operands[0], node.arg("target")
        here = self.placement(logits)
        kind = target.type
        by_class = min(1, self.global_type(logits).ndim - 1)
        if not isinstance(here, Shard) or here.dim == by_class:
            return False
        if not isinstance(kind, TensorType) or kind.dtype.is_floating_point:
            return False
        # The class dimension is gone from the target: [N, C] -> [N], [N, C, S] -> [N, S].
        shard = Shard(here.dim - 1 if here.dim > 1 else here.dim, here.outer)
        whole = self.form(target, INVARIANT, before=node)
        self.placed.setdefault(whole, INVARIANT)
        ignored = self.form(whole, shard, before=node, fill=node.arg("ignore_index"))
        self.substitute(node, target, ignored)
        self.place(node, shard if node.arg("reduction") == 0 else INVARIANT)
        self._retype(node)
        return True
