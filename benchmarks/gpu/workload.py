"""The workload all modes share: a Llama with 8B dimensions cut to a few layers, random weights and tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.stand_in import start_alone


@dataclass(frozen=True)
class Choice:
    """What a mode is asked to run beyond its name.

    Args:
        mode: The mode's name.
        backend: Backend of our modes.
        pipeline: Pipeline of our modes; None for the default one.
    """

    mode: str
    backend: str = "inductor"
    pipeline: str | None = None


@dataclass(frozen=True)
class Case:
    """One mode at one length.

    Args:
        step: Forward, backward and gradient reduction; returns this rank's loss. Timed steps pass None. Given a
            factor, a peer multiplies its loss by it before the backward, which ours ignores.
        share: The factor that makes the sum of the ranks' losses the global mean, and so the sum of their gradients
            its gradient: valid tokens here / valid tokens everywhere for a peer whose loss is a mean of its own.
        build_s: Seconds spent before the first step: capture, passes and compilation of ours.
        weighted: Whether a step needs its factor to leave the gradient of the global mean, so that one more is run.
        clear: Drops the gradients that the model's own `zero_grad` does not know of.
    """

    step: Callable[[float | None], Tensor]
    share: float
    build_s: float = 0.0
    weighted: bool = True
    clear: Callable[[], None] = lambda: None


Mode = tuple[nn.Module, Callable[[int], Case]]
"""A model, and a function from a sequence length to the case that is measured."""


def start(sizes: Sizes, *, process_group: bool = True) -> torch.device:
    """Take this rank's device and start its process group; the CPU stands in where there is no GPU."""
    torch.set_float32_matmul_precision("high")
    device = _take_device(sizes)
    if not process_group:
        return device
    if sizes.stand_in:
        start_alone(sizes.stand_in)
    elif device.type == "cpu":
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("nccl", device_id=device)
    return device


def _take_device(sizes: Sizes) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if sizes.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, sizes.cap_gib / total))
    return torch.device("cuda", torch.cuda.current_device())


def build(sizes: Sizes, device: torch.device, attention: str | None) -> nn.Module:
    """A randomly initialised LlamaForCausalLM in training mode; the same weights in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inter,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": 1 << 21,
        "rope_theta": 500000.0,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
    config = LlamaConfig(**settings)
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, sizes.dtype))
    with torch.device(device):
        model: nn.Module = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    return model.train()


def tokens(sizes: Sizes, seq: int, device: torch.device) -> Tensor:
    """Random token ids `[1, seq]`, the same in every process."""
    generator = torch.Generator().manual_seed(seq)
    return torch.randint(0, sizes.vocab, (1, seq), generator=generator).to(device)
