"""Attention masks as attributes: proving that a mask is causal, a window, or no mask at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from autosp_ir.analysis.index_domain import Affine, Choice, Condition, Number
from autosp_ir.analysis.index_values import IndexValues
from autosp_ir.ir.graph import Node, Value

# exp(-1e9 + anything a model computes) is exactly 0 in every dtype, as is exp of the smallest number of a dtype.
_CERTAINLY_MASKED = -1e9
_COPIES = frozenset({"clone", "contiguous", "alias", "lift_fresh_copy"})


@dataclass(frozen=True)
class MaskForm:
    """What a mask says.

    Args:
        causal: Key j is visible to query i only if j <= i.
        window: Only if i - j < window (and |i - j| < window when not causal); None is unlimited.
    """

    causal: bool
    window: int | None


def mask_form(values: IndexValues, mask: Value) -> MaskForm | None:
    """Prove what a mask says.

    Args:
        values: From `index_values`.
        mask: A bool mask (True attends) or a floating one added to the scores, `[…, Sq, Skv]`.

    Returns:
        The attributes that express it exactly; None when that cannot be proved.
    """
    condition = visible(values, mask)
    return None if condition is None else form_of(condition)


def split_mask(values: IndexValues, mask: Value) -> tuple[Condition, Value | None] | None:
    """Take apart a bias that also masks: `where(visible, bias, -inf)`, `bias + mask`, in any nesting.

    Args:
        values: From `index_values`.
        mask: As for `mask_form`.

    Returns:
        Where a query may attend, and the bias that is left to add there, None when nothing is; None when no part of the
        mask is known.
    """
    condition = visible(values, mask)
    if condition is not None:
        return condition, None
    node = mask.producer
    name = node.op.name.split(".")[1] if node.op.name.startswith("aten.") else ""
    if name in _COPIES:
        return split_mask(values, node.args[0])
    if name in ("where", "masked_fill"):
        return _split_filled(values, node)
    if name == "add" and node.arg("alpha", 1) == 1:
        return _split_sum(values, node)
    return None


def _split_filled(values: IndexValues, node: Node) -> tuple[Condition, Value | None] | None:
    kind = node.result.tensor_type
    if not kind.dtype.is_floating_point:
        return None
    if node.op.name.startswith("aten.where"):
        where, kept, fill, keeps = node.args[0], node.args[1], node.args[2], True
        if not isinstance(kept, Value) or _number(values, fill) is None:
            kept, fill, keeps = node.args[2], node.args[1], False
    else:
        (kept, where, fill), keeps = node.args[:3], False
    known, number = values.of(where), _number(values, fill)
    masked = number is not None and certainly_masked(number, torch.finfo(kind.dtype).min)
    if not isinstance(known, Condition) or not isinstance(kept, Value) or not masked:
        return None
    condition = known if keeps else known.negated()
    return None if condition is None else _both(condition, values, kept)


def _split_sum(values: IndexValues, node: Node) -> tuple[Condition, Value | None] | None:
    for one, other in (node.args[:2], node.args[1::-1]):
        condition = visible(values, one) if isinstance(one, Value) and isinstance(other, Value) else None
        if condition is not None:
            return _both(condition, values, other)
    return None


def _both(condition: Condition, values: IndexValues, rest: Value) -> tuple[Condition, Value | None]:
    inner = split_mask(values, rest)
    return (condition, rest) if inner is None else (condition.both(inner[0]), inner[1])


def _number(values: IndexValues, argument: object) -> Number | None:
    found = None if isinstance(argument, bool) else values.of(argument)
    return found.constant if isinstance(found, Affine) and found.is_constant else None


def form_of(condition: Condition) -> MaskForm | None:
    """The attributes that express where a query may attend; None when there are none that do."""
    if condition.at_least_zero is None:
        return None
    ahead: list[int] = []
    behind: list[int] = []
    for constraint in condition.at_least_zero:
        reach = _reach(constraint)
        if reach is None:
            return None
        (ahead if constraint.coefficients[-2] == 1 else behind).append(reach)
    return _form(min(ahead, default=None), min(behind, default=None))


def visible(values: IndexValues, mask: Value) -> Condition | None:
    """Where a mask lets a query attend, if that is known."""
    found = values.of(mask)
    if isinstance(found, Condition):
        return found
    if isinstance(found, Affine) and found.is_constant and found.constant == 0:
        return Condition(frozenset())
    if not isinstance(found, Choice):
        return None
    lowest = torch.finfo(mask.tensor_type.dtype).min if mask.tensor_type.dtype.is_floating_point else -math.inf
    if found.then == 0 and certainly_masked(found.otherwise, lowest):
        return found.condition
    if found.otherwise == 0 and certainly_masked(found.then, lowest):
        return found.condition.negated()
    return None


def certainly_masked(number: Number, lowest: float = -math.inf) -> bool:
    """Whether adding `number` to a score leaves no probability; `lowest` is the smallest number of the dtype."""
    return isinstance(number, int | float) and number <= max(_CERTAINLY_MASKED, lowest)


def _reach(constraint: Affine) -> int | None:
    """The c of `q - k + c >= 0` or `k - q + c >= 0`; None for any other constraint."""
    *others, query, key = (0, 0, *constraint.coefficients)
    if any(others) or (query, key) not in ((1, -1), (-1, 1)):
        return None
    return int(constraint.constant) if isinstance(constraint.constant, int) else None


def _form(ahead: int | None, behind: int | None) -> MaskForm | None:
    """`ahead`: how far a query may look ahead; `behind`: how far back; None is unlimited."""
    if ahead is None and behind is None:
        return MaskForm(causal=False, window=None)
    if ahead == 0:
        return MaskForm(causal=True, window=None if behind is None else behind + 1)
    return MaskForm(causal=False, window=ahead + 1) if ahead is not None and ahead == behind else None


__all__ = ["MaskForm", "certainly_masked", "form_of", "mask_form", "split_mask", "visible"]
