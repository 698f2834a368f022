"""Attention in the spellings that people use, and sharing of keys and values between and inside blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.e2e.random_parts import HEADS, WIDTH

SPELLINGS = (
    "sdpa-causal",
    "sdpa-full",
    "sdpa-mask",
    "sdpa-grouped",
    "matmul-causal",
    "matmul-full",
    "bmm",
    "einsum",
    "linear",
)
SHARING = ("apart", "k-is-v", "q-is-k", "two-attentions", "k-again", "cross-block")

Shared = tuple[Tensor, Tensor]
Batch = tuple[Tensor, Tensor]
"""Ids and labels `[B, S]`, for masks made of them."""


class Attention(nn.Module):
    """One attention block.

    Args:
        spelling: How softmax(QK)V is written.
        sharing: What is used for keys and values, and what else reads them.
        kv_heads: Fewer key heads than query heads, expanded by hand unless SDPA does it.
        bias: Whether projections have one.
        heads: Query heads, each as wide as if there were four.
    """

    def __init__(self, spelling: str, sharing: str, kv_heads: int, bias: bool, heads: int = HEADS) -> None:
        super().__init__()
        self.spelling, self.sharing, self.kv_heads, self.heads = spelling, sharing, kv_heads, heads
        self.head_width = WIDTH // HEADS
        narrow, wide = kv_heads * self.head_width, heads * self.head_width
        self.form: nn.Module | None = None
        self.q = nn.Linear(WIDTH, wide, bias)
        self.k = nn.Linear(WIDTH, narrow, bias)
        self.v = nn.Linear(WIDTH, narrow, bias)
        self.out = nn.Linear(wide, WIDTH, bias)
        self.second = nn.Linear(WIDTH, wide, bias) if sharing == "two-attentions" else None
        self.back = nn.Linear(narrow, WIDTH, bias) if sharing == "k-again" else None

    def forward(self, x: Tensor, shared: Shared | None = None, batch: Batch | None = None) -> tuple[Tensor, Shared]:
        b, t, _ = x.shape
        q = self._split(self.q(x), self.heads)
        k = self._split(self.k(x), self.kv_heads)
        v = k if self.sharing == "k-is-v" else self._split(self.v(x), self.kv_heads)
        if self.sharing == "q-is-k" and self.kv_heads == self.heads:
            k = q
        if self.sharing == "cross-block" and shared is not None:
            k, v = shared
        y = self._attend(q, k, v, batch)
        if self.second is not None:
            y = y + self._attend(self._split(self.second(x), self.heads), k, v, batch)
        y = self.out(y.transpose(1, 2).reshape(b, t, -1))
        if self.back is not None:
            y = y + torch.tanh(self.back(k.transpose(1, 2).flatten(2)))
        return y, (k, v)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, self.head_width).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch | None = None) -> Tensor:
        if self.form is not None:
            attended: Tensor = self.form(q, k, v, batch)
            return attended
        groups = q.shape[1] // k.shape[1]
        if self.spelling == "sdpa-grouped":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if self.spelling == "sdpa-causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.spelling == "sdpa-full":
            return F.scaled_dot_product_attention(q, k, v)
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        if self.spelling == "sdpa-mask":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        if self.spelling == "linear":
            return F.elu(q) @ (F.elu(k).transpose(2, 3) @ v) / 16
        if self.spelling == "bmm":
            flat = [x.flatten(0, 1) for x in (q, k, v)]
            weights = (torch.bmm(flat[0], flat[1].transpose(1, 2)) * self.head_width**-0.5).softmax(-1)
            return torch.bmm(weights, flat[2]).view_as(q)
        if self.spelling == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q, k) / self.head_width**0.5
            weights = weights.masked_fill(~causal, torch.finfo(q.dtype).min).softmax(-1)
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        scores = q @ k.transpose(-2, -1) / self.head_width**0.5
        if self.spelling == "matmul-causal":
            scores = scores.masked_fill(causal.logical_not(), float("-inf"))
        return torch.softmax(scores, dim=-1) @ v
