"""The kinds of cases by name, and a finding made small."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.cases import FINDING, Case, Judge, Outcome, run_case
from tests.fuzz.ir_programs import judge_graphs, judge_layouts, judge_tokens
from tests.fuzz.models import judge_models, simpler

KINDS: dict[str, Judge] = {
    "layouts": judge_layouts,
    "graphs": judge_graphs,
    "tokens": judge_tokens,
    "models": judge_models,
}


def run(case: Case) -> Outcome:
    """Run a case of any kind."""
    return run_case(case, KINDS[case.kind])


def _fewer_nodes(case: Case) -> list[Case]:
    current = int(dict(case.changes).get("nodes", 33))
    return [case.changed(nodes=n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24) if n < current]


_SMALLER: dict[str, Callable[[Case], list[Case]]] = {"models": simpler}


def shrunk(case: Case, outcome: Outcome) -> Outcome:
    """The finding of a smaller case that fails in the same class of error, greedily."""
    error_class = outcome.reason.partition(" ")[0]
    while True:
        for smaller in _SMALLER.get(case.kind, _fewer_nodes)(case):
            found = run(smaller)
            if found.verdict == FINDING and found.reason.partition(" ")[0] == error_class:
                case, outcome = smaller, found
                break
        else:
            return outcome
