"""Timing one case, and a loss and a gradient that can be compared between modes."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

from benchmarks.gpu.launch import MARK
from benchmarks.gpu.power import EnergyMeter
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.workload import Case


@dataclass
class Measured:
    """One row of the table.

    Args:
        mode: Mode.
        seq: Tokens.
        world: GPUs.
        build_s: Seconds before the first step; ours captures and compiles here.
        warm_s: Seconds of the warm-up steps; the peers compile here.
        step_s: Median seconds of a step; each step takes as long as its slowest rank.
        min_s: Fastest step.
        max_s: Slowest step.
        peak_gib: Peak allocated memory of the timed steps, on the rank that needs most.
        loss: Mean loss over every valid token of the sequence.
        grad_norm: Norm of the gradient of that mean.
        joules: Energy of a step, of all GPUs; 0 where it is not counted.
        watts: Mean power of one GPU over the timed steps and what lies between them.
        error: Why there is no figure.
    """

    mode: str
    seq: int
    world: int
    build_s: float = 0.0
    warm_s: float = 0.0
    step_s: float = 0.0
    min_s: float = 0.0
    max_s: float = 0.0
    peak_gib: float = 0.0
    loss: float = 0.0
    grad_norm: float = 0.0
    joules: float = 0.0
    watts: float = 0.0
    error: str = ""


def measure(row: Measured, sizes: Sizes, model: nn.Module, case: Case) -> None:
    """Fill `row` with the figures of one case.

    Args:
        row: Mode, length and world.
        sizes: How many steps.
        model: The parameters whose gradients are looked at.
        case: What is measured.
    """
    cuda = torch.cuda.is_available()
    row.build_s = case.build_s
    began = time.perf_counter()
    for _ in range(sizes.warmup):
        _timed(model, case, cuda)
    row.warm_s = time.perf_counter() - began
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    meter = EnergyMeter(torch.cuda.current_device() if cuda else 0)
    began, energy = time.perf_counter(), meter.joules()
    times = [_timed(model, case, cuda) for _ in range(sizes.steps - 1)]
    seconds, loss = _step(case, cuda)
    times.append(seconds)
    spent, energy = time.perf_counter() - began, meter.joules() - energy
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    slowest = _over_ranks([*times, peak], dist.ReduceOp.MAX)
    times, row.peak_gib = slowest[:-1], slowest[-1]
    row.step_s, row.min_s, row.max_s = statistics.median(times), min(times), max(times)
    together = _over_ranks([energy], dist.ReduceOp.SUM)[0]
    row.joules, row.watts = together / sizes.steps, together / row.world / spent

    if case.weighted:
        clear(model, case)
        row.loss = global_loss(case)
    else:
        row.loss = _over_ranks([float(loss.detach()) * case.share], dist.ReduceOp.SUM)[0]
    row.grad_norm = gradient_norm(model)
    clear(model, case)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def _timed(model: nn.Module, case: Case, cuda: bool) -> float:
    seconds, loss = _step(case, cuda)
    del loss
    clear(model, case)
    return seconds


def _step(case: Case, cuda: bool) -> tuple[float, Tensor]:
    if cuda:
        torch.cuda.synchronize()
    dist.barrier()
    at = time.perf_counter()
    loss = case.step(None)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - at, loss


def clear(model: nn.Module, case: Case) -> None:
    """Drop every gradient."""
    case.clear()
    model.zero_grad(set_to_none=True)


def global_loss(case: Case) -> float:
    """Run one step that leaves the gradient of the mean over every valid token, and return that mean."""
    loss = float(case.step(case.share).detach())
    return _over_ranks([loss * case.share], dist.ReduceOp.SUM)[0]


def gradient_norm(model: nn.Module) -> float:
    """Norm over all parameters; NaN when none has a gradient."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in model.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else float("nan")


def _over_ranks(values: list[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    reduced: Tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(reduced, op=how)
    found: list[float] = reduced.tolist()
    return found


def describe(error: BaseException) -> str:
    """One line about a failure."""
    text = str(error)
    return "out of memory" if "out of memory" in text.lower() else f"{type(error).__name__}: {text}"[:600]


def report(row: DataclassInstance) -> None:
    """Print one row: a dataclass, as JSON behind `MARK`."""
    print(MARK + json.dumps(asdict(row)), flush=True)


def leave() -> None:
    """End this process at once, because the other ranks may hang in a collective."""
    os._exit(1)
