"""What an attention call must look like, and where its tokens stand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.types import Dim, TensorType

Described = Tensor | TensorType


def check(
    q: Described,
    k: Described,
    v: Described,
    bias: Described | None,
    segment_ids: Described | None,
    window: object,
    dropout: float,
    softcap: float | None,
) -> None:
    """Refuse what no kernel computes. Symbolic sizes are compared at run time, where they are numbers."""
    check_operands(q, k, v, segment_ids, window, dropout, softcap)
    if bias is not None:
        check_bias(bias, (*q.shape[:3], k.shape[2]))


def check_operands(
    q: Described,
    k: Described,
    v: Described,
    segment_ids: Described | None,
    window: object,
    dropout: float,
    softcap: float | None,
) -> None:
    """Refuse operands and attributes that no kernel computes, the bias aside."""
    if not 0 <= dropout < 1:
        raise UnsupportedError(
            f"attention cannot drop out with probability {dropout}", hint="use a dropout of at least 0 and below 1"
        )
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise UnsupportedError(
            f"attention takes [B, H, S, D] tensors, got {q.ndim}, {k.ndim} and {v.ndim} dimensions",
            hint="reshape the queries, keys and values to four dimensions",
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise UnsupportedError(
            f"attention takes queries, keys and values of one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}",
            hint="cast them to one dtype before attention",
        )
    (batch, heads, _, width), (kv_batch, kv_heads, keys, _) = q.shape, k.shape
    same = ((batch, kv_batch), (batch, v.shape[0]), (kv_heads, v.shape[1]), (keys, v.shape[2]), (width, k.shape[3]))
    if any(_differ(a, b) for a, b in same) or (_static(heads, kv_heads) and (kv_heads == 0 or heads % kv_heads)):
        raise UnsupportedError(
            f"attention shapes do not fit: queries {list(q.shape)}, keys {list(k.shape)}, values {list(v.shape)}",
            hint="batch, key length and head width must agree, and key heads must divide query heads",
        )
    if isinstance(window, int) and window < 1:
        raise UnsupportedError(f"an attention window of {window} sees nothing", hint="use a window of at least 1")
    if softcap is not None and not 0 < softcap < math.inf:
        raise UnsupportedError(
            f"attention scores cannot be capped at {softcap}", hint="use a positive softcap, or None for no cap"
        )
    if segment_ids is not None and (segment_ids.ndim != 2 or segment_ids.dtype.is_floating_point):
        raise UnsupportedError(
            f"segment_ids must be integers of shape [B, S], got {segment_ids.dtype} with {segment_ids.ndim} dimensions",
            hint="give every token the integer id of its document",
        )


def check_keep(keep: Described | None, dropout: float, scores: Sequence[Dim]) -> None:
    """Refuse dropout without the mask that says what it keeps, and a mask that is not of the scores' shape."""
    if (keep is None) != (dropout == 0):
        raise UnsupportedError(
            f"attention with dropout {dropout} is given {'no ' if keep is None else 'a '}mask of what is kept",
            hint="pass keep=, drawn by autosp.keep_mask, together with dropout=",
        )
    if keep is None:
        return
    fits = keep.ndim == 4 and not any(_differ(a, b) for a, b in zip(keep.shape, scores, strict=True))
    if not fits or keep.dtype != torch.bool:
        raise UnsupportedError(
            f"the dropout mask {list(keep.shape)} of {keep.dtype} does not fit scores of shape {list(scores)}",
            hint="draw one bool for every query, key and head",
        )


def check_bias(bias: Described, scores: Sequence[Dim]) -> None:
    """Refuse a bias that does not broadcast to scores of this shape."""
    fits = bias.ndim <= 4 and not any(
        _differ(extent, target) and extent != 1
        for extent, target in zip(reversed(bias.shape), reversed(scores), strict=False)
    )
    if not fits or not (bias.dtype == torch.bool or bias.dtype.is_floating_point):
        raise UnsupportedError(
            f"an attention bias {bias.dtype}{list(bias.shape)} does not broadcast to the scores {list(scores)}",
            hint="give a floating bias or a bool mask (True attends) that broadcasts to [B, H, Sq, Skv]",
        )


def _static(*sizes: object) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _differ(a: Dim, b: Dim) -> bool:
    return _static(a, b) and a != b


def check_positions(positions: Described | None, tokens: Dim, offset: object, name: str) -> None:
    """Refuse positions that are not one integer per token, or that come with an offset."""
    if positions is None:
        return
    if positions.ndim != 1 or positions.dtype != torch.int64 or _differ(positions.shape[0], tokens):
        raise UnsupportedError(
            f"{name}_positions must be int64 of shape [{tokens}], got {positions.dtype}{list(positions.shape)}",
            hint="give the global position of every token that this rank holds (air.token_positions)",
        )
    if isinstance(offset, int) and offset != 0:
        raise UnsupportedError(
            f"attention is given both {name}_positions and {name}_offset={offset}",
            hint="positions are global already: add the offset to them",
        )


def located(positions: Tensor | None, offset: int) -> tuple[int, Tensor | None]:
    """The offset of tokens that stand one behind the other, without positions; other positions as they are."""
    if positions is None or positions.numel() == 0:
        return offset, None
    first = int(positions[0])
    behind = torch.arange(first, first + positions.numel(), device=positions.device)
    return (first, None) if torch.equal(positions, behind) else (0, positions)


def last_position(positions: Tensor | None, offset: int, tokens: int) -> int:
    """The largest global position among the tokens; before `offset` when there are none."""
    return offset + tokens - 1 if positions is None else int(positions.max())
