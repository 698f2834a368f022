"""Every architecture of the zoo: exact or refused by name, as docs/support.md says."""

from __future__ import annotations

import pytest

from autosp_ir.doctor import Diagnosis, Verdict
from tests.doctor.support_page import RANKS, cell, committed_rows, examined, row
from tests.models.architectures import ARCHITECTURES

_SAMPLE = ("llama", "bloom", "lfm2")
_ON_FOUR = ("mistral", "gpt2", "bart", "qwen2_moe")


def cells(name: str) -> list[str]:
    return committed_rows()[name].strip("|").split(" | ")


def check_verdicts(name: str, diagnosis: Diagnosis) -> None:
    assert diagnosis.ok, diagnosis
    said = [cells(name)[2 + RANKS.index(f.ranks)] for f in diagnosis.findings]
    assert [cell(f) for f in diagnosis.findings] == said, diagnosis


def test_the_page_has_every_architecture_and_no_bug() -> None:
    rows = committed_rows()
    assert list(rows) == list(ARCHITECTURES)
    verdicts = {name: set(cells(name)[2:4]) for name in rows}
    assert set().union(*verdicts.values()) <= {"exact", "gathers", "refused"}
    assert sum("refused" not in found for found in verdicts.values()) >= 20


@pytest.mark.parametrize("name", _SAMPLE)
def test_the_page_says_what_the_doctor_says(name: str) -> None:
    assert row(name, examined(name)) == committed_rows()[name], "write the page anew: make support"


# Every second one runs each time; all of them when the page is written, and with `-m long`.
_OTHERS = [n for n in ARCHITECTURES if n not in _SAMPLE]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in _ON_FOUR or not i % 2 else pytest.mark.long) for i, n in enumerate(_OTHERS)],
)
def test_an_architecture_is_exact_or_refused_by_name(name: str) -> None:
    diagnosis = examined(name, (2, 4) if name in _ON_FOUR else (2,))
    check_verdicts(name, diagnosis)
    for finding in diagnosis.findings:
        if finding.verdict is Verdict.REFUSED:
            assert finding.failure is not None and finding.failure.hint
