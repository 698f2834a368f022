"""Models that an examination ends in different ways on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.batches import VOCAB, tokens


class Mixes(nn.Module):
    """Token embeddings, a mean over each sequence added back, and the next token's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Map ids and labels `[B, S]` to the loss."""
        x = self.embed(input_ids)
        x = x + torch.cummax(x, dim=1).values
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Whole(nn.Module):
    """Images cut into patches by a convolution over height and width: nothing of it keeps its rows cut."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Map pixels `[B, 3, H, W]` and labels `[B]` to the loss."""
        return F.cross_entropy(self.head(self.patches(pixels).flatten(2).mean(2)), labels)


def mixes(length: int = 24) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with an operation that no rule keeps cut."""
    torch.manual_seed(0)
    ids = tokens(2, length, seed=0)
    return Mixes(), {"input_ids": ids, "labels": ids.clone()}


def whole() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of which nothing can be cut."""
    torch.manual_seed(0)
    return Whole(), {"pixels": torch.randn(2, 3, 16, 16), "labels": torch.tensor([1, 4])}


def not_a_model() -> str:
    """What is no model and batch."""
    return "nothing"
