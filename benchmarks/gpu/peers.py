"""What users would pick instead, without a framework: one GPU, Ulysses by hand, torch's ring attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.workload import Case, Choice, Mode, build, tokens

IGNORED = -100


def register_ulysses() -> None:
    """Ulysses as a transformers attention function, on torch's functional collectives."""
    import torch.distributed._functional_collectives as functional
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    group = dist.group.WORLD
    assert group is not None
    ranks = dist.get_world_size(group)

    def to_heads(x: Tensor) -> Tensor:
        batch, heads, local, width = x.shape
        y = x.reshape(batch, ranks, heads // ranks, local, width).permute(1, 0, 2, 3, 4).contiguous()
        y = functional.all_to_all_single_autograd(y, None, None, group)
        return y.permute(1, 2, 0, 3, 4).reshape(batch, heads // ranks, ranks * local, width)

    def to_tokens(x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        y = x.reshape(batch, heads, ranks, length // ranks, width).permute(2, 0, 1, 3, 4).contiguous()
        y = functional.all_to_all_single_autograd(y, None, None, group)
        return y.permute(1, 3, 0, 2, 4).reshape(batch, length // ranks, heads * ranks, width)

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any) -> Any:
        q, k, v = to_heads(q), to_heads(k), to_heads(v)
        grouped = q.shape[1] != k.shape[1]
        return to_tokens(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        ), None

    ALL_ATTENTION_FUNCTIONS["bench_ulysses"] = attention


def register_causal() -> None:
    """Causal attention with no mask in the graph, as a transformers attention function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any) -> Any:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["bench_causal"] = attention


def next_tokens(ids: Tensor) -> Tensor:
    """Labels shifted by one, `IGNORED` at the end."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)


def backward(loss: Tensor, factor: float | None) -> None:
    """The backward of a loss, or of a multiple of it."""
    (loss if factor is None else loss * factor).backward()


def reduce_gradients(model: nn.Module, device: torch.device) -> None:
    """One coalesced all-reduce of every gradient."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if device.type != "cuda" or dist.get_backend() == "fake":
        for gradient in gradients:
            dist.all_reduce(gradient)
        return
    coalescing: Any = vars(dist)["_coalescing_manager"]
    with coalescing(device=device):
        for gradient in gradients:
            dist.all_reduce(gradient)


def single(sizes: Sizes, device: torch.device, choice: Choice) -> Mode:
    """One GPU, compiled; only the loss leaves the compiled function."""
    register_causal()
    model: Any = build(sizes, device, "bench_causal")
    if choice.mode.endswith("-ac"):
        model.gradient_checkpointing_enable()

    def prepare(seq: int) -> Case:
        forward = compiled(lambda **inputs: model(**inputs).loss)
        ids = tokens(sizes, seq, device)
        position = torch.arange(seq, device=device)[None]

        def step(factor: float | None) -> Tensor:
            loss: Tensor = forward(input_ids=ids, labels=ids, position_ids=position)
            backward(loss, factor)
            return loss

        return Case(step, 1.0)

    return model, prepare


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` from a clean slate: otherwise the second length is compiled for any length."""
    torch._dynamo.reset()
    made: Callable[..., Any] = torch.compile(function)
    return made


def ulysses(sizes: Sizes, device: torch.device, choice: Choice) -> Mode:
    """Hand-written Ulysses."""
    register_ulysses()
    model: Any = build(sizes, device, "bench_ulysses")
    if choice.mode.endswith("-ac"):
        model.gradient_checkpointing_enable()

    def forward_of(mode: str) -> Callable[..., Any]:
        if "loss" in mode:
            return compiled(lambda **inputs: model(**inputs).loss)
        whole = model if "eager" in mode else compiled(model)
        return lambda **inputs: whole(**inputs).loss

    def prepare(seq: int) -> Case:
        forward = forward_of(choice.mode)
        inputs, share = cut(sizes, seq, device)

        def step(factor: float | None) -> Tensor:
            loss: Tensor = forward(**inputs)
            backward(loss, factor)
            reduce_gradients(model, device)
            return loss

        return Case(step, share)

    return model, prepare


def cut(sizes: Sizes, seq: int, device: torch.device) -> tuple[dict[str, Tensor], float]:
    """This rank's slice of a batch whose labels were shifted before the cut, and its share of the valid labels."""
    ids = tokens(sizes, seq, device)
    local = seq // dist.get_world_size()
    mine = slice(dist.get_rank() * local, (dist.get_rank() + 1) * local)
    labels = next_tokens(ids)[:, mine].contiguous()
    position = torch.arange(seq, device=device)[None][:, mine]
    inputs = {"input_ids": ids[:, mine], "position_ids": position, "labels": labels, "shift_labels": labels}
    return inputs, int((labels != IGNORED).sum()) / (seq - 1)


def ring(sizes: Sizes, device: torch.device, choice: Choice) -> Mode:
    """Torch's context_parallel: ring attention, eager."""
    del choice
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    register_causal()
    model = build(sizes, device, "bench_causal")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def prepare(seq: int) -> Case:
        ids = tokens(sizes, seq, device)
        position = torch.arange(seq, device=device)[None]
        # Inside, each rank sees its own part of the buffers.
        buffers = [next_tokens(ids)]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1]):
            share = int((buffers[0] != IGNORED).sum()) / (seq - 1)

        def step(factor: float | None) -> Tensor:
            buffers = [ids.clone(), next_tokens(ids), position.clone()]
            with (
                context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1]),
                sdpa_kernel([SDPBackend.FLASH_ATTENTION]),
            ):
                found = model(input_ids=buffers[0], position_ids=buffers[2], shift_labels=buffers[1], labels=buffers[1])
                loss: Tensor = found.loss
                backward(loss, factor)
            reduce_gradients(model, device)
            return loss

        return Case(step, share)

    return model, prepare
