"""The workload all modes share: a Llama with 8B dimensions cut to a few layers, random weights and tokens."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Dimensions of the model and limits of the run.

    Args:
        layers: Decoder layers.
        hidden: Model width.
        inter: MLP width.
        heads: Query heads.
        kv: Key/value heads.
        vocab: Vocabulary.
        dtype: Parameter dtype name.
        cap_gib: Allocator cap per GPU; 0 for none.
        steps: Timed steps.
        warmup: Steps before timing.
    """

    layers: int = 4
    hidden: int = 4096
    inter: int = 14336
    heads: int = 32
    kv: int = 8
    vocab: int = 128256
    dtype: str = "bfloat16"
    cap_gib: float = 80.0
    steps: int = 10
    warmup: int = 3


@dataclass
class Measured:
    """One row of the table."""

    mode: str
    seq: int
    world: int
    warm_s: float = 0.0
    step_s: float = 0.0
    min_s: float = 0.0
    max_s: float = 0.0
    peak_gib: float = 0.0
    loss: float = 0.0
    grad_norm: float = 0.0
    error: str = ""
    extra: dict[str, float] = field(default_factory=dict)


def start(sizes: Sizes) -> torch.device:
    """Take this rank's device and start its process group; the CPU stands in where there is no GPU."""
    torch.set_float32_matmul_precision("high")
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if sizes.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, sizes.cap_gib / total))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device)
    return device


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


def measure(mode: str, seq: int, sizes: Sizes, model: nn.Module, step: Callable[[], Tensor]) -> Measured:
    """Time `step` (forward, backward and gradient reduction, returning the loss) and free what it made."""
    cuda = torch.cuda.is_available()
    row = Measured(mode, seq, dist.get_world_size() if dist.is_initialized() else 1)
    times: list[float] = []
    began = time.perf_counter()
    try:
        for index in range(sizes.warmup + sizes.steps):
            if index == sizes.warmup:
                row.warm_s = time.perf_counter() - began
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
            _synchronise(cuda)
            at = time.perf_counter()
            loss = step()
            _synchronise(cuda)
            if index >= sizes.warmup:
                times.append(time.perf_counter() - at)
            row.loss = float(loss.detach())
            if index == 0:
                norms = [p.grad.float().norm() ** 2 for p in model.parameters() if p.grad is not None]
                row.grad_norm = float(torch.stack(norms).sum() ** 0.5)
            del loss
            model.zero_grad(set_to_none=True)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        row.error = "out of memory" if "out of memory" in str(error).lower() else repr(error)[:1500]
        return row
    row.step_s, row.min_s, row.max_s = statistics.median(times), min(times), max(times)
    if cuda:
        row.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
    gc.collect()
    return row


def _synchronise(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def report(row: Measured) -> None:
    """Rank 0 prints the row; a rank that failed leaves at once, because its peers may hang."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("RESULT " + json.dumps(asdict(row)), flush=True)
    if row.error:
        os._exit(0)
