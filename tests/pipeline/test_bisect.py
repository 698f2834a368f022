"""Bisection over passes and single rewrites, and the limit on rewrites that it stands on."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import autosp_ir as air
from autosp_ir.errors import PipelineError, UnsupportedError, VerifyError
from autosp_ir.ir.program import Program
from autosp_ir.pipeline import Pass, PassContext, PassManager, command_judge, parse_pipeline
from autosp_ir.rewrite.limit import RewriteLimit
from autosp_ir.testing import assert_same_numbers
from tests.models.plain import plain_decoder
from tests.pipeline.planted import LINE, MESH, block, find, layers
from tests.pipeline.toys import FoldRelu, small_program
from tests.sampling import sampled


@air.rule("tanh-to-sigmoid")
def wrong_rule(op: Any, x: Any) -> Any:
    return op.aten.tanh(x)


@wrong_rule.replacement
def _(op: Any, x: Any) -> Any:
    return op.aten.sigmoid(x)


class Wrong(air.RulePass):
    name = "wrong-rule"
    rules = (wrong_rule,)


class Whole(Pass):
    """Wrong without naming a site."""

    name = "wrong-whole"

    def run(self, program: Program, ctx: PassContext) -> None:
        rewriter = ctx.rewriter(program)
        for node in program.find("aten.tanh"):
            with rewriter.before(node):
                rewriter.replace(node, rewriter.create("aten.sigmoid", node.args))


class Bare(Pass):
    """Right at its sites and wrong besides them."""

    name = "wrong-bare"

    def run(self, program: Program, ctx: PassContext) -> None:
        rewriter = ctx.rewriter(program)
        for node in program.find("aten.tanh"):
            if rewriter.allows(node):
                with rewriter.after(node):
                    rewriter.replace(node, rewriter.create("aten.alias", (node.result,)))
        Whole().run(program, ctx)


class Breaks(Pass):
    """Leaves a stale type at one of its sites."""

    name = "breaks-types"

    def run(self, program: Program, ctx: PassContext) -> None:
        rewriter = ctx.rewriter(program)
        for position, node in enumerate(program.find("aten.tanh")):
            if rewriter.allows(node):
                operand = node.operands[0] if position != 5 else program.graph.inputs[0].result
                rewriter.set_args(node, (operand if position != 5 else 1.0,))


def few_sigmoids(most: int) -> Any:
    return lambda program: len(program.find("aten.sigmoid")) <= most


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13])
def test_the_guilty_application_of_a_rule_is_named(count: int) -> None:
    for most in range(count):
        found = air.bisect([Wrong()], layers(count), few_sigmoids(most))
        assert found.site is not None
        assert (found.site.index, found.sites, found.units) == (most + 1, count, count)
        assert found.runs <= math.log2(count) + 2
        assert found.site.rule == "tanh-to-sigmoid"
        assert "test_bisect.py" in found.site.location
        assert found.site.source == f"model.py:{10 + most}"
        assert any("aten.tanh" in line for line in found.changes.removed)
        assert any("aten.sigmoid" in line and f"model.py:{10 + most}" in line for line in found.changes.created)


@pytest.mark.parametrize("position", range(4))
def test_the_guilty_pass_is_found_among_others(position: int) -> None:
    passes: list[Pass] = [FoldRelu(), FoldRelu(), FoldRelu()]
    passes.insert(position, Whole())
    found = air.bisect(passes, layers(3), few_sigmoids(0))
    assert found.pass_name == "wrong-whole"
    assert found.site is None
    assert found.runs <= math.log2(4) + 2
    assert "wrong as a whole" in str(found)


def test_what_a_pass_does_besides_its_sites_is_told_apart() -> None:
    found = air.bisect([FoldRelu(), Bare()], layers(4), few_sigmoids(0))
    assert (found.pass_name, found.site, found.sites) == ("wrong-bare", None, 4)
    assert "wrong without any of its 4 rewrites" in str(found)


def test_a_rewrite_that_the_verifier_refuses_is_found_without_a_predicate() -> None:
    found = air.bisect([FoldRelu(), Breaks()], layers(8))
    assert found.site is not None
    assert (found.pass_name, found.site.index, found.site.node) == ("breaks-types", 6, "tanh_5")
    assert isinstance(found.error, VerifyError)
    assert "tanh_5" in str(found)


def test_what_cannot_be_judged_is_said() -> None:
    def good(program: Program) -> bool | None:
        number = len(program.find("aten.sigmoid"))
        return None if number in (3, 4) else number < 5

    found = air.bisect([Wrong()], layers(8), good)
    assert found.site is not None
    assert found.site.index == 5
    assert [label.split(":")[0] for label in found.inconclusive] == [
        "rewrite 3 of wrong-rule",
        "rewrite 4 of wrong-rule",
    ]
    assert "could not be judged" in str(found)


def test_a_refusal_by_the_judge_is_inconclusive_and_a_failed_assertion_is_bad() -> None:
    def good(program: Program) -> bool:
        number = len(program.find("aten.sigmoid"))
        if number == 2:
            raise UnsupportedError("half of it")
        assert number < 6
        return True

    found = air.bisect([Wrong()], layers(8), good)
    assert found.site is not None
    assert found.site.index == 6
    assert not found.inconclusive


def test_there_must_be_something_to_find() -> None:
    with pytest.raises(PipelineError, match="what the pipeline makes is good"):
        air.bisect([Wrong()], layers(2), lambda program: True)
    with pytest.raises(PipelineError, match="bad before any pass"):
        air.bisect([Wrong()], layers(2), lambda program: False)
    with pytest.raises(PipelineError, match="bad before any pass"):
        air.bisect([FoldRelu()], small_program(), lambda program: False)
    with pytest.raises(PipelineError, match="cannot be judged"):
        air.bisect([Wrong()], layers(2), lambda program: None)
    with pytest.raises(PipelineError, match="say what is wrong"):
        air.bisect([Wrong()], layers(2))
    with pytest.raises(PipelineError, match="the pipeline is empty"):
        air.bisect([], layers(2), lambda program: False)


def test_a_command_judges_the_text() -> None:
    good = command_judge("! grep -q sigmoid")
    found = air.bisect([Wrong()], layers(4), good)
    assert found.site is not None
    assert found.site.index == 1
    assert command_judge("test -s {}")(layers(1)) is True
    assert command_judge("exit 125; true")(layers(1)) is None
    assert command_judge("false")(layers(1)) is False
    with pytest.raises(PipelineError, match="cannot be run"):
        command_judge("/no/such/command")(layers(1))


def test_a_limit_counts_over_the_passes_of_a_pipeline() -> None:
    limit = RewriteLimit(5)
    made = PassManager([Wrong()], limit=limit).run(layers(8)).program
    assert len(made.find("aten.sigmoid")) == 5
    assert [site.index for site in limit.sites] == [1, 2, 3, 4, 5]
    assert limit.refused


def test_a_pass_that_left_sites_alone_establishes_nothing() -> None:
    given = PassManager("canonicalize,token-partition").run(block(), mesh=MESH).program
    made = PassManager("ulysses", limit=RewriteLimit(0)).run(given).program
    assert "attention-resolved" not in made.facts
    assert find(made, "autosp.attention")


@cache
def captured() -> Program:
    model, batch = plain_decoder(length=16)
    return air.capture(model, batch)


@pytest.mark.parametrize("name", sampled([p.name for p in parse_pipeline(LINE)], 3))
def test_any_number_of_sites_of_a_built_in_pass_may_be_left_alone(name: str) -> None:
    passes = parse_pipeline(LINE)
    position = next(i for i, p in enumerate(passes) if p.name == name)
    given = PassManager(passes[:position]).run(captured(), mesh={"sp": 2}).program
    allowed = RewriteLimit()
    PassManager([passes[position]], limit=allowed).run(given, mesh={"sp": 2})
    count = len(allowed.sites)
    for most in sorted({0, 1, count // 2, max(count - 1, 0)}):
        limit = RewriteLimit(most)
        made = PassManager([passes[position]], limit=limit).run(given, mesh={"sp": 2}).program
        assert limit.sites == allowed.sites[:most]
        assert_same_numbers(given, made)


def test_sites_are_what_the_passes_are_known_for() -> None:
    limit = RewriteLimit()
    PassManager(LINE, limit=limit).run(captured(), mesh={"sp": 2})
    passes = {site.pass_name for site in limit.sites}
    assert passes >= {"canonicalize", "ulysses", "grad-sync", "lower-comm"}


def test_the_judge_gets_a_copy(tmp_path: Path) -> None:
    def good(program: Program) -> bool:
        bad = len(program.find("aten.sigmoid")) > 2
        program.graph.output_node.set_args(((program.graph.inputs[0].result,),))
        return not bad

    found = air.bisect([Wrong()], layers(4), good)
    assert found.site is not None
    assert found.site.index == 3
