"""Small decoders in plain PyTorch, one per habit of model authors that a rewrite can get wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.correctness.models import HEADS, WIDTH, merged
from benchmarks.correctness.models import Attention as Body
from tests.models.batches import VOCAB, tokens


def heads(x: Tensor) -> Tensor:
    """`[B, S, C]` to `[B, H, S, D]`."""
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over `[B, S, C]`."""
    return merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True))


class Decoder(nn.Module):
    """Embedding, one body with a residual connection, and a head; trained on the next token.

    `body` maps `[B, S, C]` to a tensor that is added to it.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = body
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Map ids and labels `[B, S]` to the loss."""
        x = self.embed(input_ids)
        logits = self.head(self.norm(x + self.body(x)))
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def decoder(body: nn.Module | Callable[[Tensor, Tensor, Tensor], Tensor]) -> Decoder:
    """A decoder around a module, or around a function of queries, keys and values."""
    return Decoder(body if isinstance(body, nn.Module) else Body(body))


def batch(batch_size: int = 2, length: int = 32) -> dict[str, Tensor]:
    """Ids, and labels that are equal to them."""
    ids = tokens(batch_size, length, seed=0)
    return {"input_ids": ids, "labels": ids.clone()}


class Pooled(nn.Module):
    """Adds what a function over all tokens makes of `[B, S, C]`: `[B, 1, C]`."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to `[B, S, C]`."""
        y: Tensor = self.linear(x)
        pooled: Tensor = self.linear(self.pool(y))
        return y * pooled


class Convolved(nn.Module):
    """A causal depthwise convolution over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to `[B, S, C]`."""
        convolved = self.conv(x.transpose(1, 2))[..., : x.shape[1]]
        out: Tensor = self.linear(convolved.transpose(1, 2))
        return out


class Shifted(nn.Module):
    """Mixes every token with a neighbour, as RWKV does."""

    def __init__(self, shift: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to `[B, S, C]`."""
        out: Tensor = self.linear(x + 0.5 * self.shift(x))
        return out


class Flattened(nn.Module):
    """A feed-forward on `[B*T, C]`, positions from `arange(T)`."""

    def __init__(self, length: int = 64) -> None:
        super().__init__()
        self.positions = nn.Embedding(length, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to `[B, S, C]`."""
        b, t, c = x.shape
        flat = (x + self.positions(torch.arange(t, device=x.device))).reshape(b * t, c)
        out: Tensor = self.down(F.gelu(self.up(flat)))
        return out.reshape(b, t, c)


class Checkpointed(nn.Module):
    """A body inside `torch.utils.checkpoint`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to `[B, S, C]`."""
        out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out
