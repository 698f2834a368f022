"""What patterns match: variables, attributes, types, layouts, alternatives, several results and several roots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import autosp_ir as air
from autosp_ir.ir.program import Program
from autosp_ir.rewrite.rules import Match, Rule
from tests.rewrite.rule_library import double_transpose


def small(build: Callable[[air.ProgramBuilder, air.Value], Any], shape: tuple[int, ...] = (2, 3)) -> Program:
    b = air.ProgramBuilder()
    made = build(b, b.input("x", shape))
    b.output(*(made if isinstance(made, tuple) else (made,)))
    return b.build()


def matches(rule: Rule, program: Program) -> list[Match]:
    return air.explain(rule, program).matches


def bindings(pattern: Callable[..., Any], program: Program) -> list[dict[str, Any]]:
    found = matches(air.rule("probe")(pattern), program)
    return [{k: v.name if isinstance(v, air.Value) else v for k, v in m.bindings.items()} for m in found]


def test_variables_stand_for_values_and_for_attributes() -> None:
    program = small(lambda b, x: b.aten.transpose.int(b.aten.relu(x), 0, 1))
    assert bindings(lambda op, y, a, b: op.aten.transpose.int(y, a, b), program) == [{"y": "relu", "a": 0, "b": 1}]


def test_a_variable_that_occurs_twice_stands_for_one_thing() -> None:
    program = small(lambda b, x: (b.aten.add.Tensor(x, x), b.aten.add.Tensor(x, b.aten.relu(x))))
    assert len(bindings(lambda op, y: op.aten.add.Tensor(y, y), program)) == 1


def test_an_argument_that_is_left_out_must_have_its_default() -> None:
    program = small(lambda b, x: (b.aten.add.Tensor(x, x, alpha=2), b.aten.add.Tensor(x, x, alpha=1)))
    assert len(bindings(lambda op, y: op.aten.add.Tensor(y, y), program)) == 1
    assert bindings(lambda op, y, n: op.aten.add.Tensor(y, y, alpha=n), program) == [{"y": "x", "n": n} for n in (2, 1)]
    assert len(bindings(lambda op, y: op.aten.add.Tensor(y, ...), program)) == 2


def test_how_an_argument_is_passed_does_not_matter() -> None:
    program = small(lambda b, x: b.aten.softmax.int(x, dim=-1))
    assert bindings(lambda op, y, d: op.aten.softmax.int(y, d), program) == [{"y": "x", "d": -1}]


def test_numbers_are_compared_by_value_and_booleans_are_no_numbers() -> None:
    program = small(lambda b, x: (b.aten.mul.Tensor(x, 1.0), b.aten.sum.dim_IntList(x, [1], True)))
    assert len(bindings(lambda op, y: op.aten.mul.Tensor(y, 1), program)) == 1
    assert not bindings(lambda op, y: op.aten.sum.dim_IntList(y, [1], 1), program)


def test_lists_match_element_by_element() -> None:
    program = small(lambda b, x: b.aten.cat([x, b.aten.relu(x), x], 1))
    assert bindings(lambda op, a, c: op.aten.cat([a, op.aten.relu(a), c], 1), program) == [{"a": "x", "c": "x"}]
    assert bindings(lambda op, a: op.aten.cat([a, ...], 1), program) == [{"a": "x"}]
    assert not bindings(lambda op, a, c: op.aten.cat([a, c], 1), program)


def test_annotations_restrict_variables() -> None:
    program = small(lambda b, x: (b.aten.mul.Tensor(x, 2), b.aten.mul.Tensor(x, 2.5), b.aten.mul.Tensor(x, x)))

    def value(op: Any, y: Any, z: air.Value) -> Any:
        return op.aten.mul.Tensor(y, z)

    def number(op: Any, y: Any, n: float) -> Any:
        return op.aten.mul.Tensor(y, n)

    def whole(op: Any, y: Any, n: int | str) -> Any:
        return op.aten.mul.Tensor(y, n)

    assert [len(bindings(p, program)) for p in (value, number, whole)] == [1, 2, 1]


def test_a_parameter_with_a_default_keeps_it() -> None:
    program = small(lambda b, x: b.aten.mul.Tensor(x, 2))
    assert bindings(lambda op, y, n=2: op.aten.mul.Tensor(y, n), program) == [{"y": "x"}]


def test_commuted_operands_match_in_either_order() -> None:
    program = small(lambda b, x: (b.aten.mul.Tensor(b.aten.relu(x), x), b.aten.mul.Tensor(x, b.aten.relu(x))))
    assert len(bindings(lambda op, y, z: op.aten.mul.Tensor(op.aten.relu(y), z), program)) == 1
    assert len(bindings(lambda op, y, z: op.aten.mul.Tensor(op.aten.relu(y), z).commuted(), program)) == 2


def test_matching_backtracks_over_nested_exchanges() -> None:
    program = small(lambda b, x: b.aten.add.Tensor(b.aten.mul.Tensor(x, b.aten.neg(x)), b.aten.mul.Tensor(x, x)))

    def pattern(op: Any, y: Any, z: Any) -> Any:
        return op.aten.add.Tensor(op.aten.mul.Tensor(y, y), op.aten.mul.Tensor(op.aten.neg(z), z).commuted()).commuted()

    assert bindings(pattern, program) == [{"y": "x", "z": "x"}]


def test_any_of_a_set_of_operations() -> None:
    program = small(lambda b, x: (b.aten.view(x, [6]), b.aten.reshape(x, [3, 2]), b.aten.flatten.using_ints(x)))
    found = bindings(lambda op, y, s: op.one_of("aten.view", "aten.reshape")(y, s), program)
    assert [b["s"] for b in found] == [[6], [3, 2]]


def test_alternatives_are_tried_in_order() -> None:
    program = small(lambda b, x: (b.aten.relu(b.aten.neg(x)), b.aten.relu(b.aten.abs(x)), b.aten.relu(x)))

    def pattern(op: Any, y: Any) -> Any:
        return op.aten.relu(op.aten.neg(y) | op.aten.abs(y))

    assert [b["y"] for b in bindings(pattern, program)] == ["x", "x"]
    assert len(bindings(lambda op, y: op.aten.relu(y) | op.aten.abs(y), program)) == 4


def test_shape_dtype_and_rank() -> None:
    program = small(lambda b, x: (b.aten.relu(x), b.aten.sum.dim_IntList(b.aten.relu(x), [0])))
    assert bindings(lambda op, y, n: op.aten.relu(y.having(shape=(2, n))), program) == [{"y": "x", "n": 3}] * 2
    assert len(bindings(lambda op, y: op.aten.relu(y).having(rank=2, dtype=torch.float32), program)) == 2
    assert not bindings(lambda op, y: op.aten.relu(y).having(dtype=torch.float64), program)
    assert not bindings(lambda op, y: op.aten.relu(y).having(rank=1), program)


def test_number_of_uses() -> None:
    program = small(lambda b, x: (b.aten.neg(x), b.aten.abs(b.aten.relu(x))))
    assert bindings(lambda op, y: op.aten.abs(op.aten.relu(y.having(uses=2))), program)
    assert not bindings(lambda op, y: op.aten.abs(op.aten.relu(y.having(uses=1))), program)


def sharded() -> Program:
    b = air.ProgramBuilder(mesh={"sp": 2})
    x = b.input("x", (2, 8))
    y = b.aten.relu(b.autosp.shard(x, 1, "sp", 2))
    b.output(b.autosp.all_gather(y, 1, "sp", 2))
    return b.build()


def test_layouts() -> None:
    program = sharded()
    exact = bindings(lambda op, y: op.aten.relu(y.having(layout={"sp": air.Shard(1)})), program)
    kind = bindings(lambda op, y: op.aten.relu(y).having(layout={"sp": air.Shard}), program)
    bound = bindings(lambda op, y, where: op.aten.relu(y.having(layout={"sp": where})), program)
    assert len(exact) == len(kind) == 1
    assert bound == [{"y": "shard", "where": air.Shard(1)}]
    assert not bindings(lambda op, y: op.aten.relu(y.having(layout={"sp": air.Shard(0)})), program)
    assert not bindings(lambda op, y: op.aten.relu(y.having(layout={"sp": air.Replicate})), program)


def test_what_is_inside_a_match_has_no_other_reader_unless_shared() -> None:
    def build(b: air.ProgramBuilder, x: air.Value) -> Any:
        inner = b.aten.neg(x)
        return b.aten.neg(inner), b.aten.relu(inner)

    program = small(build)
    assert not bindings(lambda op, y: op.aten.neg(op.aten.neg(y)), program)
    assert bindings(lambda op, y: op.aten.neg(op.aten.neg(y).shared()), program) == [{"y": "x"}]


def test_a_subpattern_that_is_used_twice_matches_one_node() -> None:
    def twice(op: Any, y: Any) -> Any:
        inner = op.aten.neg(y)
        return op.aten.mul.Tensor(inner, inner)

    once = small(lambda b, x: b.aten.mul.Tensor(*[b.aten.neg(x)] * 2))
    separate = small(lambda b, x: b.aten.mul.Tensor(b.aten.neg(x), b.aten.neg(x)))
    assert bindings(twice, once) and not bindings(twice, separate)


def test_interior_values_can_be_named() -> None:
    program = small(lambda b, x: b.aten.neg(b.aten.relu(x)))
    assert bindings(lambda op, y: op.aten.neg(op.aten.relu(y).named("inner")), program) == [{"inner": "relu", "y": "x"}]


def test_results_of_an_operation_with_several() -> None:
    program = small(lambda b, x: b.aten.relu(b.aten.max.dim(x, 1)[0]))

    def pattern(op: Any, y: Any, dim: int) -> Any:
        values, _ = op.aten.max.dim(y, dim).shared()
        return op.aten.relu(values)

    assert bindings(pattern, program) == [{"y": "x", "dim": 1}]


def test_several_roots_are_found_from_what_they_share() -> None:
    def build(b: air.ProgramBuilder, x: air.Value) -> Any:
        inner = b.aten.exp(x)
        return b.aten.neg(inner), b.aten.abs(b.aten.relu(inner)), b.aten.neg(x)

    def pattern(op: Any, y: Any) -> Any:
        inner = op.aten.exp(y)
        return op.aten.neg(inner), op.aten.abs(op.aten.relu(inner))

    (match,) = matches(air.rule("probe")(pattern), small(build))
    assert [node.name for node in match.roots] == ["neg", "abs"]
    assert [node.name for node in match.nodes] == ["exp", "neg", "relu", "abs"]


def test_nothing_matches_across_a_write() -> None:
    def build(b: air.ProgramBuilder, x: air.Value) -> Any:
        y = b.aten.clone(x)
        first = b.aten.transpose.int(y, 0, 1)
        b.aten.add_.Tensor(y, 1)
        return b.aten.transpose.int(first, 0, 1)

    explained = air.explain(double_transpose, small(build))
    assert not explained.fires and "writes to an operand" in explained.reason


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (lambda op, x: op.aten.transpos.int(x, 0, 1), "did you mean 'aten.transpose"),
        (lambda op, x: op.aten.transpose(x, 0, 1), "did you mean 'aten.transpose."),
        (lambda op, x: op.autosp.all_to_al(x, ...), "did you mean 'autosp.all_to_all'"),
        (lambda op, x: op.one_of("aten.view", "aten.reshap")(x, [1]), "did you mean 'aten.reshape'"),
        (lambda op, x: op.aten.relu(x, 1), "1 positional arguments, not 2"),
        (lambda op, x: op.aten.add.Tensor(x, x, alhpa=1), "no argument 'alhpa'"),
        (lambda op, x: op.aten.transpose.int(x, 0), "needs the argument 'dim1'"),
        (lambda op, x: x, "returns operations"),
        (lambda: None, "takes op and its variables"),
        (lambda op, x, match: op.aten.mul.Tensor(x, match), "cannot be called 'match'"),
    ],
)
def test_a_malformed_pattern_is_refused_where_it_is_written(pattern: Callable[..., Any], said: str) -> None:
    with pytest.raises(air.RuleError, match="the rule 'bad'") as error:
        air.rule("bad")(pattern)
    assert said in str(error.value)


def test_one_result_cannot_be_unpacked() -> None:
    def pattern(op: Any, x: Any) -> Any:
        first, _ = op.aten.relu(x)
        return first

    with pytest.raises(air.RuleError, match="has one result"):
        air.rule("bad")(pattern)
