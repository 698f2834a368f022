"""Gradient errors against a dense run: `torchrun --nproc-per-node=2 -m benchmarks.gpu.accuracy --seq 8192`.

The reference is the dense model on one GPU, eager, with the weights of the measured dtype upcast: in float32 for half
types, and in float64 for float32, because a float32 reference errs as much as what it judges, and in the same direction
as a candidate that happens to use its attention kernel. TF32 is off for everything here, also for what is compared.
Rank 0 computes the reference and keeps its gradients in host memory; every candidate starts from the same weights and
tokens.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.measure import clear, describe, global_loss, leave, report
from benchmarks.gpu.modes import maker_of
from benchmarks.gpu.peers import register_causal
from benchmarks.gpu.sizes import Sizes, add_size_arguments, sizes_of
from benchmarks.gpu.workload import Choice, build, start, tokens

CANDIDATES = ("ours", "ulysses-compile-loss")
DENSE = "dense-eager"

Gradients = dict[str, Tensor]

# Of these many tokens logits exist at once.
_LOSS_TOKENS = 4096


@dataclass
class Error:
    """How far the gradients of one candidate are from the reference.

    Args:
        candidate: A mode, or `dense-eager`: the dense model on one GPU in the measured dtype, with the attention kernel
            that torch picks.
        dtype: Parameter dtype.
        seq: Tokens.
        overall: Norm of the difference over all parameters / norm of the reference.
        worst: Largest relative L2 error of one parameter.
        worst_name: That parameter.
        loss: Global mean loss.
        reference_loss: The reference's.
        tf32: Whether TF32 was allowed.
        error: Why there is no figure.
    """

    candidate: str
    dtype: str
    seq: int
    overall: float = 0.0
    worst: float = 0.0
    worst_name: str = ""
    loss: float = 0.0
    reference_loss: float = 0.0
    tf32: bool = False
    error: str = ""


def compare(row: Error, found: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor]) -> None:
    """Fill in the errors of `found`; a parameter whose true gradient is nearly zero is judged by the model's.

    Args:
        row: Gets the figures.
        found: Gradients by parameter; None counts as zero.
        wanted: The reference's, in any memory.
    """
    size: dict[str, float] = {}
    error: dict[str, float] = {}
    for name, reference in wanted.items():
        gradient = found[name]
        true = reference if gradient is None else reference.to(gradient.device)
        size[name] = _norm(true)
        error[name] = size[name] if gradient is None else _norm(gradient.to(true.dtype) - true)
    floor = 1e-6 * max(size.values())
    relative = {name: error[name] / max(size[name], floor) for name in wanted}
    row.worst_name = max(relative, key=lambda name: math.inf if math.isnan(relative[name]) else relative[name])
    row.worst = relative[row.worst_name]
    row.overall = math.hypot(*error.values()) / math.hypot(*size.values())


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def dense(model: Any, sizes: Sizes, seq: int, device: torch.device) -> float:
    """One step of a dense model on one GPU; returns its loss."""
    ids = tokens(sizes, seq, device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach())


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients by canonical parameter name."""
    return {name: p.grad for name, p in model.named_parameters()}


def forbid_tf32() -> None:
    """Float32 products in float32, for the rest of this process."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def register_causal_by_head() -> None:
    """Causal attention one query head at a time, each computed again in backward, as a transformers function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def one(q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any) -> Any:
        group = q.shape[1] // k.shape[1]
        heads = [
            checkpoint(one, q[:, h, None], k[:, h // group, None], v[:, h // group, None], scaling, use_reentrant=False)
            for h in range(q.shape[1])
        ]
        return torch.cat(heads, 1).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["bench_causal_by_head"] = attention


def reference(sizes: Sizes, seq: int, device: torch.device) -> tuple[float, Gradients]:
    """Loss and gradients of the dense step in the next wider dtype, in host memory.

    Attention is the plain product of matrices, whose scores only fit one head at a time, computed again in backward.
    """
    register_causal_by_head()
    model: Any = build(sizes, device, "bench_causal_by_head")
    model = model.double() if sizes.dtype == "float32" else model.float()
    model.gradient_checkpointing_enable()
    ids = tokens(sizes, seq, device)
    with sdpa_kernel([SDPBackend.MATH]):
        # transformers' own loss takes logits in float32, whatever the model's dtype, and those of all tokens at once.
        hidden = model.model(input_ids=ids).last_hidden_state[0, :-1]
        parts = zip(hidden.split(_LOSS_TOKENS), ids[0, 1:].split(_LOSS_TOKENS), strict=True)
        sums: list[Any] = [checkpoint(_loss, model.lm_head, x, wanted, use_reentrant=False) for x, wanted in parts]
        loss = torch.stack(sums).sum() / (seq - 1)
        loss.backward()
    return float(loss.detach()), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def _loss(head: nn.Module, hidden: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden), wanted, reduction="sum")


def run(sizes: Sizes, seq: int, device: torch.device, pipelines: Mapping[str, str]) -> None:
    """Compare every candidate and print a row for each.

    Args:
        sizes: Of the model.
        seq: Tokens.
        device: Of this rank.
        pipelines: Pipelines of ours by a name that begins with `ours`, to be compared too.
    """
    first = dist.get_rank() == 0
    true_loss, wanted = reference(sizes, seq, device) if first else (0.0, {})
    _free()
    if first:
        _report(Error(DENSE, sizes.dtype, seq, reference_loss=true_loss), _dense, sizes, device, wanted)
    dist.barrier()
    for mode in (*CANDIDATES, *pipelines):
        fill = partial(_candidate, Choice(mode, pipeline=pipelines.get(mode)))
        _report(Error(mode, sizes.dtype, seq, reference_loss=true_loss), fill, sizes, device, wanted)
        dist.barrier()


def _report(row: Error, fill: Any, sizes: Sizes, device: torch.device, wanted: Gradients) -> None:
    """Fill one row and print it; what does not fit leaves the others their turn."""
    try:
        fill(row, sizes, device, wanted)
    except torch.OutOfMemoryError as error:
        row.error = describe(error)
    if dist.get_rank() == 0:
        report(row)
    _free()


def _dense(row: Error, sizes: Sizes, device: torch.device, wanted: Gradients) -> None:
    register_causal()
    model = build(sizes, device, "bench_causal")
    row.loss = dense(model, sizes, row.seq, device)
    compare(row, gradients(model), wanted)


def _candidate(choice: Choice, row: Error, sizes: Sizes, device: torch.device, wanted: Gradients) -> None:
    make: Any = maker_of(choice.mode)
    model, prepare = make(sizes, device, choice)
    case = prepare(row.seq)
    row.loss = global_loss(case)
    if dist.get_rank() == 0:
        compare(row, gradients(model), wanted)
    clear(model, case)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Compare one dtype at one length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--variant", action="append", default=[], metavar="ours-NAME=PIPELINE")
    add_size_arguments(parser)
    given = parser.parse_args()
    sizes = sizes_of(given)
    try:
        device = start(sizes)
        forbid_tf32()
        run(sizes, given.seq, device, dict(text.split("=", 1) for text in given.variant))
    except Exception as error:  # the table holds every failure
        traceback.print_exc()
        report(Error(f"rank {os.environ['RANK']}", sizes.dtype, given.seq, error=describe(error)))
        leave()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
