"""The cases: what each builds, and what is measured on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.correctness import models
from benchmarks.correctness.models import (
    Attention,
    Checkpointed,
    Convolution,
    Decoder,
    Flat,
    Grouped,
    Mixed,
    Positions,
    llama,
)

Batch = dict[str, Tensor]
Measure = Literal["gradients", "redrawn masks", "repeated collectives", "second program"]
_LONG = 8192
"""AutoSP's rematerialisation begins at 4,096 tokens on a rank."""


@dataclass(frozen=True)
class Case:
    """One model and batch.

    Args:
        name: Of the row.
        model: Makes the model; called with a fixed seed.
        batch: Makes the batch, what `forward` takes by name.
        ranks: Number of ranks.
        measure: "gradients" against the dense model. "redrawn masks": gradients with rematerialisation; for AutoSP
            against its own without it, from the same seeds, since its masks are not those of the dense model.
            "repeated collectives": all-to-alls of forward and backward. "second program": two in one process.
        bytes: Whether the bytes of the all-to-alls are part of the row.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    ranks: int = 2
    measure: Measure = "gradients"
    bytes: bool = False

    def build(self) -> tuple[nn.Module, Batch]:
        """The model in float64 and its batch, the same each time."""
        torch.manual_seed(0)
        return self.model().double(), self.batch()


def plain(length: int = 32, rows: int = 2, ignored: tuple[int, ...] | range = ()) -> Callable[[], Batch]:
    """Ids and labels `[rows, length]`, random and apart, with some positions of every row ignored."""

    def make() -> Batch:
        generator = torch.Generator().manual_seed(1)
        ids, labels = torch.randint(0, models.VOCAB, (2, rows, length), generator=generator)
        labels[:, list(ignored)] = -100
        return {"input_ids": ids, "labels": labels}

    return make


def causal(length: int = 32, padded: int = 0, mask: bool = True) -> Callable[[], Batch]:
    """A row for a causal language model as AutoSP's documentation passes it: labels are the ids, all by name."""

    def make() -> Batch:
        ids = plain(length, 1)()["input_ids"]
        batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(length)[None]}
        seen = torch.ones_like(ids)
        if padded:
            seen[:, -padded:] = 0
            batch["labels"][:, -padded:] = -100
        return {**batch, "attention_mask": seen} if mask else batch

    return make


def _decoder(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Decoder(*(layer() for layer in layers))


def _attention(function: models.Function) -> Callable[[], nn.Module]:
    return _decoder(lambda: Attention(function))


def _mean(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


def _shift(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


_one = _decoder(Attention)
_scattered = (*range(17), 30, 40)

CASES: tuple[Case, ...] = (
    Case("one attention, every label valid (the control)", _one, plain()),
    Case("causal language model of transformers", llama, causal()),
    Case("causal language model of transformers, 4 ranks", llama, causal(), ranks=4),
    Case("19 of 64 labels ignored", _one, plain(64, 1, _scattered)),
    Case("12 of 32 tokens padded", llama, causal(padded=12)),
    Case("one shard without a valid label", _one, plain(ignored=range(16, 32))),
    Case("K and V the same tensor", _attention(models.keys_as_values), plain()),
    Case("K and V shared by two attentions", _attention(models.shared_by_two), plain()),
    Case("K used again after attention", _attention(models.used_again), plain()),
    Case("pooling over tokens", _decoder(Attention, lambda: Mixed(_mean)), plain()),
    Case("conv1d over tokens", _decoder(Attention, Convolution), plain()),
    Case("token shift", _decoder(Attention, lambda: Mixed(_shift)), plain()),
    Case("reshape(B*T, C)", _decoder(Attention, Flat), plain()),
    Case("arange(T) positions", _decoder(Positions, Attention), plain()),
    Case("attention called by keyword", _attention(models.by_keyword), plain()),
    Case("no attention_mask", llama, causal(mask=False)),
    Case("33 tokens on 2 ranks", _one, plain(33)),
    Case("bytes with as many K/V heads as query heads", lambda: llama(8, 8), causal(), bytes=True),
    Case("bytes with 8 query and 2 K/V heads", lambda: llama(8, 2), causal(), bytes=True),
    Case("bytes with 4 query heads and one K/V head", lambda: llama(4, 1), causal(), bytes=True),
    Case("one K/V head that torch's attention shares out", _decoder(lambda: Grouped(1)), plain()),
    Case("attention inside a checkpoint", _decoder(lambda: Checkpointed(Attention())), plain()),
    Case("one of two attentions inside a checkpoint", _decoder(Attention, lambda: Checkpointed(Attention())), plain()),
    Case(
        "dropout, rematerialised",
        _decoder(Attention, models.DroppedOut),
        plain(_LONG, 1),
        measure="redrawn masks",
    ),
    Case(
        "collectives, rematerialised",
        _decoder(Attention, Attention),
        plain(_LONG, 1),
        measure="repeated collectives",
    ),
    Case("second program in one process", _one, plain(), measure="second program"),
)
"""In the order of the table."""
