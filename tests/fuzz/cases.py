"""One fuzzed case: a kind, a seed, and what is overridden; exact, refused by name, or a finding."""

from __future__ import annotations

import contextlib
import re
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from autosp_ir.errors import AutoSPError, PassError, SimulationError, VerifyError
from autosp_ir.pipeline.manager import PassManager, PassResult
from autosp_ir.testing import EquivalenceError

EXACT, REFUSED, FINDING = "exact", "refused", "finding"
_SECONDS = 180.0
_LONGEST_REASON = 160


@dataclass(frozen=True)
class Case:
    """What a case is drawn from; prints as `kind:seed` or `kind:seed,field=value,…`, and reads back.

    Args:
        kind: Of program.
        seed: Chooses everything.
        changes: Overrides some of what was drawn, by field.
    """

    kind: str
    seed: int
    changes: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return ";".join([f"{self.kind}:{self.seed}", *(f"{k}={v}" for k, v in self.changes)])

    @staticmethod
    def parse(text: str) -> Case:
        """The case that prints like this."""
        head, *changes = text.split(";")
        kind, _, seed = head.partition(":")
        pairs = tuple((k, v) for k, _, v in (c.partition("=") for c in changes))
        return Case(kind, int(seed), pairs)

    def changed(self, **changes: Any) -> Case:
        """The same case with more overridden."""
        merged = dict(self.changes) | {k: str(v) for k, v in changes.items()}
        return Case(self.kind, self.seed, tuple(merged.items()))

    def apply(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """What was drawn, with the overrides, each read as the type of what it replaces."""
        found = dict(drawn)
        for name, text in self.changes:
            found[name] = _read(text, found[name])
        return found


def _read(text: str, like: Any) -> Any:
    if isinstance(like, bool):
        return text == "True"
    return type(like)(text)


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Args:
        case: As it prints.
        verdict: exact, refused or finding.
        reason: Error class, pass and message without names and numbers; empty when exact.
        features: What the case made use of.
        details: The whole message of a finding.
    """

    case: str
    verdict: str
    reason: str = ""
    features: tuple[str, ...] = ()
    details: str = field(default="", compare=False)


Judge = Callable[[Case], set[str]]
"""Runs a case and returns the features it used; any error is left to `run_case`."""


def run_case(case: Case, judge: Judge) -> Outcome:
    """Run a case; nothing is raised, whatever happens in it."""
    try:
        with cpu_limit(_SECONDS):
            features = judge(case)
    except (EquivalenceError, SimulationError) as error:
        return _ended(case, FINDING, error)
    except AutoSPError as error:
        # A program that a pass left unverifiable is the pass's fault, whatever its user asked for.
        own = not isinstance(error, PassError) or isinstance(error.__cause__, AutoSPError | None)
        own = own and type(error) is not VerifyError
        return _ended(case, REFUSED if own and error.hint else FINDING, error)
    except Exception as error:  # the point of a fuzzer
        return _ended(case, FINDING, error)
    return Outcome(str(case), EXACT, "", tuple(sorted(features)))


def _ended(case: Case, verdict: str, error: Exception) -> Outcome:
    details = "".join(traceback.format_exception(error, limit=-6)) if verdict == FINDING else ""
    return Outcome(str(case), verdict, reason_of(error), (), details)


def reason_of(error: Exception) -> str:
    """An error's class, pass and first line, without names and numbers, so that equal reasons count together."""
    first = (error.reason if isinstance(error, AutoSPError) else str(error)).partition("\n")[0]
    first = re.sub(r"%\w+|'[^']*'", "…", first)
    first = re.sub(r"\[[^\]]*\]", "[…]", first)
    first = re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "N", first)
    where = f" [{error.pass_name}]" if isinstance(error, AutoSPError) and error.pass_name else ""
    return f"{type(error).__name__}{where} {first}"[:_LONGEST_REASON]


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Stop a case that never ends; time spent waiting for the processor does not count."""

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the case took more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


_COUNTED = ("autosp.", "_c10d_functional.")


def features_of(result: PassResult, ranks: int) -> set[str]:
    """Which passes changed the program and how, and what communicates in the result."""
    found = {f"ranks {ranks}", f"stage {result.program.stage}"}
    for record in result.trace:
        if record.modified:
            found.add(f"pass {record.name}")
        found |= {f"{record.name} {name}" for name, count in record.statistics.items() if count}
    found |= {f"{r.pass_name} missed" for r in result.remarks if r.kind == "missed"}
    found |= {n.op.name for n in result.program.graph.nodes if n.op.name.startswith(_COUNTED)}
    return found


def run_pipeline(program: Any, pipeline: str, ranks: int) -> PassResult:
    """Run a pipeline over one sequence axis; on one rank there is none."""
    torch.set_num_threads(1)
    return PassManager(pipeline).run(program, mesh={"sp": ranks})
