"""Attention sinks: logits that join the softmax and whose weight is dropped again.

With `lse` the log of the denominator over the keys, a sink takes the weight `exp(sink) / (exp(lse) + exp(sink))`, so
what the keys keep is `sigmoid(lse - sink)`: attention with sinks is attention times that factor, gradient included.
Some models are written in that form, with a `logsumexp` of the scores beside their softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autosp_ir.ir.graph import Node, Value
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._canonicalize.match import CASTS, SAME_VALUES, base, skip_same, tensor


@dataclass(frozen=True)
class Sunk:
    """Scores that share their softmax with a sink.

    Attributes:
        scores: `[…, Sq, Skv]`.
        sink: `[…, 1]`, of the rank of the scores; other dimensions may be broadcast.
        start: The column of the softmax at which the scores begin: 0, or 1 behind the sink.
    """

    scores: Value
    sink: Value
    start: int


def read_sinks(operand: Value) -> Sunk | None:
    """The scores and the sink of a softmax over `cat([scores, sink])` or `cat([sink, scores])`; None without a sink.

    Args:
        operand: What the softmax reads, without its row maximum.
    """
    joined = without_row_max(operand)
    node = joined.producer
    kind = joined.tensor_type
    parts = node.args[0] if base(node) == "cat" else ()
    if len(parts) != 2 or int(node.arg("dim", 0)) % kind.ndim != kind.ndim - 1:
        return None
    widths = [part.tensor_type.shape[-1] for part in parts]
    if (widths[0] == 1) == (widths[1] == 1):
        return None
    start = int(widths[0] == 1)
    return Sunk(parts[start], _unexpanded(parts[1 - start]), start)


def without_row_max(value: Value) -> Value:
    """The value behind casts and behind a subtraction of its own maximum per row, which no softmax notices."""
    while True:
        node = value.producer
        same = base(node) in SAME_VALUES or base(node) in CASTS
        if not same and not (base(node) == "sub" and node.arg("alpha", 1) == 1 and _is_row_max(*node.args[:2])):
            return value
        value = node.args[0]


def _is_row_max(value: Any, other: Any) -> bool:
    if tensor(value) is None or tensor(other) is None:
        return False
    node = other.producer
    while base(node) in SAME_VALUES or base(node) == "detach":
        node = node.args[0].producer
    if node.is_op("operator.getitem") and node.args[1] == 0:
        node = node.args[0].producer
    dims = node.arg("dim") if base(node) in ("max", "amax") else None
    dim = dims[0] if isinstance(dims, tuple | list) and len(dims) == 1 else dims
    last = isinstance(dim, int) and dim % value.tensor_type.ndim == value.tensor_type.ndim - 1
    return last and node.arg("keepdim") is True and skip_same(node.args[0]) is skip_same(value)


def _unexpanded(sink: Value) -> Value:
    """The sink before it was spread over batch and queries: products with it broadcast."""
    inner = skip_same(sink)
    if base(inner.producer) != "expand":
        return sink
    source: Value = inner.producer.args[0]
    return source if source.tensor_type.ndim == sink.tensor_type.ndim else sink


def log_sums(operand: Value, summed: Value) -> list[Node]:
    """Each `logsumexp` over the keys of the scores `[B, H, Sq, Skv]` of a softmax, in program order.

    Args:
        operand: What the softmax reads.
        summed: The scores, without casts and without a row maximum that is subtracted in between.
    """
    if summed.tensor_type.ndim != 4:
        return []
    cast = operand
    while cast is not summed and (base(cast.producer) in SAME_VALUES or base(cast.producer) in CASTS):
        cast = cast.producer.args[0]
    read = [summed] if cast is not summed else list(dict.fromkeys((summed, operand)))
    found = [node for value in read for node in value.producer.users if _is_log_sum(node, value)]
    return operand.producer.graph.ordered(found)


def _is_log_sum(node: Node, value: Value) -> bool:
    return node.is_op("aten.logsumexp") and node.args[0] is value and [int(d) % 4 for d in node.arg("dim")] == [3]


def drops_sink(node: Node, sunk: Sunk) -> bool:
    """Whether a slice of the probabilities keeps the columns of the scores and no other."""
    kind = node.args[0].tensor_type
    if base(node) != "slice" or int(node.arg("dim", 0)) % kind.ndim != kind.ndim - 1 or node.arg("step", 1) != 1:
        return False
    queries, keys = sunk.scores.tensor_type.shape[-2:]
    kept = node.result.tensor_type.shape[-1] == keys and kind.shape[-2:] == (queries, keys + 1)
    return kept and (node.arg("start") or 0) == sunk.start


def damped(rewriter: Rewriter, out: Value, lse: Value, sink: Value) -> Value:
    """What is left of attention beside a sink.

    Args:
        rewriter: Where to create; inside `with rewriter.before(node)`.
        out: `[B, H, Sq, Dv]`, attention over the keys.
        lse: `[B, H, Sq]`, the log of its denominator.
        sink: `[…, 1]` that broadcasts to `[B, H, Sq, 1]`.

    Returns:
        `[B, H, Sq, Dv]`, in the dtype of `out`; the factor is computed in that of `lse`.
    """
    column = rewriter.create("aten.unsqueeze", (lse, -1))
    kept = rewriter.create("aten.sigmoid", (rewriter.create("aten.sub.Tensor", (column, sink)),))
    product = rewriter.create("aten.mul.Tensor", (out, kept))
    dtype = out.tensor_type.dtype
    return product if product.tensor_type.dtype == dtype else rewriter.create("aten.to.dtype", (product, dtype))


__all__ = ["Sunk", "damped", "drops_sink", "log_sums", "read_sinks", "without_row_max"]
