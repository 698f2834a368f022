"""Several tensors in one all-to-all from tokens to heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autosp_ir.ir.graph import Value
from autosp_ir.rewrite.rewriter import Rewriter

_RANKS, _HEADS, _TOKENS = 1, 2, 3


def packs(values: Sequence[Value]) -> bool:
    """Whether tensors [B, H, S, D] can share a collective: alike in all but their heads, and none is there twice."""
    first, *others = (v.tensor_type for v in values)
    alike = all(
        (t.dtype, t.layout, t.shape[:1], t.shape[2:]) == (first.dtype, first.layout, first.shape[:1], first.shape[2:])
        for t in others
    )
    return alike and len(set(values)) == len(values)


def exchange_together(
    values: Sequence[Value], axis: str, size: int, create: Callable[..., Value], rewriter: Rewriter
) -> list[Value]:
    """Send the heads of every tensor that belong to a rank side by side: [B, H, S/P, D] -> [B, H/P, S, D] each.

    Args:
        values: Tensors of token shards, which `packs` accepts; the ranks divide the heads of each.
        axis: Mesh axis.
        size: Its ranks.
        create: Makes an operation, from its name and arguments.
        rewriter: Rewrites the program.

    Returns:
        The tensors as head shards of all tokens.
    """
    parts = []
    for value in values:
        batch, heads, _, width = value.tensor_type.shape
        parts.append(create("aten.reshape", value, [batch, size, heads // size, -1, width]))
    moved = create("autosp.all_to_all", create("aten.cat", parts, _HEADS), _RANKS, _TOKENS, axis, size)
    own = [part.tensor_type.shape[_HEADS] for part in parts]
    received = rewriter.unpack(create("aten.split_with_sizes", moved, own, _HEADS))
    # Flattened, not reshaped: at local length 1 a shape alone would not say where the ranks go.
    return [create("aten.flatten.using_ints", part, _RANKS, _HEADS) for part in received]


__all__ = ["exchange_together", "packs"]
