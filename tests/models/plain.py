"""A decoder in plain PyTorch, written the way people write their own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.models.batches import IGNORE_INDEX, VOCAB, labels_of, tokens


class PlainBlock(nn.Module):
    """Pre-norm block: fused QKV, SDPA with keyword arguments, a GELU MLP on `[B*T, C]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, C]` to `[B, T, C]`."""
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(b, t, c))
        flat = self.norm2(x).reshape(b * t, c)
        mixed: torch.Tensor = self.down(F.gelu(self.up(flat)))
        return x + mixed.reshape(b, t, c)


class PlainDecoder(nn.Module):
    """Learned positions, `reshape(B*T, C)`, SDPA by keyword, tied head, its own shifted loss.

    Called as `model(idx, targets)`; without targets it returns the logits alone, for a loss outside the model.
    """

    def __init__(self, width: int = 32, heads: int = 8, layers: int = 2, max_length: int = 512) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, width)
        self.positions = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList([PlainBlock(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.tokens.weight
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Map ids and targets `[B, T]` to `{"loss": scalar, "logits": [B, T, V]}`."""
        length = idx.shape[1]
        x = self.tokens(idx) + self.positions(torch.arange(length, device=idx.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return {"logits": logits}
        shifted = logits[:, :-1, :].reshape(-1, VOCAB)
        loss = F.cross_entropy(shifted, targets[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX)
        return {"loss": loss, "logits": logits}


def plain_decoder(
    batch_size: int = 1,
    length: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ignored: int = 0,
    ignored_from: int | None = None,
    heads: int = 8,
    num_hidden_layers: int = 2,
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The plain decoder and a batch for it."""
    torch.manual_seed(seed)
    model = PlainDecoder(heads=heads, layers=num_hidden_layers).to(dtype)
    ids = tokens(batch_size, length, seed)
    return model, {"idx": ids, "targets": labels_of(ids, ignored, ignored_from)}
