"""Losses of which one term has no gradient: what is summed over ranks meets what every rank computes alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.e2e.line import check_line
from tests.models.batches import VOCAB, tokens


class FrozenTerm(nn.Module):
    """A mean over tokens without a gradient, one over pooled tokens, and one over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.pooled, self.each = nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.embed.requires_grad_(False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Ids `[B, S]` to the loss."""
        x = self.embed(input_ids)
        pooled = self.pooled(x.amax(1)).tanh().mean()
        return {"loss": x.tanh().mean() + pooled + self.each(x).tanh().mean()}


@pytest.mark.parametrize(("ranks", "length"), [(2, 8), (3, 8)])
def test_a_frozen_term_beside_trained_ones(ranks: int, length: int) -> None:
    check_line(FrozenTerm(), {"input_ids": tokens(2, length, seed=0)}, ranks)
