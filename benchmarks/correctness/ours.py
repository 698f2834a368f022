"""A case through the default pipeline, on simulated ranks in this process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import autosp_ir as air
from benchmarks.correctness.cases import Batch, Case
from benchmarks.correctness.compare import Row, Step, dense_step, errors

_REMATERIALISED = air.DEFAULT_PIPELINE.replace("remat", "remat{policy=min-cut}")
_SEED = 0


def measure(case: Case) -> Row:
    """One case.

    Raises:
        AutoSPError: The case is refused.
    """
    return _MEASURES[case.measure](case)


def refuses(error: BaseException) -> bool:
    """Whether an error is one of ours, with a name and a hint."""
    return isinstance(error, air.AutoSPError)


def _program(model: nn.Module, batch: Batch, ranks: int, pipeline: str = air.DEFAULT_PIPELINE) -> air.Program:
    return air.PassManager(pipeline).run(air.capture(model, batch), mesh={"sp": ranks}).program


def _row(model: nn.Module, batch: Batch, simulation: air.Simulation) -> Row:
    torch.manual_seed(_SEED)
    return errors(Step(simulation.loss, simulation.grads), dense_step(model, batch))


def _gradients(case: Case) -> Row:
    model, batch = case.build()
    simulation = air.simulate(_program(model, batch, case.ranks), batch)
    row = _row(model, batch, simulation)
    sent = sum(record.bytes for record in simulation.comm if record.op == "all_to_all")
    return {**row, "bytes": sent} if case.bytes else row


def _redrawn_masks(case: Case) -> Row:
    model, batch = case.build()
    pipeline = _REMATERIALISED.replace("canonicalize", "canonicalize{rng=global}")
    program = _program(model, batch, case.ranks, pipeline)
    return _row(model, batch, air.simulate(program, batch, seed=_SEED))


def _repeated_collectives(case: Case) -> Row:
    model, batch = case.build()
    nodes = _program(model, batch, case.ranks, _REMATERIALISED).find("_c10d_functional.all_to_all_single")
    forward = sum(node.phase is air.Phase.FORWARD for node in nodes)
    return {"all_to_alls": {"forward": forward, "backward": len(nodes) - forward}}


def _second_program(case: Case) -> Row:
    model, batch = case.build()
    programs = [_program(model, batch, ranks) for ranks in (case.ranks, 2 * case.ranks)]
    rows = [_row(model, batch, air.simulate(program, batch)) for program in programs]
    return max(rows, key=lambda row: row["gradient_error"])


_MEASURES: dict[str, Callable[[Case], Row]] = {
    "gradients": _gradients,
    "redrawn masks": _redrawn_masks,
    "repeated collectives": _repeated_collectives,
    "second program": _second_program,
}
