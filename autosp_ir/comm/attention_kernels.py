"""How an attention call is computed: fused kernels where they apply, blockwise arithmetic everywhere else.

`KERNELS` is tried in order; the first that supports a call computes it. All share one interface, so a backend is
added by one entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from autosp_ir import _torch_compat

HALF_DTYPES = (torch.float16, torch.bfloat16)

# One tile of scores holds at most this many elements, or one row by `_MIN_KEYS` keys for very large batches. A tile as
# wide as the keys is exact in its backward, so rows are given up for width as long as `_MIN_ROWS` are left.
_TILE_ELEMENTS = 2**25
_MAX_ROWS = 1024
_MIN_ROWS = 64
_MIN_KEYS = 256

# Its thread is started by the first call.
_PLANS = ThreadPoolExecutor(1, "autosp-cudnn")

# torch's memory-efficient backward reads the log-sum-exp of a whole number of these rows.
_LSE_ALIGNMENT = 32


@dataclass(frozen=True)
class Call:
    """The tensors and attributes of one attention.

    Attributes:
        q: [B, Hq, Sq, D].
        k: [B, Hkv, Skv, D]; query head h reads key head h // (Hq // Hkv).
        v: [B, Hkv, Skv, Dv].
        bias: Added to the scores, or a bool mask (True attends); broadcastable to [B, Hq, Sq, Skv].
        segment_ids: [B, S] integers over global positions; a query attends within its own segment only.
        causal: Key j is visible to query i iff j <= i, in global positions.
        window: Causal: 0 <= i - j < window. Else: |i - j| < window.
        q_offset: Global position of the first query.
        kv_offset: Global position of the first key.
        scale: Factor on the scores.
        softcap: Bounds the scaled scores to `softcap * tanh(scores / softcap)`, in front of bias and masks.
        q_positions: Global positions of the queries, where `q_offset` does not say them.
        kv_positions: Global positions of the keys, where `kv_offset` does not say them.
        keep: Bool [B, Hq, Sq, Skv]: the probabilities that dropout keeps.
        kept_scale: Factor on those.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    segment_ids: Tensor | None
    causal: bool
    window: int | None
    q_offset: int
    kv_offset: int
    scale: float
    softcap: float | None = None
    q_positions: Tensor | None = None
    kv_positions: Tensor | None = None
    keep: Tensor | None = None
    kept_scale: float = 1.0

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def plain(self) -> bool:
        """Full attention, or causal attention of equal lengths at equal offsets, on tensors that are not empty."""
        if any(x is not None for x in (self.bias, self.segment_ids, self.window, self.softcap, self.keep)):
            return False
        if self.q.numel() == 0 or self.k.numel() == 0 or self.q.shape[-1] != self.v.shape[-1]:
            return False
        along = self.q_positions is None and self.kv_positions is None
        square = along and self.q.shape[2] == self.k.shape[2] and self.q_offset == self.kv_offset
        return square or not self.causal


Forward = Callable[[Call], tuple[Tensor, Tensor]]
Backward = Callable[[Call, Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention.

    Attributes:
        name: For messages and tests.
        supports: Whether the kernel computes this call; the second argument says whether lse has a gradient.
        forward: `call -> (out, lse)`; any strides.
        backward: `(call, dout, dlse, out, lse) -> (dq, dk, dv)`; any strides.
    """

    name: str
    supports: Callable[[Call, bool], bool]
    forward: Forward
    backward: Backward


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """What `forward` gives for `out`, uninitialised: in the strides of q where it has its shape, else contiguous."""
    return torch.empty_like(q) if q.shape[3] == v.shape[3] else q.new_empty((*q.shape[:3], v.shape[3]))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Compute `(out, lse)`: out as `empty_out`, which fused kernels write without a copy, and lse contiguous.

    For half types lse is float32.
    """
    out, lse = _select(call, False).forward(call)
    return _laid_out(out, empty_out(_described(call.q), _described(call.v))), lse.contiguous()


def backward(call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `(dq, dk, dv)`, each in the strides of `torch.empty_like` of its operand."""
    grads = _select(call, dlse is not None).backward(call, dout, dlse, out, lse)
    return _laid_out_as_operands(call, grads)


def bias_backward(
    call: Call, bias: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `backward`, and `dbias`, contiguous and summed over the dimensions that the bias broadcasts."""
    dtype = torch.float32 if call.q.dtype in HALF_DTYPES else call.q.dtype
    dbias = torch.zeros(bias.shape, dtype=dtype, device=bias.device)
    grads = _blockwise_backward(call, dout, dlse, out, lse, dbias)
    return *_laid_out_as_operands(call, grads), dbias.to(bias.dtype)


def _described(x: Tensor) -> Tensor:
    """Sizes and strides without memory."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """The tensor in the strides of another of its shape; itself if it has them, but for extents of one."""
    pairs = zip(x.shape, x.stride(), like.stride(), strict=True)
    if all(mine == wanted for extent, mine, wanted in pairs if extent > 1):
        return x.as_strided(x.shape, like.stride())
    return torch.empty_strided(x.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _laid_out_as_operands(call: Call, grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    operands = (torch.empty_like(_described(x)) for x in (call.q, call.k, call.v))
    dq, dk, dv = (_laid_out(grad, x) for grad, x in zip(grads, operands, strict=True))
    return dq, dk, dv


def _select(call: Call, has_dlse: bool) -> Kernel:
    return next(kernel for kernel in KERNELS if kernel.supports(call, has_dlse))


# Fused kernels -------------------------------------------------------------------------------------------------------


def _cpu_flash_supports(call: Call, has_dlse: bool) -> bool:
    return call.q.is_cpu and call.plain and not has_dlse


def _cpu_flash_forward(call: Call) -> tuple[Tensor, Tensor]:
    out, lse = _torch_compat.cpu_flash_attention()(
        call.q, _per_query_head(call.k, call), _per_query_head(call.v, call), 0.0, call.causal, scale=call.scale
    )
    return out, lse


def _cpu_flash_backward(
    call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = _per_query_head(call.k, call), _per_query_head(call.v, call)
    dq, dk, dv = _torch_compat.cpu_flash_attention_backward()(
        dout.contiguous(), call.q, k, v, out, lse, 0.0, call.causal, scale=call.scale
    )
    return dq, _per_kv_head(dk, call), _per_kv_head(dv, call)


def _per_query_head(x: Tensor, call: Call) -> Tensor:
    return x if call.groups == 1 else x.repeat_interleave(call.groups, dim=1)


def _per_kv_head(grad: Tensor, call: Call) -> Tensor:
    return grad if call.groups == 1 else grad.unflatten(1, (-1, call.groups)).sum(2)


def _cudnn_supports(call: Call, has_dlse: bool) -> bool:
    """The fused kernels of cuDNN, nearly twice flash-attention 2 on Hopper; their backward needs D <= 128."""
    if not (call.q.is_cuda and call.q.dtype in HALF_DTYPES and call.plain and not has_dlse):
        return False
    capable = torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(call.q.device)[0] >= 9
    return capable and call.q.shape[-1] % 8 == 0 and call.q.shape[-1] <= 128 and call.q.shape[2] > 1


def _cudnn_forward(call: Call) -> tuple[Tensor, Tensor]:
    results = _torch_compat.cudnn_attention()(
        call.q, call.k, call.v, None, True, 0.0, call.causal, False, scale=call.scale
    )
    return results[0], results[1].squeeze(-1)


def _cudnn_backward(
    call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Torch keeps the plan of a backward by the sizes and strides of q, k and v, and by the thread. It runs it for any
    # strides of `out` and `dout`, and leaves wrong gradients of q and k if these are not those it was made for. So
    # those of q decide them here, and in a thread of its own a call meets no plan that another was made for.
    like = torch.empty_like(_described(call.q))
    out, dout = _laid_out(out, like), _laid_out(dout, like)
    # Without dropout the generator state is not read; without variable lengths the cumulative lengths are absent.
    state = torch.zeros((), dtype=torch.int64, device=call.q.device)
    stream = torch.cuda.current_stream(call.q.device)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.stream(stream), torch.no_grad():
            dq, dk, dv = _torch_compat.cudnn_attention_backward()(
                dout, call.q, call.k, call.v, out, lse.unsqueeze(-1), state, state, None, None, None,
                call.q.shape[2], call.k.shape[2], 0.0, call.causal, scale=call.scale,
            )  # fmt: skip
            return dq, dk, dv

    return _PLANS.submit(run).result()


def _cuda_flash_supports(call: Call, has_dlse: bool) -> bool:
    head_dim = call.q.shape[-1]
    half = call.q.dtype in HALF_DTYPES
    return call.q.is_cuda and half and call.plain and not has_dlse and head_dim % 8 == 0 and head_dim <= 256


def _cuda_flash_forward(call: Call) -> tuple[Tensor, Tensor]:
    results = _torch_compat.cuda_flash_attention()(call.q, call.k, call.v, 0.0, call.causal, False, scale=call.scale)
    return results[0], results[1][..., : call.q.shape[2]]


def _cuda_flash_backward(
    call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # No variable lengths and no dropout: the cumulative lengths are absent and the generator state is not read.
    state = torch.zeros(2, dtype=torch.uint64, device=call.q.device)
    dq, dk, dv = _torch_compat.cuda_flash_attention_backward()(
        dout, call.q, call.k, call.v, out, lse, None, None, call.q.shape[2], call.k.shape[2],
        0.0, call.causal, state, state[0], scale=call.scale,
    )  # fmt: skip
    return dq, dk, dv


def _efficient_supports(call: Call, has_dlse: bool) -> bool:
    """The memory-efficient kernels of torch, the only fused ones for float32; rows are loaded 16 bytes at a time."""
    single = call.q.is_cuda and call.q.dtype == torch.float32
    return single and call.plain and not has_dlse and call.q.shape[-1] % 4 == 0


def _efficient_forward(call: Call) -> tuple[Tensor, Tensor]:
    k, v = _per_query_head(call.k, call), _per_query_head(call.v, call)
    results = _torch_compat.cuda_efficient_attention()(call.q, k, v, None, True, 0.0, call.causal, scale=call.scale)
    return results[0], results[1][..., : call.q.shape[2]]


def _efficient_backward(
    call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = _per_query_head(call.k, call), _per_query_head(call.v, call)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=math.inf)
    state = torch.zeros((), dtype=torch.int64, device=call.q.device)  # without dropout it is not read
    dq, dk, dv, _ = _torch_compat.cuda_efficient_attention_backward()(
        dout, call.q, k, v, None, out, padded, state, state, 0.0, [True, True, True, False], call.causal,
        scale=call.scale,
    )  # fmt: skip
    return dq, _per_kv_head(dk, call), _per_kv_head(dv, call)


# Blockwise arithmetic ------------------------------------------------------------------------------------------------


def _blockwise_forward(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v = _grouped(call)
    batch, kv_heads, groups, rows, _ = q.shape
    out = v.new_zeros((batch, kv_heads, groups, rows, v.shape[-1]))
    lse = q.new_full((batch, kv_heads, groups, rows), -math.inf)
    for row, columns in _tiles(call):
        # The running softmax: scores so far have maximum `top`, `total` is the sum of exp(score - top).
        top = q.new_full((batch, kv_heads, groups, row.stop - row.start, 1), -math.inf)
        total, acc = torch.zeros_like(top), torch.zeros_like(out[..., row, :])
        for column in columns:
            scores = _masked(call, _scores(call, q, k, row, column), row, column)
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            # A row that has seen no key yet has top = -inf: subtract 0, so that exp gives 0 and not NaN.
            shift = new_top.masked_fill(new_top == -math.inf, 0.0)
            weights, keep = torch.exp(scores - shift), torch.exp(top - shift)
            total = total * keep + weights.sum(-1, keepdim=True)
            acc = acc * keep + _matmul(_kept(call, weights, row, column), v[..., column, :])
            top = new_top
        shift = top.masked_fill(top == -math.inf, 0.0)
        out[..., row, :] = acc / total.masked_fill(total == 0, 1.0)
        lse[..., row] = (shift + total.log()).squeeze(-1)
    return out.flatten(1, 2).to(call.q.dtype), lse.flatten(1, 2)


def _blockwise_backward(
    call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, dbias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _grouped(call)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    heads = (k.shape[1], call.groups)
    dout = dout.to(q.dtype).unflatten(1, heads)
    lse = lse.to(q.dtype).unflatten(1, heads).unsqueeze(-1)
    # d lse / d scores = weights, so its gradient enters where the softmax's own row sum leaves.
    centre = (dout * out.to(q.dtype).unflatten(1, heads)).sum(-1, keepdim=True)
    if dlse is not None:
        centre = centre - dlse.to(q.dtype).unflatten(1, heads).unsqueeze(-1)
    empty = lse == -math.inf
    centre, lse = centre.masked_fill(empty, 0.0), lse.masked_fill(empty, math.inf)
    for row, columns in _tiles(call):
        for column in columns:
            free = _scores(call, q, k, row, column)
            scores = _masked(call, free, row, column)
            dweights = _kept(call, _matmul(dout[..., row, :], v[..., column, :].mT), row, column)
            if len(columns) == 1 and dlse is None:
                # Weights rebuilt from a rounded lse are a fifth less exact than those of whole rows.
                weights = torch.softmax(scores, -1).masked_fill(empty[..., row, :], 0.0)
                middle = (weights * dweights).sum(-1, keepdim=True)
            else:
                weights, middle = torch.exp(scores - lse[..., row, :]), centre[..., row, :]
            dscores = weights * (dweights - middle)
            if dbias is not None:
                _add_to_bias(dbias, dscores.flatten(1, 2), row, column)
            if call.softcap is not None:
                dscores = dscores * (1 - (free / call.softcap).square())
            dscores = dscores * call.scale
            dq[..., row, :] += _matmul(dscores, k[..., column, :])
            dk[..., column, :] += _matmul_over_rows(dscores, q[..., row, :])
            dv[..., column, :] += _matmul_over_rows(_kept(call, weights, row, column), dout[..., row, :])
    dtype = call.q.dtype
    return dq.flatten(1, 2).to(dtype), dk.to(dtype), dv.to(dtype)


def _grouped(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as [B, Hkv, G, Sq, D] keys and values as [B, Hkv, Skv, D], in at least float32."""
    dtype = torch.float32 if call.q.dtype in HALF_DTYPES else call.q.dtype
    q = call.q.to(dtype).unflatten(1, (call.k.shape[1], call.groups))
    return q, call.k.to(dtype), call.v.to(dtype)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """[B, Hkv, G, R, N] @ [B, Hkv, N, M] without expanding the right side over the group."""
    product: Tensor = (left.flatten(2, 3) @ right).unflatten(2, left.shape[2:4])
    return product


def _matmul_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """[B, Hkv, G, R, N]^T @ [B, Hkv, G, R, M] summed over the group: [B, Hkv, N, M]."""
    return left.flatten(2, 3).mT @ right.flatten(2, 3)


def _tiles(call: Call) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of query rows, each with the blocks of keys that some row of it can see."""
    batch, heads, length, _ = call.q.shape
    keys = call.k.shape[2]
    most = max(1, _TILE_ELEMENTS // max(1, batch * heads * _MIN_KEYS))
    rows = min(_MAX_ROWS, most, max(_MIN_ROWS, _TILE_ELEMENTS // max(1, batch * heads * keys)))
    width = max(_MIN_KEYS, _TILE_ELEMENTS // max(1, batch * heads * rows))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        # Positions of the first and last query of the block, counted from the first key.
        first, last = (call.q_offset - call.kv_offset + i for i in (start, stop - 1))
        low, high = 0, keys
        along = call.q_positions is None and call.kv_positions is None
        if call.causal and along:
            high = min(high, last + 1)
        if call.window is not None and along:
            low = max(low, first - call.window + 1)
            high = min(high, last + call.window)
        yield slice(start, stop), [slice(at, min(at + width, high)) for at in range(low, high, width)]


def _scores(call: Call, q: Tensor, k: Tensor, row: slice, column: slice) -> Tensor:
    """The scaled and capped scores of one tile: [B, Hkv, G, rows, columns]."""
    scores = _matmul(q[..., row, :], k[..., column, :].mT) * call.scale
    return scores if call.softcap is None else call.softcap * torch.tanh(scores / call.softcap)


def _masked(call: Call, scores: Tensor, row: slice, column: slice) -> Tensor:
    """The scores of one tile with bias and masks."""
    if call.bias is not None:
        bias = _bias_tile(call, call.bias, row, column)
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias.to(scores.dtype)
    hidden = _hidden(call, row, column)
    return scores if hidden is None else scores.masked_fill(hidden, -math.inf)


def _kept(call: Call, tile: Tensor, row: slice, column: slice) -> Tensor:
    """What dropout leaves of one tile [B, Hkv, G, rows, columns] of probabilities, or of their gradient."""
    if call.keep is None:
        return tile
    keep: Tensor = call.keep[:, :, row, column].unflatten(1, (-1, call.groups))
    return tile * keep * call.kept_scale


def _bias_tile(call: Call, bias: Tensor, row: slice, column: slice) -> Tensor:
    bias = bias[(None,) * (4 - bias.ndim)]
    bias = bias if bias.shape[2] == 1 else bias[:, :, row]
    bias = bias if bias.shape[3] == 1 else bias[..., column]
    heads = (1, 1) if bias.shape[1] == 1 else (-1, call.groups)
    grouped: Tensor = bias.unflatten(1, heads)
    return grouped


def _add_to_bias(dbias: Tensor, dscores: Tensor, row: slice, column: slice) -> None:
    """Add the gradient of one tile of scores, [B, H, rows, columns], to that of the bias."""
    whole = dbias[(None,) * (4 - dbias.ndim)]
    tile = whole if whole.shape[2] == 1 else whole[:, :, row]
    tile = tile if whole.shape[3] == 1 else tile[..., column]
    tile += dscores.sum_to_size(tile.shape)


def _hidden(call: Call, row: slice, column: slice) -> Tensor | None:
    """Which scores of a tile are masked by position or segment, broadcastable to the tile; None for none."""
    device = call.q.device
    query = _positions(row, call.q_offset, call.q_positions, device)[:, None]
    key = _positions(column, call.kv_offset, call.kv_positions, device)[None, :]
    distance = query - key
    hidden: Tensor | None = None
    if call.causal:
        hidden = distance < 0
    if call.window is not None:
        far = (distance if call.causal else distance.abs()) >= call.window
        hidden = far if hidden is None else hidden | far
    if call.segment_ids is not None:
        ids = call.segment_ids
        other = ids[:, query] != ids[:, key]
        other = other[:, None, None]
        hidden = other if hidden is None else hidden | other
    return hidden


def _positions(part: slice, offset: int, positions: Tensor | None, device: torch.device) -> Tensor:
    if positions is not None:
        return positions[part].to(device)
    return torch.arange(part.start, part.stop, device=device) + offset


KERNELS: list[Kernel] = [
    Kernel("cpu-flash", _cpu_flash_supports, _cpu_flash_forward, _cpu_flash_backward),
    Kernel("cudnn", _cudnn_supports, _cudnn_forward, _cudnn_backward),
    Kernel("cuda-flash", _cuda_flash_supports, _cuda_flash_forward, _cuda_flash_backward),
    Kernel("cuda-efficient", _efficient_supports, _efficient_forward, _efficient_backward),
    Kernel("blockwise", lambda call, has_dlse: True, _blockwise_forward, _blockwise_backward),
]
