"""Models that cannot be rewritten soundly, or not for every number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.batches import VOCAB, tokens

WIDTH = 24


class Between(nn.Module):
    """An embedding, a function of `[B, S, C]`, and the next token's loss."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.function = function

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Map ids and labels `[B, S]` to the loss."""
        logits: Tensor = self.head(self.function(self.embed(input_ids)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Attends(nn.Module):
    """Causal attention with a number of query and key heads, the batch dimension first."""

    def __init__(self, heads: int, key_heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, heads * 4)
        self.keys, self.head = nn.Linear(heads * 4, key_heads * 4), nn.Linear(heads * 4, VOCAB)
        self.heads, self.key_heads = heads, key_heads

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Map ids and labels `[B, S]` to the loss."""
        x = self.embed(input_ids)
        q = x.unflatten(2, (self.heads, 4)).transpose(1, 2)
        k = self.keys(x).unflatten(2, (self.key_heads, 4)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        logits = self.head(out.transpose(1, 2).flatten(2))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@torch.library.custom_op("autosp_refusals::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    """An operation that nobody described."""
    return x * 2


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _mystery_gradient(ctx: object, gradient: Tensor) -> Tensor:
    return gradient * 2


mystery.register_autograd(_mystery_gradient)


def batch(length: int = 24) -> dict[str, Tensor]:
    """Ids and equal labels."""
    ids = tokens(2, length, seed=0)
    return {"input_ids": ids, "labels": ids.clone()}
