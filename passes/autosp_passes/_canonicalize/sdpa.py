"""`scaled_dot_product_attention` in any call form, as `autosp.attention`."""

from __future__ import annotations

from typing import Any

import torch

from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._canonicalize.dropout import draw_mask, extents
from autosp_passes._canonicalize.match import tensor

_ARGUMENTS: dict[str, Any] = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def rewrite_sdpa(program: Program, rewriter: Rewriter, ctx: PassContext) -> None:
    """Replace every SDPA node that `autosp.attention` expresses; a remark says why another one stays."""
    for node in program.graph.nodes:
        if not _is_sdpa(node):
            continue
        call = _call(node)
        reason = _obstacle(call)
        if reason is not None:
            ctx.remark("missed", node, f"attention stays as it is: {reason}")
            continue
        if not rewriter.allows(node, "sdpa"):
            continue
        with rewriter.rewrite():
            rewriter.replace(node, _attention(rewriter, node, call))
        ctx.count("sdpa")


def _is_sdpa(node: Node) -> bool:
    """ATen's operator, or torch's function in a graph that was traced at the torch level."""
    return (
        node.op.name == "aten.scaled_dot_product_attention"
        or node.op.target is torch.nn.functional.scaled_dot_product_attention
    )


def _call(node: Node) -> dict[str, Any]:
    return {**_ARGUMENTS, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def _obstacle(call: dict[str, Any]) -> str | None:
    """Why a call cannot become `autosp.attention`; None when it can."""
    if call["dropout_p"] == 1:
        raise UnsupportedError(
            "scaled_dot_product_attention drops every probability", hint="use a dropout probability below 1"
        )
    types = [tensor(call[name]) for name in ("query", "key", "value")]
    if any(t is None or t.ndim not in (3, 4) for t in types):
        return "queries, keys and values are not [B, H, S, D] or [B, S, D]"
    q, k, v = (t for t in types if t is not None)
    if len({(t.ndim, t.dtype) for t in (q, k, v)}) > 1:
        return "queries, keys and values differ in rank or dtype"
    if q.ndim == 4 and not _heads_fit(q.shape[1], k.shape[1], v.shape[1], bool(call["enable_gqa"])):
        return f"{q.shape[1]} query heads do not fit {k.shape[1]} key and {v.shape[1]} value heads"
    if len({t.shape[0] for t in (q, k, v)}) > 1 or k.shape[-2] != v.shape[-2]:
        return "batch or key lengths are broadcast"
    mask_type = tensor(call["attn_mask"])
    return "its mask has more dimensions than the scores" if mask_type and mask_type.ndim > q.ndim else None


def _heads_fit(q: Any, k: Any, v: Any, grouped: bool) -> bool:
    if k != v or not (isinstance(q, int) and isinstance(k, int)):
        return bool(q == k == v)
    return q == k or k == 1 or (grouped and q % k == 0)


def _attention(rewriter: Rewriter, node: Node, call: dict[str, Any]) -> Value:
    q, k, v, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    single = q.tensor_type.ndim == 3
    with rewriter.before(node):
        if single:
            q, k, v = (rewriter.create("aten.unsqueeze", (x, 1)) for x in (q, k, v))
            if isinstance(mask, Value) and mask.tensor_type.ndim == 3:
                mask = rewriter.create("aten.unsqueeze", (mask, 1))
        attributes = {"causal": bool(call["is_causal"]), "scale": call["scale"]}
        if call["dropout_p"]:
            shape = [*extents(rewriter, q)[:3], extents(rewriter, k)[2]]
            keep = draw_mask(rewriter, shape, call["dropout_p"], q.tensor_type)
            attributes |= {"dropout": call["dropout_p"], "keep": keep}
        both = rewriter.create("autosp.attention", (q, k, v, mask), attributes, name="attention")
        (out,) = rewriter.unpack(both, 1)
        return rewriter.create("aten.squeeze.dim", (out, 1)) if single else out


__all__ = ["rewrite_sdpa"]
