"""Bisection: which rewrite of which pass made a program wrong.

A pipeline is a line of units: each rewrite that a pass asks about (`Rewriter.allows`), and each pass that asks about
none. The result of the first i units is a program of its own, made by running the passes in front whole and the last
one under a limit; nothing behind it runs. Somewhere on the line the program turns from good to bad, and a binary
search finds where in at most log2(units) + 2 judgements, if every program on the way can be judged.

Where the pipeline itself fails, there is nothing to judge: a program is bad when making it fails in the same way.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from autosp_ir.errors import AutoSPError, PipelineError
from autosp_ir.ir.hashing import bindings_of, structural_hash
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.bisection import Bisection, changes
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.rewrite.limit import RewriteLimit, Site

Good = Callable[[Program], bool | None]
"""Judges a program: True, False, or None where it cannot. An AssertionError is False, an AutoSPError is None."""

_INCONCLUSIVE = 125
_NO_COMMAND = (126, 127)


class Outcome(StrEnum):
    """What a judgement said."""

    GOOD = "good"
    BAD = "bad"
    INCONCLUSIVE = "inconclusive"


def bisect(
    pipeline: str | Sequence[Pass | type[Pass] | str],
    program: Program,
    good: Good | None = None,
    *,
    mesh: Mapping[str, int] | None = None,
    strict: bool = False,
    verify: bool = True,
) -> Bisection:
    """Find the first rewrite after which a program is bad.

    Args:
        pipeline: As for `PassManager`.
        program: What it runs on; never mutated.
        good: Says whether a program is good; it sees programs of any stage. Not needed when the pipeline fails.
        mesh: Axis sizes; the program's own when None.
        strict: As for `PassManager.run`.
        verify: Verify after each pass, so that a rewrite after which the verifier objects is found too.

    Returns:
        The pass, the rewrite, and what it removed and created.

    Raises:
        PipelineError: There is nothing to find: the result is good, the input is bad, or nothing judges the result.
        AutoSPError: The input does not verify.
    """
    return _Search(pipeline, program, good, mesh, strict, verify).run()


def command_judge(command: str) -> Good:
    """Judge programs by a shell command, which gets the path of an IR file.

    Args:
        command: Exits with 0 for a good program, 125 where it cannot tell, and anything else for a bad one. `{}` in it
            is replaced by the path, which is else appended.

    Returns:
        What `bisect` takes as `good`; it raises PipelineError when the command cannot be run.
    """

    def good(program: Program) -> bool | None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "program.ir"
            path.write_text(f"{program}\n", encoding="utf-8")
            quoted = shlex.quote(str(path))
            line = command.replace("{}", quoted) if "{}" in command else f"{command} {quoted}"
            done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        if done.returncode in _NO_COMMAND:
            raise PipelineError(
                f"the command {command!r} cannot be run: {done.stderr.strip()}",
                hint="give a command that takes the path of an IR file and exits with 0 when the program is good",
            )
        return None if done.returncode == _INCONCLUSIVE else done.returncode == 0

    return good


@dataclass(frozen=True)
class _Unit:
    """The last of the units that are run: pass number `position`, under a limit unless it is None."""

    position: int
    limit: int | None


class _Search:
    def __init__(
        self,
        pipeline: str | Sequence[Pass | type[Pass] | str],
        program: Program,
        good: Good | None,
        mesh: Mapping[str, int] | None,
        strict: bool,
        verify: bool,
    ) -> None:
        manager = PassManager(pipeline, reproducer=False)
        self.mesh = manager.check(program, mesh)
        self.passes, self.good, self.strict, self.verify = manager.passes, good, strict, verify
        self.given: list[Program] = [program]
        self.sites: list[list[Site]] = []
        self.failure: AutoSPError | None = None
        self.runs = 0
        self.known: dict[object, Outcome] = {}

    def run(self) -> Bisection:
        self._run_whole()
        units = self._units()
        if not units:
            raise PipelineError("the pipeline is empty", hint="give the passes that made the program bad")
        self._check_result(units[-1])
        low, high, skipped = 0, len(units), set[int]()
        while open_ := [i for i in range(low + 1, high) if i not in skipped]:
            middle = min(open_, key=lambda i: abs(i - (low + high) // 2))
            outcome = self._judge(self._made(units[middle - 1]))
            if outcome is Outcome.INCONCLUSIVE:
                skipped.add(middle)
            elif outcome is Outcome.BAD:
                high = middle
            else:
                low = middle
        return self._found(units, low, high)

    def _run_whole(self) -> None:
        """Run the pipeline once, noting what each pass was given and which sites it has."""
        for position in range(len(self.passes)):
            limit = RewriteLimit()
            made = self._run_pass(position, limit)
            self.sites.append(limit.sites)
            if isinstance(made, AutoSPError):
                if made.pass_name is None:
                    raise made
                self.failure = made
                return
            self.given.append(made)

    def _run_pass(self, position: int, limit: RewriteLimit) -> Program | AutoSPError:
        manager = PassManager([self.passes[position]], verify=self.verify, limit=limit, reproducer=False)
        try:
            return manager.run(self.given[position], mesh=self._axes(position), strict=self.strict).program
        except AutoSPError as error:
            return error

    def _axes(self, position: int) -> dict[str, int]:
        return {**self.given[position].mesh, **self.mesh}

    def _units(self) -> list[_Unit]:
        units = []
        for position, sites in enumerate(self.sites):
            units += [_Unit(position, limit) for limit in range(1, len(sites))]
            units.append(_Unit(position, None))
        return units

    def _made(self, unit: _Unit) -> Program | AutoSPError:
        if unit.limit is None:
            whole = unit.position + 1 < len(self.given)
            return self.given[unit.position + 1] if whole else self.failure or self.given[-1]
        return self._run_pass(unit.position, RewriteLimit(unit.limit))

    def _judge(self, made: Program | AutoSPError) -> Outcome:
        if isinstance(made, AutoSPError):
            alike = self.failure is not None and type(made) is type(self.failure)
            return Outcome.BAD if alike else Outcome.INCONCLUSIVE
        if self.failure is not None:
            return Outcome.GOOD
        key = (structural_hash(made), frozenset(bindings_of(made).items()))
        if key not in self.known:
            self.known[key] = self._ask(made)
        return self.known[key]

    def _ask(self, made: Program) -> Outcome:
        if self.good is None:
            raise PipelineError("the pipeline runs through", hint="say what is wrong: give a predicate or a command")
        self.runs += 1
        try:
            answer = self.good(made.clone())
        except PipelineError:
            raise
        except AssertionError:
            return Outcome.BAD
        except AutoSPError:
            return Outcome.INCONCLUSIVE
        if answer is None:
            return Outcome.INCONCLUSIVE
        return Outcome.GOOD if answer else Outcome.BAD

    def _check_result(self, last: _Unit) -> None:
        outcome = self._judge(self._made(last))
        if outcome is Outcome.GOOD:
            raise PipelineError("what the pipeline makes is good", hint="there is no wrong rewrite to look for")
        if outcome is Outcome.INCONCLUSIVE:
            raise PipelineError(
                "what the pipeline makes cannot be judged",
                hint="leave out the passes at the end, or let the predicate judge programs of this stage",
            )

    def _found(self, units: list[_Unit], low: int, high: int) -> Bisection:
        """Name the unit at `high`, knowing that the one at `low` is good, if there is one."""
        unit = units[high - 1]
        sites = self.sites[unit.position]
        number = len(sites) if unit.limit is None else unit.limit
        before: Program | AutoSPError = self.given[unit.position]
        if sites and number > 1:
            before = self._run_pass(unit.position, RewriteLimit(number - 1))
        elif sites:
            # What a pass does besides its sites comes in front of the first one.
            bare = self._run_pass(unit.position, RewriteLimit(0))
            if self._judge(bare) is Outcome.BAD:
                number = 0
            else:
                before = bare
        if number == 0 and low == 0 and self._judge(self.given[0]) is Outcome.BAD:
            raise PipelineError("the program is bad before any pass", hint="check the predicate on the input first")
        after = self._made(unit if number else _Unit(unit.position, 0 if sites else None))
        doubtful = [self._label(units[i - 1]) for i in range(low + 1, high)]
        return Bisection(
            pass_name=self.passes[unit.position].name,
            pass_text=str(self.passes[unit.position]),
            site=sites[number - 1] if number else None,
            sites=len(sites),
            units=len(units),
            runs=self.runs,
            inconclusive=tuple(doubtful),
            error=after if isinstance(after, AutoSPError) else None,
            changes=changes(before, after),
        )

    def _label(self, unit: _Unit) -> str:
        sites = self.sites[unit.position]
        number = len(sites) if unit.limit is None else unit.limit
        return str(sites[number - 1]) if sites else self.passes[unit.position].name


__all__ = ["Good", "Outcome", "bisect", "command_judge"]
