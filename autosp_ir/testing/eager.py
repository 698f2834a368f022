"""A captured model run eagerly, under autograd: what the captured program is checked against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autosp_ir.capture.info import CaptureInfo
from autosp_ir.capture.outputs import LOSS, Branch, Constant, Leaf, Structure
from autosp_ir.errors import AutoSPError


@dataclass(frozen=True)
class EagerRun:
    """Outputs and gradients of an eager run.

    Args:
        outputs: The kept outputs, by the names that capture gave them.
        gradients: By parameter or user input name; parameters that the loss does not reach are absent.
        tangents: The gradient given to each output.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    tangents: dict[str, Tensor]


def run_eagerly(model: nn.Module, capture: CaptureInfo, batch: Any, seed: int = 0) -> EagerRun:
    """Run a model on a batch, under the autocast of its capture, and differentiate what `capture` keeps of its outputs.

    Args:
        model: With real weights; its `.grad` fields are not touched, and buffers that it updates get their values back.
        capture: Names the inputs and the kept outputs.
        batch: As the model takes it.
        seed: Of the random gradients given to outputs other than a scalar.

    Raises:
        AutoSPError: The model returns no differentiable output.
    """
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(_as_tuple(batch)), {})
    given = dict(zip(capture.input_names, capture.flatten(args, kwargs), strict=True))
    leaves = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in given.items()}
    flat = [leaves[n] for n in capture.input_names]
    with _own_buffers(model):
        return _differentiated(model, capture, flat, leaves, seed)


@contextlib.contextmanager
def _own_buffers(model: nn.Module) -> Iterator[None]:
    """What a program is bound to is the model's own memory: an eager step in front of it must not be seen there."""
    before = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _differentiated(
    model: nn.Module, capture: CaptureInfo, flat: list[Tensor], leaves: Mapping[str, Tensor], seed: int
) -> EagerRun:
    with capture.autocast.entered():
        output = capture.plan.call(model, flat)
        outputs = _kept(capture, output, capture.plan.batch(flat))
    tangents = {n: _tangent(t, seed + i) for i, (n, t) in enumerate(outputs.items()) if t.requires_grad}
    wanted: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wanted |= {n: t for n, t in leaves.items() if t.requires_grad}
    if wanted and not tangents:
        raise AutoSPError(
            f"none of the outputs {sorted(outputs)} depends on a parameter that asks for a gradient",
            hint="keep a differentiable output, such as the loss",
        )
    if not wanted:
        return EagerRun({n: t.detach().clone() for n, t in outputs.items()}, {}, tangents)
    gradients = torch.autograd.grad(
        [outputs[n] for n in tangents], list(wanted.values()), list(tangents.values()), allow_unused=True
    )
    return EagerRun(
        {n: t.detach().clone() for n, t in outputs.items()},
        {n: g for n, g in zip(wanted, gradients, strict=True) if g is not None},
        tangents,
    )


def _as_tuple(batch: Any) -> Any:
    return (batch,) if isinstance(batch, Tensor) else batch


def _kept(capture: CaptureInfo, output: Any, batch: Any) -> dict[str, Tensor]:
    """The kept outputs by name, found along the structure that capture recorded."""
    structure, found = capture.output_structure, {}
    if capture.loss_fn is not None:
        found[LOSS] = capture.loss_fn(output, batch)
        if isinstance(structure, Branch) and structure.keys == (LOSS, "output"):
            rest = structure.children[1]
            structure = rest if rest is not None else Constant(None)
    _read(structure, output, found)
    return {name: found[name] for name in capture.output_names}


def _read(structure: Structure, output: Any, found: dict[str, Tensor]) -> None:
    if isinstance(structure, Leaf):
        found.setdefault(structure.name, output)
        return
    if isinstance(structure, Constant):
        return
    for position, child in enumerate(structure.children):
        if child is None or (isinstance(child, Leaf) and child.name in found):
            continue
        if structure.keys is None:
            _read(child, output[position], found)
            continue
        key = structure.keys[position]
        _read(child, output[key] if isinstance(output, Mapping) else getattr(output, key), found)


def _tangent(output: Tensor, seed: int) -> Tensor:
    if output.ndim == 0:
        return torch.ones_like(output)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


__all__ = ["EagerRun", "run_eagerly"]
