"""Gradient errors against a dense float32 run: `torchrun --nproc-per-node=2 -m benchmarks.gpu.accuracy --seq 8192`.

The reference is the dense model on one GPU: eager, float32, with the weights of the measured dtype upcast, products at
highest precision. TF32 is off for everything here, also for what is compared. Rank 0 computes the reference and keeps
its gradients in host memory; every candidate starts from the same weights and tokens.
"""

from __future__ import annotations

import argparse
import gc
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.gpu.measure import clear, describe, global_loss, leave, report
from benchmarks.gpu.modes import maker_of
from benchmarks.gpu.sizes import Sizes, add_size_arguments, sizes_of
from benchmarks.gpu.workload import Choice, build, start, tokens

CANDIDATES = ("ours", "ulysses-compile-loss")
REFERENCE = "dense-eager"

Gradients = dict[str, Tensor]


@dataclass
class Error:
    """How far the gradients of one candidate are from the reference.

    Args:
        candidate: A mode, or `dense-eager`: the dense model on one GPU in the measured dtype.
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
    size = {name: float(torch.linalg.vector_norm(g, dtype=torch.float64)) for name, g in wanted.items()}
    floor = 1e-6 * max(size.values())
    square, row.worst = 0.0, -1.0
    for name, reference in wanted.items():
        gradient = found[name]
        error = size[name]
        if gradient is not None:
            difference = gradient.float() - reference.to(gradient.device)
            error = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
        square += error**2
        relative = error / max(size[name], floor)
        if relative > row.worst or relative != relative:  # nothing is worse than NaN
            row.worst, row.worst_name = relative, name
    row.overall = square**0.5 / sum(s**2 for s in size.values()) ** 0.5


def dense(sizes: Sizes, seq: int, device: torch.device, dtype: torch.dtype) -> tuple[float, nn.Module]:
    """The model of `sizes` converted to `dtype`, after one eager step on one GPU; and its loss."""
    model: Any = build(sizes, device, "sdpa").to(dtype)
    ids = tokens(sizes, seq, device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), model


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients by canonical parameter name."""
    return {name: p.grad for name, p in model.named_parameters()}


def forbid_tf32() -> None:
    """Float32 products in float32, for the rest of this process."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def reference(sizes: Sizes, seq: int, device: torch.device) -> tuple[float, Gradients]:
    """Loss and gradients of the dense float32 step, in host memory."""
    loss, model = dense(sizes, seq, device, torch.float32)
    return loss, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def run(sizes: Sizes, seq: int, device: torch.device) -> None:
    """Compare every candidate and print a row for each."""
    first = dist.get_rank() == 0
    true_loss, wanted = reference(sizes, seq, device) if first else (0.0, {})
    _free()
    if first:
        row = Error(REFERENCE, sizes.dtype, seq, reference_loss=true_loss)
        row.loss, model = dense(sizes, seq, device, getattr(torch, sizes.dtype))
        compare(row, gradients(model), wanted)
        report(row)
        del model
    _free()
    dist.barrier()
    for mode in CANDIDATES:
        row = Error(mode, sizes.dtype, seq, reference_loss=true_loss)
        _candidate(row, sizes, device, wanted)
        if first:
            report(row)
        _free()
        dist.barrier()


def _candidate(row: Error, sizes: Sizes, device: torch.device, wanted: Gradients) -> None:
    make: Any = maker_of(row.candidate)
    model, prepare = make(sizes, device, Choice(row.candidate))
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
    add_size_arguments(parser)
    given = parser.parse_args()
    sizes = sizes_of(given)
    try:
        device = start(sizes)
        forbid_tf32()
        run(sizes, given.seq, device)
    except Exception as error:  # the table holds every failure
        traceback.print_exc()
        report(Error(f"rank {os.environ['RANK']}", sizes.dtype, given.seq, error=describe(error)))
        leave()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
