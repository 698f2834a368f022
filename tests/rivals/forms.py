"""Tiny random models of the forms that long-context training meets, one layer each, with a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from tests.models.batches import IGNORE_INDEX, VOCAB, tokens

LENGTH = 16

Built = tuple[nn.Module, dict[str, Any]]
FORMS: dict[str, Callable[[], Built]] = {}

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
_BERT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def form(build: Callable[[], Built]) -> Callable[[], Built]:
    """Register a form under its function's name."""
    FORMS[build.__name__] = build
    return build


def language_model(config: Any, batch_size: int = 1, length: int = LENGTH, **extra: Any) -> Built:
    """A causal language model with ids, and labels that are ignored where a mask hides the token."""
    ids = tokens(batch_size, length, seed=0)
    labels = ids.clone()
    if "attention_mask" in extra:
        labels[extra["attention_mask"] == 0] = IGNORE_INDEX
    return hf.AutoModelForCausalLM.from_config(config).train(), {"input_ids": ids, "labels": labels, **extra}


def padding(side: str, length: int = LENGTH, padded: int = 5) -> Tensor:
    """Two rows `[2, length]`, the first one padded on a side."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, slice(0, padded) if side == "left" else slice(length - padded, length)] = 0
    return mask


def packed_positions() -> Tensor:
    """Positions of two documents in one row."""
    return torch.cat([torch.arange(6), torch.arange(LENGTH - 6)])[None]


@form
def mistral_window() -> Built:
    return language_model(hf.MistralConfig(**_DECODER, sliding_window=4))


@form
def qwen2_window() -> Built:
    config = {**_DECODER, "num_hidden_layers": 2, "use_sliding_window": True, "max_window_layers": 1}
    return language_model(hf.Qwen2Config(**config, sliding_window=4))


@form
def gemma3_windows() -> Built:
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return language_model(hf.Gemma3TextConfig(**{**_DECODER, **layers}, sliding_window=4))


@form
def packed_with_cache() -> Built:
    return language_model(hf.LlamaConfig(**_DECODER), position_ids=packed_positions())


@form
def packed() -> Built:
    return language_model(hf.LlamaConfig(**_DECODER, use_cache=False), position_ids=packed_positions())


@form
def padded_left() -> Built:
    return language_model(hf.LlamaConfig(**_DECODER), 2, attention_mask=padding("left"))


@form
def padded_right() -> Built:
    return language_model(hf.LlamaConfig(**_DECODER), 2, attention_mask=padding("right"))


@form
def padded_odd_length() -> Built:
    return language_model(hf.LlamaConfig(**_DECODER), 2, 15, attention_mask=padding("right", 15))


@form
def padded_window() -> Built:
    return language_model(hf.MistralConfig(**_DECODER, sliding_window=4), 2, attention_mask=padding("left"))


@form
def alibi_bloom() -> Built:
    config = hf.BloomConfig(
        vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
    )
    return language_model(config)


@form
def alibi_falcon() -> Built:
    config = hf.FalconConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, alibi=True,
        hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return language_model(config)


@form
def local_attention() -> Built:
    config = hf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=4, max_position_embeddings=64, resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return language_model(config)


def _t5() -> Any:
    kind: Any = hf.T5Config
    return kind(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip


@form
def t5() -> Built:
    return hf.T5ForConditionalGeneration(_t5()), {"input_ids": tokens(1, 16, 0), "labels": tokens(1, 16, 1)}


@form
def t5_encoder() -> Built:
    return hf.T5EncoderModel(_t5()), {"input_ids": tokens(1, LENGTH, 0)}


@form
def bert() -> Built:
    model = hf.BertForMaskedLM(hf.BertConfig(vocab_size=VOCAB, **_BERT))
    return model, {"input_ids": tokens(2, LENGTH, 0), "labels": tokens(2, LENGTH, 1)}


@form
def mpnet() -> Built:
    model = hf.MPNetForMaskedLM(hf.MPNetConfig(vocab_size=VOCAB, **_BERT))
    return model, {"input_ids": tokens(2, 15, 0), "labels": tokens(2, 15, 1)}


@form
def disentangled_deberta() -> Built:
    config = hf.DebertaV2Config(vocab_size=VOCAB, **_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])
    return hf.DebertaV2ForMaskedLM(config), {"input_ids": tokens(2, LENGTH, 0), "labels": tokens(2, LENGTH, 1)}


@form
def bert_padded() -> Built:
    model, batch = bert()
    return model, {**batch, "attention_mask": padding("right")}


@form
def bert_classifier() -> Built:
    model = hf.BertForSequenceClassification(hf.BertConfig(vocab_size=VOCAB, **_BERT))
    return model, {"input_ids": tokens(2, LENGTH, 0), "labels": torch.tensor([0, 1])}


def _bart(target: int) -> Built:
    config = hf.BartConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config), {
        "input_ids": tokens(1, LENGTH, 0),
        "labels": tokens(1, target, 1),
    }


@form
def encoder_decoder() -> Built:
    return _bart(LENGTH)


@form
def encoder_decoder_of_unequal_lengths() -> Built:
    return _bart(LENGTH // 2)


@form
def vit() -> Built:
    kind: Any = hf.ViTConfig
    model = hf.ViTForImageClassification(kind(**_BERT, image_size=32, patch_size=8, num_labels=3))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}


@form
def moe_mixtral() -> Built:
    config = hf.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    return language_model(config)


@form
def moe_qwen2() -> Built:
    config = hf.Qwen2MoeConfig(
        **_DECODER, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=8, decoder_sparse_step=1
    )
    return language_model(config)


@form
def latent_attention() -> Built:
    config = hf.DeepseekV3Config(
        **{**_DECODER, "num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        v_head_dim=4, qk_nope_head_dim=4, first_k_dense_replace=1,
    )  # fmt: skip
    return language_model(config)


@form
def mamba() -> Built:
    config = hf.MambaConfig(vocab_size=VOCAB, hidden_size=8, state_size=2, num_hidden_layers=1)
    return language_model(config, length=4)


@form
def mamba2() -> Built:
    config = hf.Mamba2Config(
        vocab_size=VOCAB, hidden_size=8, state_size=4, num_hidden_layers=1, num_heads=4, head_dim=4, n_groups=1,
        chunk_size=4,
    )  # fmt: skip
    return language_model(config, length=8)


@form
def softcap_gemma2() -> Built:
    config = {**_DECODER, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return language_model(hf.Gemma2Config(**config, sliding_window=4))


@form
def sinks_gpt_oss() -> Built:
    config = hf.GptOssConfig(
        **_DECODER, num_local_experts=2, num_experts_per_tok=1, sliding_window=4, layer_types=["sliding_attention"]
    )
    return language_model(config)


class FlexDecoder(nn.Module):
    """Causal flex attention, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, 48), nn.Linear(16, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ids `[B, S]` to a scalar."""
        x = self.embed(input_ids)
        q, k, v = (y.view(*x.shape[:2], 4, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))

        def causal(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, score, -float("inf"))

        y = flex_attention(q, k, v, score_mod=causal)
        out: Tensor = self.head(y.transpose(1, 2).flatten(2)).logsumexp(-1).mean()
        return out


@form
def flex_by_hand() -> Built:
    return FlexDecoder(), {"input_ids": tokens(1, LENGTH, 0)}
