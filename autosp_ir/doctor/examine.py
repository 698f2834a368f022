"""The examination: capture once, then passes and a float64 comparison for each number of ranks."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from autosp_ir.capture.batch import plan_call
from autosp_ir.comm.random_masks import GLOBAL
from autosp_ir.doctor.findings import Diagnosis, Failure, RankFinding, Verdict
from autosp_ir.doctor.placements import Placements
from autosp_ir.errors import AutoSPError, PassError, PipelineError, SimulationError
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.drawing import drawing
from autosp_ir.pipeline.instrument import Instrument
from autosp_ir.pipeline.manager import PassManager, PassResult
from autosp_ir.pipeline.spec import DEFAULT_PIPELINE
from autosp_ir.testing.compare import EquivalenceError, Report
from autosp_ir.testing.equivalence import DenseReference

T = TypeVar("T")

Progress = Callable[[str], None]
"""Called with what is about to be done, `steps_of(ranks)` times in all."""

_REPORT_IT = "report this as a bug, with the model's config and the batch's shapes"
_TRACEBACK_FRAMES = 6


def steps_of(ranks: Sequence[int]) -> int:
    """How often `diagnose` calls its `progress` when nothing fails."""
    return 1 + 2 * len(ranks)


def diagnose(
    model: nn.Module,
    batch: Any,
    ranks: Sequence[int] = (2, 4),
    *,
    pipeline: str = DEFAULT_PIPELINE,
    axis: str = "sp",
    strict: bool = False,
    rtol: float = 1e-10,
    name: str | None = None,
    progress: Progress = lambda step: None,
    **settings: Any,
) -> Diagnosis:
    """Say for each number of ranks whether a model's step is exact, or why it is refused; nothing is raised for either.

    The captured program is compared with the eager model in the model's own precision. What the passes make of it
    runs on all ranks, simulated in one process in float64, and loss, outputs and every gradient are compared. Active
    dropout draws the dense model's masks.

    Args:
        model: With real weights; it is not changed.
        batch: As the model takes it.
        ranks: Sizes of the sequence axis to examine, each on its own.
        pipeline: The passes; without `token-partition` nothing is said about what is cut.
        axis: Name of the sequence axis.
        strict: Refuse instead of gathering.
        rtol: Largest relative error that counts as exact.
        name: Of the model in the diagnosis; its class when None.
        progress: Called before each step.
        settings: `seq_dims`, `outputs` and `loss_fn` of `air.capture`.

    Returns:
        One finding per number of ranks.

    Raises:
        PipelineError: The pipeline is malformed, or a number of ranks is not positive.
    """
    if not ranks or any(r < 1 for r in ranks):
        raise PipelineError(f"{list(ranks)} are no numbers of ranks", hint="give positive numbers, such as 2,4")
    PassManager(pipeline)  # a malformed pipeline is the caller's mistake, no finding
    diagnosis = Diagnosis(
        name or type(model).__name__, sum(p.numel() for p in model.parameters()), _shapes(model, batch)
    )
    progress("capturing, and running the dense model")
    reference = _attempt("capture", lambda: DenseReference.of(model, batch, **settings))
    if isinstance(reference, _Failed):
        found = tuple(RankFinding(r, reference.verdict, failure=reference.failure) for r in ranks)
        return replace(diagnosis, findings=found)
    diagnosis = replace(diagnosis, capture_error=reference.capture.worst)
    if not reference.capture.ok:
        failure = _deviation("capture", reference.capture)
        return replace(diagnosis, findings=tuple(RankFinding(r, Verdict.WRONG, failure=failure) for r in ranks))
    examination = _Examination(reference, pipeline, axis, strict, rtol, progress)
    return replace(diagnosis, findings=tuple(examination.on(r) for r in ranks))


@dataclass(frozen=True)
class _Failed:
    verdict: Verdict
    failure: Failure


@dataclass(frozen=True)
class _Examination:
    """The steps for one number of ranks."""

    reference: DenseReference
    pipeline: str
    axis: str
    strict: bool
    rtol: float
    progress: Progress

    def on(self, ranks: int) -> RankFinding:
        watched = Placements()
        self.progress(f"{ranks} ranks: passes")
        result = _attempt("passes", lambda: self._run(self.reference.program, ranks, watched))
        found = RankFinding(
            ranks,
            Verdict.EXACT,
            families=tuple(watched.families),
            gathers=tuple(watched.gathers),
            gathered_bytes=watched.gathered_bytes,
            spread=watched.spread,
        )
        if isinstance(result, _Failed):
            return replace(found, verdict=result.verdict, failure=result.failure)
        found = replace(found, notes=tuple(str(r) for r in result.remarks if r.kind == "missed"))
        self.progress(f"{ranks} ranks: simulating, in float64")
        compared = _attempt("check", lambda: self.reference.compare(result.program, self.rtol).program)
        if isinstance(compared, _Failed):
            return replace(found, verdict=compared.verdict, failure=compared.failure)
        found = replace(found, error=compared.worst)
        if not compared.ok:
            return replace(found, verdict=Verdict.WRONG, failure=_deviation("check", compared))
        something_cut = ranks == 1 or watched.spread is None or watched.spread > 0
        return found if something_cut and not watched.gathers else replace(found, verdict=Verdict.EXACT_WITH_GATHERS)

    def _run(self, program: Program, ranks: int, watched: Instrument) -> PassResult:
        # Masks of the dense model: with masks of their own, ranks cannot be compared with it.
        passes = drawing(PassManager(self.pipeline).passes, GLOBAL)
        manager = PassManager(passes, instruments=[watched], reproducer=False)
        return manager.run(program, mesh={self.axis: ranks}, strict=self.strict)


def _attempt(stage: str, step: Callable[[], T]) -> T | _Failed:
    """The step's result, or what its exception means."""
    try:
        return step()
    except AutoSPError as error:
        failure = Failure(stage, type(error).__name__, error.reason, error.hint, error.context, error.pass_name)
        return _Failed(_verdict_of(error), failure)
    except Exception as error:  # whatever it is, it is no named refusal
        text = "".join(traceback.format_exception(error)[-_TRACEBACK_FRAMES:])
        return _Failed(Verdict.CRASH, Failure(stage, type(error).__name__, str(error), _REPORT_IT, text))


def _verdict_of(error: AutoSPError) -> Verdict:
    # The manager wraps what a pass did not mean to raise, and keeps it as the cause.
    if isinstance(error, PassError) and error.__cause__ is not None and not isinstance(error.__cause__, AutoSPError):
        return Verdict.CRASH
    return Verdict.WRONG if isinstance(error, SimulationError | EquivalenceError) else Verdict.REFUSED


def _deviation(stage: str, report: Report) -> Failure:
    return Failure(stage, EquivalenceError.__name__, str(report), _REPORT_IT)


def _shapes(model: nn.Module, batch: Any) -> dict[str, tuple[int, ...]]:
    try:
        plan, tensors = plan_call(model, batch)
    except AutoSPError:
        return {}  # capture says what is wrong with it
    return {name: tuple(t.shape) for name, t in zip(plan.names, tensors, strict=True)}


__all__ = ["Progress", "diagnose", "steps_of"]
