"""`simulate`: every rank of a program in one process, in lockstep, without a process group.

A plain interpreter steps each rank to its next collective; a collective completes when every rank of its group has
arrived at the same one, and is evaluated as a pure function over their contributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autosp_ir._torch_compat import exact_autocast
from autosp_ir.comm.layout import check_emittable
from autosp_ir.errors import PipelineError, SimulationError
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import OutputKind, Program, Stage
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.sim.binding import Batch, InputBinder
from autosp_ir.sim.interpreter import RankInterpreter
from autosp_ir.sim.memory import MemoryMeter
from autosp_ir.sim.mesh import RankMesh
from autosp_ir.sim.results import agreed, buffers_of, gradients_of, outputs_of
from autosp_ir.sim.scheduler import CommRecord, Scheduler

LOSS = "loss"


@dataclass
class Simulation:
    """What a simulated run gave.

    Attributes:
        program: The program that ran; for a forward program with gradients, its joint form.
        outputs: Per rank, the model's outputs by name.
        buffers: Buffers that the program writes, by canonical name.
        grads: Gradients by canonical parameter or input name, complete; tied parameters appear once.
        comm: Every collective over more than one rank, in the order rank 0 issues it.
        peak_bytes: Per rank, the most bytes of storage alive at once; parameters and inputs are not counted.
        values: Per rank, every value by name; filled when simulated with `trace=True`.
    """

    program: Program
    outputs: list[dict[str, Any]]
    buffers: dict[str, Tensor]
    grads: dict[str, Tensor]
    comm: list[CommRecord]
    peak_bytes: list[int]
    values: list[dict[str, Any]] = field(default_factory=list)

    @property
    def loss(self) -> Tensor:
        """The global loss.

        Raises:
            SimulationError: The program has no output called "loss" and no single scalar output, or the ranks
                disagree.
        """
        scalars = [name for name, value in self.outputs[0].items() if isinstance(value, Tensor) and value.ndim == 0]
        if LOSS not in self.outputs[0] and len(scalars) != 1:
            raise SimulationError(
                f"the program has no loss; its outputs are {sorted(self.outputs[0])}",
                hint="read sim.outputs[rank], or capture with loss_fn= for a loss outside the model",
            )
        name = LOSS if LOSS in self.outputs[0] else scalars[0]
        return agreed(f"the loss {name!r}", [outputs[name] for outputs in self.outputs])


def simulate(
    program: Program | None = None,
    batch: Batch = None,
    *,
    programs: Sequence[Program] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    tangents: Mapping[str, Tensor] | None = None,
    gradients: bool = True,
    seed: int = 0,
    trace: bool = False,
) -> Simulation:
    """Run every rank of a program's mesh in this process.

    A forward program is differentiated first if anything in it asks for a gradient; joint and lowered programs run
    as they are.

    Args:
        program: The program that every rank runs.
        batch: The full batch, as the model was captured with; every rank gets the same one.
        programs: One program per rank instead, for programs that depend on the rank.
        tensors: Parameters and buffers to use instead of the bound ones, by canonical name.
        tangents: Gradients of outputs by output name; ones where absent.
        gradients: False runs a forward program without differentiating it.
        seed: Start of each rank's random numbers: values drawn from equal shapes are equal on all ranks.
        trace: Keep every value of every rank.

    Returns:
        Loss, outputs, gradients, collectives and peak memory.

    Raises:
        SimulationError: An input is missing or does not fit, an operation failed, or ranks disagree on a gradient.
        DeadlockError: The ranks issue different collective sequences.
        UnsupportedError: Attention over tokens that are cut between ranks, which no pass has resolved.
    """
    per_rank = _per_rank(program, programs)
    for each in {id(p): p for p in per_rank}.values():
        check_emittable(each)
    if gradients:
        differentiated = {key: _with_gradients(p) for key, p in {id(p): p for p in per_rank}.items()}
        per_rank = [differentiated[id(p)] for p in per_rank]
    mesh = RankMesh.of(per_rank[0].mesh)
    meters = [MemoryMeter() for _ in per_rank]
    values: list[dict[str, Any]] = [{} for _ in per_rank] if trace else []
    with torch.no_grad(), exact_autocast():
        ranks = [
            RankInterpreter(
                each,
                _inputs(each, batch, tensors, tangents),
                mesh.coordinates(rank),
                meters[rank],
                values[rank].__setitem__ if trace else None,
            ).run()
            for rank, each in enumerate(per_rank)
        ]
        scheduler = Scheduler(mesh, ranks, seed=seed, random=any(_has(p, Trait.RANDOM) for p in per_rank))
        flat = scheduler.run()
    return Simulation(
        program=per_rank[0],
        outputs=[outputs_of(p, o, OutputKind.USER_OUTPUT) for p, o in zip(per_rank, flat, strict=True)],
        buffers=buffers_of(per_rank, flat),
        grads=gradients_of(per_rank, flat),
        comm=scheduler.comm,
        peak_bytes=[meter.peak_bytes for meter in meters],
        values=values,
    )


def _per_rank(program: Program | None, programs: Sequence[Program] | None) -> list[Program]:
    if (program is None) == (programs is None):
        raise SimulationError(
            "simulate needs either one program or one program per rank",
            hint="call simulate(program, batch) or simulate(programs=[p0, p1, …], batch=batch)",
        )
    if program is not None:
        return [program] * RankMesh.of(program.mesh).size
    given = list(programs or ())
    meshes = {tuple(p.mesh.items()) for p in given}
    if len(meshes) != 1 or RankMesh(next(iter(meshes))).size != len(given):
        raise SimulationError(
            f"{len(given)} program(s) were given for the mesh(es) {[p.mesh for p in given]}",
            hint="give one program per rank, all written for the same mesh",
        )
    return given


def _with_gradients(program: Program) -> Program:
    wanted = any(spec.requires_grad for spec in program.signature.inputs)
    if program.stage is not Stage.FORWARD or not wanted:
        return program
    try:
        # By its registered name: the core never imports the built-in passes.
        manager = PassManager("differentiate", verify=False)
    except PipelineError as error:
        raise SimulationError(
            "a forward program needs the pass `differentiate` for its gradients",
            hint="install the passes with the package, or call simulate(…, gradients=False)",
        ) from error
    return manager.run(program, mesh=program.mesh).program


def _inputs(
    program: Program, batch: Batch, tensors: Mapping[str, Tensor] | None, tangents: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    inputs = InputBinder(program, batch, tensors, tangents).bind()
    if not _has(program, Trait.MUTATES):
        return inputs
    # A program that writes in place gets copies: neither the caller's tensors nor other ranks may change.
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _has(program: Program, trait: Trait) -> bool:
    return any(node.op.has(trait) for node in program.graph.nodes)
