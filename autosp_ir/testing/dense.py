"""A captured one-device program under autograd: the dense side of a comparison, without a backward of our own in it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from autosp_ir._torch_compat import exact_autocast
from autosp_ir.errors import SimulationError
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import OutputKind, Program, Stage
from autosp_ir.sim.binding import Batch, InputBinder
from autosp_ir.sim.interpreter import RankInterpreter
from autosp_ir.sim.lockstep import Simulation, simulate
from autosp_ir.sim.memory import MemoryMeter
from autosp_ir.sim.results import outputs_of

# Random numbers are handed out by the simulator; what writes in place, or holds regions, is differentiated as a graph.
_NOT_ALONE = frozenset({Trait.RANDOM, Trait.MUTATES, Trait.COLLECTIVE, Trait.READS_RANK})


def run_dense(program: Program, batch: Batch, tangents: Mapping[str, Tensor], seed: int = 0) -> Simulation:
    """Run a forward program on one device, and let autograd differentiate what it runs.

    As `simulate`, in a fraction of the time: no backward is traced. Programs that are not for autograd alone (random
    ones, those that write in place, those with nested regions) are simulated.

    Args:
        program: A forward program for one device.
        batch: As the model was captured with.
        tangents: Gradients of outputs by output name; ones where absent.
        seed: Start of the random numbers.

    Raises:
        SimulationError: An input is missing or does not fit, or an operation failed.
    """
    if not _for_autograd(program):
        return simulate(program, batch, tangents=dict(tangents), seed=seed)
    inputs = InputBinder(program, batch, None, tangents).bind()
    wanted = {s.target: s.name for s in program.signature.inputs if s.requires_grad and _floating(inputs[s.name])}
    leaves = {target: inputs[name].detach().requires_grad_() for target, name in wanted.items()}
    inputs |= {name: leaves[target] for target, name in wanted.items()}
    with torch.enable_grad(), exact_autocast():
        flat = _finished(RankInterpreter(program, inputs, {}, MemoryMeter()).run())
        outputs = outputs_of(program, flat, OutputKind.USER_OUTPUT)
        grads = _gradients(outputs, leaves, tangents)
    plain = {n: v.detach() if isinstance(v, Tensor) else v for n, v in outputs.items()}
    return Simulation(program, [plain], {}, grads, [], [0])


def _for_autograd(program: Program) -> bool:
    if program.stage is not Stage.FORWARD or program.mesh:
        return False
    if any(s.kind is OutputKind.BUFFER_MUTATION for s in program.signature.outputs):
        return False
    return not any(n.op.traits & _NOT_ALONE or n.op.name.startswith("hop.") for n in program.graph.nodes)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _finished(steps: Generator[Any, Any, Any]) -> list[Any]:
    """What an interpreter returns that has nobody to wait for."""
    try:
        next(steps)
    except StopIteration as end:
        found: list[Any] = end.value
        return found
    raise SimulationError(
        "a program for one device waits for others", hint="give it a mesh and simulate it: air.simulate(program, batch)"
    )


def _gradients(
    outputs: Mapping[str, Any], leaves: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    reached = {n: v for n, v in outputs.items() if isinstance(v, Tensor) and v.requires_grad}
    if not reached or not leaves:
        return {}
    given = [tangents.get(n, torch.ones_like(v)) for n, v in reached.items()]
    found = torch.autograd.grad(list(reached.values()), list(leaves.values()), given, allow_unused=True)
    return {n: g for n, g in zip(leaves, found, strict=True) if g is not None}


__all__ = ["run_dense"]
