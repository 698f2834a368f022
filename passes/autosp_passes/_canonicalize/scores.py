"""Reading `softmax(softcap * tanh(scale * q @ k.T / softcap) + mask)` backwards, from the softmax to the product."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autosp_ir.analysis.index_domain import Affine
from autosp_ir.analysis.index_values import IndexValues
from autosp_ir.ir.graph import Value
from autosp_passes._canonicalize.match import CASTS, SAME_VALUES, base, permutation, tensor

_RESHAPES = ("view", "reshape", "_unsafe_view")


@dataclass(frozen=True)
class Mask:
    """Scores replaced by a number.

    Args:
        where: A bool value.
        visible: The value of `where` at which a score is kept.
        fill: The number elsewhere.
    """

    where: Value
    visible: bool
    fill: float


@dataclass(frozen=True)
class Scores:
    """The parts of attention scores.

    Attributes:
        q: `[…, Sq, D]`.
        kt: `[…, D, Skv]`.
        lead: The batch dimensions of the scores when they differ from the product's (`[B*H]` seen as `[B, H]`).
        scale: Factor on the product.
        softcap: Bound on the scaled product.
        biases: Added values, each with its factor.
        masks: Replaced scores.
    """

    q: Value
    kt: Value
    lead: tuple[Any, ...] | None = None
    scale: float = 1.0
    softcap: float | None = None
    biases: tuple[tuple[Value, float], ...] = field(default=())
    masks: tuple[Mask, ...] = field(default=())


def read_scores(values: IndexValues, scores: Value) -> Scores | None:
    """Take scores apart; None when they are anything but a scaled, biased and masked product.

    Args:
        values: What is known of values by index; scale factors may be tensors.
        scores: The operand of the softmax.
    """
    node = scores.producer
    name = base(node)
    if name in SAME_VALUES or name in CASTS:
        return read_scores(values, node.args[0])
    if name in ("matmul", "bmm"):
        return Scores(node.args[0], node.args[1])
    if name == "baddbmm":
        return _biased_product(values, scores)
    if name in ("mul", "div"):
        return _scaled(values, scores)
    if name == "tanh":
        return _capped(values, scores)
    if name == "add":
        return _biased(values, scores)
    if name in ("masked_fill", "where"):
        return _masked(values, scores)
    return _reshaped(values, scores) if name in _RESHAPES else None


def number_of(values: IndexValues, argument: Any) -> float | None:
    """A plain number, or a tensor that is the same number everywhere."""
    found = values.of(argument) if not isinstance(argument, bool) else None
    if isinstance(found, Affine) and found.is_constant and isinstance(found.constant, int | float):
        return float(found.constant)
    return None


def _scaled(values: IndexValues, scores: Value) -> Scores | None:
    node = scores.producer
    left, right = node.args[0], node.args[1]
    factor, inside = number_of(values, right), left
    if factor is None and base(node) == "mul":
        factor, inside = number_of(values, left), right
    if not factor or factor < 0 or node.arg("rounding_mode") is not None or not isinstance(inside, Value):
        return None
    inner = read_scores(values, inside)
    return None if inner is None else _times(inner, factor if base(node) == "mul" else 1.0 / factor)


def _times(scores: Scores, factor: float) -> Scores:
    """Scores times a positive `f`: `f * c * tanh(s * x / c)` has the cap `f * c` and the scale `f * s`."""
    return replace(
        scores,
        scale=scores.scale * factor,
        softcap=None if scores.softcap is None else scores.softcap * factor,
        biases=tuple((bias, f * factor) for bias, f in scores.biases),
        masks=tuple(replace(m, fill=m.fill * factor) for m in scores.masks),
    )


def _capped(values: IndexValues, scores: Value) -> Scores | None:
    """`tanh` of a scaled product: scores capped at 1, until a factor behind it says otherwise."""
    inner = read_scores(values, scores.producer.args[0])
    if inner is None or inner.biases or inner.masks or inner.softcap is not None:
        return None
    return replace(inner, softcap=1.0)


def _biased(values: IndexValues, scores: Value) -> Scores | None:
    node = scores.producer
    if node.arg("alpha", 1) != 1:
        return None
    for inside, bias in (node.args[:2], node.args[1::-1]):
        if tensor(inside) is None or tensor(bias) is None:
            continue
        inner = read_scores(values, inside)
        if inner is not None:
            return replace(inner, biases=(*inner.biases, (bias, 1.0)))
    return None


def _biased_product(values: IndexValues, scores: Value) -> Scores | None:
    node = scores.producer
    beta, alpha = node.arg("beta", 1), node.arg("alpha", 1)
    if not isinstance(beta, int | float) or not isinstance(alpha, int | float) or alpha <= 0:
        return None
    biases = ((node.args[0], float(beta)),) if beta else ()
    return Scores(node.args[1], node.args[2], scale=float(alpha), biases=biases)


def _masked(values: IndexValues, scores: Value) -> Scores | None:
    node = scores.producer
    if base(node) == "masked_fill":
        inside, where, fill = node.args[0], node.args[1], number_of(values, node.args[2])
        return _with_mask(values, inside, where, False, fill)
    where, then, otherwise = node.args[:3]
    fill = number_of(values, otherwise)
    if fill is not None:
        return _with_mask(values, then, where, True, fill)
    return _with_mask(values, otherwise, where, False, number_of(values, then))


def _with_mask(values: IndexValues, inside: Any, where: Any, visible: bool, fill: float | None) -> Scores | None:
    kind = tensor(where)
    if fill is None or not isinstance(inside, Value) or kind is None or kind.dtype != torch.bool:
        return None
    inner = read_scores(values, inside)
    return None if inner is None else replace(inner, masks=(*inner.masks, Mask(where, visible, fill)))


def _reshaped(values: IndexValues, scores: Value) -> Scores | None:
    """`[B*H, Sq, Skv]` seen as `[B, H, Sq, Skv]`, or back again; what was added so far keeps its own dimensions."""
    node = scores.producer
    inner_type, outer_type = tensor(node.args[0]), tensor(scores)
    inner = read_scores(values, node.args[0])
    if inner is None or inner_type is None or outer_type is None:
        return None
    if inner_type.shape == outer_type.shape:
        return inner
    if {inner_type.ndim, outer_type.ndim} != {3, 4} or inner_type.shape[-2:] != outer_type.shape[-2:]:
        return None
    lead = (outer_type if outer_type.ndim == 4 else inner_type).shape[:2]
    return replace(inner, lead=lead) if inner.lead in (None, lead) else None


def with_lead(values: IndexValues, scores: Scores) -> Scores:
    """Scores of `[B*H, S, D]` operands, with the heads that an operand had before they were merged into the batch."""
    if scores.lead is not None or scores.q.tensor_type.ndim != 3:
        return scores
    leads = (_lead(values, scores.q), _lead(values, scores.kt))
    return replace(scores, lead=next((lead for lead in leads if lead is not None), None))


def _lead(values: IndexValues, value: Value) -> tuple[Any, ...] | None:
    batch = value.tensor_type.shape[0]
    while True:
        node = value.producer
        name = base(node)
        scaled = name in ("mul", "div") and number_of(values, node.args[1]) is not None
        turned = permutation(node) == [0, 2, 1]
        if not (name in _RESHAPES or name in SAME_VALUES or name in CASTS or turned or scaled):
            return None
        if not isinstance(node.args[0], Value):
            return None
        value = node.args[0]
        shape = value.tensor_type.shape
        if len(shape) == 4:
            return shape[:2] if shape[0] * shape[1] == batch and name in _RESHAPES else None


__all__ = ["Mask", "Scores", "number_of", "read_scores", "with_lead"]
