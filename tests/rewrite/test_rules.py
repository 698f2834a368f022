"""Applying rules: what the driver does in which order, what it refuses, and what a rewrite carries over."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import autosp_ir as air
from autosp_ir.comm.rules.base import rule as attach_layout_rule
from autosp_ir.ir.graph import Origin
from autosp_ir.ir.program import Program
from autosp_ir.rewrite import RewriteEvent
from autosp_ir.rewrite.rules import Rule
from tests.comm.random_layouts import random_pair
from tests.models.transformers_zoo import llama
from tests.rewrite.rule_library import EXACT, double_negation, double_transpose, factor_out, subtract, unit_factor

torch.set_num_threads(1)


def replaces(name: str, wanted: str, by: str, **kwargs: Any) -> Rule:
    """A rule that puts one unary operation in the place of another."""
    made = air.rule(name)(lambda op, x: op.one_of(wanted)(x, **kwargs))
    made.replacement(lambda op, x: getattr(op.aten, by)(x))
    return made


def chain(*operations: str) -> Program:
    b = air.ProgramBuilder()
    x = b.input("x", (2, 3))
    with b.source("model.py:7", module="layers.0"):
        for operation in operations:
            x = b.call(operation, (x,))
    b.output(y=x)
    return b.build()


def names(program: Program) -> list[str]:
    return [n.op.name for n in program.graph.nodes if n.op.kind == "call_function"]


def test_a_rule_rewrites_every_site() -> None:
    program = chain("aten.neg", "aten.neg", "aten.relu", "aten.neg", "aten.neg")
    statistics = air.apply_rules([double_negation], program)
    program.verify()
    assert names(program) == ["aten.relu"]
    assert (statistics.rewrites, statistics["drop-double-negation"].hits) == (2, 2)
    assert statistics["drop-double-negation"].tries >= 3 and statistics["drop-double-negation"].ms > 0
    assert "drop-double-negation" in str(statistics)


def test_earlier_rules_win_and_nodes_come_in_program_order() -> None:
    order: list[tuple[str, str]] = []

    def noting(name: str, by: str) -> Rule:
        made = air.rule(name)(lambda op, x: op.aten.abs(x))

        @made.replacement
        def _(op: Any, x: air.Value, match: air.Match) -> Any:
            order.append((name, match.root.name))
            return getattr(op.aten, by)(x)

        return made

    program = chain("aten.abs", "aten.relu", "aten.abs")
    air.apply_rules([noting("first", "sin"), noting("second", "cos")], program)
    assert order == [("first", "abs"), ("first", "abs_1")]
    assert names(program) == ["aten.sin", "aten.relu", "aten.sin"]


def test_what_a_rewrite_makes_and_what_reads_it_is_visited_again() -> None:
    program = chain("aten.abs", "aten.neg")
    statistics = air.apply_rules([replaces("abs-is-neg", "aten.abs", "neg"), double_negation], program)
    assert names(program) == [] and statistics.rewrites == 2


def test_a_value_that_lost_a_reader_is_visited_again() -> None:
    b = air.ProgramBuilder()
    inner = b.aten.transpose.int(b.input("x", (2, 2)), 0, 1)
    b.output(b.aten.transpose.int(inner, 0, 1), b.aten.mul.Tensor(b.aten.abs(inner), 1))
    program = b.build()
    zero = air.rule("zero")(lambda op, x: op.aten.mul.Tensor(op.aten.abs(x), 1))
    zero.replacement(lambda op: op.aten.zeros([2, 2]))
    air.apply_rules([double_transpose, zero], program)
    program.verify()
    assert names(program) == ["aten.zeros"]


def test_the_last_visit_of_the_whole_program_rewrites_nothing() -> None:
    program = chain(*["aten.neg"] * 7)
    air.apply_rules([double_negation], program)
    assert names(program) == ["aten.neg"]
    again = air.apply_rules([double_negation], program)
    assert (again.rewrites, again.sweeps) == (0, 1)


def test_two_rules_that_undo_each_other_are_named() -> None:
    program = chain("aten.abs", "aten.relu")
    rules = [replaces("abs-to-neg", "aten.abs", "neg"), replaces("neg-to-abs", "aten.neg", "abs"), unit_factor]
    with pytest.raises(air.TerminationError, match="'abs-to-neg' and 'neg-to-abs' undo each other") as error:
        air.apply_rules(rules, program)
    assert "drop-unit-factor" not in str(error.value) and "model.py:7" in str(error.value)
    assert isinstance(error.value, air.PassError)


def test_a_ring_of_three_rules_is_named() -> None:
    ring = [replaces(f"{a}-to-{b}", f"aten.{a}", b) for a, b in (("abs", "neg"), ("neg", "relu"), ("relu", "abs"))]
    with pytest.raises(air.TerminationError, match=r"'abs-to-neg', 'neg-to-relu' and 'relu-to-abs' undo each other"):
        air.apply_rules(ring, chain("aten.abs"))


def test_a_rule_that_undoes_what_another_wraps_is_named() -> None:
    wrap = air.rule("wrap")(lambda op, x: op.aten.relu(x).named("y"))
    wrap.replacement(lambda op, y: op.aten.neg(op.aten.neg(y)))
    with pytest.raises(air.TerminationError, match="undo each other") as error:
        air.apply_rules([double_negation, wrap], chain("aten.relu"))
    assert "'wrap'" in str(error.value) and "'drop-double-negation'" in str(error.value)


def test_a_rule_that_makes_again_what_it_replaced_is_named() -> None:
    swap = air.rule("swap")(lambda op, x, y: op.aten.mul.Tensor(x, y))
    swap.replacement(lambda op, x, y: op.aten.mul.Tensor(y, x))
    b = air.ProgramBuilder()
    b.output(b.aten.mul.Tensor(b.input("x", (2,)), b.input("y", (2,))))
    with pytest.raises(air.TerminationError, match="the rule 'swap' makes again what it replaced"):
        air.apply_rules([swap], b.build())


def test_a_rule_that_makes_ever_more_work_is_caught_and_named() -> None:
    grow = air.rule("grow")(lambda op, x: op.aten.relu(x))
    grow.replacement(lambda op, x: op.aten.relu(op.aten.neg(x)))
    with pytest.raises(air.TerminationError, match=r"1000 rewrites did not reach a fixpoint.*'grow'"):
        air.apply_rules([grow], chain("aten.relu"))
    with pytest.raises(air.TerminationError, match="7 rewrites did not"):
        air.apply_rules([grow], chain("aten.relu"), max_rewrites=7)


def test_a_long_chain_is_no_quarrel() -> None:
    program = chain(*["aten.neg"] * 400)
    assert air.apply_rules([double_negation], program).rewrites == 200


def test_each_rewrite_is_one_event_of_the_rules_name() -> None:
    events: list[RewriteEvent] = []
    program = chain("aten.abs", "aten.neg", "aten.neg", "aten.abs")
    ids = [n.id for n in program.graph.nodes]
    rewriter = air.Rewriter(program, "tidy", [events.append])
    air.apply_rules([double_negation, replaces("abs-is-relu", "aten.abs", "relu")], program, rewriter)
    assert [e.rule for e in events] == ["abs-is-relu", "drop-double-negation", "abs-is-relu"]
    assert events[0].removed == (ids[1],) and len(events[0].created) == 1
    assert set(events[1].removed) == {ids[2], ids[3]} and events[1].created == ()
    assert {e.pass_name for e in events} == {"tidy"}


def test_a_replacement_carries_type_layout_origin_and_phase() -> None:
    b = air.ProgramBuilder(mesh={"sp": 2}, stage="joint")
    with b.source("model.py:9", module="mlp"):
        y = b.aten.neg(b.aten.neg(b.autosp.shard(b.aten.relu(b.input("x", (2, 8))), 1, "sp", 2)))
        z = b.aten.abs(y)
    gathered = b.autosp.all_gather(z, 1, "sp", 2)
    z.producer.phase = gathered.producer.phase = air.Phase.BACKWARD
    b.output(gathered)
    program = b.build()
    made = air.rule("abs-twice")(lambda op, x: op.aten.abs(x))
    made.where("it is alone")(lambda x, match: not any(n.is_op("aten.abs") for n in (x.producer, *match.root.users)))
    made.replacement(lambda op, x: op.aten.abs(op.aten.abs(x)))
    air.apply_rules([made], program, air.Rewriter(program, "tidy"))
    program.verify()
    inner, outer = program.find("aten.abs")
    for node in (inner, outer):
        assert node.result.type == y.type and node.result.tensor_type.layout["sp"] == air.Shard(1)
        assert node.origin == Origin("model.py:9", "mlp", ("tidy",))
        assert node.phase is air.Phase.BACKWARD


def test_a_replacement_of_another_type_is_an_error_of_the_rule() -> None:
    wrong = air.rule("sum-instead")(lambda op, x: op.aten.relu(x))
    wrong.replacement(lambda op, x: op.aten.sum.dim_IntList(x, [1]))
    program = chain("aten.relu")
    before = str(program)
    with pytest.raises(
        air.RuleError, match=r"the rule 'sum-instead'.*is f32\[2, 3\], but what replaces it is f32\[2\]"
    ):
        air.apply_rules([wrong], program)
    assert str(program) == before


def test_a_replacement_may_wrap_what_it_replaces() -> None:
    wrap = air.rule("wrap")(lambda op, x: op.aten.relu(x).named("y"))
    wrap.where("it is not wrapped")(lambda match: not any(n.is_op("aten.abs") for n in match.root.users))
    wrap.replacement(lambda op, y: op.aten.abs(y))
    program = chain("aten.relu", "aten.neg")
    assert air.apply_rules([wrap], program).rewrites == 1
    program.verify()
    assert names(program) == ["aten.relu", "aten.abs", "aten.neg"]


def test_a_replacement_that_comes_too_late_is_an_error_of_the_rule() -> None:
    late = air.rule("late")(lambda op, x: (op.aten.neg(x), op.aten.abs(x).named("y")))
    late.replacement(lambda y: (y, None))
    b = air.ProgramBuilder()
    x = b.input("x", (2, 3))
    b.output(b.aten.relu(b.aten.neg(x)), b.aten.abs(x))
    program = b.build()
    before = str(program)
    with pytest.raises(air.RuleError, match=r"the rule 'late'.*comes too late"):
        air.apply_rules([late], program)
    assert str(program) == before


def test_a_replacement_of_another_layout_is_an_error_of_the_rule() -> None:
    b = air.ProgramBuilder(mesh={"sp": 2})
    x = b.autosp.invariant_to_replicate(b.input("x", (2, 8)), "sp", 2)
    b.output(b.autosp.all_gather(b.autosp.shard(b.input("z", (2, 8)), 1, "sp", 2), 1, "sp", 2), b.aten.relu(x))
    program = b.build()
    wrong = air.rule("forget")(lambda op, x: op.aten.relu(op.autosp.invariant_to_replicate(x, ...)))
    wrong.replacement(lambda op, x: op.aten.relu(x))
    with pytest.raises(air.RuleError, match=r"the rule 'forget'.*\{sp: R\}, but what replaces it is f32\[2, 8\]"):
        air.apply_rules([wrong], program)
    program.verify()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda op, x: op.aten.mm(x, x), "aten.mm rejects its operands"),
        (lambda op, x: op.aten.rellu(x), "did you mean 'aten.relu'"),
        (lambda op, x: 3, "returned 3, not a value"),
        (lambda op, x: (x, x), "not a value"),
        (lambda op, x: None, "changed nothing"),
        (lambda op, x: x.nonsense, "AttributeError"),
    ],
)
def test_a_replacement_that_fails_names_the_rule_and_leaves_the_program_alone(build: Any, said: str) -> None:
    rule = air.rule("broken")(lambda op, x: op.aten.neg(x))
    rule.replacement(build)
    program = chain("aten.neg")
    before = str(program)
    with pytest.raises(air.RuleError, match="the rule 'broken'") as error:
        air.apply_rules([rule], program)
    assert said in str(error.value) and str(program) == before


def test_layout_rules_have_a_decorator_of_their_own() -> None:
    assert air.layout_rule is attach_layout_rule
    assert isinstance(air.rule("one")(lambda op, x: op.aten.neg(x)), Rule)


def test_malformed_rules_are_refused() -> None:
    bare = air.rule("bare")(lambda op, x: op.aten.neg(x))
    with pytest.raises(air.RuleError, match="it has no replacement"):
        air.apply_rules([bare], chain("aten.neg"))
    with pytest.raises(air.RuleError, match="no rule"):
        air.apply_rules(cast(Any, [lambda op, x: x]), chain("aten.neg"))
    with pytest.raises(air.RuleError, match="same name"):
        air.apply_rules([replaces("a", "aten.neg", "abs"), replaces("a", "aten.abs", "neg")], chain("aten.neg"))
    with pytest.raises(air.RuleError, match=r"asks for 'factr', which is no variable") as error:
        air.rule("typo")(lambda op, factor: op.aten.neg(factor)).replacement(lambda factr: factr)
    assert "did you mean 'factor'" in str(error.value)
    with pytest.raises(air.RuleError, match="of another program"):
        air.apply_rules([double_negation], chain("aten.neg"), air.Rewriter(chain("aten.neg")))


def test_a_condition_answers_yes_no_or_why_not() -> None:
    rule = air.rule("odd")(lambda op, x: op.aten.neg(x))
    rule.replacement(lambda op, x: op.aten.abs(x))
    rule.where("it is wanted")(lambda: None)
    with pytest.raises(air.RuleError, match="answered None"):
        air.apply_rules([rule], chain("aten.neg"))


def test_let_gives_a_variable_a_value_or_ends_the_match() -> None:
    rule = air.rule("fold-sum")(lambda op, x, a, b: op.aten.add.Tensor(op.aten.add.Tensor(x, a), b))
    rule.let("total", "both are numbers")(lambda a, b: a + b if isinstance(a, int) and isinstance(b, int) else None)
    rule.replacement(lambda op, x, total: op.aten.add.Tensor(x, total))
    b = air.ProgramBuilder()
    x = b.input("x", (2,))
    b.output(b.aten.add.Tensor(b.aten.add.Tensor(b.aten.add.Tensor(x, 1), 2), x))
    program = b.build()
    air.apply_rules([rule], program)
    assert [n.args[1] for n in program.find("aten.add.Tensor")] == [3, x]


def test_a_root_changed_in_place_stays() -> None:
    rule = air.rule("shorten")(lambda op, x, n: op.aten.slice.Tensor(x, 0, 0, n).named("y"))
    rule.where("it goes to the end")(lambda x, n, y: n > x.tensor_type.shape[0] and y.tensor_type.shape[0] < n)

    @rule.replacement
    def _(x: air.Value, match: air.Match, rewriter: air.Rewriter) -> None:
        rewriter.set_arg(match.root, "end", x.tensor_type.shape[0])

    b = air.ProgramBuilder()
    b.output(y=b.aten.slice.Tensor(b.input("x", (3,)), 0, 0, 99))
    program = b.build()
    node = program.find("aten.slice.Tensor")[0]
    assert air.apply_rules([rule], program).rewrites == 1
    assert not node.erased and node.arg("end") == 3


def test_several_roots_are_replaced_together() -> None:
    def pattern(op: Any, x: Any, v: Any, w: Any) -> Any:
        return op.aten.mm(x, v), op.aten.mm(x, w)

    rule = air.rule("fuse-products")(pattern)

    @rule.replacement
    def _(op: Any, x: air.Value, v: air.Value, w: air.Value) -> Any:
        both = op.aten.mm(x, op.aten.cat([v, w], 1))
        width = v.tensor_type.shape[1]
        return op.aten.slice.Tensor(both, 1, 0, width), op.aten.slice.Tensor(both, 1, width, 2**63 - 1)

    b = air.ProgramBuilder()
    x, v, w = b.input("x", (2, 3)), b.input("v", (3, 4)), b.input("w", (3, 5))
    left = b.aten.mm(x, v)
    late = b.aten.relu(w)
    b.output(b.aten.relu(left), b.aten.mm(x, w), late)
    program = b.build()
    dense = program.clone()
    assert air.apply_rules([rule], program).rewrites == 1
    program.verify()
    assert len(program.find("aten.mm")) == 1
    batch = {"x": torch.randn(2, 3), "v": torch.randn(3, 4), "w": torch.randn(3, 5)}
    for one, other in zip(*(air.simulate(p, batch).outputs[0].values() for p in (program, dense)), strict=True):
        torch.testing.assert_close(one, other)


def test_equal_values_become_one_however_often_they_were_made_by_rules() -> None:
    same = air.rule("share")(lambda op, x: (op.aten.neg(x).named("first"), op.aten.neg(x)))
    same.where("the first one stays")(lambda match: match.in_order)
    same.replacement(lambda first: (None, first))
    b = air.ProgramBuilder()
    x = b.input("x", (2, 3))
    b.output(*(b.aten.relu(b.aten.abs(x)) for _ in range(5)))
    program = b.build()
    statistics = air.apply_rules([replaces("abs-to-neg", "aten.abs", "neg"), same], program)
    program.verify()
    assert names(program).count("aten.neg") == 1 and statistics["share"].hits == 4


def test_roots_between_which_a_reader_stands_are_left_alone() -> None:
    def pattern(op: Any, x: Any, v: Any, w: Any) -> Any:
        return op.aten.mm(x, v), op.aten.mm(x, w)

    b = air.ProgramBuilder()
    x, v = b.input("x", (3, 3)), b.input("v", (3, 3))
    b.output(b.aten.mm(x, b.aten.relu(b.aten.mm(x, v))))
    explained = air.explain(air.rule("fuse")(pattern), b.build())
    assert not explained.fires and "no place" in str(explained)


def test_a_pass_that_consists_of_rules() -> None:
    tidy = air.register_pass("tidy-negations", stage="forward", rules=[double_negation, unit_factor])
    assert issubclass(tidy, air.RulePass) and air.get_pass("tidy-negations") is tidy
    program = chain("aten.neg", "aten.neg", "aten.relu")
    result = air.PassManager("tidy-negations").run(program)
    assert names(result.program) == ["aten.relu"]
    assert result.statistics == {"tidy-negations": {"drop-double-negation": 1}}
    assert result.rules["tidy-negations"]["drop-double-negation"].hits == 1
    assert result.rules["tidy-negations"]["drop-unit-factor"].tries == 0
    (record,) = result.trace
    assert [event.rule for event in record.rewrites] == ["drop-double-negation"]
    assert result.program.find("aten.relu")[0].origin.passes == ("tidy-negations",)


def test_a_pass_that_never_ends_is_named() -> None:
    class Quarrel(air.RulePass):
        """Two rules that fight."""

        name = "quarrel"
        rules = (replaces("abs-to-neg", "aten.abs", "neg"), replaces("neg-to-abs", "aten.neg", "abs"))

    with pytest.raises(air.TerminationError, match="undo each other") as error:
        air.PassManager([Quarrel]).run(chain("aten.abs"))
    assert error.value.pass_name == "quarrel"


def test_an_instrument_adds_rules_up_over_pipelines() -> None:
    rules = air.instruments.Rules()

    class Tidy(air.RulePass):
        """One rule."""

        name = "tidy-twice"
        rules = (double_negation,)

    for _ in range(2):
        air.PassManager([Tidy], instruments=[rules]).run(chain("aten.neg", "aten.neg"))
    done = rules.done["tidy-twice", "drop-double-negation"]
    assert (done.hits, done.tries) == (2, 4) and done.ms > 0
    assert "tidy-twice  drop-double-negation" in str(rules)


def test_rules_count_in_the_context_of_a_pass() -> None:
    program = chain("aten.neg", "aten.neg")
    ctx = air.PassContext(program=program, pass_name="mine")
    air.apply_rules([double_negation], program, ctx)
    assert ctx.statistics == {"drop-double-negation": 1} and ctx.rules["drop-double-negation"].hits == 1


@pytest.mark.parametrize("seed", range(12))
def test_exact_rules_keep_random_programs_equivalent(seed: int) -> None:
    program, batch = tried(seed)
    rewritten = program.clone()
    statistics = air.apply_rules(EXACT, rewritten, air.Rewriter(rewritten, "exact"))
    rewritten.verify()
    before, after = (air.simulate(p, batch, gradients=False).outputs[0] for p in (program, rewritten))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-10, atol=1e-10)
    assert statistics.rewrites > 0
    assert air.apply_rules(EXACT, rewritten).rewrites == 0


def odd(name: str) -> Rule:
    """f(-x) is -f(x)."""
    made = air.rule(f"odd-{name}")(lambda op, x: op.one_of(f"aten.{name}")(x).named("y"))
    made.where("x is no negation already")(lambda x: not x.producer.op.name.startswith("aten.neg"))
    made.replacement(lambda op, x: op.aten.neg(getattr(op.aten, name)(op.aten.neg(x))))
    return made


add_is_sub = air.rule("add-is-sub")(lambda op, x, y: op.aten.add.Tensor(x, y))
add_is_sub.where("both are tensors")(lambda x, y: isinstance(x, air.Value) and isinstance(y, air.Value))
add_is_sub.replacement(lambda op, x, y: op.aten.sub.Tensor(x, op.aten.neg(y)))
NEAR = [odd("tanh"), odd("sin"), add_is_sub]


def tried(seed: int) -> tuple[Program, dict[str, Any]]:
    """A random program with places for the rules."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    b = air.ProgramBuilder()
    values = [b.input(name, (4, 4), torch.float64) for name in "xyz"]
    steps = [
        lambda v, w: b.aten.transpose.int(v, 0, 1),
        lambda v, w: b.aten.transpose.int(b.aten.transpose.int(v, 0, 1), 0, 1),
        lambda v, w: b.aten.neg(v),
        lambda v, w: b.aten.neg(b.aten.neg(v)),
        lambda v, w: b.aten.mul.Tensor(v, 1),
        lambda v, w: b.aten.add.Tensor(v, b.aten.neg(w)),
        lambda v, w: b.aten.add.Tensor(b.aten.mul.Tensor(v, w), b.aten.mul.Tensor(v, w)),
        lambda v, w: b.aten.tanh(v),
    ]
    for _ in range(40):
        values.append(steps[draw(len(steps))](values[-1 - draw(3)], values[-1 - draw(3)]))
    b.output(*values[-4:])
    batch = {name: torch.randn(4, 4, dtype=torch.float64, generator=generator) for name in "xyz"}
    return b.build(), batch


@air.rule("drop-double-t")
def double_t(op: Any, x: air.Value) -> Any:
    return op.aten.t(op.aten.t(x).shared())


double_t.replacement(lambda x: x)


def test_rules_keep_the_joint_program_of_a_model_exact() -> None:
    model, batch = llama()
    program = air.capture(model, batch)
    tidy = air.register_pass("tidy-joint", stage="joint", rules=[double_t, *EXACT])
    before = "canonicalize,pad-tokens,token-partition,ulysses,differentiate"
    result = air.PassManager([before, tidy, "remat,grad-sync,lower-comm"]).run(program, mesh={"sp": 2})
    assert result.statistics["tidy-joint"]["drop-double-t"] > 4
    air.testing.assert_equivalent(model, result.program, batch)


def test_factoring_and_subtraction_are_found() -> None:
    b = air.ProgramBuilder()
    x, y, z = (b.input(n, (2, 2)) for n in "xyz")
    b.output(b.aten.add.Tensor(b.aten.mul.Tensor(x, z), b.aten.mul.Tensor(y, z)), b.aten.add.Tensor(b.aten.neg(x), y))
    program = b.build()
    air.apply_rules([factor_out, subtract], program)
    assert names(program) == ["aten.add.Tensor", "aten.mul.Tensor", "aten.sub.Tensor"]


@pytest.mark.parametrize("seed", range(12))
def test_exact_rules_keep_random_sharded_programs_equal_to_their_twin(seed: int) -> None:
    program, twin, batch = random_pair(seed, ranks=2, steps=48)
    air.apply_rules([*EXACT, *NEAR], program, air.Rewriter(program, "exact"))
    program.verify()
    expected = air.simulate(twin, batch).outputs[0]
    for outputs in air.simulate(program, batch).outputs:
        for name, value in expected.items():
            torch.testing.assert_close(outputs[name], value, rtol=1e-10, atol=1e-10)
