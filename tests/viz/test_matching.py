"""Comparing programs: by identity, by structure, and what counts as moved."""

from __future__ import annotations

from collections import Counter

from autosp_ir.viz.matching import compare, match_lines
from autosp_ir.viz.recording import Line
from tests.viz.recorded import llama_recording


def line(key: int, op: str = "aten.relu", operands: tuple[int, ...] = (), name: str = "") -> Line:
    reads = ", ".join(f"%n{o}" for o in operands)
    return Line(key, name or f"n{key}", op, f"({reads})", "f32[2]", "", operands, "block", "m.py:1", "forward", (), ())


def kinds(before: list[Line], after: list[Line]) -> list[str]:
    return [row.kind for row in compare(before, after)]


def test_equal_programs_are_the_same() -> None:
    program = [line(0), line(1, operands=(0,))]
    assert kinds(program, program) == ["same", "same"]


def test_the_fewest_lines_count_as_moved() -> None:
    a, b, c = line(0), line(1), line(2)
    assert kinds([a, b, c], [c, a, b]) == ["moved", "same", "same", "moved"]


def test_removed_stand_in_front_of_added() -> None:
    assert kinds([line(0), line(1)], [line(0), line(2)]) == ["same", "removed", "added"]


def test_another_operand_is_a_change() -> None:
    assert kinds([line(0), line(1, operands=(0,))], [line(0), line(1, operands=(0, 0))]) == ["same", "changed"]


def test_every_line_stands_in_a_row_in_its_order() -> None:
    recording = llama_recording()
    for number, stage in enumerate(recording.stages[1:], start=1):
        before, after = recording.program(number - 1), recording.program(number)
        rows = compare(before, after, stage.matches if stage.lines is not None else None)
        assert [r.before for r in rows if r.before is not None] == before
        assert [r.after for r in rows if r.after is not None] == after


def test_structure_matches_whatever_values_are_called() -> None:
    before = [line(0, "placeholder", name="x"), line(1, operands=(0,)), line(2, "aten.neg", (1,))]
    after = [line(10, "placeholder", name="y"), line(11, operands=(10,)), line(12, "aten.neg", (11,))]
    assert sorted(match_lines(before, after)) == [(0, 10), (1, 11), (2, 12)]


def test_differentiation_keeps_the_forward_lines() -> None:
    recording = llama_recording()
    stage = recording.stages[recording.stage_of("differentiate")]
    before = recording.program(recording.stage_of("ulysses"))
    kept = {b for b, _ in stage.matches}
    lost = Counter(n.op for n in before if n.key not in kept)
    assert lost.total() < 0.2 * len(before)
    assert not any(n.op.startswith("autosp.") for n in before if n.key not in kept), lost
