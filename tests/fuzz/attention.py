"""Masks, biases and sources of keys that attention has in models, put into the blocks of a random model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.e2e.random_attention import Attention, Batch
from tests.e2e.random_models import RandomModel

Attend = Callable[["Form", Tensor, Tensor, Tensor, Batch], Tensor]


class Form(nn.Module):
    """What an attention of a random model does with q, k and v.

    Args:
        attend: A function of `[B, H, S, D]` tensors.
        heads: Query heads.
        width: Of one head.
    """

    def __init__(self, attend: Attend, heads: int, width: int) -> None:
        super().__init__()
        self.attend = attend
        self.slopes = nn.Parameter(torch.rand(heads))
        self.relative = nn.Parameter(torch.randn(2, 64) / 4)
        self.latents = nn.Parameter(torch.randn(5, heads * width) / 4)
        self.q_norm, self.k_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Keys and values get as many heads as the queries."""
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return self.attend(self, q, k, v, batch)


def use_form(model: nn.Module, name: str) -> None:
    """Let every attention of a random model attend in this form; "none" keeps their own spelling."""
    if name == "none" or not isinstance(model, RandomModel):
        return
    for block in model.attentions:
        assert isinstance(block, Attention)
        block.form = Form(FORMS[name], block.heads, block.head_width)
        block.form.requires_grad_(block.q.weight.requires_grad)


def _distance(q: Tensor) -> Tensor:
    at = torch.arange(q.shape[2], device=q.device)
    return at[:, None] - at


def _window(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    distance = _distance(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 5))


def _alibi(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    heads = torch.arange(1, q.shape[1] + 1, device=q.device)
    bias = -(2.0**-heads)[:, None, None] * _distance(q).abs()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def _learned_slopes(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    bias = form.slopes[:, None, None] * _distance(q).abs().neg()
    scores = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).masked_fill(_distance(q) < 0, -math.inf)
    return scores.softmax(-1) @ v


def _packed(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    document = (batch[0] == 0).cumsum(1)
    same = (document[:, :, None] == document[:, None]) & (_distance(q) >= 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same[:, None])


def _key_padding(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    keep = (batch[1] >= 0)[:, None, None, :] & (_distance(q) >= 0)
    # A query that sees nothing would be undefined.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep | (_distance(q) == 0))


def _capped(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    scores = 3 * torch.tanh(q @ k.mT / math.sqrt(q.shape[-1]) / 3)
    return scores.masked_fill(_distance(q) < 0, -math.inf).softmax(-1) @ v


def _normalised(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    return F.scaled_dot_product_attention(form.q_norm(q), form.k_norm(k), v, is_causal=True, scale=1.0)


def _sinks(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    scores = (q @ k.mT * 0.5).masked_fill(_distance(q) < 0, -math.inf)
    sink = form.slopes.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


def _latent_keys(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    memory = form.latents.view(1, 5, q.shape[1], q.shape[3]).transpose(1, 2).expand(q.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(q, memory, memory) + F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _latent_queries(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    memory = form.latents.view(1, 5, q.shape[1], q.shape[3]).transpose(1, 2).expand(q.shape[0], -1, -1, -1)
    read = F.scaled_dot_product_attention(memory, k, v)
    return F.scaled_dot_product_attention(q, read, read)


def _prefix(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    seen = (_distance(q) >= 0) | (torch.arange(q.shape[2], device=q.device) < 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _shorter_keys(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2])


def _rotary(form: Form, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    angle = torch.arange(q.shape[2], device=q.device)[:, None] * torch.tensor([1.0, 0.1], device=q.device)
    angle = torch.cat([angle, angle], -1)[:, : q.shape[-1]].to(q.dtype)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    return F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)


FORMS: dict[str, Attend] = {
    "window": _window,
    "alibi": _alibi,
    "learned-slopes": _learned_slopes,
    "packed": _packed,
    "key-padding": _key_padding,
    "capped": _capped,
    "normalised": _normalised,
    "sinks": _sinks,
    "latent-keys": _latent_keys,
    "latent-queries": _latent_queries,
    "prefix": _prefix,
    "shorter-keys": _shorter_keys,
    "rotary": _rotary,
}
