"""Random programs, models and pipelines: each exact, or refused by a named error. A failure prints how to replay it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.cases import EXACT, FINDING, REFUSED, Case, Outcome, run_case
from tests.fuzz.kinds import run
from tests.fuzz.record import Record
from tests.fuzz.session import blocks

# Seeds of recorded runs start at 0; these are others. `tests/e2e/test_random_models.py` adds models.
_FIRST = 1_000_000
_CASES = {"layouts": 460, "graphs": 32, "tokens": 8}
_PER_TEST = {"layouts": 46, "graphs": 16, "tokens": 4}
BLOCKS = [(k, first, _PER_TEST[k]) for k, n in _CASES.items() for first in range(_FIRST, _FIRST + n, _PER_TEST[k])]


@pytest.mark.parametrize(("kind", "first", "count"), BLOCKS)
def test_random_cases_are_exact_or_refused(kind: str, first: int, count: int) -> None:
    outcomes = [run(Case(kind, seed)) for seed in range(first, first + count)]
    found = [f"python -m tests.fuzz --replay '{o.case}'\n{o.details}" for o in outcomes if o.verdict == FINDING]
    assert not found, "\n".join(found)
    assert sum(o.verdict == EXACT for o in outcomes) >= count / 2, Counter(o.reason for o in outcomes)


def test_enough_cases_run_each_time() -> None:
    assert sum(count for _, _, count in BLOCKS) >= 500


def test_cases_read_back() -> None:
    case = Case("models", 7).changed(mixer="none", bias=False, pipeline="canonicalize,tile{chunks=2 wide=1.0}")
    assert Case.parse(str(case)) == case
    assert case.apply({"mixer": "roll", "bias": True, "pipeline": "", "seed": 7}) == {
        "mixer": "none",
        "bias": False,
        "pipeline": "canonicalize,tile{chunks=2 wide=1.0}",
        "seed": 7,
    }


def test_every_other_error_is_a_finding() -> None:
    def crash(case: Case) -> set[str]:
        raise KeyError("lost")

    outcome = run_case(Case("graphs", 1), crash)
    assert outcome.verdict == FINDING and outcome.reason == "KeyError …" and "lost" in outcome.details


def test_a_record_goes_on_where_it_stopped(tmp_path: Path) -> None:
    record = Record()
    outcomes = [Outcome("graphs:0", EXACT, "", ("tile tiled",)), Outcome("graphs:1", REFUSED, "UnsupportedError why")]
    record.add("graphs", [*outcomes, Outcome("graphs:2", FINDING, "KeyError", (), "trace")], 1.0, "abc")
    record.save(tmp_path / "record.json")
    again = Record.load(tmp_path / "record.json")
    assert again.totals() == {"cases": 3, "exact": 1, "refused": 1, "findings": 1, "resolved": 0}
    assert list(blocks(again, {"graphs": 5})) == [("graphs", 3, 2)]
    again.recheck(again.findings[0], Outcome("graphs:2", EXACT), "def")
    assert again.totals() == {"cases": 3, "exact": 2, "refused": 1, "findings": 0, "resolved": 1}
