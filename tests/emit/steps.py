"""Functions that run on every rank of the emission tests; each call measures several configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

import autosp_ir as air
from autosp_ir.emit.parallelize import Backend
from tests.models import build

Measured = tuple[float, dict[str, Tensor]]


def loss_of(output: Any) -> Tensor:
    """The loss of a model's output, or the output itself if it is the loss."""
    loss: Tensor = output if isinstance(output, Tensor) else output["loss"]
    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by canonical name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def measure(model: nn.Module, forward: Callable[..., Any], batch: dict[str, Tensor]) -> Measured:
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = loss_of(forward(**batch))
    loss.backward()
    return float(loss.detach()), gradients(model)


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error over tensors, each relative to its own scale (or 1e-6 of the largest of all)."""
    assert found.keys() == expected.keys()
    top = max(float(t.abs().max()) for t in expected.values())
    return max(float((found[n] - t).abs().max()) / max(float(t.abs().max()), 1e-6 * top) for n, t in expected.items())


def step_errors(rank: int, world: int, cases: Sequence[tuple[str, dict[str, Any], dict[str, Any]]]) -> list[Any]:
    """For every (model, settings, options): relative loss error and largest gradient error against dense."""
    errors = []
    for name, settings, options in cases:
        model, batch = build(name, **settings)
        loss, grads = measure(model, model, batch)
        step = air.parallelize(model, batch, **options)
        found_loss, found = measure(model, step, batch)
        errors.append((abs(found_loss - loss) / abs(loss), largest_error(found, grads)))
    return errors


def optimise(
    model: nn.Module, forward: Callable[..., Any], batch: dict[str, Tensor], kind: str, rate: float
) -> dict[str, Tensor]:
    """Parameters after ten optimizer steps on one batch."""
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=rate)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(forward(**batch)).backward()
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def training_errors(rank: int, world: int, name: str, backend: Backend) -> dict[str, float]:
    """Distance from dense training after ten steps, and the drift between two dense attention kernels."""
    runs: dict[tuple[str, str], dict[str, Tensor]] = {}
    for kind, rate in (("SGD", 1e-1), ("AdamW", 1e-3)):
        for variant in ("dense", "other kernel", "parallel"):
            model, batch = build(name, length=33)
            forward = air.parallelize(model, batch, backend=backend) if variant == "parallel" else model
            kernel = sdpa_kernel(SDPBackend.MATH) if variant == "other kernel" else nullcontext()
            with kernel:
                runs[kind, variant] = optimise(model, forward, batch, kind, rate)
    return {
        "SGD": largest_error(runs["SGD", "parallel"], runs["SGD", "dense"]),
        "AdamW": largest_error(runs["AdamW", "parallel"], runs["AdamW", "dense"]),
        "AdamW drift": largest_error(runs["AdamW", "other kernel"], runs["AdamW", "dense"]),
    }


def lengths_errors(rank: int, world: int, dynamic: bool | None) -> list[tuple[float, float]]:
    """Errors at several lengths through one step; recaptured, or captured once with a symbol."""
    model, batch = build("llama-gqa", length=32)
    step = air.parallelize(model, batch, backend="aot_eager", dynamic=dynamic)
    errors = []
    for length in (32, 33, 48, 32):
        _, other = build("llama-gqa", length=length)
        loss, grads = measure(model, model, other)
        found_loss, found = measure(model, step, other)
        errors.append((abs(found_loss - loss) / abs(loss), largest_error(found, grads)))
    return errors


def outside_loss(rank: int, world: int) -> list[tuple[float, float]]:
    """A loss outside the model, given as `loss_fn` and computed by the caller from gathered logits."""

    def loss_fn(output: Any, batch: dict[str, Tensor]) -> Tensor:
        logits, labels = output.logits, batch["labels"]
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    model, batch = build("llama-gqa", length=33, ignored=5)

    def dense(**inputs: Tensor) -> Tensor:
        return loss_fn(model(**inputs), inputs)

    loss, grads = measure(model, dense, batch)
    errors = []
    inside = air.parallelize(model, batch, backend="aot_eager", loss_fn=loss_fn)
    logits = air.parallelize(model, batch, backend="aot_eager", outputs=["logits"])
    for forward in (inside, lambda **inputs: loss_fn(logits(**inputs), inputs)):
        found_loss, found = measure(model, forward, batch)
        errors.append((abs(found_loss - loss) / abs(loss), largest_error(found, grads)))
    return errors


def data_axis(rank: int, world: int) -> float:
    """dp x sp: each data group has its own batch; returns the largest gradient error against its dense run."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "sp"))
    group = mesh.get_local_rank("dp")
    model, batch = build("llama-gqa", length=32)
    batch = {k: v.roll(group, dims=1) for k, v in batch.items()}
    _, grads = measure(model, model, batch)
    step = air.parallelize(model, batch, mesh=mesh, backend="aot_eager")
    _, found = measure(model, step, batch)
    return largest_error(found, grads)


def external_sync(rank: int, world: int) -> float:
    """grad_sync="external": averaging over the ranks gives the dense gradient."""
    model, batch = build("llama-gqa", length=32)
    _, grads = measure(model, model, batch)
    step = air.parallelize(model, batch, backend="aot_eager", grad_sync="external")
    _, found = measure(model, step, batch)
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= world
    return largest_error(found, grads)


def state_dict_travels(rank: int, world: int) -> bool:
    """A state_dict of the step loads into a dense model, and a dense one into the step."""
    model, batch = build("llama-gqa", length=32)
    step = air.parallelize(model, batch, backend="aot_eager")
    optimise(model, step, batch, "SGD", 1e-1)
    other, _ = build("llama-gqa", length=32, seed=7)
    missing = other.load_state_dict(step.state_dict())
    same = all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    fresh, _ = build("llama-gqa", length=32, seed=9)
    step.load_state_dict(fresh.state_dict())
    loss, _ = measure(model, step, batch)
    expected, _ = measure(fresh, fresh, batch)
    return same and not missing.missing_keys and abs(loss - expected) <= 1e-5 * abs(expected)
