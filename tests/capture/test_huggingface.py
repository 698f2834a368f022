"""Transformers models: masks are proved or kept, batches are held to what was proved, nothing is left behind."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn

from autosp_ir.capture import huggingface
from autosp_ir.capture.facts import check_facts
from autosp_ir.capture.program import capture
from autosp_ir.errors import RuntimeMismatchError, UnsupportedError
from autosp_ir.ir.program import InputKind, Program
from tests.models import build, llama, mistral

torch.set_num_threads(1)


def assert_same_step(model: nn.Module, program: Program, batch: dict[str, Any]) -> None:
    """The program, run by the simulator on one rank, against the model."""
    from autosp_ir.sim.lockstep import simulate

    model.zero_grad()
    loss = model(**batch)["loss"]
    loss.backward()
    result = simulate(program, batch)
    torch.testing.assert_close(result.loss, loss.detach())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(result.grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def attributes(program: Program) -> set[tuple[Any, ...]]:
    found = program.find("autosp.attention")
    return {(n.arg("causal"), n.arg("window"), n.arg("bias") is not None) for n in found}


def test_positions_that_count_up_are_a_fact() -> None:
    model, tokens = llama(length=16)
    batch: dict[str, Any] = {**tokens, "position_ids": torch.arange(16)[None], "use_cache": False}
    program = capture(model, batch)
    assert attributes(program) == {(True, None, False)}
    assert program.info["batch_facts"] == {"position_ids": "arange"}
    assert_same_step(model, program, batch)
    packed = torch.cat([torch.arange(8), torch.arange(8)])[None]
    with pytest.raises(RuntimeMismatchError, match="position_ids"):
        check_facts(program.info["batch_facts"], {**batch, "position_ids": packed})


def test_a_call_with_the_default_cache_attends_across_packed_positions() -> None:
    model, batch = llama(length=16)
    batch["position_ids"] = torch.cat([torch.arange(6), torch.arange(10)])[None]
    program = capture(model, batch)
    assert attributes(program) == {(True, None, False)}
    assert program.info["batch_facts"] == {}
    assert_same_step(model, program, batch)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_packed_positions_keep_their_mask(dynamic: bool) -> None:
    model, tokens = llama(length=16)
    batch: dict[str, Any] = {
        **tokens,
        "position_ids": torch.cat([torch.arange(6), torch.arange(10)])[None],
        "use_cache": False,
    }
    program = capture(model, batch, dynamic=dynamic)
    assert attributes(program) == {(False, None, True)}
    assert program.info["batch_facts"] == {}
    assert_same_step(model, program, batch)


def test_a_mask_of_ones_is_a_fact() -> None:
    model, batch = llama(batch_size=2, length=16)
    batch["attention_mask"] = torch.ones(2, 16, dtype=torch.int64)
    program = capture(model, batch)
    assert attributes(program) == {(True, None, False)}
    assert program.info["batch_facts"] == {"attention_mask": "ones"}
    padded = batch["attention_mask"].clone()
    padded[1, 12:] = 0
    with pytest.raises(RuntimeMismatchError, match="attention_mask"):
        check_facts(program.info["batch_facts"], {**batch, "attention_mask": padded})


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_kept(side: str) -> None:
    model, batch = llama(batch_size=2, length=16)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, slice(0, 5) if side == "left" else slice(11, 16)] = 0
    batch["attention_mask"] = mask
    batch["labels"][mask == 0] = -100
    program = capture(model, batch)
    assert attributes(program) == {(False, None, True)}
    assert_same_step(model, program, batch)


def test_a_prepared_mask_is_kept() -> None:
    model, batch = llama(length=16)
    mask = torch.zeros(1, 1, 16, 16).masked_fill(torch.ones(16, 16).tril() == 0, float("-inf"))
    mask[..., 10:, 3] = float("-inf")
    batch["attention_mask"] = mask
    program = capture(model, batch)
    assert attributes(program) == {(False, None, True)}
    assert_same_step(model, program, batch)


@pytest.mark.parametrize(("window", "expected"), [(5, 5), (16, None), (4096, None)])
def test_windows_become_attributes(window: int, expected: int | None) -> None:
    model, batch = mistral(length=16, sliding_window=window)
    program = capture(model, batch)
    assert attributes(program) == {(True, expected, False)}
    assert_same_step(model, program, batch)


def test_a_window_of_a_symbolic_length_stays_a_window() -> None:
    model, batch = mistral(length=16, sliding_window=12)
    program = capture(model, batch, dynamic=True)
    assert attributes(program) == {(True, 12, False)}
    _, shorter = mistral(length=9)
    assert_same_step(model, program, shorter)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_any_attention_implementation_is_exchanged(implementation: str) -> None:
    model, batch = build("gpt2", length=16)
    cast(transformers.PreTrainedModel, model).set_attn_implementation(implementation)
    program = capture(model, batch)
    assert attributes(program) == {(True, None, False)}
    assert_same_step(model, program, batch)


def test_an_encoder_is_not_causal() -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model, (_, batch) = BertForMaskedLM(config), llama(length=16)
    program = capture(model, batch)
    assert attributes(program) == {(False, None, False)}
    assert_same_step(model, program, batch)


def test_embeddings_as_input() -> None:
    model, batch = llama(length=16)
    embeds = torch.randn(1, 16, 32, requires_grad=True)
    program = capture(model, {"inputs_embeds": embeds, "labels": batch["labels"]})
    assert program.info["seq_dims"] == {"inputs_embeds": 1, "labels": 1}
    spec = program.signature.input(InputKind.USER_INPUT, "inputs_embeds")
    assert spec is not None and spec.requires_grad


def test_a_model_inside_a_module() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = llama(length=16)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.inner(input_ids=input_ids, labels=labels).loss * 0.5}

    _, batch = llama(length=16)
    model = Scaled()
    program = capture(model, batch)
    assert attributes(program) == {(True, None, False)}
    assert "inner.lm_head.weight" in program.tensors
    assert_same_step(model, program, batch)


def _state(model: nn.Module) -> list[Any]:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    config: Any = model.config
    registered = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
    return [config._attn_implementation, config.use_cache, *(dict(r) for r in registered)]


def test_everything_is_restored() -> None:
    model, batch = llama(length=16)
    before = _state(model)
    capture(model, batch)
    assert _state(model) == before
    broken = {**batch, "labels": batch["labels"].float()}
    with pytest.raises(Exception, match="cannot be captured"):
        capture(model, broken)
    assert _state(model) == before
    assert huggingface.IMPLEMENTATION not in str(before)


@pytest.mark.parametrize("flag", ["use_cache", "output_attentions"])
def test_what_a_step_does_not_return_is_refused(flag: str) -> None:
    model, batch = llama(length=16)
    with pytest.raises(UnsupportedError, match=flag):
        capture(model, {**batch, flag: True})


def test_attention_dropout_is_a_mask_of_its_own() -> None:
    model, batch = llama(length=16, attention_dropout=0.1)
    (node, *_) = capture(model, batch).find("autosp.attention")
    assert node.arg("dropout") == 0.1
    assert node.arg("keep").tensor_type.shape == (*node.arg("q").tensor_type.shape[:3], 16)
    (node, *_) = capture(model.eval(), batch).find("autosp.attention")
    assert node.arg("dropout") == 0 and node.arg("keep") is None


def test_attention_that_sdpa_does_not_compute_keeps_its_operators() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    _, batch = llama(length=16)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config)
    program = capture(model, batch)
    assert attributes(program) == set() and any(n.op.name == "aten.tanh" for n in program.graph.nodes)
    assert_same_step(model, program, batch)


def test_attention_sinks_are_refused_where_stock_attention_ignores_them() -> None:
    model, _ = llama(length=16)
    q = torch.randn(1, 8, 16, 4)
    with pytest.raises(UnsupportedError, match="s_aux"):
        huggingface._attention("layer", model, q, q, q, None, s_aux=torch.zeros(8))
