"""A small causal decoder with grouped queries, and a loss over its tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Decoder(nn.Module):
    """Two layers; `heads` query heads share `kv_heads` key heads; a scale of one for `fold-unit-scale`."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        self.embed = nn.Embedding(53, 32)
        self.query = nn.ModuleList(nn.Linear(32, 8 * heads) for _ in range(2))
        self.pair = nn.ModuleList(nn.Linear(32, 16 * kv_heads) for _ in range(2))
        self.close = nn.ModuleList(nn.Linear(8 * heads, 32) for _ in range(2))
        self.head = nn.Linear(32, 53)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of labels that are already shifted."""
        x = self.embed(input_ids)
        for query, pair, close in zip(self.query, self.pair, self.close, strict=True):
            q = query(x).unflatten(-1, (self.heads, 8)).transpose(1, 2)
            k, v = pair(x).unflatten(-1, (2, self.kv_heads, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
            x = x + close(out.transpose(1, 2).flatten(2)) * 1.0
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def model(heads: int = 4, kv_heads: int = 2, causal: bool = True) -> Decoder:
    """The same weights at every call."""
    torch.manual_seed(0)
    return Decoder(heads, kv_heads, causal)


def batch(length: int = 32) -> dict[str, Tensor]:
    """Two sequences."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(0, 53, (2, 2, length), generator=generator)
    return {"input_ids": ids, "labels": labels}
