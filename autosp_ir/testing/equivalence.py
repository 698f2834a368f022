"""Whether a program computes what its model computes: loss, every output and every gradient.

Three runs are compared. The model runs eagerly in its own precision, and so does the program captured from it anew
on one device: a bug in the capture cannot cancel out. Then that one-device program and the program under test run
promoted to float64, where nothing but a mistake can tell them apart.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autosp_ir.capture.info import CaptureInfo
from autosp_ir.capture.program import capture
from autosp_ir.comm.random_masks import GLOBAL
from autosp_ir.errors import AutoSPError, UnsupportedError
from autosp_ir.ir.program import Program
from autosp_ir.sim.lockstep import Simulation, simulate
from autosp_ir.testing.compare import (
    FLOOR,
    GRADIENT,
    Deviation,
    EquivalenceError,
    Report,
    compare_named,
    gradient_floor,
)
from autosp_ir.testing.dense import run_dense
from autosp_ir.testing.eager import EagerRun, run_eagerly
from autosp_ir.testing.promote import floating_dtypes, promote, promote_batch
from autosp_ir.testing.unresolved import with_gathered_attention

# Where every run's random numbers start; a dropout of one is that of all, if it is drawn with rng="global".
_SEED = 0

# Of the coarsest dtype that a model computes in: error that two kernels for the same formula may show, and the part
# of the largest gradient below which rounding noise drowns a gradient.
_OWN_PRECISION = {torch.float64: (1e-10, FLOOR), torch.float32: (2e-5, 1e-3)}
_HALF_PRECISION = (6e-2, 3e-2)


@dataclass
class Equivalence:
    """What `compare_to_dense` found.

    Attributes:
        capture: The captured one-device program against the eager model, in the model's own precision.
        program: The program under test against the one-device program, in float64.
    """

    capture: Report
    program: Report

    @property
    def ok(self) -> bool:
        """Whether both comparisons passed."""
        return self.capture.ok and self.program.ok

    def check(self) -> Equivalence:
        """Return this when both comparisons passed.

        Raises:
            EquivalenceError: One did not; the message is its report.
        """
        self.capture.check()
        self.program.check()
        return self

    def __str__(self) -> str:
        return f"{self.capture}\n{self.program}"


@dataclass
class DenseReference:
    """The one-device side of a comparison, computed once for many programs.

    Attributes:
        batch: The batch.
        program: The model captured on this batch, for one device.
        capture: The captured program against the eager model.
        simulation: The captured program promoted to float64, run on one device.
    """

    batch: Any
    program: Program
    capture: Report
    simulation: Simulation
    tangents: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, batch: Any, like: CaptureInfo | None = None, **settings: Any) -> DenseReference:
        """Run the dense side.

        Args:
            model: With real weights.
            batch: As the model takes it.
            like: Take `seq_dims`, `outputs` and `loss_fn` from this capture.
            settings: `seq_dims`, `outputs`, `loss_fn` of `air.capture`.

        Raises:
            CaptureError: The model cannot be captured.
        """
        if like is not None:
            settings = {"seq_dims": like.seq_dims, "outputs": like.output_names, "loss_fn": like.loss_fn} | settings
        with like.autocast.entered() if like is not None else contextlib.nullcontext():
            program = capture(model, batch, **settings)
        # Attention as it is defined. torch's CPU kernel recomputes probabilities from their logarithmic sum, which a
        # query that attends to nothing loses to rounding when its mask adds a large finite number: wrong gradients.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_SEED)
                eager = run_eagerly(model, program.capture, batch)
            own = run_dense(program, batch, eager.tangents, seed=_SEED)
        tangents = {name: tangent.double() for name, tangent in eager.tangents.items()}
        # If that run traced a backward, its joint program is promoted: to trace again would take most of the time.
        wide = run_dense(promote(own.program), promote_batch(batch), tangents, seed=_SEED)
        return DenseReference(batch, program, _capture_report(program, own, eager), wide, tangents)

    def compare(self, program: Program, rtol: float = 1e-10) -> Equivalence:
        """Run a program of any stage, promoted to float64, on all its ranks and compare.

        Attention that no strategy pass has resolved yet runs on gathered tokens.

        Raises:
            UnsupportedError: Ranks draw masks of their own, so that nothing can be the dense model's.
        """
        _refuse_own_masks(program)
        runnable = promote(with_gathered_attention(program))
        found = simulate(runnable, promote_batch(self.batch), tangents=self.tangents, seed=_SEED)
        return Equivalence(self.capture, compare_runs(found, self.simulation, rtol=rtol, title=_title(program)))

    def check(self, program: Program, rtol: float = 1e-10) -> Equivalence:
        """As `compare`, raising EquivalenceError when the program deviates."""
        return self.compare(program, rtol).check()


def compare_to_dense(model: nn.Module, program: Program, batch: Any, *, rtol: float = 1e-10) -> Equivalence:
    """Compare a program with the model that it was captured from.

    Args:
        model: The model, with real weights.
        program: Captured from it and rewritten by any passes, of any stage; on as many ranks as its mesh has.
        batch: A batch as the model takes it. A program with a symbolic length accepts any length.
        rtol: Largest error allowed between the promoted programs.

    Returns:
        Both reports; nothing is raised for a deviation.

    Raises:
        AutoSPError: The program was not captured from a model, or cannot run.
    """
    if not isinstance(program.capture, CaptureInfo):
        raise AutoSPError(
            "the program was not captured from a model, so there is nothing dense to compare it with",
            hint="use air.capture(model, batch), or check_pass for programs from text",
        )
    return DenseReference.of(model, batch, program.capture).compare(program, rtol)


def assert_equivalent(
    model: nn.Module, program: Program, batch: Any, *, rtol: float = 1e-10, world: int | None = None
) -> Equivalence:
    """Assert that a program computes the loss, every output and every gradient of its model.

    Args:
        model: The model, with real weights of any dtype.
        program: Captured from it and rewritten by any passes, of any stage.
        batch: A batch as the model takes it.
        rtol: Largest error allowed, relative to the tensor's largest magnitude; see `autosp_ir.testing.compare`.
        world: Number of ranks that the program must be written for; None accepts any.

    Returns:
        The reports.

    Raises:
        EquivalenceError: The program deviates (an AssertionError, with the worst tensors by name).
    """
    ranks = math.prod(program.mesh.values())
    if world is not None and ranks != world:
        raise EquivalenceError(
            f"the program is written for {ranks} rank(s), not {world}",
            hint=f'run the pipeline with mesh={{"sp": {world}}} first',
        )
    return compare_to_dense(model, program, batch, rtol=rtol).check()


def compare_runs(
    found: Simulation,
    expected: Simulation,
    *,
    rtol: float = 1e-10,
    floor: float = FLOOR,
    least: float = 0.0,
    title: str = "two runs",
) -> Report:
    """Compare two simulated runs: outputs of every rank of `found` with rank 0 of `expected`, and gradients.

    Args:
        found: The run under test.
        expected: The reference.
        rtol: Largest error that passes.
        floor: Part of the largest gradient that every gradient counts as at least.
        least: Magnitude that every output and gradient counts as at least, for programs of which some may be zero but
            for rounding, such as the mean of what was centred.
        title: Of the report.
    """
    report = Report(title, rtol)
    for rank, outputs in enumerate(found.outputs):
        where = f" on rank {rank}" if len(found.outputs) > 1 else ""
        report.deviations += [
            Deviation(f"{d.what}{where}", d.error, d.note)
            for d in compare_named("output", outputs, expected.outputs[0], floor=least)
        ]
    report.deviations += compare_named("buffer", found.buffers, expected.buffers)
    report.deviations += compare_named(
        GRADIENT, found.grads, expected.grads, floor=max(least, gradient_floor(expected.grads.values(), floor))
    )
    return report


def _refuse_own_masks(program: Program) -> None:
    for node in program.find("autosp.keep_mask"):
        if node.arg("rng") != GLOBAL:
            raise UnsupportedError(
                f"%{node.name} is a dropout mask that the dense model does not draw",
                node=node,
                hint="compare a program of canonicalize{rng=global}, or call model.eval() before capturing",
            )


def _capture_report(program: Program, own: Simulation, eager: EagerRun) -> Report:
    rtol, floor = _tolerance(floating_dtypes(program))
    report = Report("captured program against the eager model, in its own precision", rtol)
    report.deviations += compare_named("output", own.outputs[0], eager.outputs)
    report.deviations += compare_named(
        GRADIENT, own.grads, eager.gradients, floor=gradient_floor(eager.gradients.values(), floor)
    )
    return report


def _tolerance(dtypes: set[torch.dtype]) -> tuple[float, float]:
    if not dtypes:
        return _OWN_PRECISION[torch.float64]
    coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps)
    return _OWN_PRECISION.get(coarsest, _HALF_PRECISION)


def _title(program: Program) -> str:
    mesh = " × ".join(f"{axis}={size}" for axis, size in program.mesh.items())
    return f"{program.stage} program on {mesh or 'one rank'} against the dense model, in float64"


__all__ = ["DenseReference", "Equivalence", "assert_equivalent", "compare_runs", "compare_to_dense"]
