"""The attention operator pair: `torch.ops.autosp.attention` and `torch.ops.autosp.attention_backward`.

Device-neutral operators that stay whole through tracing, differentiation and every pass. Layout [B, H, S, D]; keys
and values may have fewer heads than queries (grouped query). Query i and key j stand at the global positions
`q_offset + i` and `kv_offset + j`. `lse` is the log of the softmax's denominator, so that partial results over blocks
of keys can be merged, and it is differentiable. A query that sees no key gives out 0 and lse -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autosp_ir._torch_compat import exact_autocast
from autosp_ir.comm import attention_kernels
from autosp_ir.comm.attention_kernels import HALF_DTYPES, Call
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import extend_op
from autosp_ir.ir.types import Dim, Shard, TensorType, TupleType

Described = Tensor | TensorType
_MASKS, _TOKENS = ("bias", "segment_ids"), 2
_ATTRIBUTES = (
    "bool causal=False, SymInt? window=None, SymInt q_offset=0, SymInt kv_offset=0, "
    "float? scale=None, float dropout=0.0"
)
SCHEMAS = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? segment_ids=None, "
    f"{_ATTRIBUTES}) -> (Tensor out, Tensor lse)",
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? segment_ids, "
    f"Tensor out, Tensor lse, {_ATTRIBUTES}) -> (Tensor dq, Tensor dk, Tensor dv)",
)

LIBRARY = torch.library.Library("autosp", "FRAGMENT")
for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of `lse` for queries of `dtype`."""
    return torch.float32 if dtype in HALF_DTYPES else dtype


def _check(
    q: Described,
    k: Described,
    v: Described,
    bias: Described | None,
    segment_ids: Described | None,
    window: object,
    dropout: float,
) -> None:
    """Refuse what no kernel computes. Symbolic sizes are compared at run time, where they are numbers."""
    _check_operands(q, k, v, segment_ids, window, dropout)
    if bias is not None:
        _check_bias(bias, (*q.shape[:3], k.shape[2]))


def _check_operands(
    q: Described, k: Described, v: Described, segment_ids: Described | None, window: object, dropout: float
) -> None:
    if dropout:
        raise UnsupportedError(
            f"attention with dropout {dropout} is not supported",
            hint="set the model's attention dropout to 0 (transformers: config.attention_dropout = 0.0)",
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
    if segment_ids is not None and (segment_ids.ndim != 2 or segment_ids.dtype.is_floating_point):
        raise UnsupportedError(
            f"segment_ids must be integers of shape [B, S], got {segment_ids.dtype} with {segment_ids.ndim} dimensions",
            hint="give every token the integer id of its document",
        )


def _check_bias(bias: Described, scores: Sequence[Dim]) -> None:
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
) -> Call:
    _check(q, k, v, bias, segment_ids, window, dropout)
    if segment_ids is not None:
        tokens = max(q_offset + q.shape[2], kv_offset + k.shape[2])
        if segment_ids.shape[0] not in (1, q.shape[0]) or segment_ids.shape[1] < tokens:
            raise UnsupportedError(
                f"segment_ids {list(segment_ids.shape)} do not cover {q.shape[0]} row(s) of {tokens} global positions",
                hint="pass the segment ids of the whole row: offsets index into it",
            )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return Call(q, k, v, bias, segment_ids, causal, window, q_offset, kv_offset, factor)


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
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, bias, segment_ids, window, dropout)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, bias, segment_ids, window, dropout)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


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
) -> tuple[Tensor, Tensor]:
    call = _call(q, k, v, bias, segment_ids, causal, window, q_offset, kv_offset, scale, dropout)
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
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(q, k, v, bias, segment_ids, causal, window, q_offset, kv_offset, scale, dropout)
    return attention_kernels.backward(call, dout, dlse, out, lse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, segment_ids, *attributes = inputs
    if bias is not None and bias.requires_grad:
        raise UnsupportedError(
            "the gradient of a learned attention bias is not computed",
            hint="detach the bias if it is constant, or keep this attention outside the partitioned region",
        )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, segment_ids, *output)
    ctx.attributes = attributes


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, segment_ids, out, lse = ctx.saved_tensors
    none = (None,) * (2 + len(ctx.attributes))
    if dout is None and dlse is None:
        return (None, None, None, *none)
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = torch.ops.autosp.attention_backward(dout, dlse, q, k, v, bias, segment_ids, out, lse, *ctx.attributes)
    return (*gradients, *none)


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
    unresolved = any(isinstance(p, Shard) and p.dim == _TOKENS for _, p in q.layout.items())
    _check_operands(q, k, v, segment_ids, node.arg("window"), node.arg("dropout"))
    if bias is not None:
        lengths = bias.shape[-2:] if unresolved else (q.shape[2], k.shape[2])
        _check_bias(bias, (*q.shape[:2], *lengths))
    out = TensorType((*q.shape[:3], v.shape[3]), q.dtype, q.device)
    return TupleType((out, TensorType(q.shape[:3], lse_dtype(q.dtype), q.device)))


torch.library.register_fake("autosp::attention", _shape, lib=LIBRARY)
torch.library.register_fake("autosp::attention_backward", _backward_shape, lib=LIBRARY)
LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
LIBRARY.impl("attention", _under_autocast("cpu"), "AutocastCPU")
LIBRARY.impl("attention", _under_autocast("cuda"), "AutocastCUDA")
torch.library.register_autograd("autosp::attention", _gradient, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("autosp::attention_backward", _no_second_gradient, lib=LIBRARY)
extend_op(torch.ops.autosp.attention.default, infer=_infer)
