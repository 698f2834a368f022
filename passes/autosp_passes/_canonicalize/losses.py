"""Losses of `logits[:, :-1]` against `labels[:, 1:]`, as losses of all logits against shifted labels.

Cutting the last row off the logits leaves a token axis that no number of ranks divides. The same loss reads every
row, against labels that are shifted by one and end in the ignored index: the rows that were cut off count for nothing
in the sum, in the mean's denominator and in label smoothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import Dim
from autosp_ir.pipeline.base import PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._canonicalize.match import CASTS, SAME_VALUES, base, permutation, tensor

_LOSSES = frozenset({"cross_entropy_loss", "nll_loss", "nll_loss_nd"})
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten"})
_NORMS = frozenset({"linear", "log_softmax", "_log_softmax", "softmax", "layer_norm", "rms_norm"})
_PER_ROW = SAME_VALUES | CASTS | _RESHAPES | _NORMS | {"transpose", "permute", "t", "mT"}
_REDUCTION_NONE = 0
_TO_THE_END = 2**63 - 1


@dataclass
class Cut:
    """A value computed row by row from a slice along one dimension.

    Attributes:
        node: The slice.
        chain: The operators from the slice to the value, innermost first, each reading the one before it.
        missing: How many rows the slice leaves out.
        places: Where the rows are in the result of the slice and of each operator of the chain.
    """

    node: Node
    chain: list[Node]
    missing: int
    places: list[Rows]


@dataclass(frozen=True)
class Rows:
    """The rows of a value: dimension `dim` is `outer` blocks of them."""

    dim: int
    outer: int = 1


def rewrite_losses(program: Program, rewriter: Rewriter, ctx: PassContext) -> None:
    """Replace sliced logits and labels by whole logits and shifted labels under every cross-entropy."""
    for loss in program.graph.nodes:
        if base(loss) not in _LOSSES or loss.arg("reduction", 1) == _REDUCTION_NONE:
            continue
        logits, labels = _cut(loss.args[0], front=False), _cut(loss.args[1], front=True)
        if logits is None or labels is None or not _aligned(logits, labels):
            continue
        if not rewriter.allows(loss, "losses-shifted"):
            continue
        with rewriter.rewrite():
            with rewriter.before(loss):
                whole = _replayed(rewriter, logits, logits.node.args[0])
                shifted = _replayed(rewriter, labels, _shifted(rewriter, labels, loss.arg("ignore_index", -100)))
            rewriter.set_args(loss, (whole, shifted, *loss.args[2:]), loss.kwargs)
            rewriter.reinfer([loss])
        ctx.count("losses-shifted")
        ctx.remark("applied", loss, f"labels are shifted by {labels.missing} and padded with the ignored index")


def _cut(value: Any, *, front: bool) -> Cut | None:
    """Walk from a loss operand to the slice it is computed from, row by row."""
    chain: list[Node] = []
    while isinstance(value, Value):
        node = value.producer
        if base(node) == "slice":
            return _from_slice(node, chain[::-1], front)
        if base(node) not in _PER_ROW and not node.op.has(Trait.POINTWISE):
            return None
        chain.append(node)
        value = node.args[0]
    return None


def _from_slice(node: Node, chain: list[Node], front: bool) -> Cut | None:
    dim = int(node.arg("dim", 0)) % node.result.tensor_type.ndim
    missing = _missing(node, dim, front)
    if missing is None:
        return None
    places = [Rows(dim)]
    for step in chain:
        moved = _moved(step, places[-1], node.result.tensor_type.shape[dim])
        if moved is None:
            return None
        places.append(moved)
    return Cut(node, chain, missing, places)


def _missing(node: Node, dim: int, front: bool) -> int | None:
    """How many rows a slice leaves out at the front (or at the end), when it leaves out nothing else."""
    start = node.arg("start")
    if node.arg("step", 1) != 1 or not isinstance(start, int | None):
        return None
    missing = sympy.expand(node.args[0].tensor_type.shape[dim] - node.result.tensor_type.shape[dim])
    if not missing.is_Integer or missing <= 0:
        return None
    return int(missing) if (start or 0) == (int(missing) if front else 0) else None


def _moved(node: Node, rows: Rows, count: Dim) -> Rows | None:
    """Where the rows are behind an operator; None when it does not treat each row on its own."""
    name, kind = base(node), node.result.tensor_type
    if name in SAME_VALUES or name in CASTS:
        return rows
    if name in _RESHAPES:
        return _reshaped_rows(node.args[0].tensor_type.shape, kind.shape, rows, count)
    order = permutation(node)
    if order is not None:
        return Rows(order.index(rows.dim), rows.outer)
    if name in ("log_softmax", "_log_softmax", "softmax"):
        return rows if int(node.args[1]) % kind.ndim != rows.dim else None
    if name in ("linear", "layer_norm", "rms_norm"):
        normalized = len(node.args[1]) if name != "linear" else 1
        return rows if rows.dim < kind.ndim - normalized else None
    others = [t for v in node.operands[1:] if (t := tensor(v)) is not None]
    return rows if all(t.ndim < kind.ndim - rows.dim for t in others) else None


def _reshaped_rows(before: tuple[Dim, ...], after: tuple[Dim, ...], rows: Rows, count: Dim) -> Rows | None:
    """The dimension of a reshape that holds the rows whole: `[B, S, V]` to `[B*S, V]` gives `Rows(0, B)`."""
    outer = _product(before[: rows.dim]) * rows.outer
    inner = _product(before[rows.dim :]) / (rows.outer * count)
    for dim, extent in enumerate(after):
        blocks = sympy.simplify(outer / _product(after[:dim]))
        rest = sympy.simplify(inner / _product(after[dim + 1 :]))
        whole = blocks.is_Integer and rest.is_Integer and blocks > 0 and rest > 0
        if whole and sympy.expand(blocks * rest * count - extent) == 0:
            return Rows(dim, int(blocks))
    return None


def _product(extents: tuple[Dim, ...]) -> sympy.Expr:
    return sympy.prod(sympy.sympify(extent) for extent in extents)


def _aligned(logits: Cut, labels: Cut) -> bool:
    """Both read the same tokens in the same order: class scores stand in dimension 1 of the logits."""
    a, b = logits.places[-1], labels.places[-1]
    whole = logits.node.args[0].tensor_type.shape[logits.places[0].dim]
    same_length = whole == labels.node.args[0].tensor_type.shape[labels.places[0].dim]
    at = a.dim - 1 if a.dim > 1 else a.dim
    return bool(a.dim != 1 and same_length and (at, a.outer, logits.missing) == (b.dim, b.outer, labels.missing))


def _shifted(rewriter: Rewriter, labels: Cut, ignored: int) -> Value:
    """The labels moved up, the rows behind them ignored."""
    source, dim, count = labels.node.args[0], labels.places[0].dim, labels.missing
    behind = [0, 0] * (source.tensor_type.ndim - 1 - dim)
    padded = rewriter.create("aten.pad", (source, [*behind, 0, count], "constant", float(ignored)))
    return rewriter.create("aten.slice.Tensor", (padded, dim, count, _TO_THE_END))


def _replayed(rewriter: Rewriter, cut: Cut, source: Value) -> Value:
    """The chain behind a slice, applied to a value with all rows."""
    current = source
    for node, rows in zip(cut.chain, cut.places[1:], strict=True):
        if base(node) in _RESHAPES:
            shape = [-1 if d == rows.dim else extent for d, extent in enumerate(node.result.tensor_type.shape)]
            current = rewriter.create("aten.reshape", (current, shape), origin_from=node)
        else:
            current = rewriter.clone_node(node, mapping={node.args[0]: current})
    return current


__all__ = ["rewrite_losses"]
