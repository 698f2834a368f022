"""What users would pick instead: `torchrun --nproc-per-node=2 -m benchmarks.gpu.peers --mode MODE --seq 16384 65536`.

Modes: single, single-ac (one GPU, compiled; -ac with per-layer checkpointing); ulysses-compile (hand-written Ulysses,
compiled, returns logits), ulysses-compile-loss (the loss alone leaves the compiled function: what a careful user
writes), ulysses-compile-loss-ac; ring (torch context_parallel, eager); autosp, autosp-causal (DeepSpeed AutoSP as
documented, and its best case: no mask in the graph); alst (ALST's parts by hand: eager Ulysses, checkpointing,
DeepSpeed's tiled MLP and tiled loss, no offload).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.workload import Sizes, build, measure, report, start, tokens

Step = Callable[[], Tensor]
MODES = (
    "single", "single-ac", "ulysses-compile", "ulysses-compile-loss", "ulysses-compile-loss-ac", "ring", "autosp",
    "autosp-causal", "alst",
)  # fmt: skip


def register_ulysses(group: dist.ProcessGroup) -> None:
    """Ulysses as a transformers attention function, on torch's functional collectives."""
    import torch.distributed._functional_collectives as functional
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
    """Labels shifted by one, -100 at the end."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)


def reduce_gradients(model: nn.Module, device: torch.device) -> None:
    """One coalesced all-reduce of every gradient."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if device.type != "cuda":
        for gradient in gradients:
            dist.all_reduce(gradient)
        return
    coalescing: Any = vars(dist)["_coalescing_manager"]
    with coalescing(device=device):
        for gradient in gradients:
            dist.all_reduce(gradient)


def single(sizes: Sizes, device: torch.device, mode: str) -> tuple[nn.Module, Callable[[int], Step]]:
    """One GPU, compiled."""
    register_causal()
    model: Any = build(sizes, device, "bench_causal")
    if mode.endswith("-ac"):
        model.gradient_checkpointing_enable()
    forward = torch.compile(lambda **inputs: model(**inputs).loss)

    def prepare(seq: int) -> Step:
        ids = tokens(sizes, seq, device)
        position = torch.arange(seq, device=device)[None]

        def step() -> Tensor:
            loss: Tensor = forward(input_ids=ids, labels=ids, position_ids=position)
            loss.backward()
            return loss

        return step

    return model, prepare


def ulysses(sizes: Sizes, device: torch.device, mode: str) -> tuple[nn.Module, Callable[[int], Step]]:
    """Hand-written Ulysses, compiled."""
    group = dist.group.WORLD
    assert group is not None
    register_ulysses(group)
    model: Any = build(sizes, device, "bench_ulysses")
    if mode.endswith("-ac"):
        model.gradient_checkpointing_enable()
    whole: Callable[..., Any] = torch.compile(model)
    loss_alone = torch.compile(lambda **inputs: model(**inputs).loss)

    def prepare(seq: int) -> Step:
        inputs = _cut(sizes, seq, device)

        def step() -> Tensor:
            loss: Tensor = loss_alone(**inputs) if "loss" in mode else whole(**inputs).loss
            loss.backward()
            reduce_gradients(model, device)
            return loss

        return step

    return model, prepare


def _cut(sizes: Sizes, seq: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's slice of a batch whose labels were shifted before the cut."""
    ids = tokens(sizes, seq, device)
    local = seq // dist.get_world_size()
    mine = slice(dist.get_rank() * local, (dist.get_rank() + 1) * local)
    labels = next_tokens(ids)[:, mine].contiguous()
    position = torch.arange(seq, device=device)[None][:, mine]
    return {"input_ids": ids[:, mine], "position_ids": position, "labels": labels, "shift_labels": labels}


def ring(sizes: Sizes, device: torch.device, mode: str) -> tuple[nn.Module, Callable[[int], Step]]:
    """Torch's context_parallel: ring attention, eager."""
    del mode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    register_causal()
    model = build(sizes, device, "bench_causal")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def prepare(seq: int) -> Step:
        ids = tokens(sizes, seq, device)
        position = torch.arange(seq, device=device)[None]

        def step() -> Tensor:
            buffers = [ids.clone(), next_tokens(ids), position.clone()]
            with (
                context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1]),
                sdpa_kernel([SDPBackend.FLASH_ATTENTION]),
            ):
                found = model(input_ids=buffers[0], position_ids=buffers[2], shift_labels=buffers[1], labels=buffers[1])
                loss: Tensor = found.loss
                loss.backward()
            reduce_gradients(model, device)
            return loss

        return step

    return model, prepare


def autosp(sizes: Sizes, device: torch.device, mode: str) -> tuple[nn.Module, Callable[[int], Step]]:
    """DeepSpeed AutoSP, as its documentation says to use it, or without a mask in the graph."""
    import deepspeed
    from deepspeed.compile.passes.sp_compile import prepare_autosp_inputs

    register_causal()
    causal = mode == "autosp-causal"
    model = build(sizes, device, "bench_causal" if causal else "sdpa")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 0},
        "bf16": {"enabled": True},
        "compile": {"deepcompile": True, "passes": ["autosp"]},
        "sequence_parallel_size": dist.get_world_size(),
        "gradient_clipping": 0.0,
    }
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    torch._dynamo.config.capture_scalar_outputs = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(config=config, model=model, optimizer=optimizer)
    engine.compile(compile_kwargs={"dynamic": True})

    def prepare(seq: int) -> Step:
        ids = tokens(sizes, seq, device)
        position = torch.arange(seq, device=device)[None]

        def step() -> Tensor:
            mask = None if causal else torch.ones_like(ids)
            x = prepare_autosp_inputs(ids.clone(), ids.clone(), position.clone(), mask, seq_dim=1)
            loss: Tensor = engine(input_ids=x[0], labels=x[1], position_ids=x[2], attention_mask=x[3]).loss
            engine.backward(loss)
            return loss

        return step

    return model, prepare


def alst(sizes: Sizes, device: torch.device, mode: str) -> tuple[nn.Module, Callable[[int], Step]]:
    """ALST's parts by hand, without offload."""
    del mode
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP
    from transformers.models.llama import modeling_llama

    group = dist.group.WORLD
    assert group is not None
    register_ulysses(group)

    def inner(mlp: Any, x: Tensor) -> Tensor:
        found: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        return found

    def tiled(mlp: Any, x: Tensor) -> Any:
        weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
        return TiledMLP.apply(inner, mlp, x, max(1, math.ceil(x.shape[1] / x.shape[2])), weights)

    mlp_class: Any = modeling_llama.LlamaMLP
    mlp_class.forward = tiled
    model: Any = build(sizes, device, "bench_ulysses")
    model.gradient_checkpointing_enable()

    def loss_of(head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), y, ignore_index=-100, reduction="sum")

    def prepare(seq: int) -> Step:
        inputs = _cut(sizes, seq, device)

        def step() -> Tensor:
            hidden = model.model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).last_hidden_state
            shards = max(1, hidden.shape[1] // 4096)
            total = TiledFusedLogitsLoss.apply(
                loss_of, model.lm_head, hidden, inputs["labels"], None, shards, [model.lm_head.weight], "sum"
            )
            loss: Tensor = total / hidden.shape[1]
            loss.backward()
            reduce_gradients(model, device)
            return loss

        return step

    return model, prepare


def main() -> None:
    """Measure one mode at each length."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", required=True, choices=MODES)
    parser.add_argument("--seq", type=int, nargs="+", default=[16384])
    for name, kind in Sizes.__annotations__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type={"int": int, "float": float, "str": str}[kind])
    given = vars(parser.parse_args())
    sizes = Sizes(**{k: given[k] for k in Sizes.__annotations__ if given[k] is not None})
    mode = given["mode"]
    device = start(sizes)
    makers = {"single": single, "ulysses": ulysses, "ring": ring, "autosp": autosp, "alst": alst}
    model, prepare = makers[mode.split("-")[0]](sizes, device, mode)
    for seq in given["seq"]:
        report(measure(mode, seq, sizes, model, prepare(seq)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
