"""`softmax(q @ k.T) @ v` written with separate operators, as `autosp.attention`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autosp_ir.analysis.index_domain import ALWAYS, Condition
from autosp_ir.analysis.index_values import IndexValues, index_values, used_facts
from autosp_ir.analysis.masks import MaskForm, certainly_masked, form_of, visible
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._canonicalize.dropout import draw_mask, extents, memory_order
from autosp_passes._canonicalize.match import (
    CASTS,
    SAME_VALUES,
    base,
    inactive_dropout,
    permutation,
    tensor,
)
from autosp_passes._canonicalize.scores import Mask, Scores, read_scores, with_lead
from autosp_passes._canonicalize.sinks import Sunk, damped, drops_sink, log_sums, read_sinks, without_row_max

_RESHAPES = ("view", "reshape", "_unsafe_view")
_PRODUCTS = ("matmul", "bmm")
_SOFTMAXES = ("softmax", "_softmax", "_safe_softmax")


@dataclass
class Site:
    """One attention in separate operators.

    Attributes:
        product: The product with the values.
        softmax: The softmax.
        scores: Its operand, taken apart.
        v: `[…, Skv, Dv]`.
        form: What the provable masks say.
        proved: The masks and biases that `form` rests on.
        masks: Masks that stay.
        biases: Biases that stay.
        sunk: The sink that takes part in the softmax.
        dropout: The dropout of its probabilities.
        log_sums: What else reads the scores: the logarithms of the softmax's denominators.
    """

    product: Node
    softmax: Node
    scores: Scores
    v: Value
    form: MaskForm
    proved: list[Value]
    masks: list[Mask]
    biases: list[tuple[Value, float]]
    sunk: Sunk | None = None
    dropout: Node | None = None
    log_sums: list[Node] = field(default_factory=list)

    @property
    def anchor(self) -> Node:
        """In front of what attention goes."""
        return self.log_sums[0] if self.log_sums else self.product


def rewrite_matmuls(program: Program, rewriter: Rewriter, ctx: PassContext) -> None:
    """Replace softmax between two products by `autosp.attention`; a remark says why another one stays."""
    softmaxes = [n for n in program.graph.nodes if base(n) in _SOFTMAXES]
    if not softmaxes:
        return
    values = index_values(program)
    rests_on: list[Value] = []
    for softmax in softmaxes:
        site = _site(values, softmax)
        if site is None:
            continue
        reason = _obstacle(site)
        if reason is not None:
            ctx.remark("missed", softmax, f"attention stays in separate operators: {reason}")
            continue
        if not rewriter.allows(softmax, "matmul-softmax-matmul"):
            continue
        with rewriter.rewrite():
            rewriter.replace(site.product, _attention(rewriter, site))
            if site.dropout is not None:
                rewriter.replace(site.dropout, site.dropout.operands[0])
        rests_on.extend(site.proved)
        ctx.count("matmul-softmax-matmul")
    program.info["batch_facts"] = {**program.info.get("batch_facts", {}), **used_facts(values, rests_on)}


def _site(values: IndexValues, softmax: Node) -> Site | None:
    kind = softmax.result.tensor_type
    dim = softmax.arg("dim")
    if not isinstance(dim, int) or kind.ndim not in (3, 4) or dim % kind.ndim != kind.ndim - 1:
        return None
    sunk = read_sinks(softmax.args[0])
    product, dropout = _product_with_values(softmax, sunk)
    summed = sunk.scores if sunk is not None else without_row_max(softmax.args[0])
    scores = read_scores(values, summed) if product is not None else None
    if product is None or scores is None:
        return None
    scores = with_lead(values, scores)
    form = MaskForm(False, None)
    site = Site(product, softmax, scores, product.args[1], form, [], [], [], sunk, dropout)
    if sunk is None and dropout is None:
        site.log_sums = _behind(site.v, log_sums(softmax.args[0], summed))
    return _with_masks(values, site)


def _behind(value: Value, nodes: list[Node]) -> list[Node]:
    """Nodes in program order, none if the first stands in front of what makes `value`."""
    return nodes if not nodes or nodes[0].graph.ordered([value.producer, nodes[0]])[0] is value.producer else []


def _product_with_values(softmax: Node, sunk: Sunk | None) -> tuple[Node | None, Node | None]:
    """The product that alone reads the probabilities, and their dropout.

    Between them may stand casts, copies, a reshape, the dropout, and the cut behind a sink.
    """
    node, dropout = softmax, None
    whole = sunk is None
    while True:
        readers = node.users
        if len(readers) != 1:
            return None, None
        previous, node = node, readers[0]
        name = base(node)
        if name in _PRODUCTS:
            reads = whole and node.args[0] is previous.result and node.args[1] is not previous.result
            return (node, dropout) if reads else (None, None)
        if sunk is not None and not whole and drops_sink(node, sunk):
            whole = True
            continue
        if name == "dropout" and whole and dropout is None and 0 < node.arg("p") < 1 and not inactive_dropout(node):
            dropout = node
            continue
        same = name in SAME_VALUES or name in CASTS or name in _RESHAPES or inactive_dropout(node)
        if not same or node.args[0] is not previous.result:
            return None, None


def _with_masks(values: IndexValues, site: Site) -> Site:
    """Sort masks and biases into what is proved and what stays."""
    condition = ALWAYS
    for mask in site.scores.masks:
        found = values.of(mask.where)
        known = found if mask.visible else found.negated() if isinstance(found, Condition) else None
        if isinstance(known, Condition) and certainly_masked(mask.fill, torch.finfo(_dtype(site)).min):
            condition = condition.both(known)
            site.proved.append(mask.where)
        else:
            site.masks.append(mask)
    for bias, factor in site.scores.biases:
        known = visible(values, bias)
        if known is not None:
            condition = condition.both(known)
            site.proved.append(bias)
        else:
            site.biases.append((bias, factor))
    form = form_of(condition)
    if form is not None:
        site.form = form
        return site
    site.proved, site.masks, site.biases = [], list(site.scores.masks), list(site.scores.biases)
    return site


def _dtype(site: Site) -> torch.dtype:
    return site.softmax.args[0].tensor_type.dtype if isinstance(site.softmax.args[0], Value) else torch.float32


def _obstacle(site: Site) -> str | None:
    q, kt, v = (tensor(x) for x in (site.scores.q, site.scores.kt, site.v))
    if q is None or kt is None or v is None or len({q.dtype, kt.dtype, v.dtype}) > 1:
        return "queries, keys and values differ in dtype"
    if not q.ndim == kt.ndim == v.ndim or (site.scores.lead is not None and q.ndim != 3):
        return "queries, keys and values differ in rank"
    if q.ndim == 4 and (q.shape[0] != kt.shape[0] or kt.shape[:2] != v.shape[:2] or kt.shape[1] not in (1, q.shape[1])):
        return "heads or batch are broadcast"
    if q.ndim == 3 and len({q.shape[0], kt.shape[0], v.shape[0]}) > 1:
        return "batch is broadcast"
    lowest = torch.finfo(_dtype(site)).min
    if any(m.fill > lowest for m in site.masks):
        return "a mask that is not provably causal fills with a finite number, so fully masked rows would differ"
    return None


def _keep(rewriter: Rewriter, dropout: Node, scores: Scores) -> Value:
    """The mask of a dropout `[B, H, Sq, Skv]`, drawn where the model draws it: its elements follow one another."""
    with rewriter.before(dropout):
        x = dropout.operands[0]
        shape, lead, order = extents(rewriter, x), scores.lead, memory_order(dropout)
        if order is None and len(shape) == 3:
            if lead is None:
                shape.insert(1, 1)
            elif all(isinstance(extent, int) for extent in lead):
                shape[:1] = lead
        keep = draw_mask(rewriter, shape, float(dropout.arg("p")), x.tensor_type, order)
        return _beside_heads(rewriter, keep, scores)


def _attention(rewriter: Rewriter, site: Site) -> Value:
    """Build the node in front of the product with the values."""
    scores = site.scores
    keep = _keep(rewriter, site.dropout, scores) if site.dropout is not None else None
    with rewriter.before(site.anchor):
        q, v = scores.q, site.v
        k = _transposed(rewriter, scores.kt)
        operands = [_four_dims(rewriter, x, scores.lead) for x in (q, k, v)]
        bias = _operand(rewriter, site)
        attributes: dict[str, Any] = {"causal": site.form.causal, "window": site.form.window, "scale": scores.scale}
        attributes |= {} if scores.softcap is None else {"softcap": scores.softcap}
        if site.dropout is not None and keep is not None:
            attributes |= {"dropout": float(site.dropout.arg("p")), "keep": keep}
        both = rewriter.create("autosp.attention", (*operands, bias), attributes, name="attention")
        if site.sunk is None and not site.log_sums:
            (out,) = rewriter.unpack(both, 1)
        else:
            out, lse = rewriter.unpack(both, 2)
            for node in site.log_sums:
                rewriter.replace(node, _like(rewriter, lse, node))
            if site.sunk is not None:
                out = damped(rewriter, out, lse, _beside_heads(rewriter, site.sunk.sink, scores))
        wanted = site.product.result.tensor_type
        return out if wanted.ndim == 4 else _three_dims(rewriter, out, scores.lead)


def _like(rewriter: Rewriter, lse: Value, node: Node) -> Value:
    """The logarithms `[B, H, Sq]` of attention as a `logsumexp` gives them."""
    shaped = rewriter.create("aten.unsqueeze", (lse, -1)) if node.arg("keepdim") else lse
    dtype = node.result.tensor_type.dtype
    return shaped if lse.tensor_type.dtype == dtype else rewriter.create("aten.to.dtype", (shaped, dtype))


def _transposed(rewriter: Rewriter, value: Value) -> Value:
    """The last two dimensions swapped; a swap that made `value` is undone instead."""
    order = permutation(value.producer)
    rank = value.tensor_type.ndim
    if order == [*range(rank - 2), rank - 1, rank - 2]:
        source: Value = value.producer.args[0]
        return source
    return rewriter.create("aten.transpose.int", (value, -2, -1))


def _four_dims(rewriter: Rewriter, value: Value, lead: tuple[Any, ...] | None) -> Value:
    """`[B, H, S, D]`; a reshape that merged B and H is undone."""
    kind = value.tensor_type
    if kind.ndim == 4:
        return value
    if lead is None:
        return rewriter.create("aten.unsqueeze", (value, 1))
    wanted = (*lead, *kind.shape[1:])
    source: Value = value
    while base(source.producer) in _RESHAPES or base(source.producer) in SAME_VALUES:
        source = source.producer.args[0]
        if source.tensor_type.shape == wanted:
            return source
    # At most one extent is symbolic here, and `reshape` infers it.
    return rewriter.create("aten.reshape", (value, [extent if isinstance(extent, int) else -1 for extent in wanted]))


def _three_dims(rewriter: Rewriter, out: Value, lead: tuple[Any, ...] | None) -> Value:
    return (
        rewriter.create("aten.squeeze.dim", (out, 1))
        if lead is None
        else rewriter.create("aten.flatten.using_ints", (out, 0, 1))
    )


def _operand(rewriter: Rewriter, site: Site) -> Value | None:
    """The masks and biases that stay, as one operand that broadcasts to `[B, H, Sq, Skv]`."""
    bias: Value | None = None
    for value, factor in site.biases:
        value = _beside_heads(rewriter, value, site.scores)
        scaled = value if factor == 1.0 else rewriter.create("aten.mul.Tensor", (value, factor))
        bias = scaled if bias is None else rewriter.create("aten.add.Tensor", (bias, scaled))
    masks = [replace(m, where=_beside_heads(rewriter, m.where, site.scores)) for m in site.masks]
    if bias is None and masks and all(m.fill == -math.inf for m in masks):
        return _conjunction(rewriter, masks)
    for mask in masks:
        bias = _filled(rewriter, site, mask, bias)
    return bias


def _beside_heads(rewriter: Rewriter, value: Value, scores: Scores) -> Value:
    """What meets scores of three dimensions, as it meets `[B, H, Sq, Skv]`."""
    kind = value.tensor_type
    if kind.ndim != 3 or scores.q.tensor_type.ndim != 3:
        return value
    if scores.lead is None:
        return rewriter.create("aten.unsqueeze", (value, 1))
    batch, heads = scores.lead
    if kind.shape[0] != batch * heads:
        return value
    # One extent of the two at most is symbolic here, and `unflatten` infers it.
    extents = [extent if isinstance(extent, int) else -1 for extent in scores.lead]
    return rewriter.create("aten.unflatten.int", (value, 0, extents))


def _filled(rewriter: Rewriter, site: Site, mask: Mask, bias: Value | None) -> Value:
    """A mask as an addend: the fill absorbs any score, so rows that are masked throughout keep their uniform sum."""
    device = mask.where.tensor_type.device
    attributes = {"dtype": site.scores.q.tensor_type.dtype, "device": device, "pin_memory": False}
    fill = rewriter.create("aten.full", ([], mask.fill), attributes)
    kept = bias if bias is not None else rewriter.create("aten.full", ([], 0.0), attributes)
    then, otherwise = (kept, fill) if mask.visible else (fill, kept)
    return rewriter.create("aten.where.self", (mask.where, then, otherwise))


def _conjunction(rewriter: Rewriter, masks: list[Mask]) -> Value:
    result: Value | None = None
    for mask in masks:
        where = mask.where if mask.visible else rewriter.create("aten.logical_not", (mask.where,))
        result = where if result is None else rewriter.create("aten.logical_and", (result, where))
    return result if result is not None else masks[0].where


__all__ = ["rewrite_matmuls"]
