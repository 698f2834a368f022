"""One small config per transformers architecture: two layers, width 32, four heads, no dropout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from autosp_ir.capture.from_config import model_from_config
from tests.models.batches import VOCAB

LENGTH = 24

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_HEADS_OF_8 = {"head_dim": 8}
_WINDOW = {"sliding_window": 7}
_ONE_OF_EACH = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
_BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_EXPERTS = {"num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    **_LLAMA_LIKE,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


@dataclass(frozen=True)
class Architecture:
    """A small model of one kind.

    Args:
        group: What kind of model it is.
        config: As in a `config.json`; `model_type` is the architecture's name unless given.
        length: Tokens per sequence.
        settings: Of `air.capture`.
    """

    group: str
    config: Mapping[str, Any]
    length: int = LENGTH
    settings: Mapping[str, Any] = field(default_factory=dict)


def _decoder(*parts: Mapping[str, Any], **more: Any) -> Architecture:
    return Architecture("decoder", {k: v for part in (*parts, more) for k, v in part.items()})


def _encoder(*parts: Mapping[str, Any], **more: Any) -> Architecture:
    return Architecture("encoder", {k: v for part in (*parts, more) for k, v in part.items()})


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder(_LLAMA_LIKE),
    "mistral": _decoder(_LLAMA_LIKE, _WINDOW),
    "qwen2": _decoder(_LLAMA_LIKE),
    "qwen3": _decoder(_LLAMA_LIKE, _HEADS_OF_8),
    "gemma": _decoder(_LLAMA_LIKE, _HEADS_OF_8),
    "gemma2": _decoder(_LLAMA_LIKE, _HEADS_OF_8, _ONE_OF_EACH, attn_logit_softcapping=None),
    "gemma3_text": _decoder(_LLAMA_LIKE, _HEADS_OF_8, _ONE_OF_EACH),
    "phi": _decoder(_LLAMA_LIKE, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0),
    "phi3": _decoder(_LLAMA_LIKE),
    "cohere": _decoder(_LLAMA_LIKE),
    "olmo2": _decoder(_LLAMA_LIKE),
    "glm4": _decoder(_LLAMA_LIKE, _HEADS_OF_8),
    "granite": _decoder(_LLAMA_LIKE),
    "stablelm": _decoder(_LLAMA_LIKE, _NO_DROPOUT),
    "starcoder2": _decoder(_LLAMA_LIKE, residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0),
    "diffllama": _decoder(_LLAMA_LIKE),
    "deepseek_v3": _decoder(_LATENT, first_k_dense_replace=2),
    "gpt2": _decoder(_GPT2_LIKE),
    "gptj": _decoder(_GPT2_LIKE, rotary_dim=4),
    "gpt_neo": _decoder(
        {k: v for k, v in _LLAMA_LIKE.items() if k not in ("num_hidden_layers", "num_attention_heads")},
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=7,
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
    ),
    "gpt_neox": _decoder(_LLAMA_LIKE, _NO_DROPOUT),
    "opt": _decoder(_LLAMA_LIKE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0),
    "bloom": _decoder(_NO_DROPOUT, vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "falcon": _decoder(_LLAMA_LIKE, _NO_DROPOUT),
    "falcon, ALiBi": _decoder(
        _LLAMA_LIKE, _NO_DROPOUT, model_type="falcon", alibi=True, multi_query=False, new_decoder_architecture=False
    ),
    "mpt": _decoder(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64, vocab_size=VOCAB),
    "bert": _encoder(_BERT_LIKE),
    "roberta": _encoder(_BERT_LIKE, max_position_embeddings=66),
    "electra": _encoder(_BERT_LIKE, embedding_size=16),
    "albert": _encoder(_BERT_LIKE, embedding_size=16),
    "distilbert": _encoder(
        vocab_size=VOCAB,
        max_position_embeddings=64,
        n_layers=2,
        n_heads=4,
        dim=32,
        hidden_dim=48,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "modernbert": _encoder(
        _LLAMA_LIKE, global_attn_every_n_layers=2, local_attention=8, cls_token_id=1, sep_token_id=2, pad_token_id=0
    ),
    "deberta-v2": _encoder(
        _BERT_LIKE, relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"]
    ),
    "t5": Architecture(
        "encoder-decoder",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": Architecture(
        "encoder-decoder",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
            "max_position_embeddings": 64,
            **{f"{where}dropout": 0.0 for where in ("", "attention_", "activation_")},
            "pad_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
    ),
    "mixtral": Architecture("experts", {**_LLAMA_LIKE, **_EXPERTS, "num_local_experts": 4}),
    "qwen2_moe": Architecture(
        "experts",
        {
            **_LLAMA_LIKE,
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "output_router_logits": True,
        },
    ),
    "deepseek_v2": Architecture(
        "experts",
        {
            **_LATENT,
            **_EXPERTS,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gpt_oss": Architecture("experts", {**_LLAMA_LIKE, **_EXPERTS, **_HEADS_OF_8, **_WINDOW, "num_local_experts": 4}),
    "vit": Architecture(
        "vision",
        {**_BERT_LIKE, "image_size": 32, "patch_size": 8},
        settings={"seq_dims": {"pixel_values": 2}},
    ),
    "lfm2": Architecture("state space", {**_LLAMA_LIKE, "block_ff_dim": 48, "layer_types": ["conv", "full_attention"]}),
    "mamba": Architecture(
        "state space",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "time_step_rank": 4,
        },
        length=8,  # its scan is unrolled, token by token
    ),
    "mamba2": Architecture(
        "state space",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
}
"""By name, which is the `model_type` up to a comma."""


def small(name: str, **settings: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build one of `ARCHITECTURES` and a batch for it; `settings` go to `model_from_config`."""
    architecture = ARCHITECTURES[name]
    config = {"model_type": name, **architecture.config}
    return model_from_config(config, **{"length": architecture.length, **settings})
