"""DeepSpeed's sequence parallelism: AutoSP as its users run it, and ALST's parts by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.peers import cut, reduce_gradients, register_causal, register_ulysses
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.workload import Case, Choice, Mode, build, tokens


def autosp(sizes: Sizes, device: torch.device, choice: Choice) -> Mode:
    """DeepSpeed AutoSP, as its documentation says to use it, or without a mask in the graph.

    Its loss and gradients are wrong by design (labels are cut before the shift, means are averaged), so they are
    reported as they come: the mean of the ranks' losses, and the gradient that the engine leaves.
    """
    import deepspeed
    from deepspeed.compile.passes.sp_compile import prepare_autosp_inputs

    register_causal()
    causal = choice.mode == "autosp-causal"
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo")
    model = build(sizes, device, "bench_causal" if causal else "sdpa")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 0},
        "bf16": {"enabled": sizes.dtype == "bfloat16"},
        "compile": {"deepcompile": True, "passes": ["autosp"]},
        "sequence_parallel_size": dist.get_world_size(),
        "gradient_clipping": 0.0,
    }
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    torch._dynamo.config.capture_scalar_outputs = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(config=config, model=model, optimizer=optimizer)
    engine.compile(compile_kwargs={"dynamic": True})

    def prepare(seq: int) -> Case:
        ids = tokens(sizes, seq, device)
        position = torch.arange(seq, device=device)[None]

        def step(factor: float | None) -> Tensor:
            del factor
            mask = None if causal else torch.ones_like(ids)
            x = prepare_autosp_inputs(ids.clone(), ids.clone(), position.clone(), mask, seq_dim=1)
            loss: Tensor = engine(input_ids=x[0], labels=x[1], position_ids=x[2], attention_mask=x[3]).loss
            engine.backward(loss)
            return loss

        return Case(step, 1 / dist.get_world_size(), clear=engine.zero_grad)

    return model, prepare


def alst(sizes: Sizes, device: torch.device, choice: Choice) -> Mode:
    """ALST's parts by hand, without offload: eager Ulysses, checkpointing, tiled MLP and tiled loss."""
    del choice
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP
    from transformers.models.llama import modeling_llama

    register_ulysses()

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

    def prepare(seq: int) -> Case:
        inputs, _ = cut(sizes, seq, device)

        def step(factor: float | None) -> Tensor:
            hidden = model.model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).last_hidden_state
            shards = max(1, hidden.shape[1] // 4096)
            scale = (1.0 if factor is None else factor) / hidden.shape[1]

            # Scaled in here: TiledFusedLogitsLoss ignores the gradient that comes into its backward.
            def loss_of(head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
                total: Tensor = F.cross_entropy(head(x).float(), y, ignore_index=-100, reduction="sum") * scale
                return total

            loss: Tensor = TiledFusedLogitsLoss.apply(
                loss_of, model.lm_head, hidden, inputs["labels"], None, shards, [model.lm_head.weight], "sum"
            )
            loss.backward()
            reduce_gradients(model, device)
            return loss if factor is None else loss / factor

        # Its loss is the sum over its tokens / their number, the one without a label included.
        return Case(step, (seq // dist.get_world_size()) / (seq - 1))

    return model, prepare
