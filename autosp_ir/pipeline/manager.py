"""The pass manager: checks a whole pipeline, then runs it on a clone, one verified pass at a time."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autosp_ir._torch_compat import exact_autocast
from autosp_ir.errors import AutoSPError, PassError, PipelineError
from autosp_ir.ir.hashing import bindings_of, structural_hash
from autosp_ir.ir.program import Program, Stage
from autosp_ir.pipeline import formats
from autosp_ir.pipeline.base import Pass, PassContext, Remark
from autosp_ir.pipeline.check import check_mesh, check_pipeline
from autosp_ir.pipeline.instrument import Instrument, Verify
from autosp_ir.pipeline.registry import format_pipeline, parse_pipeline
from autosp_ir.pipeline.reproduce import VARIABLE, describe_failure, write_reproducer
from autosp_ir.pipeline.spec import closest
from autosp_ir.pipeline.timeout import call_within
from autosp_ir.pipeline.trace import PassRecord, Trace
from autosp_ir.rewrite.limit import RewriteLimit
from autosp_ir.rewrite.statistics import RuleStatistics

_logger = logging.getLogger("autosp_ir.pipeline")


@dataclass(frozen=True)
class PassResult:
    """What a pipeline made of a program.

    Args:
        program: The rewritten program; the argument of `run` is untouched.
        trace: One record per pass, with its rewrites.
        remarks: What the passes said, in order.
        statistics: What each pass counted, by pass name; the hits of its rules among it.
        timings: Seconds by pass name, without verification and instruments.
    """

    program: Program
    trace: Trace
    remarks: list[Remark]
    statistics: dict[str, dict[str, int]]
    timings: dict[str, float]

    @property
    def rules(self) -> dict[str, dict[str, RuleStatistics]]:
        """Tries, hits and milliseconds by pass and rule; passes without rules are left out."""
        totals: dict[str, dict[str, RuleStatistics]] = {}
        for record in self.trace:
            for name, done in record.rules.items():
                totals.setdefault(record.name, {}).setdefault(name, RuleStatistics()).add(done)
        return totals

    def __repr__(self) -> str:
        return f"<PassResult of {len(self.trace)} passes: {self.program!r}>"

    def _repr_html_(self) -> str:
        from autosp_ir.viz.notebook import result_html  # pictures import PassResult

        return result_html(self)


class PassManager:
    """Runs passes in order.

    Args:
        pipeline: Pipeline text, or passes: instances, classes (with their default options) and text may be mixed.
        verify: Verify the input, and the program after each pass that changed it.
        instruments: Called around each pass.
        skip: Names of passes to leave out.
        limit: Says how many sites may be rewritten, and notes them; see `Rewriter.allows`.
        timeout: Seconds that a pass may take; None sets no limit.
        reproducer: A file or folder for a reproducer when a pass fails. None takes the folder that the environment
            variable AUTOSP_IR_REPRODUCER names, if any; False writes none.

    Raises:
        ParseError: Pipeline text is malformed.
        PipelineError: A pass or option is unknown, or no pass has a name to skip.
    """

    def __init__(
        self,
        pipeline: str | Sequence[Pass | type[Pass] | str],
        *,
        verify: bool = True,
        instruments: Sequence[Instrument] = (),
        skip: Collection[str] = (),
        limit: RewriteLimit | None = None,
        timeout: float | None = None,
        reproducer: str | Path | Literal[False] | None = None,
    ) -> None:
        elements = [pipeline] if isinstance(pipeline, str) else list(pipeline)
        self.passes: list[Pass] = _without(skip, [pass_ for element in elements for pass_ in _passes_of(element)])
        self.instruments: list[Instrument] = [*instruments, *([Verify()] if verify else [])]
        self._limit, self._timeout, self._verify = limit, timeout, verify
        wanted = os.environ.get(VARIABLE) if reproducer is None else reproducer
        self._reproducer = Path(wanted) if wanted else None

    def __str__(self) -> str:
        return format_pipeline(self.passes)

    @classmethod
    def from_toml(cls, path: str | Path, **settings: Any) -> PassManager:
        """Read a pipeline from a TOML file; see `pipeline.formats` for what it looks like.

        Args:
            path: The file.
            settings: Keyword arguments of `PassManager`.

        Raises:
            ParseError: The file is malformed; it names line and column.
            PipelineError: A pass, option or key is unknown, or the file cannot be read.
        """
        return cls(formats.from_toml(formats.read(path)), **settings)

    @classmethod
    def from_json(cls, path: str | Path, **settings: Any) -> PassManager:
        """Read a pipeline from a JSON file; as `from_toml`."""
        return cls(formats.from_json(formats.read(path)), **settings)

    def to_toml(self, path: str | Path | None = None) -> str:
        """The pipeline as TOML text, written to `path` when one is given.

        Raises:
            PipelineError: TOML cannot say an option's value.
        """
        return formats.write(formats.to_toml(self.passes), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """The pipeline as JSON text, written to `path` when one is given."""
        return formats.write(formats.to_json(self.passes), path)

    def check(self, program: Program, mesh: Mapping[str, int] | None = None) -> dict[str, int]:
        """Check that the pipeline can run on `program`, without running it.

        Args:
            program: The program.
            mesh: Axis sizes; the program's own when None.

        Returns:
            The mesh it would run for.

        Raises:
            PipelineError: Passes are in an order that cannot work, or the mesh contradicts the program's.
        """
        axes = check_mesh(program, mesh)
        check_pipeline(self.passes, program)
        return axes

    def run(self, program: Program, mesh: Mapping[str, int] | None = None, strict: bool = False) -> PassResult:
        """Run every pass on a clone of `program`.

        Args:
            program: The program; never mutated.
            mesh: Axis sizes, such as `{"sp": 4}`; the program's own when None.
            strict: Let passes refuse what they would otherwise run replicated.

        Returns:
            The rewritten program and what happened.

        Raises:
            PipelineError: The pipeline cannot run on this program; nothing ran.
            AutoSPError: A pass refused the program, or left an invalid one; `pass_name` says which.
            PassError: A pass failed in another way; the cause is chained.
        """
        axes = self.check(program, mesh)
        work = program.clone()
        trace = Trace()
        ctx = PassContext(mesh=axes, strict=strict, program=work, limit=self._limit)
        for instrument in self.instruments:
            instrument.before_pipeline(work, self.passes)
        fingerprint = structural_hash(work)
        for pass_ in self.passes:
            with self._reproducible(pass_, work, ctx):
                trace.records.append(self._run_one(pass_, work, ctx, fingerprint))
            fingerprint = trace.records[-1].hash
        for instrument in self.instruments:
            instrument.after_pipeline(work, trace)
        return PassResult(work, trace, ctx.remarks, _statistics(trace), _timings(trace))

    def _run_one(self, pass_: Pass, program: Program, ctx: PassContext, fingerprint: str) -> PassRecord:
        record = PassRecord(pass_.name, str(pass_))
        ctx.pass_name, ctx.statistics, ctx.rules = pass_.name, record.statistics, record.rules
        ctx.listeners = (record.rewrites.append, *(i.on_rewrite for i in self.instruments))
        stage, facts, bindings = program.stage, set(program.facts), bindings_of(program)
        for instrument in self.instruments:
            instrument.before_pass(pass_, program)
        started = time.perf_counter()

        def run() -> None:
            pass_.run(program, ctx)
            ctx.finish_pass()

        with _blaming(pass_), exact_autocast():
            call_within(self._timeout, run)
        record.seconds = time.perf_counter() - started
        _check_stage(pass_, stage, program)
        _settle_facts(pass_, facts, program, complete=self._limit is None or not self._limit.refused)
        record.hash = structural_hash(program)
        record.modified = record.hash != fingerprint or bindings_of(program) != bindings
        _logger.debug("%s: modified=%s in %.1f ms", record.text, record.modified, record.seconds * 1e3)
        for instrument in self.instruments:
            with _named(pass_):
                instrument.after_pass(pass_, program, record)
        return record

    @contextmanager
    def _reproducible(self, pass_: Pass, program: Program, ctx: PassContext) -> Iterator[None]:
        """Write a reproducer when the pass fails, and say so in the error's hint."""
        if self._reproducer is None:
            yield
            return
        given = program.clone()
        try:
            yield
        except AutoSPError as error:
            header = describe_failure(
                error,
                pass_,
                self.passes,
                given,
                ctx.mesh,
                strict=ctx.strict,
                verify=self._verify,
                timeout=self._timeout,
            )
            try:
                path = write_reproducer(self._reproducer, header, given)
                told = f"replay the failure with: autosp-ir opt --reproduce {path}"
            except (AutoSPError, OSError) as failure:
                told = f"no reproducer could be written: {failure}"
            error.hint = f"{error.hint}; {told}" if error.hint else told
            raise


def _without(skip: Collection[str], passes: list[Pass]) -> list[Pass]:
    """The passes whose names are not to be skipped."""
    names = {pass_.name for pass_ in passes}
    unknown = next((name for name in skip if name not in names), None)
    if unknown is not None:
        raise PipelineError(f"no pass of the pipeline is called {unknown!r}", hint=closest(unknown, names))
    return [pass_ for pass_ in passes if pass_.name not in skip]


def _passes_of(element: Pass | type[Pass] | str) -> list[Pass]:
    if isinstance(element, str):
        return parse_pipeline(element)
    if isinstance(element, Pass):
        return [element]
    if isinstance(element, type) and issubclass(element, Pass):
        return [element()]
    raise PipelineError(
        f"{element!r} is no pass",
        hint="give Pass objects, or decorate a function (program, ctx) with air.register_pass",
    )


@contextmanager
def _named(pass_: Pass) -> Iterator[None]:
    """Let errors raised on purpose say which pass was running; their type stays."""
    try:
        yield
    except AutoSPError as error:
        if error.pass_name is None:
            error.pass_name = pass_.name
        raise


@contextmanager
def _blaming(pass_: Pass) -> Iterator[None]:
    """As `_named`, and any other exception becomes a PassError that says where it was raised."""
    try:
        with _named(pass_):
            yield
    except AutoSPError:
        raise
    except Exception as error:  # whatever a pass raises must name the pass
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PassError(
            f"{type(error).__name__}: {error} (at {frame.filename}:{frame.lineno})",
            hint="this is a bug in the pass; the traceback of the cause is above",
            pass_name=pass_.name,
        ) from error


def _check_stage(pass_: Pass, before: Stage, program: Program) -> None:
    expected = pass_.stage_after(before)
    if program.stage is not expected:
        raise PassError(
            f"the pass left the program at stage {program.stage}, but declares {expected}",
            hint=f'set produces = "{program.stage}" in the pass, or leave the stage alone',
            pass_name=pass_.name,
        )


def _settle_facts(pass_: Pass, before: set[str], program: Program, *, complete: bool) -> None:
    """Refuse facts that the pass did not declare, then add and take away those it did.

    A pass that had to leave sites alone establishes nothing.
    """
    undeclared = sorted(program.facts - before - pass_.provides)
    if undeclared:
        raise PassError(
            f"the pass establishes {', '.join(map(repr, undeclared))} without declaring it",
            hint=f"add it to provides: the pipeline is checked before it runs, from what {pass_.name} declares",
            pass_name=pass_.name,
        )
    lost = sorted(before - program.facts - pass_.removes)
    if lost:
        raise PassError(
            f"the pass takes {', '.join(map(repr, lost))} away without declaring it",
            hint="add it to removes, so that later passes that require it are refused before anything runs",
            pass_name=pass_.name,
        )
    program.facts -= pass_.removes
    if complete:
        program.facts |= pass_.provides


def _statistics(trace: Trace) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[str, int]] = {}
    for record in trace:
        total = totals.setdefault(record.name, {})
        for key, n in record.statistics.items():
            total[key] = total.get(key, 0) + n
    return totals


def _timings(trace: Trace) -> dict[str, float]:
    totals: dict[str, float] = {}
    for record in trace:
        totals[record.name] = totals.get(record.name, 0.0) + record.seconds
    return totals
