"""A small decoder that drops out everywhere, and the same one under masks that are given to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, WIDTH, HEADS = 17, 16, 4

HIDDEN: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "elements": lambda h, on: F.dropout(h, 0.1, on),
    "in place": lambda h, on: F.dropout(h * 1.0, 0.1, on, True),
    "channels": lambda h, on: F.dropout1d(h.transpose(1, 2), 0.3, on).transpose(1, 2),
    "tokens": lambda h, on: F.dropout1d(h, 0.3, on),
    "saturated": lambda h, on: F.alpha_dropout(h, 0.1, on),
    "saturated channels": lambda h, on: F.feature_alpha_dropout(h, 0.3, on),
    "everything": lambda h, on: F.dropout(h, 1.0, on),
}


class Dropping(nn.Module):
    """Dropout of embeddings, probabilities, residuals and the hidden layer of the MLP.

    Args:
        attention: `sdpa`, or in separate operators over `heads` or over heads in the `batch`.
        hidden: A key of `HIDDEN`.
    """

    def __init__(self, attention: str = "sdpa", hidden: str = "elements") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention, self.hidden = attention, hidden
        self.embed, self.qkv, self.out = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.up, self.down, self.head = nn.Linear(WIDTH, 80), nn.Linear(80, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.residual, self.probabilities = nn.Dropout(0.2), nn.Dropout(0.3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.attention == "sdpa":
            p = self.probabilities.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        if self.attention == "batch":
            q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)
        out: Tensor = self.probabilities(weights) @ v
        return out if self.attention == "heads" else out.view(-1, HEADS, *out.shape[1:])

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.residual(self.embed(input_ids))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.residual(self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)))
        x = x + self.down(HIDDEN[self.hidden](F.gelu(self.up(x)), self.training))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Given(nn.Module):
    """Dropout by masks that stand in a queue."""

    def __init__(self, p: float, masks: Iterator[Tensor]) -> None:
        super().__init__()
        self.p, self.masks = p, masks

    def forward(self, x: Tensor) -> Tensor:
        return x * next(self.masks) / (1 - self.p)


def under_masks(model: nn.Module, masks: Sequence[Tensor]) -> nn.Module:
    """Make the dropout modules of a model read these masks, in the order in which they are called."""
    queue = iter(masks)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(parent, name, Given(child.p, queue))
    return model


def batch_of(length: int = 16, batch_size: int = 2) -> dict[str, Tensor]:
    """Random ids and labels, int64 `[batch_size, length]`."""
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randint(0, VOCAB, (batch_size, length), generator=generator) for n in ("input_ids", "labels")}


class Awkward(nn.Module):
    """One key head for four query heads, tokens folded into the batch, and a dropout of what lies transposed in memory.

    torch draws masks in the order in which the elements lie in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.query, self.pair = nn.Embedding(VOCAB, 32), nn.Linear(32, 32), nn.Linear(32, 16)
        self.up, self.down, self.head = nn.Linear(32, 96), nn.Linear(96, 32), nn.Linear(32, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (t.unsqueeze(1).repeat_interleave(4, 1) for t in self.pair(x).chunk(2, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2)
        folded = x.flatten(0, 1) + F.dropout(attended.transpose(1, 2).reshape(-1, 32), 0.1)
        folded = folded + self.down(F.dropout(F.relu(self.up(folded)), 0.2))
        crossed = F.dropout(folded.view(x.shape).transpose(0, 1), 0.1).transpose(0, 1)
        return F.cross_entropy(self.head(crossed).flatten(0, 1), labels.flatten())


def transformer(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny transformers model of one layer with the dropouts that its configuration has by default."""
    import transformers as hf

    attention: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}
    encoder: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, **attention}
    decoder: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, **attention}
    decoder["word_embed_proj_dim"] = decoder["hidden_size"]
    sides: dict[str, Any] = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()}
    pair: dict[str, Any] = {"vocab_size": 97, "d_model": 32, "decoder_start_token_id": 0}
    made: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**encoder)),
        "pooled bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**encoder)),
        "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**decoder)),
        "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**pair, max_position_embeddings=64, **sides)),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**pair, d_kv=8, d_ff=48, num_layers=1, num_heads=4)),
    }
    torch.manual_seed(0)
    model = made[name]().train()
    ids = torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(2))
    return model, {"input_ids": ids, "labels": torch.tensor([0, 1]) if name == "pooled bert" else ids}


_BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
