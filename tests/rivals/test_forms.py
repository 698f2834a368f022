"""Model forms beyond plain causal decoders: each is exact, or refused by name before a step runs."""

from __future__ import annotations

from typing import cast

import pytest
import torch
import transformers

import autosp_ir as air
from autosp_ir.testing import DenseReference
from tests.gloo import run_ranks
from tests.rivals.bodies import form_errors
from tests.rivals.forms import FORMS, language_model
from tests.rivals.line import run_line
from tests.sampling import sampled

EXACT, GATHERED = "exact", "exact, partly replicated"

OUTCOMES: dict[str, str] = {
    "mistral_window": EXACT,
    "qwen2_window": EXACT,
    "gemma3_windows": EXACT,
    "packed_with_cache": EXACT,
    "packed": EXACT,
    "padded_left": EXACT,
    "padded_right": EXACT,
    "padded_odd_length": EXACT,
    "padded_window": EXACT,
    "alibi_bloom": "UnsupportedError: GeLUFunction",
    "alibi_falcon": EXACT,
    "local_attention": EXACT,
    "t5": EXACT,
    "t5_encoder": EXACT,
    "mpnet": EXACT,
    "disentangled_deberta": GATHERED,
    "bert": EXACT,
    "bert_padded": EXACT,
    "bert_classifier": GATHERED,
    "encoder_decoder": EXACT,
    "encoder_decoder_of_unequal_lengths": GATHERED,
    "vit": "CaptureError: seq_dims=",
    "moe_mixtral": GATHERED,
    "moe_qwen2": GATHERED,
    "latent_attention": EXACT,
    "mamba": GATHERED,
    "mamba2": GATHERED,
    "softcap_gemma2": EXACT,
    "sinks_gpt_oss": GATHERED,
    "flex_by_hand": "CaptureError: FlexAttention",
}
"""What becomes of each form on two ranks; a refusal is an error class and words of its message."""


def test_every_form_has_an_outcome() -> None:
    assert FORMS.keys() == OUTCOMES.keys()


@pytest.mark.parametrize("name", sampled(FORMS, 3))
def test_exact_or_refused_by_name(name: str) -> None:
    torch.manual_seed(0)
    model, batch = FORMS[name]()
    expected = OUTCOMES[name]
    if expected in (EXACT, GATHERED):
        line = run_line(model, batch, 2)
        assert (GATHERED if line.gathered else EXACT) == expected, line.gathered
        return
    error, _, words = expected.partition(": ")
    with pytest.raises(getattr(air, error)) as raised:
        run_line(model, batch, 2)
    assert words in str(raised.value) and "What you can do: " in str(raised.value)


def test_flex_attention_of_transformers_is_captured_as_attention() -> None:
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    config._attn_implementation = "flex_attention"
    model, batch = language_model(config)
    program = air.capture(model, batch)
    assert [n.arg("causal") for n in program.find("autosp.attention")] == [True]
    # Flex attention has no backward on the CPU, so the dense side computes the same attention with SDPA.
    cast(transformers.PreTrainedModel, model).config._attn_implementation = "sdpa"
    reference = DenseReference.of(model, batch)
    reference.check(air.PassManager(air.DEFAULT_PIPELINE).run(program, mesh={"sp": 2}).program)


@pytest.mark.parametrize("ranks", [2, 4])
def test_capped_scores_of_an_odd_length(ranks: int) -> None:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Gemma2Config(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, sliding_window=4, attn_logit_softcapping=0.5, pad_token_id=0,
    )  # fmt: skip
    line = run_line(*language_model(config, 2, 13), ranks)
    found = [(n.arg("softcap"), n.arg("window"), n.arg("bias")) for n in line.result.program.find("autosp.attention")]
    assert found == [(0.5, 4, None), (0.5, None, None)] and not line.gathered


@pytest.mark.gloo
@pytest.mark.parametrize("backend", sampled(["aot_eager", "eager"], 2))
def test_forms_with_masks_and_gathers_over_gloo(backend: str) -> None:
    names = ["padded_left", "padded_odd_length", "alibi_falcon", "bert_padded", "moe_mixtral", "t5"]
    names += ["softcap_gemma2", "sinks_gpt_oss"]
    for errors in run_ranks(form_errors, 2, names, backend, timeout=300.0):
        assert max(errors) <= 1e-4, dict(zip(names, errors, strict=True))
