"""Attention of cut queries to keys that every rank has: a learned memory, a pooled summary, a short text.

Nothing travels, and each rank adds its part to the gradients of keys and values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autosp_ir as air
from tests.e2e.line import check_line
from tests.sampling import sampled

_KEYS, _TEXT, _LENGTH, _ENTRIES = 6, 7, 16, 12
_PLAIN = "canonicalize,pad-tokens,token-partition,ulysses,differentiate,remat,grad-sync,lower-comm"
_FULL = (
    "canonicalize{rng=global},pad-tokens{multiple=4},token-partition,ulysses{fuse=qkv},head-chunk{chunks=2},"
    "tile{chunks=2},differentiate{decompose=true},remat,grad-sync{bucket=auto},lower-comm,overlap,offload{smallest=0}"
)
Options = Callable[["Reader", Tensor | None], dict[str, Any]]


class Reader(nn.Module):
    """Tokens that read a memory, or a text that is given, through one attention.

    Args:
        form: A key of `FORMS`.
        heads: Of the queries.
        key_heads: Of keys and values.
    """

    def __init__(self, form: str = "plain", heads: int = 4, key_heads: int = 4) -> None:
        super().__init__()
        self.form, self.heads, self.key_heads = form, heads, key_heads
        torch.manual_seed(0)
        width = 2 * heads
        self.table, self.head = nn.Embedding(_ENTRIES, width), nn.Linear(width, _ENTRIES)
        self.q, self.k, self.v = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * key_heads),
            nn.Linear(width, 2 * key_heads),
        )
        self.memory = nn.Parameter(torch.randn(_KEYS, width))
        self.bias = nn.Parameter(torch.randn(heads, 1, _KEYS))
        self.rows = nn.Parameter(torch.randn(_LENGTH, _KEYS))
        self.rows_of_heads = nn.Parameter(torch.randn(heads, _LENGTH, _KEYS))

    def forward(
        self, input_ids: Tensor, labels: Tensor, text: Tensor | None = None, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = self.table(input_ids)
        source = self.memory.expand(x.shape[0], -1, -1) if text is None else text
        if self.form == "summary":
            source = source + x.mean(1, keepdim=True)
        q = self._split(self.q(x), self.heads)
        k, v = self._split(self.k(source), self.key_heads), self._split(self.v(source), self.key_heads)
        options = FORMS[self.form](self, mask)
        read = F.scaled_dot_product_attention(
            q, k, k if self.form == "keys are values" else v, enable_gqa=self.key_heads != self.heads, **options
        )
        x = x + read.transpose(1, 2).flatten(2)
        if self.form == "again":
            more = F.scaled_dot_product_attention(
                self._split(self.q(x), self.heads), k, v, enable_gqa=self.key_heads != self.heads
            )
            x = x + more.transpose(1, 2).flatten(2) + 0.1 * k.mean() + 0.1 * v.sum()
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}

    @staticmethod
    def _split(x: Tensor, heads: int) -> Tensor:
        split: Tensor = x.unflatten(-1, (heads, 2))
        return split.transpose(1, 2)


FORMS: dict[str, Options] = {
    "plain": lambda model, mask: {},
    "summary": lambda model, mask: {},
    "again": lambda model, mask: {},
    "keys are values": lambda model, mask: {},
    "bias of heads": lambda model, mask: {"attn_mask": model.bias},
    "bias of rows": lambda model, mask: {"attn_mask": model.rows},
    "bias of heads and rows": lambda model, mask: {"attn_mask": model.rows_of_heads},
    "padding": lambda model, mask: {"attn_mask": _expanded(mask)},
    "dropout": lambda model, mask: {"dropout_p": 0.3},
}


def _expanded(mask: Tensor | None) -> Tensor:
    """A padding mask as transformers expands it."""
    assert mask is not None
    return mask[:, None, None, :].expand(-1, 1, _LENGTH, -1)


def batch_of(form: str, text: int = 0, width: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(1)
    batch = {name: torch.randint(0, _ENTRIES, (2, _LENGTH)) for name in ("input_ids", "labels")}
    if text:
        batch["text"] = torch.randn(2, text, width)
    if form == "padding":
        batch["mask"] = torch.ones(2, text or _KEYS, dtype=torch.bool)
        batch["mask"][1, 4:] = False
    return batch


TOKENS = {"input_ids": 1, "labels": 1}


@pytest.mark.parametrize(
    ("form", "ranks", "pipeline"), sampled(itertools.product(sorted(FORMS), [2, 4], [_PLAIN, _FULL]), 3)
)
def test_exact_with_a_memory(form: str, ranks: int, pipeline: str) -> None:
    if form == "dropout":
        pipeline = pipeline.replace("canonicalize,", "canonicalize{rng=global},")
    check_line(Reader(form), batch_of(form), ranks, pipeline, seq_dims=TOKENS)


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (3, 3), (1, 1)])
@pytest.mark.parametrize("form", ["plain", "padding"])
def test_exact_with_any_number_of_heads(form: str, heads: tuple[int, int]) -> None:
    """What is not exchanged need not be divided."""
    check_line(Reader(form, *heads), batch_of(form), 4, _FULL, seq_dims=TOKENS)


@pytest.mark.parametrize("form", ["plain", "padding", "again"])
def test_exact_with_a_short_text_whose_length_nothing_divides(form: str) -> None:
    check_line(Reader(form), batch_of(form, text=_TEXT), 2, _PLAIN, seq_dims=TOKENS)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_nothing_travels_and_nothing_is_gathered(form: str) -> None:
    program = air.capture(Reader(form), batch_of(form), seq_dims=TOKENS)
    result = air.PassManager("canonicalize,pad-tokens,token-partition,ulysses").run(
        program, mesh={"sp": 2}, strict=True
    )
    assert not [*result.program.find("autosp.all_to_all"), *result.program.find("autosp.all_gather")]
    (attention, *_) = result.program.find("autosp.attention")
    assert attention.arg("q").tensor_type.layout["sp"] == air.Shard(2)
    assert any("every rank has all keys" in r.message for r in result.remarks)
