"""Small decoders, one per habit of model authors, and a small Llama; random weights in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, HEADS, LONGEST = 97, 32, 4, 64

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def split(x: Tensor) -> Tensor:
    """`[B, S, C]` to `[B, H, S, D]`."""
    return x.view(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """`[B, H, S, D]` to `[B, S, C]`."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over `[B, S, C]`, as AutoSP expects it: query, key and value by position."""
    return merged(F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True))


def keys_as_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Key and value are one tensor."""
    key = split(k)
    return merged(F.scaled_dot_product_attention(split(q), key, key, is_causal=True)) + v


def shared_by_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two attentions read the same keys and values."""
    key, value = split(k), split(v)
    first = F.scaled_dot_product_attention(split(q), key, value, is_causal=True)
    second = F.scaled_dot_product_attention(split(torch.tanh(q)), key, value, is_causal=True)
    return merged(first + second)


def used_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The keys gate the attention's output."""
    key = split(k)
    return merged(F.scaled_dot_product_attention(split(q), key, split(v), is_causal=True) * torch.sigmoid(key))


def by_keyword(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query, key and value by name."""
    return merged(F.scaled_dot_product_attention(query=split(q), key=split(k), value=split(v), is_causal=True))


class Attention(nn.Module):
    """Three projections and a function of them; maps `[B, S, C]` to the same.

    Args:
        function: Of queries, keys and values.
    """

    def __init__(self, function: Function = attend) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Attend over `[B, S, C]`."""
        return self.function(self.q(x), self.k(x), self.v(x))


class Grouped(nn.Module):
    """Attention with fewer key and value heads, which torch's attention shares out (`enable_gqa`).

    Args:
        kv_heads: Key and value heads.
    """

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * WIDTH // HEADS) for _ in range(2))
        self.kv_heads = kv_heads

    def forward(self, x: Tensor) -> Tensor:
        """Attend over `[B, S, C]`."""
        k, v = (
            y.view(y.shape[0], y.shape[1], self.kv_heads, WIDTH // HEADS).transpose(1, 2)
            for y in (self.k(x), self.v(x))
        )
        return merged(F.scaled_dot_product_attention(split(self.q(x)), k, v, is_causal=True, enable_gqa=True))


class Mixed(nn.Module):
    """A linear layer behind something that reads other tokens.

    Args:
        mix: A function of `[B, S, C]`.
    """

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same."""
        y: Tensor = self.linear(x)
        return y * self.mix(y)


class Convolution(nn.Module):
    """A causal depthwise convolution over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same."""
        out: Tensor = self.conv(x.transpose(1, 2))[..., :-2].transpose(1, 2)
        return out


class Flat(nn.Module):
    """A feed-forward on `[B*T, C]`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, C]` to the same."""
        b, t, c = x.shape
        out: Tensor = self.down(F.gelu(self.up(x.reshape(b * t, c))))
        return out.reshape(b, t, c)


class DroppedOut(nn.Module):
    """A feed-forward with dropout between its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same."""
        out: Tensor = self.down(self.dropout(F.gelu(self.up(x))))
        return out


class Positions(nn.Module):
    """Learned positions, numbered by `arange(T)`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(LONGEST, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, C]` to the same."""
        out: Tensor = x + self.table(torch.arange(x.shape[1], device=x.device))
        return out


class Checkpointed(nn.Module):
    """A layer inside `torch.utils.checkpoint`.

    Args:
        inner: The layer.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` as `inner` does."""
        out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out


class Decoder(nn.Module):
    """Embedding, layers with residual connections, and a head.

    Labels belong to the position that they stand at: nothing is shifted, so that an error is that of the layers.

    Args:
        layers: Each maps `[B, S, C]` to the same.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Map ids and labels `[B, S]` to the mean loss over labels that are not -100."""
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        logits = self.head(self.norm(x))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def llama(heads: int = 4, kv_heads: int = 4) -> nn.Module:
    """A Llama of two layers from transformers, whose attention is torch's.

    Args:
        heads: Query heads.
        kv_heads: Key and value heads.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 8 * heads,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**settings))
