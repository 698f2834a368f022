"""`repeat_kv` folded away: attention reads keys and values with their own number of heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autosp_ir.ir.graph import Node, Value
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_ir.rewrite.rules import Match, rule
from autosp_passes._canonicalize.match import SAME_VALUES, base, permutation, skip_same

_RESHAPES = ("view", "reshape", "_unsafe_view")


@dataclass
class Repeated:
    """A value whose heads are copies: head h of it is head `h // groups` of `source`.

    Attributes:
        source: The value before repetition; `squeezed` says that it still has a dimension of extent 1 for the groups.
        groups: Copies of each head.
        dim: The head dimension of `source`.
        squeeze: The dimension of `source` to drop, or None.
        chain: Transposes and copies between the repetition and the value, outermost first.
    """

    source: Value
    groups: int
    dim: int
    squeeze: int | None = None
    chain: list[Node] = field(default_factory=list)


@rule("repeats-folded")
def fold_repeats(op: Any, k: Any, v: Any) -> Any:
    """Attention reads keys and values before their heads are repeated."""
    return op.autosp.attention(..., k, v, ...)


fold_repeats.let("key", "its keys are no repeated heads")(lambda k: repeated(k, 1))
fold_repeats.let("value", "its values are no repeated heads")(lambda v: repeated(v, 1))
fold_repeats.where("keys and values are repeated equally")(lambda key, value: key.groups == value.groups)


@fold_repeats.replacement
def _(match: Match, rewriter: Rewriter, key: Repeated, value: Repeated) -> None:
    rewriter.set_arg(match.root, "k", _unexpanded(rewriter, key))
    rewriter.set_arg(match.root, "v", _unexpanded(rewriter, value))


def repeated(value: Value, dim: int) -> Repeated | None:
    """Recognise `value` as a repetition of consecutive heads along `dim`."""
    node = value.producer
    name = base(node)
    order = permutation(node)
    if name in SAME_VALUES or order is not None:
        inner = repeated(node.args[0], dim if order is None else order[dim])
        if inner is not None:
            inner.chain.insert(0, node)
        return inner
    if name == "repeat_interleave":
        groups = node.arg("repeats")
        same = node.arg("dim") is not None and node.arg("dim") % value.tensor_type.ndim == dim
        return Repeated(node.args[0], groups, dim) if same and isinstance(groups, int) and groups > 1 else None
    if name in ("expand", "repeat"):
        groups = _copies(node.args[0], value, dim)
        return Repeated(node.args[0], groups, dim) if groups is not None else None
    return _reshaped(node, value, dim) if name in _RESHAPES else None


def _copies(source: Value, value: Value, dim: int) -> int | None:
    """How often `expand` or `repeat` copies a dimension of extent 1, when it changes no other."""
    before, after = source.tensor_type.shape, value.tensor_type.shape
    if len(before) != len(after) or before[dim] != 1 or not isinstance(after[dim], int) or after[dim] == 1:
        return None
    others = all(before[d] == after[d] for d in range(len(after)) if d != dim)
    return int(after[dim]) if others else None


def _reshaped(node: Node, value: Value, dim: int) -> Repeated | None:
    """`[B, Hkv, 1, S, D]` copied along the third dimension and merged into `[B, Hkv * g, S, D]`."""
    copied = skip_same(node.args[0])
    if base(copied.producer) not in ("expand", "repeat"):
        return None
    source: Any = copied.producer.args[0]
    groups = _copies(source, copied, dim + 1) if copied.tensor_type.ndim == value.tensor_type.ndim + 1 else None
    if groups is None:
        return None
    split, merged = copied.tensor_type.shape, value.tensor_type.shape
    if split[:dim] != merged[:dim] or split[dim + 2 :] != merged[dim + 1 :] or split[dim] * groups != merged[dim]:
        return None
    return Repeated(source, groups, dim, squeeze=dim + 1)


def _unexpanded(rewriter: Rewriter, found: Repeated) -> Value:
    current = found.source
    if found.squeeze is not None:
        unsqueeze = current.producer
        opened = base(unsqueeze) == "unsqueeze" and unsqueeze.args[1] % current.tensor_type.ndim == found.squeeze
        current = unsqueeze.args[0] if opened else rewriter.create("aten.squeeze.dim", (current, found.squeeze))
    for node in reversed(found.chain):
        current = rewriter.clone_node(node, mapping={node.args[0]: current})
    return current


__all__ = ["Repeated", "fold_repeats", "repeated"]
