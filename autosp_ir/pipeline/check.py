"""Checking a whole pipeline before anything of it runs: stages, required facts, conflicts and the mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from autosp_ir.errors import PipelineError
from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.streams import SEPARATOR
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.registry import registered_passes
from autosp_ir.pipeline.spec import closest

_ORDER = list(Stage)


def check_pipeline(passes: Sequence[Pass], program: Program) -> None:
    """Follow stages and facts through the pipeline, as if it ran.

    Raises:
        PipelineError: A pass cannot stand where it does; it names the two passes and the fix.
    """
    walk = _Walk(program)
    for index, pass_ in enumerate(passes):
        later = passes[index + 1 :]
        walk.check_stage(pass_, later)
        walk.check_required(pass_, later)
        walk.check_conflicts(pass_)
        walk.step(pass_)


def check_mesh(program: Program, mesh: Mapping[str, int] | None) -> dict[str, int]:
    """The mesh to run with: the given one, or the program's.

    Raises:
        PipelineError: An axis is malformed, or contradicts the mesh the program is written for.
    """
    if mesh is None:
        return dict(program.mesh)
    for axis, size in mesh.items():
        if not isinstance(axis, str) or not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise PipelineError(f"{axis!r}: {size!r} is no mesh axis", hint='give sizes by name, such as {"sp": 4}')
        if SEPARATOR in axis:
            raise PipelineError(
                f"{axis!r} names a stream of communication, not a mesh axis", hint=f"use a name without {SEPARATOR!r}"
            )
        if program.mesh.get(axis, size) != size:
            raise PipelineError(
                f"the program is written for {axis}={program.mesh[axis]}, but the pipeline is run for {axis}={size}",
                hint="run the whole pipeline on the captured program again, with the mesh you want",
            )
    missing = sorted(set(program.mesh) - set(mesh))
    if missing:
        raise PipelineError(
            f"the program is written for the mesh {program.mesh}, but the pipeline is run without {', '.join(missing)}",
            hint="pass mesh=None to keep the program's mesh",
        )
    return dict(mesh)


class _Walk:
    """The stage and the facts at one point of the pipeline, and which pass is responsible for each."""

    def __init__(self, program: Program) -> None:
        self.stage = program.stage
        self.staged_by: Pass | None = None
        self.facts: dict[str, Pass | None] = dict.fromkeys(program.facts)
        self.removed: dict[str, Pass] = {}

    def step(self, pass_: Pass) -> None:
        after = pass_.stage_after(self.stage)
        if after is not self.stage:
            self.stage, self.staged_by = after, pass_
        for fact in pass_.removes:
            if fact in self.facts:
                del self.facts[fact]
                self.removed[fact] = pass_
        self.facts.update(dict.fromkeys(pass_.provides, pass_))

    def check_stage(self, pass_: Pass, later: Sequence[Pass]) -> None:
        accepted = pass_.stages()
        if self.stage in accepted:
            return
        wanted = " or ".join(accepted)
        since = f"after {self.staged_by.name} " if self.staged_by is not None else ""
        reason = f"{pass_.name} runs on {wanted} programs, but {since}the program is at stage {self.stage}"
        if self.staged_by is not None and _ORDER.index(self.stage) > max(_ORDER.index(s) for s in accepted):
            raise PipelineError(reason, hint=f"put {pass_.name} before {self.staged_by.name}")

        def produces(other: Pass | type[Pass]) -> bool:
            return other.produces is not None and Stage(other.produces) in accepted

        moved = next((p for p in later if produces(p)), None)
        if moved is not None:
            raise PipelineError(
                f"{reason}: {moved.name} makes it {moved.produces}, but comes later",
                hint=f"put {moved.name} before {pass_.name}",
            )
        raise PipelineError(reason, hint=_insert(pass_, produces, f"run a pass that produces a {wanted} program first"))

    def check_required(self, pass_: Pass, later: Sequence[Pass]) -> None:
        for fact in sorted(pass_.requires - self.facts.keys()):
            self._fail_required(pass_, fact, later)

    def _fail_required(self, pass_: Pass, fact: str, later: Sequence[Pass]) -> None:
        def provides(other: Pass | type[Pass]) -> bool:
            return fact in other.provides

        remover = self.removed.get(fact)
        if remover is not None:
            raise PipelineError(
                f"{pass_.name} requires {fact!r}, which no longer holds after {remover.name}",
                hint=f"put {pass_.name} before {remover.name}",
            )
        moved = next((p for p in later if provides(p)), None)
        if moved is not None:
            raise PipelineError(
                f"{pass_.name} requires {fact!r}, which {moved.name} provides, but {moved.name} comes later",
                hint=f"put {moved.name} before {pass_.name}",
            )
        known = {f for p in _known_passes() for f in p.provides}
        raise PipelineError(
            f"{pass_.name} requires {fact!r}, which neither an earlier pass nor the program provides",
            hint=_insert(pass_, provides, f"no known pass provides {fact!r}: {closest(fact, known)}"),
        )

    def check_conflicts(self, pass_: Pass) -> None:
        for fact in sorted(pass_.conflicts & self.facts.keys()):
            provider = self.facts[fact]
            if provider is None:
                raise PipelineError(
                    f"{pass_.name} conflicts with {fact!r}, which holds for the program already",
                    hint=f"leave {pass_.name} out, or start from a program that has not been through that step",
                )
            raise PipelineError(
                f"{pass_.name} conflicts with {fact!r}, which {provider.name} provides",
                hint=f"leave one of {provider.name} and {pass_.name} out, or put {pass_.name} first",
            )


def _known_passes() -> list[type[Pass]]:
    """Passes to suggest; two packages that offer one name must not hide the error at hand."""
    try:
        return list(registered_passes().values())
    except PipelineError:
        return []


def _insert(pass_: Pass, fits: Callable[[type[Pass]], bool], otherwise: str) -> str:
    names = [p.name for p in _known_passes() if fits(p)]
    return f"insert {' or '.join(names)} before {pass_.name}" if names else otherwise
