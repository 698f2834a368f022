"""Rematerialisation repeats no collective and no random draw; checkpoints inside a model lose nothing."""

from __future__ import annotations

from typing import cast

import pytest
import torch
import transformers
from torch import nn

import autosp_ir as air
from benchmarks.correctness.models import Attention as Body
from tests.models import build
from tests.rivals.line import Line, run_line, run_sharded
from tests.rivals.models import Checkpointed, attend, batch, decoder

_ALL_TO_ALL = "_c10d_functional.all_to_all_single"


def with_policy(policy: str) -> str:
    """The default pipeline with another rematerialisation."""
    return air.DEFAULT_PIPELINE.replace("remat", f"remat{{policy={policy}}}")


def collectives(line: Line) -> list[int]:
    """All-to-alls of the forward and of everything behind it."""
    forward = line.count(_ALL_TO_ALL, air.Phase.FORWARD)
    return [forward, line.count(_ALL_TO_ALL) - forward]


def test_min_cut_repeats_no_collective() -> None:
    model, example = build("llama-gqa", length=64)
    counts = {p: collectives(run_line(model, example, 2, with_policy(p))) for p in ("save-all", "min-cut")}
    # q, k, v there and out back in each of two layers, and once more each in the backward.
    assert counts == {"save-all": [8, 8], "min-cut": [8, 8]}


def test_min_cut_recomputes_something_all_the_same() -> None:
    model, example = build("llama-gqa", length=64)
    program = run_line(model, example, 2, with_policy("min-cut")).result.program
    again = [n for n in program.graph.nodes if n.phase is air.Phase.RECOMPUTE]
    assert again
    assert not any(n.op.has(air.Trait.COLLECTIVE) or n.op.has(air.Trait.ATTENTION) for n in again)


@pytest.mark.parametrize("policy", ["save-all", "min-cut"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_masks_are_those_of_the_dense_model_and_never_drawn_twice(name: str, policy: str) -> None:
    """Loss and every gradient under dropout: of embeddings, residuals and attention, and of attention alone."""
    model, example = build(name, length=64, **{"dropout" if name == "gpt2" else "attention_dropout": 0.1})
    pipeline = with_policy(policy).replace("canonicalize", "canonicalize{rng=global}")
    program = run_line(model, example, 2, pipeline).result.program
    drawn = [n for n in program.graph.nodes if n.op.has(air.Trait.RANDOM)]
    assert len(drawn) == {"gpt2": 7, "llama-gqa": 2}[name]
    assert all(n.phase is air.Phase.FORWARD for n in drawn)
    assert any(n.is_op("autosp.keep_mask") for n in program.graph.nodes if n.phase is air.Phase.RECOMPUTE) == (
        policy == "min-cut"
    )


def test_dropout_that_is_switched_off_is_exact() -> None:
    model, example = build("gpt2", dropout=0.1)
    run_sharded(model.eval(), example, 2)


def test_attention_inside_a_checkpoint() -> None:
    line = run_sharded(decoder(Checkpointed(Body(attend))), batch(), 2)
    assert collectives(line) == [4, 4] and len(line.attentions) == 1


def test_checkpoints_of_transformers() -> None:
    model, example = build("llama-gqa")
    dense = run_sharded(model, example, 2)
    cast(transformers.PreTrainedModel, model).gradient_checkpointing_enable()
    line = run_sharded(model, example, 2)
    assert collectives(line) == collectives(dense) == [8, 8]


def test_reentrant_checkpoints_are_refused_by_name() -> None:
    model, example = build("llama-gqa")
    kwargs = {"use_reentrant": True}
    cast(transformers.PreTrainedModel, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    with pytest.raises(air.UnsupportedError, match="CheckpointFunction") as raised:
        air.capture(model, example)
    assert "use_reentrant=False" in str(raised.value)


def test_two_programs_in_one_process() -> None:
    lines = []
    for name, ranks in (("llama-gqa", 2), ("gpt2", 4), ("llama-gqa", 2)):
        model, example = build(name)
        lines.append(run_sharded(model, example, ranks))
    assert str(lines[0].result.program) == str(lines[2].result.program)
    assert lines[0].equivalence.program.ok and lines[1].equivalence.program.ok


def test_two_emitted_steps_of_one_model() -> None:
    model, example = build("llama-gqa")
    torch.manual_seed(0)
    steps = [air.parallelize(model, example, backend=b) for b in ("eager", "aot_eager")]
    found = []
    for step in (*steps, *steps, model):
        model.zero_grad()
        step(**example).loss.backward()
        found.append(gradients(model))
    for other in found[:-1]:
        for name, gradient in found[-1].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
