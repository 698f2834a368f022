"""The loss is the mean over all valid tokens of the batch, wherever they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autosp_ir as air
from tests.models import build
from tests.rivals.line import run_line, run_sharded


@pytest.mark.parametrize("ranks", [2, 4])
def test_labels_are_shifted_before_they_are_cut(ranks: int) -> None:
    model, batch = build("llama-gqa", length=32)
    line = run_sharded(model, batch, ranks)
    assert line.result.program.mesh == {"sp": ranks}


def test_ignored_labels_are_counted_over_all_ranks() -> None:
    model, batch = build("llama-gqa", length=1024, num_hidden_layers=1)
    # Most of them in the first shard, so that a mean of means would be far off.
    batch["labels"][:, :280] = -100
    batch["labels"][:, 1000:1020] = -100
    run_sharded(model, batch, 4)


def test_a_shard_without_valid_labels() -> None:
    model, batch = build("llama-gqa", length=32, ignored_from=16)
    run_sharded(model, batch, 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(side: str) -> None:
    model, batch = build("llama-gqa", batch_size=2, length=32)
    padding = slice(0, 12) if side == "left" else slice(20, 32)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, padding] = 0
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    run_sharded(model, {**batch, "attention_mask": mask}, 2)


def test_a_mask_of_ones_costs_nothing() -> None:
    model, batch = build("llama-gqa", batch_size=2)
    line = run_sharded(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}, 2)
    attentions = line.result.program.find("autosp.attention")
    assert attentions and all(n.arg("causal") and n.arg("bias") is None for n in attentions)


def test_no_attention_mask_leaves_no_square_value() -> None:
    model, batch = build("llama-gqa", length=32)
    line = run_sharded(model, batch, 2)
    forward = air.PassManager("canonicalize").run(air.capture(model, batch)).program
    assert air.token_factors(forward).with_two_axes() == []
    assert all(n.arg("bias") is None for n in line.result.program.find("autosp.attention"))


@pytest.mark.parametrize(("length", "ranks"), [(33, 2), (30, 4), (5, 4)])
def test_a_length_that_the_ranks_do_not_divide(length: int, ranks: int) -> None:
    model, batch = build("llama-gqa", batch_size=2, length=length)
    line = run_line(model, batch, ranks)
    assert line.gathered == [] and line.whole_products == []


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"ignored": 7}])
def test_a_mean_over_a_batch(settings: dict[str, Any]) -> None:
    model, batch = build("plain", **settings)
    run_sharded(model, batch, 4)
