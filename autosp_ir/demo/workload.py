"""What the demonstration trains: a byte-level Llama on eight sonnets, the same in every process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor, nn

from autosp_ir.errors import AutoSPError


@dataclass(frozen=True)
class Workload:
    """Sizes of the demonstration.

    Args:
        steps: Training steps.
        length: Tokens (bytes) per step.
        layers: Decoder layers.
        seed: Start of the weights.
    """

    steps: int = 30
    length: int = 1024
    layers: int = 2
    seed: int = 0


@dataclass
class History:
    """What a run measured.

    Attributes:
        losses: The loss of every step.
        gradients: Gradients of the first step, by parameter name.
        parameters: Parameters after the last step.
    """

    losses: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def build_model(workload: Workload) -> nn.Module:
    """A randomly initialised byte-level Llama, float32, on the CPU.

    Raises:
        AutoSPError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise AutoSPError("the demo builds a transformers model", hint="pip install 'autosp-ir[hf]'") from error
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=workload.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4 * workload.length,
        use_cache=False,
    )
    torch.manual_seed(workload.seed)
    model: nn.Module = LlamaForCausalLM(config)
    return model.train()


def batch_of(workload: Workload, step: int) -> dict[str, Tensor]:
    """The full batch of one step: int64 `[1, length]` bytes of the text, as inputs and labels."""
    raw = resources.files("autosp_ir.demo").joinpath("text.txt").read_bytes()
    text = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    start = (step * workload.length) % (len(text) - workload.length)
    ids = text[start : start + workload.length][None]
    return {"input_ids": ids, "labels": ids.clone()}


def train(
    model: nn.Module,
    forward: nn.Module,
    workload: Workload,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> History:
    """Train `model` by calling `forward` (the model itself, or the step that `parallelize` made of it).

    Args:
        model: Owner of the parameters.
        forward: Returns an output with a `loss`.
        workload: Sizes.
        report: Called after every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(workload.steps):
        loss = forward(**batch_of(workload, step)).loss
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        report(step, losses[-1])
    return History(losses, gradients, {n: p.detach().clone() for n, p in model.named_parameters()})
