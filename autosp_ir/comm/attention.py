"""Attention: `torch.ops.autosp.attention`, and `autosp.attention_backward` or `autosp.attention_bias_backward`.

Device-neutral operators that stay whole through tracing, differentiation and every pass. Layout [B, H, S, D]; keys and
values may have fewer heads than queries (grouped query). Query i and key j stand at the global positions `q_offset +
i` and `kv_offset + j`, or at `q_positions[i]` and `kv_positions[j]`: int64 tensors, since where a rank's tokens stand
depends on the rank. Kept on the CPU, positions that run on are recognised without waiting for a device. The scores are
`scale * q @ k.T`, bounded as `softcap * tanh(scores / softcap)` where that is given, then biased and masked.
`local_axis` says that along this mesh axis every rank attends with its own queries to its own keys only. `lse` is the
log of the softmax's denominator, so that partial results over blocks of keys can be merged, and it is differentiable.
A query that sees no key gives out 0 and lse -inf. With `dropout`, `keep`
says which probabilities stay; they are divided by `1 - dropout`, and `lse` knows nothing of it.
`attention_bias_backward` is the backward of a learned bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autosp_ir._torch_compat import exact_autocast
from autosp_ir.comm import attention_kernels
from autosp_ir.comm.attention_checks import (
    check,
    check_bias,
    check_keep,
    check_operands,
    check_positions,
    last_position,
    located,
)
from autosp_ir.comm.attention_kernels import HALF_DTYPES, Call
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import extend_op
from autosp_ir.ir.types import Shard, TensorType, TupleType

_MASKS, _TOKENS = ("bias", "segment_ids"), 2
_ATTRIBUTES = (
    "bool causal=False, SymInt? window=None, SymInt q_offset=0, SymInt kv_offset=0, "
    "float? scale=None, float dropout=0.0, float? softcap=None, Tensor? q_positions=None, Tensor? kv_positions=None, "
    "str? local_axis=None, Tensor? keep=None"
)
SCHEMAS = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? segment_ids=None, "
    f"{_ATTRIBUTES}) -> (Tensor out, Tensor lse)",
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? segment_ids, "
    f"Tensor out, Tensor lse, {_ATTRIBUTES}) -> (Tensor dq, Tensor dk, Tensor dv)",
    "attention_bias_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor bias, "
    f"Tensor? segment_ids, Tensor out, Tensor lse, {_ATTRIBUTES}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
)

LIBRARY = torch.library.Library("autosp", "FRAGMENT")
for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of `lse` for queries of `dtype`."""
    return torch.float32 if dtype in HALF_DTYPES else dtype


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    segment_ids: Tensor | None,
    causal: bool,
    window: int | None,
    q_offset: int,
    kv_offset: int,
    scale: float | None,
    dropout: float,
    softcap: float | None,
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    keep: Tensor | None,
) -> Call:
    check(q, k, v, bias, segment_ids, window, dropout, softcap)
    check_keep(keep, dropout, (*q.shape[:3], k.shape[2]))
    check_positions(q_positions, q.shape[2], q_offset, "q")
    check_positions(kv_positions, k.shape[2], kv_offset, "kv")
    q_offset, q_positions = located(q_positions, q_offset)
    kv_offset, kv_positions = located(kv_positions, kv_offset)
    last_key = last_position(kv_positions, kv_offset, k.shape[2])
    if segment_ids is not None:
        tokens = 1 + max(last_position(q_positions, q_offset, q.shape[2]), last_key)
        if segment_ids.shape[0] not in (1, q.shape[0]) or segment_ids.shape[1] < tokens:
            raise UnsupportedError(
                f"segment_ids {list(segment_ids.shape)} do not cover {q.shape[0]} row(s) of {tokens} global positions",
                hint="pass the segment ids of the whole row: offsets index into it",
            )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if window is None and q_positions is None and last_key <= q_offset:
        causal = False  # every key lies behind every query: nothing is hidden
    return Call(
        q,
        k,
        v,
        bias,
        segment_ids,
        causal,
        window,
        q_offset,
        kv_offset,
        factor,
        softcap,
        q_positions,
        kv_positions,
        keep,
        1.0 / (1.0 - dropout),
    )


def _shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    local_axis: str | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check(q, k, v, bias, segment_ids, window, dropout, softcap)
    check_positions(q_positions, q.shape[2], q_offset, "q")
    check_positions(kv_positions, k.shape[2], kv_offset, "kv")
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    return attention_kernels.empty_out(q, v), lse


def _backward_shape(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    segment_ids: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool = False,
    window: int | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    local_axis: str | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check(q, k, v, bias, segment_ids, window, dropout, softcap)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    local_axis: str | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    where = (q_offset, kv_offset, scale, dropout, softcap, q_positions, kv_positions, keep)
    call = _call(q, k, v, bias, segment_ids, causal, window, *where)
    return attention_kernels.forward(call)


def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    segment_ids: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool = False,
    window: int | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    local_axis: str | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    where = (q_offset, kv_offset, scale, dropout, softcap, q_positions, kv_positions, keep)
    call = _call(q, k, v, bias, segment_ids, causal, window, *where)
    return attention_kernels.backward(call, dout, dlse, out, lse)


def _bias_backward_shape(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_backward_shape(dout, dlse, q, k, v, bias, *args, **kwargs), bias.new_empty(bias.shape))


def _attention_bias_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    segment_ids: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool = False,
    window: int | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    local_axis: str | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    where = (q_offset, kv_offset, scale, dropout, softcap, q_positions, kv_positions, keep)
    call = _call(q, k, v, bias, segment_ids, causal, window, *where)
    return attention_kernels.bias_backward(call, bias, dout, dlse, out, lse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, segment_ids, *attributes, q_positions, kv_positions, local_axis, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, segment_ids, *output, keep, q_positions, kv_positions)
    ctx.attributes, ctx.local_axis = attributes, local_axis


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, segment_ids, out, lse, keep, *positions = ctx.saved_tensors
    none = (None,) * (5 + len(ctx.attributes))
    if dout is None and dlse is None:
        return (None, None, None, None, *none)
    dout = torch.zeros_like(out) if dout is None else dout
    learned = bias is not None and ctx.needs_input_grad[3]
    backward = torch.ops.autosp.attention_bias_backward if learned else torch.ops.autosp.attention_backward
    where = (*positions, ctx.local_axis, keep)
    gradients = backward(dout, dlse, q, k, v, bias, segment_ids, out, lse, *ctx.attributes, *where)
    return (*gradients, *none) if learned else (*gradients, None, *none)


def _no_second_gradient(ctx: Any, *grads: Tensor | None) -> None:
    raise UnsupportedError(
        "second derivatives through attention are not computed",
        hint="differentiate the loss once, or compute attention with torch.nn.functional.scaled_dot_product_attention",
    )


def _under_autocast(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator under autocast: what scaled_dot_product_attention does, every operand in the dtype of autocast."""

    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device)

        def cast(x: Any) -> Any:
            narrow = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if narrow and x.device.type == device else x

        with exact_autocast():
            result: tuple[Tensor, Tensor] = torch.ops.autosp.attention(
                *map(cast, args), **{name: cast(x) for name, x in kwargs.items()}
            )
            return result

    return attention


def _infer(node: Node) -> TupleType:
    """Types of out and lse. Cut along the tokens, a bias waits in its whole shape for the pass that places it."""
    q, k, v = (node.arg(name).tensor_type for name in ("q", "k", "v"))
    bias, segment_ids = (m.tensor_type if isinstance(m := node.arg(n), Value) else None for n in _MASKS)
    unresolved = any(
        p == k.layout[axis] == Shard(_TOKENS) and node.arg("local_axis") != axis for axis, p in q.layout.items()
    )
    for name, operand in (("q", q), ("kv", k)):
        positions = node.arg(f"{name}_positions")
        if isinstance(positions, Value) and not unresolved:
            check_positions(positions.tensor_type, operand.shape[2], node.arg(f"{name}_offset"), name)
    check_operands(q, k, v, segment_ids, node.arg("window"), node.arg("dropout"), node.arg("softcap"))
    if bias is not None:
        lengths = bias.shape[-2:] if unresolved else (q.shape[2], k.shape[2])
        check_bias(bias, (*q.shape[:2], *lengths))
    keep = node.arg("keep")
    if not unresolved:
        kept = keep.tensor_type if isinstance(keep, Value) else None
        check_keep(kept, node.arg("dropout"), (*q.shape[:3], k.shape[2]))
    out = TensorType((*q.shape[:3], v.shape[3]), q.dtype, q.device)
    return TupleType((out, TensorType(q.shape[:3], lse_dtype(q.dtype), q.device)))


torch.library.register_fake("autosp::attention", _shape, lib=LIBRARY)
torch.library.register_fake("autosp::attention_backward", _backward_shape, lib=LIBRARY)
torch.library.register_fake("autosp::attention_bias_backward", _bias_backward_shape, lib=LIBRARY)
LIBRARY.impl("attention_bias_backward", _attention_bias_backward, "CompositeExplicitAutograd")
LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
LIBRARY.impl("attention", _under_autocast("cpu"), "AutocastCPU")
LIBRARY.impl("attention", _under_autocast("cuda"), "AutocastCUDA")
torch.library.register_autograd("autosp::attention", _gradient, setup_context=_save, lib=LIBRARY)
for _backward in ("autosp::attention_backward", "autosp::attention_bias_backward"):
    torch.library.register_autograd(_backward, _no_second_gradient, lib=LIBRARY)
extend_op(torch.ops.autosp.attention.default, infer=_infer)
