"""One decoder, its attention and loss written in many ways."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB = 29
WIDTH = 16
HEADS = 4

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def _tril(q: Tensor) -> Tensor:
    return torch.tril(torch.ones(q.shape[-2], q.shape[-2], device=q.device))


def _positions(q: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2], device=q.device)
    return i[:, None] >= i[None, :]


def _repeat(x: Tensor, groups: int) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, groups, s, d).reshape(b, h * groups, s, d)


def sdpa_positional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, _repeat(k, 2), _repeat(v, 2), None, 0.0, True)


def sdpa_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True, enable_gqa=True, scale=0.3)


def sdpa_bool_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_positions(q))


def sdpa_float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.triu(torch.full((q.shape[-2], q.shape[-2]), float("-inf")), diagonal=1).to(q.dtype)
    return F.scaled_dot_product_attention(q, _repeat(k, 2), _repeat(v, 2), attn_mask=mask)


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ _repeat(k, 2).transpose(-2, -1) * (1.0 / math.sqrt(k.size(-1)))
    scores = scores.masked_fill(_tril(q)[None, None] == 0, float("-inf"))
    return F.softmax(scores, dim=-1) @ _repeat(v, 2)


def where_min(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, _repeat(k, 2).transpose(-1, -2)) / math.sqrt(k.size(-1))
    scores = torch.where(_positions(q), scores, torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, -1), _repeat(v, 2))


def added_triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[-2], q.shape[-2]), float("-inf"), dtype=q.dtype).triu(1)
    scores = torch.matmul(q / math.sqrt(k.size(-1)), _repeat(k, 2).mT) + mask
    return torch.matmul(scores.softmax(-1).type_as(q), _repeat(v, 2))


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, s, d = q.shape
    k, v = _repeat(k, 2), _repeat(v, 2)
    q3, k3, v3 = (x.reshape(b * h, s, d) for x in (q, k, v))
    scores = torch.bmm(q3, k3.transpose(1, 2)).view(b, h, s, s) * d**-0.5
    scores = scores + (1.0 - _tril(q).to(q.dtype)) * torch.finfo(q.dtype).min
    weights = scores.softmax(-1).view(b * h, s, s)
    return torch.bmm(weights, v3).view(b, h, s, d)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, _repeat(k, 2)) * 0.25
    scores = scores.masked_fill(~_positions(q), float("-inf"))
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), _repeat(v, 2))


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    mask = (i[:, None] >= i[None, :]) & (i[:, None] - i[None, :] < 5)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, _repeat(k, 2).transpose(2, 3)) * 2.0
    scores = torch.tanh(scores / 1.5) * 1.5
    scores = scores.masked_fill(~_positions(q), float("-inf"))
    return scores.softmax(-1, dtype=torch.float64) @ _repeat(v, 2)


def capped_by_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bound = torch.tensor(1.5, dtype=q.dtype)
    scores = bound * torch.tanh(torch.matmul(2.0 * q, _repeat(k, 2).transpose(2, 3)) / bound)
    return torch.where(_positions(q), scores, torch.finfo(q.dtype).min).softmax(-1) @ _repeat(v, 2)


def capped_behind_a_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(q.shape[-2], dtype=q.dtype)
    scores = q @ _repeat(k, 2).mT + (distance[:, None] - distance).abs()
    return (torch.tanh(scores / 3) * 3).masked_fill(~_positions(q), -math.inf).softmax(-1) @ _repeat(v, 2)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch from one end to the other, the mask among them."""
    b, h, s, d = q.shape
    q3, k3, v3 = (x.reshape(b * h, s, d) for x in (q * d**-0.5, _repeat(k, 2), _repeat(v, 2)))
    slopes = 0.5 ** torch.arange(1, h + 1, dtype=q.dtype)
    alibi = (slopes[:, None, None] * torch.arange(s)).repeat(b, 1, 1)
    scores = torch.baddbmm(alibi, q3, k3.transpose(1, 2), beta=0.5)
    scores = scores.masked_fill(~_positions(q), -math.inf)
    return torch.bmm(scores.softmax(-1), v3).view(b, h, s, d)


def merged_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias beside merged heads, another beside separate ones, a mask of each row and head, a sink."""
    b, h, s, d = q.shape
    q3, k3, v3 = (x.reshape(b * h, s, d) for x in (q, _repeat(k, 2), _repeat(v, 2)))
    one = torch.linspace(-1, 1, b * h, dtype=q.dtype)[:, None, None] * torch.arange(s * s).view(s, s)
    other = torch.linspace(1, 2, h, dtype=q.dtype)[:, None, None] * torch.ones(s, s, dtype=q.dtype).triu(2)
    hidden = torch.arange(b * h)[:, None, None] + 1 == torch.arange(s)
    scores = torch.bmm(q3, k3.mT).add(one).masked_fill(hidden, -math.inf).view(b, h, s, s) + other
    sink = torch.arange(b * h, dtype=q.dtype)[:, None, None].expand(b * h, s, 1)
    weights = torch.cat([scores.view(b * h, s, s), sink], -1).softmax(-1)
    return torch.bmm(weights[..., :s], v3).view(b, h, s, d)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ _repeat(k, 2).transpose(2, 3)).softmax(-1) @ _repeat(v, 2)


CAUSAL: dict[str, Attention] = {
    f.__name__: f
    for f in (
        sdpa_positional,
        sdpa_gqa,
        sdpa_bool_mask,
        sdpa_float_mask,
        masked_fill,
        where_min,
        added_triu,
        batched,
        einsum,
    )
}
"""Spellings of causal attention with 4 query and 2 key heads."""


def sliced_view(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), targets[:, 1:].reshape(-1))


def sliced_contiguous(logits: Tensor, targets: Tensor) -> Tensor:
    b, s, v = logits.shape
    shifted = logits[..., :-1, :].contiguous().view(b * (s - 1), v).float()
    return F.cross_entropy(shifted.to(logits.dtype), targets[..., 1:].contiguous().view(-1), ignore_index=3)


def channels_second(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, : logits.shape[1] - 1].transpose(1, 2), targets[:, 1:], reduction="sum")


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), label_smoothing=0.1)


def two_ahead(logits: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits[:, :-2].reshape(-1, VOCAB), -1), targets[:, 2:].reshape(-1))


LOSSES: dict[str, Loss] = {
    f.__name__: f for f in (sliced_view, sliced_contiguous, channels_second, smoothed, two_ahead)
}
"""Spellings of a loss that reads each row's successor."""


class Decoder(nn.Module):
    """Embedding, one grouped-query attention, a head; attention and loss are functions."""

    def __init__(self, attention: Attention = sdpa_gqa, loss: Loss = sliced_view) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.attention = attention
        self.loss = loss
        self.to(torch.float64)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Ids and targets `[B, S]` to the loss."""
        b, s = x.shape
        h = self.embed(x)
        q = self.q(h).view(b, s, HEADS, WIDTH // HEADS).transpose(1, 2)
        k, v = self.kv(h).view(b, s, 2, HEADS // 2, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        out = self.attention(q, k, v).transpose(1, 2).reshape(b, s, WIDTH)
        return {"loss": self.loss(self.head(h + out), y)}


def batch(length: int = 12) -> dict[str, Tensor]:
    """Two rows of ids and targets."""
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randint(0, VOCAB, (2, length), generator=generator) for k in ("x", "y")}
