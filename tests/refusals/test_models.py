"""Models and batches that cannot be captured, or not partitioned soundly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autosp_ir as air
from tests.models import build
from tests.refusals.models import Attends, Between, batch, mystery
from tests.refusals.refusal import refused
from tests.rivals.line import run_line

torch.set_num_threads(1)


def branches(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def loops(x: Tensor) -> Tensor:
    while x.abs().max() > 1:
        x = x / 2
    return x


def reads_a_number(x: Tensor) -> Tensor:
    return x * float(x.detach().mean().item())


def leaves_torch(x: Tensor) -> Tensor:
    return x * float(x.detach().numpy().mean())


def picks(x: Tensor) -> Tensor:
    return x[x[..., 0] > 0].sum() + x


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (branches, ["depends on values"]),
        (loops, ["depends on values"]),
        (reads_a_number, ["depends on values"]),
        (leaves_torch, ["numpy"]),
        (picks, ["depends on the values"]),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_what_one_graph_cannot_hold(function: Callable[[Tensor], Tensor], words: list[str]) -> None:
    model = Between(function)
    with refused(air.CaptureError, *words, source=None if function is leaves_torch else "models.py"):
        air.parallelize(model, batch())


def breaks_the_graph(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x * 2


@pytest.mark.parametrize("function", [breaks_the_graph, torch.compiler.disable(breaks_the_graph)])
def test_what_breaks_a_graph_for_dynamo_alone_is_captured_whole(function: Callable[[Tensor], Tensor]) -> None:
    assert run_line(Between(function), batch(), 2).gathered == []


def test_a_sequence_dimension_that_cannot_be_inferred() -> None:
    model = nn.Linear(8, 8)
    with refused(air.CaptureError, "sequence dimension", "input", "[6, 8]", "seq_dims="):
        air.parallelize(model, (torch.randn(6, 8),))


def test_a_sequence_dimension_that_does_not_exist() -> None:
    model, example = build("llama-gqa")
    with refused(air.CaptureError, "input_idz", "input_ids"):
        air.capture(model, example, seq_dims={"input_idz": 1})
    with refused(air.CaptureError, "input_ids", "2"):
        air.capture(model, example, seq_dims={"input_ids": 2})


def test_inputs_of_different_lengths() -> None:
    model, example = build("llama-gqa")
    with refused(air.CaptureError, "labels", "31"):
        air.capture(model, {**example, "labels": example["labels"][:, 1:]}, seq_dims={"input_ids": 1, "labels": 1})


@pytest.mark.parametrize(("heads", "ranks"), [(6, 4), (2, 4)])
def test_heads_that_the_ranks_do_not_divide(heads: int, ranks: int) -> None:
    program = air.capture(Attends(heads, 2), batch())
    with refused(air.UnsupportedError, f"{heads} query heads", f"{ranks} ranks", source="models.py"):
        air.PassManager(air.DEFAULT_PIPELINE).run(program, mesh={"sp": ranks})


@pytest.mark.parametrize(("heads", "key_heads", "ranks"), [(6, 2, 3), (6, 3, 6), (8, 1, 4), (12, 2, 4)])
def test_key_heads_that_replication_helps(heads: int, key_heads: int, ranks: int) -> None:
    run_line(Attends(heads, key_heads), batch(), ranks)


def test_an_unknown_operation_over_sharded_tokens() -> None:
    model = Between(mystery)
    program = air.capture(model, batch())
    with refused(air.UnsupportedError, "autosp_refusals.mystery", "strict=True", "layout rule", source="models.py"):
        air.PassManager(air.DEFAULT_PIPELINE).run(program, mesh={"sp": 2}, strict=True)
    assert run_line(model, batch(), 2).gathered == ["autosp_refusals.mystery"]


def test_a_batch_without_tensors() -> None:
    model, _ = build("llama-gqa")
    with refused(air.CaptureError, "tensor"):
        air.capture(model, {"use_cache": False})


def test_an_argument_that_forward_does_not_take() -> None:
    model, example = build("plain")
    with refused(air.CaptureError, "target", "targets"):
        air.capture(model, {"idx": example["idx"], "target": example["targets"]})


def test_an_output_that_does_not_exist() -> None:
    model, example = build("plain")
    with refused(air.CaptureError, "perplexity", "loss"):
        air.capture(model, example, outputs=["perplexity"])
