"""Random small decoders and encoders, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.e2e.random_attention import SHARING, SPELLINGS, Attention, Shared
from tests.e2e.random_parts import HEADS, MIXERS, MLPS, NORMS, WIDTH

VOCAB = 13
LOSSES = ("cross-entropy", "sum", "smoothed", "weighted", "nll", "mse", "masked-mean", "pooled", "z-loss", "logits")
POSITIONS = ("none", "learned", "computed", "counted")


@dataclass(frozen=True)
class Recipe:
    """What a model is made of; prints as what a failing test needs."""

    seed: int
    loss: str
    positions: str
    norm: str
    mlp: str
    spelling: str
    sharing: str
    kv_heads: int
    mixer: str
    bias: bool
    layers: int
    tied: bool
    frozen: bool
    length: int
    batch_size: int
    heads: int = HEADS

    def __str__(self) -> str:
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


def draw(seed: int, mixers: bool) -> Recipe:
    """A recipe; with `mixers` the tokens also meet outside attention."""
    rng = random.Random(seed)
    return Recipe(
        seed=seed,
        loss=rng.choice(LOSSES),
        positions=rng.choice(POSITIONS),
        norm=rng.choice(sorted(NORMS)),
        mlp=rng.choice(sorted(MLPS)),
        spelling=rng.choice(SPELLINGS),
        sharing=rng.choice(SHARING),
        kv_heads=rng.choice((HEADS, HEADS, 2, 1)),
        mixer=rng.choice(sorted(MIXERS)) if mixers else "none",
        bias=rng.random() < 0.5,
        layers=rng.choice((1, 2)),
        tied=rng.random() < 0.3,
        frozen=rng.random() < 0.3,
        length=rng.choice((8, 12, 15, 21)),
        batch_size=rng.choice((1, 2, 3)),
    )


class RandomModel(nn.Module):
    """A model of a recipe, called as `model(input_ids=…, labels=…)`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        r = self.recipe = recipe
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Embedding(64, WIDTH) if r.positions in ("learned", "counted") else None
        self.norms = nn.ModuleList([NORMS[r.norm]() for _ in range(2 * r.layers)])
        self.attentions = nn.ModuleList(
            [Attention(r.spelling, r.sharing, r.kv_heads, r.bias, r.heads) for _ in range(r.layers)]
        )
        self.mlps = nn.ModuleList([MLPS[r.mlp](r.bias) for _ in range(r.layers)])
        self.mixer = MIXERS[r.mixer]() if r.mixer != "none" else nn.Identity()
        self.head = nn.Linear(WIDTH, VOCAB, bias=r.bias)
        self.register_buffer("class_weight", torch.rand(VOCAB) + 0.5)
        if r.tied:
            self.head.weight = self.embed.weight
        if r.frozen:
            self.attentions[0].requires_grad_(False)
            self.head.requires_grad_(False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids) + self._positions(input_ids)
        shared: Shared | None = None
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            y, shared = attention(self.norms[2 * i](x), shared, (input_ids, labels))
            x = x + y
            x = self.mixer(x) if i == 0 else x
            x = x + mlp(self.norms[2 * i + 1](x))
        return self._loss(x, labels)

    def _positions(self, ids: Tensor) -> Tensor | float:
        if self.places is None and self.recipe.positions == "none":
            return 0.0
        at = torch.arange(ids.shape[1], device=ids.device)
        if self.recipe.positions == "counted":
            at = torch.ones_like(ids).cumsum(1) - 1
        if self.places is not None:
            places: Tensor = self.places(at)
            return places
        angle = at[:, None] * torch.arange(1, WIDTH + 1, device=ids.device) / 7
        return torch.cat([angle.sin()[:, ::2], angle.cos()[:, ::2]], -1)[None].to(self.embed.weight.dtype)

    def _loss(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        kind = self.recipe.loss
        if kind == "pooled":
            return {"loss": F.cross_entropy(self.head(x.mean(1)), labels[:, 0].clamp(min=0))}
        if kind == "mse":
            return {"loss": F.mse_loss(x, torch.sin(x.detach()))}
        logits = self.head(x)
        if kind == "logits":
            return {"logits": logits}
        if kind == "masked-mean":
            keep = labels[:, 1:] >= 0
            each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
            return {"loss": (each * keep).sum() / keep.sum().clamp(min=1)}
        if kind == "z-loss":
            z = torch.logsumexp(logits, -1).pow(2).mean()
            return {"loss": _shifted(logits, labels) + 1e-2 * z, "logits": logits}
        return {"loss": _shifted(logits, labels, kind, self.class_weight)}


def _shifted(logits: Tensor, labels: Tensor, kind: str = "cross-entropy", weight: Any = None) -> Tensor:
    flat, target = logits[..., :-1, :].reshape(-1, VOCAB), labels[..., 1:].reshape(-1)
    if kind == "sum":
        return F.cross_entropy(flat, target, reduction="sum") / 10
    if kind == "smoothed":
        return F.cross_entropy(flat, target, label_smoothing=0.1)
    if kind == "weighted":
        return F.cross_entropy(flat, target, weight=weight)
    if kind == "nll":
        return F.nll_loss(F.log_softmax(flat, -1), target)
    return F.cross_entropy(flat, target)


def build_random(recipe: Recipe) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and a batch, both from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    model = RandomModel(recipe)
    ids = torch.randint(0, VOCAB, (recipe.batch_size, recipe.length))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    labels[:, 0], labels[:, 1] = ids[:, 0], ids[:, 1]
    return model, {"input_ids": ids, "labels": labels}
