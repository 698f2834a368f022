"""Runs tests against mutants inside one pytest session: each test is imported once, and run where it can notice."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from tests.fuzz.cases import cpu_limit
from tests.mutation.mutants import SEMANTIC, Mutant, applied, mutants_of

_SECONDS_OF_A_TEST = 60.0
Progress = Callable[["Verdict", int, int], None]
"""Called with the last verdict, the number of mutants done, and their total."""


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Args:
        module: Of the mutant.
        kind: Of the mutant.
        mutant: As it prints.
        caught_by: The test that failed, None for a survivor.
        tests: How many tests ran.
    """

    module: str
    kind: str
    mutant: str
    caught_by: str | None
    tests: int


@dataclass
class MutationRun:
    """A pytest plugin that runs every chosen mutant in place of the session's tests.

    Args:
        modules: Whose functions are broken.
        share: Part of the mutants that change a condition or arithmetic only; the others all run.
        seconds: Of tests for each mutant, the fast ones first.
        progress: Told after each mutant.
        verdicts: Of mutants that need not run again; those of this run are added.
        only: Mutants to run, in place of every one.
    """

    modules: Sequence[str]
    share: float
    seconds: float
    progress: Progress
    verdicts: list[Verdict] = field(default_factory=list)
    only: Sequence[str] | None = None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests once as they are, then each mutant."""
        files = {str(Path(str(sys.modules[m].__file__))): m for m in self.modules}
        covered: dict[pytest.Item, set[tuple[str, str]]] = {}
        spent: dict[pytest.Item, float] = {}
        for item in session.items:
            called: set[tuple[str, str]] = set()
            started = time.process_time()
            if _fails(item, _recorder(files, called)):
                raise pytest.UsageError(f"{item.nodeid} fails on the code as it is")
            spent[item], covered[item] = time.process_time() - started, called
        mutants = self.chosen()
        for done, mutant in enumerate(mutants, start=1):
            place = (mutant.module, mutant.function)
            noticing = sorted((i for i in session.items if place in covered[i]), key=spent.__getitem__)
            self.verdicts.append(self._judge(mutant, noticing, spent))
            self.progress(self.verdicts[-1], done, len(mutants))
        return True

    def chosen(self) -> list[Mutant]:
        """Every mutant that takes a check or an answer away, and a sample of the others from every function."""
        every = [m for name in self.modules for m in mutants_of(name)]
        if self.only is not None:
            return [m for m in every if str(m) in set(self.only)]
        rng = random.Random(0)
        kept = [m for m in every if m.kind in SEMANTIC or rng.random() < self.share]
        known = {v.mutant for v in self.verdicts}
        return [m for m in kept if str(m) not in known]

    def _judge(self, mutant: Mutant, items: list[pytest.Item], spent: dict[pytest.Item, float]) -> Verdict:
        left, ran = self.seconds, 0
        with applied(mutant):
            for item in items:
                if left < 0:
                    break
                ran += 1
                left -= spent[item]
                if _fails(item):
                    return Verdict(mutant.module, mutant.kind, str(mutant), item.nodeid, ran)
        return Verdict(mutant.module, mutant.kind, str(mutant), None, ran)


def _fails(item: pytest.Item, profile: Any = None) -> bool:
    try:
        with cpu_limit(_SECONDS_OF_A_TEST):
            sys.setprofile(profile)
            try:
                reports = runtestprotocol(item, log=False, nextitem=None)
            finally:
                sys.setprofile(None)
    except TimeoutError:
        return True
    return any(report.failed for report in reports)


def _recorder(files: dict[str, str], called: set[tuple[str, str]]) -> Any:
    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename in files:
            called.add((files[frame.f_code.co_filename], frame.f_code.co_qualname))

    return profile


def summary(verdicts: Sequence[Verdict], reasons: dict[str, str]) -> dict[str, Any]:
    """Counts by module and kind, and every survivor with its reason.

    Args:
        verdicts: Of a run.
        reasons: Why a survivor is no hole, by mutant.
    """
    caught: dict[str, Counter[str]] = {"by_kind": Counter(), "by_module": Counter()}
    total: dict[str, Counter[str]] = {"by_kind": Counter(), "by_module": Counter()}
    for verdict in verdicts:
        for group, name in (("by_kind", verdict.kind), ("by_module", verdict.module)):
            total[group][name] += 1
            caught[group][name] += verdict.caught_by is not None
    survivors = [v.mutant for v in verdicts if v.caught_by is None]
    found = sum(v.caught_by is not None for v in verdicts)
    equivalent = [s for s in survivors if reasons.get(s, "").startswith("equivalent")]
    return {
        "mutants": len(verdicts),
        "caught": found,
        "equivalent": len(equivalent),
        "share": round(found / max(1, len(verdicts)), 4),
        "share_of_those_that_differ": round(found / max(1, len(verdicts) - len(equivalent)), 4),
        **{g: {n: f"{caught[g][n]} of {total[g][n]}" for n in sorted(total[g])} for g in total},
        "survivors": {s: reasons.get(s, "") for s in survivors},
    }
