"""`air.explain`: where a rule matches, or how far it got and why no further."""

from __future__ import annotations

from typing import Any, cast

import pytest

import autosp_ir as air
from autosp_ir.ir.program import Program
from autosp_ir.rewrite.rules import Rule


@air.rule("drop-double-transpose")
def double_transpose(op: Any, x: air.Value, a: int, b: int) -> Any:
    return op.aten.transpose.int(op.aten.transpose.int(x, a, b), a, b)


double_transpose.replacement(lambda x: x)


@pytest.fixture
def program() -> Program:
    b = air.ProgramBuilder()
    x = b.input("x", (2, 3, 4))
    with b.source("model.py:7", module="layers.0"):
        inner = b.aten.transpose.int(x, 0, 1)
        y = b.aten.transpose.int(b.aten.relu(inner), 1, 2)
        z = b.aten.transpose.int(b.aten.transpose.int(x, 1, 2), 0, 2)
    b.output(y, z, b.aten.mul.Scalar(x, 2.0))
    return b.build()


def test_the_best_partial_match_is_shown_with_the_first_mismatch(program: Program) -> None:
    explained = air.explain(double_transpose, program)
    report = str(explained)
    assert not explained.fires and explained.candidates == 4
    assert explained.at is not None and explained.at.name == "transpose_3"
    assert explained.reason == "argument 'dim0' of %transpose_3: it is 0, but a is 1 elsewhere"
    assert "rule 'drop-double-transpose' (test_explain.py:" in report
    assert "looks for  aten.transpose.int(aten.transpose.int(x, a, b), a, b)" in report
    assert "Best partial match: 2 of 2 operations, from %transpose_3" in report
    assert "%transpose_2: f32[2, 4, 3] = aten.transpose.int(%x, 1, 2)" in report
    assert "model.py:7" in report and "with x = %x, a = 1, b = 2" in report


def test_one_node_can_be_asked_about(program: Program) -> None:
    for node in ("transpose_1", program.graph.value("transpose_1"), program.graph.value("transpose_1").producer):
        explained = air.explain(double_transpose, program, node)
        assert explained.reason == "argument 'self' of %transpose_1: %relu is aten.relu"
        assert "Stopped at" in str(explained) and "which is not aten.transpose.int(x, a, b)" in str(explained)
    assert "%relu is aten.relu, not aten.transpose.int" in str(air.explain(double_transpose, program, "relu"))


def test_a_rule_that_matches_says_where(program: Program) -> None:
    rule = air.rule("any-relu")(lambda op, x: op.aten.relu(x))
    report = str(air.explain(rule, program))
    assert "It matches 1 time." in report and "%relu: f32[3, 2, 4] = aten.relu(%transpose)" in report
    assert air.explain(rule, program).reason == ""


def test_operations_that_come_near_are_named(program: Program) -> None:
    rule = air.rule("double")(lambda op, x: op.aten.mul.Tensor(x, 2.0))
    assert "the program has no aten.mul.Tensor, though aten.mul.Scalar (1x)" in str(air.explain(rule, program))
    assert air.explain(air.rule("r")(lambda op, x: op.aten.erf(x)), program).reason == "the program has no aten.erf"


def reason(rule: Rule, program: Program) -> str:
    return air.explain(rule, program).reason


def test_every_kind_of_mismatch_is_said_in_words(program: Program) -> None:
    def told(pattern: Any) -> str:
        return reason(air.rule("probe")(pattern), program)

    assert told(lambda op, x: op.aten.relu(x.having(rank=2))).endswith("it has 3 dimensions, not 2: f32[3, 2, 4]")
    assert "its dtype is torch.float32" in told(lambda op, x: op.aten.relu(x).having(dtype=air.testing))
    assert "it is read 1 times, not 2" in told(lambda op, x: op.aten.relu(x).having(uses=2))
    assert "along sp is I, not Shard" in told(lambda op, x: op.aten.relu(x).having(layout={"sp": air.Shard}))
    assert "it is 2.0, not 3" in told(lambda op, x: op.aten.mul.Scalar(x, 3))
    assert "it is the attribute 2.0" in told(lambda op, x: op.aten.mul.Scalar(x, op.aten.neg(x)))
    assert "it has 3 elements, not 1" in told(lambda op, x: op.aten.relu(x.having(shape=(2,))))

    def number(op: Any, n: int) -> Any:
        return op.aten.relu(n)

    assert "n must be int, but it is %transpose" in told(number)


def test_defaults_and_further_readers_are_reasons() -> None:
    b = air.ProgramBuilder()
    x = b.input("x", (2,))
    inner = b.aten.neg(x)
    b.output(b.aten.add.Tensor(x, x, alpha=2), b.aten.neg(inner), b.aten.abs(inner))
    program = b.build()
    add = air.rule("add")(lambda op, x: op.aten.add.Tensor(x, x))
    twice = air.rule("twice")(lambda op, x: op.aten.neg(op.aten.neg(x)))
    assert reason(add, program).endswith("'alpha' of %add: it is 2; the pattern leaves it at 1")
    assert "reads %neg too, which is inside the match" in reason(twice, program)


def test_conditions_come_last_and_say_why(program: Program) -> None:
    rule = air.rule("probe")(lambda op, x: op.aten.relu(x))
    rule.where("x is a matrix")(lambda x: x.tensor_type.ndim == 2)
    assert reason(rule, program) == "x is a matrix"
    other = air.rule("probe")(lambda op, x: op.aten.relu(x))
    other.where("the width fits")(lambda x: f"4 is no multiple of {x.tensor_type.shape[0]}")
    assert reason(other, program) == "the width fits: 4 is no multiple of 3"
    third = air.rule("probe")(lambda op, x: op.aten.relu(x))
    third.let("y", "x has a maker")(lambda x: None)
    assert reason(third, program) == "x has a maker"


def test_explaining_changes_nothing(program: Program) -> None:
    before, version = str(program), program.graph.version
    air.explain(double_transpose, program)
    assert (str(program), program.graph.version) == (before, version)


def test_only_rules_are_explained(program: Program) -> None:
    with pytest.raises(air.RuleError, match="is no rule"):
        air.explain(cast(Any, "drop-double-transpose"), program)
