"""Decoders whose attention learns more than its projections, written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.batches import VOCAB, tokens

WIDTH, HEADS, LONGEST = 16, 4, 32


class Decoder(nn.Module):
    """Embedding, one attention of 4 heads over 2 key heads, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of `[B, H, S, D]` tensors of as many heads."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Ids and labels `[B, S]` to the loss."""
        b, s = input_ids.shape
        x = self.embed(input_ids)
        q = self.q(x).view(b, s, HEADS, -1).transpose(1, 2)
        k, v = self.kv(x).view(b, s, 2, HEADS // 2, -1).permute(2, 0, 3, 1, 4).repeat_interleave(2, dim=2)
        y = self.attend(q, k, v).transpose(1, 2).reshape(b, s, WIDTH)
        return {"loss": F.cross_entropy(self.head(x + y).flatten(0, 1), labels.flatten())}


def later(q: Tensor) -> Tensor:
    """Bool `[S, S]`: the keys that a query must not see."""
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)


class Sinks(Decoder):
    """One learned logit per head joins the softmax.

    Args:
        first: Whether the sink is the first column.
        shifted: Whether the row maximum is subtracted.
    """

    def __init__(self, first: bool = False, shifted: bool = True) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.first, self.shifted = first, shifted

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax over keys and sink; the sink's weight is dropped."""
        scores = (q @ k.mT * 0.7).masked_fill(later(q), -math.inf)
        sink = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        logits = torch.cat([sink, scores] if self.first else [scores, sink], -1)
        if self.shifted:
            logits = logits - logits.max(dim=-1, keepdim=True).values
        weights = logits.softmax(-1)
        return (weights[..., 1:] if self.first else weights[..., :-1]) @ v


class SinkOfEachQuery(Sinks):
    """The sink's logit is a function of the query."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Sinks`."""
        scores = (q @ k.mT).masked_fill(later(q), -math.inf)
        sink = q.sum(-1, keepdim=True) * self.sinks[:, None, None]
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


class SinkBesideSoftmax(Sinks):
    """Attention times the share of the keys, from the logarithms of the softmax's denominators."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`first` says that the last dimension of the logarithms is kept."""
        scores = (q @ k.mT * 0.7).masked_fill(later(q), -math.inf)
        sums = scores.logsumexp(-1, keepdim=True) if self.first else scores.logsumexp(-1).unsqueeze(-1)
        share = (sums - self.sinks[:, None, None]).float().sigmoid()
        return scores.softmax(-1) @ v * share.to(q.dtype)


class KeptSink(Sinks):
    """No sink: the last column of the softmax stays, and the first is dropped."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax over keys and one more."""
        sink = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        return torch.cat([q @ k.mT, sink], -1).softmax(-1)[..., 1:] @ v


class Biased(Decoder):
    """Causal attention with a learned bias.

    Args:
        shape: Of the bias before it is cut to the length; an extent of `LONGEST` runs over tokens.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(*shape))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scores, bias, mask, softmax."""
        bias = self.bias[..., : q.shape[2]]
        if bias.ndim > 1 and bias.shape[-2] > 1:
            bias = bias[..., : q.shape[2], :]
        return (q @ k.mT + bias).masked_fill(later(q), -math.inf).softmax(-1) @ v


class Relative(Decoder):
    """Attention both ways with a learned bias per head and distance, shared by two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.distances = nn.Embedding(2 * LONGEST, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The second attention reads the first one's result as queries."""
        i = torch.arange(q.shape[2])
        bias = self.distances(i[:, None] - i + LONGEST).permute(2, 0, 1)[None]
        for _ in range(2):
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return q


FORMS: dict[str, Callable[[], Decoder]] = {
    "sinks": Sinks,
    "sinks in front": lambda: Sinks(first=True, shifted=False),
    "sink of each query": SinkOfEachQuery,
    "sink beside the softmax": SinkBesideSoftmax,
    "sink beside the softmax, of kept dimension": lambda: SinkBesideSoftmax(first=True),
    "bias for all heads": lambda: Biased(LONGEST, LONGEST),
    "bias per head": lambda: Biased(1, HEADS, LONGEST, LONGEST),
    "bias per head and key": lambda: Biased(HEADS, 1, LONGEST),
    "bias per distance": Relative,
}


def batch(length: int) -> dict[str, Tensor]:
    """Two rows of ids and labels."""
    return {"input_ids": tokens(2, length, seed=0), "labels": tokens(2, length, seed=1)}
