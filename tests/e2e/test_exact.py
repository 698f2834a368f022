"""Every model of the zoo on simulated ranks, in float64: loss, outputs and every gradient are the dense model's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autosp_ir.testing import DenseReference
from tests.e2e.line import check_dynamic, check_line, partitioned
from tests.e2e.pairwise import pairwise
from tests.models import ZOO, build
from tests.models.batches import IGNORE_INDEX
from tests.sampling import sampled

RANKS = (1, 2, 4, 8)
LENGTHS = (32, 33, 257)
_DYNAMIC_EXAMPLE = 40

FACTORS: dict[str, tuple[Any, ...]] = {
    "name": tuple(ZOO),
    "ranks": RANKS,
    "length": LENGTHS,
    "labels": ("all", "some", "tail"),
    "loss": ("inside", "outside"),
    "batch_size": (1, 3),
}


def every_model_once() -> list[dict[str, Any]]:
    """One case per model; the other settings cycle at different paces, so that they meet in different ways."""
    others = {k: v for k, v in FACTORS.items() if k != "name"}
    return [
        {"name": name}
        | {k: values[(i + i // len(values) * place) % len(values)] for place, (k, values) in enumerate(others.items())}
        for i, name in enumerate(ZOO)
    ]


def without_length(case: Mapping[str, Any]) -> dict[str, Any]:
    return {k: case[k] for k in ("name", "batch_size", "labels", "loss")}


def label(case: Mapping[str, Any]) -> str:
    return "-".join(str(v) for v in case.values())


def ignored(labels: str, length: int) -> dict[str, int]:
    """Zoo settings: scattered labels ignored, or every label of the last half of the shards."""
    return {"all": {}, "some": {"ignored": 5}, "tail": {"ignored_from": length // 2}}[labels]


def outside_loss(labels: str, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The shifted loss that people write around a model, with some targets ignored."""
    ids = next(iter(batch.values()))
    target = ids[:, 1:]
    positions = torch.arange(target.shape[1], device=ids.device)
    if labels == "some":
        target = target.masked_fill(positions % 3 == 0, IGNORE_INDEX)
    if labels == "tail":
        target = target.masked_fill(positions >= target.shape[1] // 2, IGNORE_INDEX)
    logits = output["logits"][:, :-1].float()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index=IGNORE_INDEX)


def prepared(
    name: str, batch_size: int, length: int, labels: str, loss: str, layers: int = 1
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    model, batch = build(
        name, batch_size=batch_size, length=length, num_hidden_layers=layers, **ignored(labels, length)
    )
    if loss == "inside":
        return model, batch, {}
    without_labels = dict(list(batch.items())[:1])
    return model, without_labels, {"loss_fn": functools.partial(outside_loss, labels)}


@pytest.mark.parametrize("case", sampled(pairwise(FACTORS), 2), ids=label)
def test_every_pair_of_settings_is_exact(case: dict[str, Any]) -> None:
    model, batch, settings = prepared(length=case["length"], **without_length(case))
    check_line(model, batch, case["ranks"], **settings)


@pytest.mark.parametrize("case", sampled(every_model_once(), 2), ids=label)
def test_a_program_captured_for_any_length_is_exact(case: dict[str, Any]) -> None:
    model, batch, settings = prepared(length=case["length"], **without_length(case))
    _, example, _ = prepared(length=_DYNAMIC_EXAMPLE, **without_length(case))
    check_dynamic(model, example, batch, case["ranks"], **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_on_every_number_of_ranks_is_exact(name: str) -> None:
    model, batch, _ = prepared(name, batch_size=3, length=33, labels="tail", loss="inside", layers=2)
    reference = DenseReference.of(model, batch)
    for ranks in RANKS:
        reference.check(partitioned(reference.program, ranks))
