"""Sums of many half-precision gradients, accumulated in float32."""

from __future__ import annotations

import torch

from autosp_ir.analysis.products import Product, product_of
from autosp_ir.ir.graph import Node, Phase, Value
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_ir.rewrite.rewriter import Rewriter

_HALF = (torch.bfloat16, torch.float16)
_LEAST_TERMS = 3
_VIEWS = ("aten.view", "aten._unsafe_view", "aten.reshape")


def accumulate_in_float32(program: Program, rewriter: Rewriter) -> int:
    """Carry chains of additions in the backward in float32, and round once at the end.

    A weight that is used by every chunk of tokens gets one gradient a chunk, which autograd adds up in the weight's
    own dtype: in bfloat16 a sum of 128 terms keeps two digits. Terms that are matrix products are not rounded either
    and are added up by the products themselves; other terms are rounded as before.

    So are the terms of one chunk of a gradient, such as those of an MLP's two projections: a compiler that fuses
    never rounds the sum for all tokens, but a chunk of it is put in its place in memory.

    Args:
        program: A joint program.
        rewriter: Owner of the mutations.

    Returns:
        How many sums were rewritten.
    """
    count = 0
    for node in list(program.graph.nodes):
        if not _is_sum(node) or any(_is_sum(u) and u.operands[0] is node.result for u in node.users):
            continue
        chain, terms = _sum_at(node)
        stored = bool(node.users) and all(u.is_op("autosp.unchunk") for u in node.users)
        products = _products(terms) if stored else None
        if products or len(terms) >= _LEAST_TERMS:
            _accumulate(chain, products or terms, rewriter)
            count += 1
    return count


def round_once(value: Value, rewriter: Rewriter) -> None:
    """Round a half-precision gradient that is put in memory as it is once, where it is a sum of products.

    Args:
        value: Of the program that `rewriter` owns; replaced wherever it is read.
        rewriter: Owner of the mutations.
    """
    if not _is_sum(value.producer):
        return
    chain, terms = _sum_at(value.producer)
    if products := _products(terms):
        _accumulate(chain, products, rewriter)


def _is_sum(node: Node) -> bool:
    if node.phase is not Phase.BACKWARD or not node.is_op("aten.add.Tensor") or len(node.operands) != 2:
        return False
    kinds = [node.result.type, *(v.type for v in node.operands)]
    return all(isinstance(k, TensorType) and k.dtype in _HALF and k == kinds[0] for k in kinds) and not node.kwargs


def _chain(last: Node) -> list[Node]:
    """The additions that lead to `last` through their first operand, each read by the next alone; first one first."""
    chain = [last]
    while _is_sum(previous := chain[0].operands[0].producer) and len(previous.result.users) == 1:
        chain.insert(0, previous)
    return chain


def _sum_at(last: Node) -> tuple[list[Node], list[Value]]:
    """The additions that end in `last`, and what they add up."""
    chain = _chain(last)
    return chain, [chain[0].operands[0], *(n.operands[1] for n in chain)]


def _products(terms: list[Value]) -> list[Value] | None:
    """The terms as matrices, before they are given another shape, if all are products; None for others."""
    flat = [t.producer.operands[0] if t.producer.is_op(*_VIEWS) and len(t.users) == 1 else t for t in terms]
    one_shape = len({t.tensor_type.shape for t in flat}) == 1
    return flat if one_shape and all(product_of(t) for t in flat) else None


def _accumulate(chain: list[Node], terms: list[Value], rewriter: Rewriter) -> None:
    """Replace the last of `chain`.

    Args:
        chain: The additions.
        terms: What they add up, which may have another shape than the sum.
        rewriter: Owner of the mutations.
    """
    wanted = chain[-1].result.tensor_type
    with rewriter.rewrite("accumulate in float32"):
        total: Value | None = None
        place = chain[0]
        for node, term in zip([chain[0], *chain], terms, strict=True):
            product = product_of(term)
            # A product goes where it stood, so that what it reads dies there.
            place = _later(product.node, place if total is not None else product.node) if product else node
            with rewriter.before(place):
                total = _add_product(total, product, rewriter) if product else _add(total, term, rewriter)
        assert total is not None  # a sum has terms
        with rewriter.before(chain[-1]):
            rounded = rewriter.create("aten._to_copy", (total,), {"dtype": wanted.dtype})
            if rounded.tensor_type.shape != wanted.shape:
                rounded = rewriter.create("aten.view", (rounded, list(wanted.shape)))
        rewriter.replace(chain[-1], rounded)
        rewriter.dead_code()


def _later(one: Node, other: Node) -> Node:
    order = one.graph.index()
    return max(one, other, key=order.__getitem__)


def _add_product(total: Value | None, product: Product, rewriter: Rewriter) -> Value:
    a, b = product.node.operands
    if product.transposed:
        a, b = (rewriter.create("aten.permute", (v, [1, 0])) for v in (b, a))
    if total is None:
        return rewriter.create("autosp.mm_float32", (a, b))
    return rewriter.create("autosp.addmm_float32", (total, a, b))


def _add(total: Value | None, term: Value, rewriter: Rewriter) -> Value:
    if total is None:
        return rewriter.create("aten._to_copy", (term,), {"dtype": torch.float32})
    return rewriter.create("aten.add.Tensor", (total, term))


__all__ = ["accumulate_in_float32", "round_once"]
