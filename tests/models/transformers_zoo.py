"""Tiny transformers models: random weights, two layers, eight query heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models.batches import VOCAB, labels_of, tokens

Batch = dict[str, torch.Tensor]


def _common(length: int, heads: int, kv_heads: int, tied: bool, overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max(64, length),
        "tie_word_embeddings": tied,
        **overrides,
    }


def _finish(
    model: nn.Module, batch_size: int, length: int, dtype: torch.dtype, seed: int, ignored: int, tail: int | None
) -> tuple[nn.Module, Batch]:
    ids = tokens(batch_size, length, seed)
    return model.to(dtype).train(), {"input_ids": ids, "labels": labels_of(ids, ignored, tail)}


def llama(
    batch_size: int = 1,
    length: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ignored: int = 0,
    ignored_from: int | None = None,
    heads: int = 8,
    kv_heads: int = 8,
    tied: bool = False,
    **overrides: Any,
) -> tuple[nn.Module, Batch]:
    """A Llama; `kv_heads` 8 is multi-head, 2 grouped, 1 multi-query. `overrides` go to `LlamaConfig`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**_common(length, heads, kv_heads, tied, overrides)))
    return _finish(model, batch_size, length, dtype, seed, ignored, ignored_from)


def qwen3(
    batch_size: int = 1,
    length: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ignored: int = 0,
    ignored_from: int | None = None,
    heads: int = 8,
    kv_heads: int = 2,
    tied: bool = True,
    **overrides: Any,
) -> tuple[nn.Module, Batch]:
    """A Qwen3: norms on q and k, a head size of its own, tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(**_common(length, heads, kv_heads, tied, {"head_dim": 8, **overrides}))
    return _finish(Qwen3ForCausalLM(config), batch_size, length, dtype, seed, ignored, ignored_from)


def mistral(
    batch_size: int = 1,
    length: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ignored: int = 0,
    ignored_from: int | None = None,
    heads: int = 8,
    kv_heads: int = 4,
    sliding_window: int | None = None,
    **overrides: Any,
) -> tuple[nn.Module, Batch]:
    """A Mistral, without a window unless `sliding_window` is given."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    extra = {"sliding_window": sliding_window, **overrides}
    config = MistralConfig(**_common(length, heads, kv_heads, False, extra))
    return _finish(MistralForCausalLM(config), batch_size, length, dtype, seed, ignored, ignored_from)


def gpt2(
    batch_size: int = 1,
    length: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ignored: int = 0,
    ignored_from: int | None = None,
    heads: int = 8,
    dropout: float = 0.0,
    num_hidden_layers: int = 2,
    **overrides: Any,
) -> tuple[nn.Module, Batch]:
    """A GPT-2: learned positions, fused QKV, tied head; without dropout unless `dropout` is given."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=max(64, length),
        n_embd=32,
        n_layer=num_hidden_layers,
        n_head=heads,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        **overrides,
    )
    return _finish(GPT2LMHeadModel(config), batch_size, length, dtype, seed, ignored, ignored_from)
