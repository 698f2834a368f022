"""Attention that learns more than its projections: recognised, cut along the tokens, exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autosp_ir as air
from autosp_ir.ir.types import Shard
from tests.e2e.attention_forms import FORMS, LONGEST, Biased, KeptSink, Relative, batch
from tests.e2e.line import check_dynamic
from tests.models.batches import tokens
from tests.passes import attention_spellings as spell
from tests.rivals.forms import language_model
from tests.rivals.line import run_line, run_sharded
from tests.sampling import sampled

torch.set_num_threads(1)


@pytest.mark.parametrize(("ranks", "length"), [(2, 16), (4, 13)])
@pytest.mark.parametrize("name", FORMS)
def test_exact_on_cut_tokens(name: str, ranks: int, length: int) -> None:
    line = run_sharded(FORMS[name](), batch(length), ranks)
    assert line.attentions


@pytest.mark.parametrize("name", sampled(FORMS, 3))
def test_exact_at_another_length_than_captured(name: str) -> None:
    check_dynamic(FORMS[name](), batch(12), batch(13), 2)


@pytest.mark.parametrize(("ranks", "length"), [(2, 16), (4, 13)])
@pytest.mark.parametrize("spelling", [spell.merged, spell.merged_bias, spell.capped])
def test_spellings_on_cut_tokens(spelling: spell.Attention, ranks: int, length: int) -> None:
    run_sharded(spell.Decoder(spelling), spell.batch(length), ranks)


def test_a_bias_per_head_follows_its_heads_once() -> None:
    line = run_line(Relative(), batch(16), 4)
    assert len(line.attentions) == 2
    bias = {n.arg("bias") for n in line.result.program.find("autosp.attention")}
    assert [b.tensor_type.shape for b in bias] == [(1, 1, 16, 16)], "both read one exchange, of one head"
    assert any("[1, 1, 16, 16] of 1024 bytes" in r.message for r in line.result.remarks)


def test_a_bias_whose_gradient_would_stay_partial_is_refused() -> None:
    program = air.capture(Biased(LONGEST, LONGEST), batch(16))
    resolved = air.PassManager("canonicalize,token-partition,ulysses").run(program, mesh={"sp": 2}).program
    (node,) = resolved.find("autosp.attention")
    entry = node.arg("bias").producer
    assert entry.op.name == "autosp.invariant_to_replicate"
    with pytest.raises(air.LayoutError, match="needs a gradient"):
        air.Rewriter(resolved, "wrong").set_arg(node, "bias", entry.operands[0])
        resolved.verify()


@pytest.mark.parametrize(
    ("ranks", "length", "target"), [pytest.param(2, 15, 15, marks=pytest.mark.long), (4, 14, 14), (2, 16, 9)]
)
def test_t5(ranks: int, length: int, target: int) -> None:
    import transformers as hf

    torch.manual_seed(0)
    kind: Any = hf.T5Config
    config = kind(
        vocab_size=97, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=12,
    )  # fmt: skip
    ids = {"input_ids": tokens(2, length, 0), "labels": tokens(2, target, 1)}
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -3:] = 0
    line = run_line(hf.T5ForConditionalGeneration(config), {**ids, "attention_mask": mask}, ranks)
    assert not line.gathered or target != length


def test_a_softmax_that_keeps_another_column_is_no_sink() -> None:
    line = run_line(KeptSink(), batch(16), 2)
    assert line.attentions == [] and line.gathered


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_sinks_of_gpt_oss_at_an_odd_length(ranks: int) -> None:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.GptOssConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, pad_token_id=0, layer_types=["sliding_attention", "full_attention"],
        num_local_experts=2, num_experts_per_tok=1, sliding_window=4,
    )  # fmt: skip
    line = run_line(*language_model(config, 2, 13), ranks)
    found = [(n.arg("causal"), n.arg("window"), n.arg("bias")) for n in line.result.program.find("autosp.attention")]
    assert found == [(True, 4, None), (True, None, None)] and line.attentions == [Shard(1)] * 2
