"""Reading a simulated run: outputs by name, and values that every rank must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autosp_ir.errors import SimulationError
from autosp_ir.ir.program import InputKind, OutputKind, Program

# Ranks run the same kernels on the same bits; only memory alignment can make them round differently.
_ROUNDING = 16.0


def outputs_of(program: Program, flat: Sequence[Any], kind: OutputKind) -> dict[str, Any]:
    """One rank's outputs of a kind, by target.

    Raises:
        SimulationError: The signature does not describe the outputs.
    """
    specs = program.signature.outputs
    if len(specs) != len(flat):
        raise SimulationError(
            f"the program returns {len(flat)} value(s) but its signature names {len(specs)}",
            hint="program.verify() shows which rewrite changed the outputs alone",
        )
    return {s.target: value for s, value in zip(specs, flat, strict=True) if s.kind is kind and value is not None}


def buffers_of(programs: Sequence[Program], flat: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """Mutated buffers by name; every rank must hold the same."""
    per_rank = [outputs_of(p, o, OutputKind.BUFFER_MUTATION) for p, o in zip(programs, flat, strict=True)]
    return {name: agreed(f"buffer {name!r}", [ranks[name] for ranks in per_rank]) for name in per_rank[0]}


def gradients_of(programs: Sequence[Program], flat: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """Complete gradients by name: equal on every rank, or averaged where the program leaves that to DDP."""
    per_rank = [outputs_of(p, o, OutputKind.GRADIENT) for p, o in zip(programs, flat, strict=True)]
    parameters = {s.target for s in programs[0].signature.inputs if s.kind is InputKind.PARAMETER}
    external = programs[0].info.get("grad_sync") == "external"
    found: dict[str, Tensor] = {}
    for name in per_rank[0]:
        ranks = [gradients[name] for gradients in per_rank]
        if external and name in parameters:
            # What DDP does with them outside the program.
            found[name] = torch.stack(ranks).mean(0)
        else:
            found[name] = agreed(f"the gradient of {name!r}", ranks)
    return found


def agreed(what: str, ranks: Sequence[Tensor]) -> Tensor:
    """The value of rank 0, which every rank must hold up to rounding.

    Raises:
        SimulationError: A rank holds another value.
    """
    first = ranks[0]
    relative = _ROUNDING * torch.finfo(first.dtype).eps if first.is_floating_point() else 0.0
    scale = float(first.nan_to_num(0.0, 0.0, 0.0).abs().max()) if first.numel() and relative else 0.0
    for rank, other in enumerate(ranks[1:], start=1):
        if other.shape == first.shape and torch.allclose(
            other, first, rtol=relative, atol=relative * scale, equal_nan=True
        ):
            continue
        raise SimulationError(
            f"ranks 0 and {rank} disagree on {what}: {_difference(first, other)}",
            hint="a reduction over the ranks is missing: program.verify() names the value whose layout is wrong",
        )
    return first


def _difference(first: Tensor, other: Tensor) -> str:
    if first.shape != other.shape:
        return f"shapes {list(first.shape)} and {list(other.shape)}"
    gap = (other.to(torch.float64) - first.to(torch.float64)).abs().max()
    return f"the largest difference is {float(gap):.3g}"
