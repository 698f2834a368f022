"""Partial expectations of a program's text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.text import parse
from autosp_ir.testing import EquivalenceError, check_pass, filecheck

GOLDEN = Path(__file__).parents[1] / "golden"
PARTITIONED = GOLDEN / "block_partitioned.ir"


def test_what_a_pass_promises() -> None:
    result = check_pass(
        "ulysses",
        before=PARTITIONED,
        world=4,
        checks="""
        CHECK-COUNT-3: autosp.all_to_all
        CHECK:         autosp.attention(
        CHECK-NOT:     autosp.all_gather
        CHECK:         [[out:%[a-z_0-9]+]]: {{.*}} = operator.getitem(
        CHECK-NEXT:    autosp.all_to_all([[out]]
        """,
    )
    filecheck(result.program, "CHECK: autosp.attention")


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ("CHECK: autosp.all_gather", "autosp.all_gather"),
        ("CHECK: autosp.attention\nCHECK-NOT: aten.linear", "aten.linear"),
        ("nothing to check", "No check strings"),
        ("CHECK: {{(}}", ""),
    ],
)
def test_a_mismatch_shows_the_directive_and_the_program(checks: str, said: str) -> None:
    program = parse(PARTITIONED.read_text())
    with pytest.raises(EquivalenceError, match="does not match its checks") as caught:
        filecheck(program, checks)
    assert said in str(caught.value)
    assert "autosp.attention" in str(caught.value)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filecheck.finput", None)
    with pytest.raises(UnsupportedError, match="pip install"):
        filecheck("x", "CHECK: x")
