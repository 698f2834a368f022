"""Every way a pass can break a program is caught at that pass, which is named, at the earliest stage possible."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch

import autosp_ir as air
from autosp_ir.errors import AutoSPError, LayoutError, PassError, TerminationError, UnsupportedError, VerifyError
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import Replicate, ScalarType, Shard, TensorType
from autosp_ir.pipeline import Pass, PassContext, PassManager
from autosp_ir.testing import EquivalenceError, assert_same_numbers, check_pass
from tests.pipeline.planted import MESH, Started, block, find, layers, line_with, noise, raw, wrong


def use_before_definition(program: Program, ctx: PassContext) -> None:
    program.graph.move(find(program, "autosp.attention"), after=program.graph.value("linear_3").producer)


def stale_use_list(program: Program, ctx: PassContext) -> None:
    program.graph.value("reshape")._users.clear()


def wrong_type(program: Program, ctx: PassContext) -> None:
    value = program.graph.value("linear_3")
    kind = value.tensor_type
    value.type = TensorType((2, 3, 17), kind.dtype, kind.device, kind.layout)


def wrong_layout(program: Program, ctx: PassContext) -> None:
    value = program.graph.value("linear_3")
    value.type = value.tensor_type.on_axis("sp", Shard(2))


def nonlinear_on_partial(program: Program, ctx: PassContext) -> None:
    total = find(program, "aten.sum.dim_IntList").result
    reader = total.users[0]
    reader.replace_operand(total, raw(program, "aten.exp", total, like=total, before=reader))


def partial_output(program: Program, ctx: PassContext) -> None:
    reduced = find(program, "autosp.all_reduce")
    reduced.result.replace_all_uses_with(reduced.operands[0])
    program.graph.erase(reduced)


def never_awaited(program: Program, ctx: PassContext) -> None:
    wait = find(program, "_c10d_functional.wait_tensor")
    blocks = wait.operands[0].producer.operands[0]
    wait.result.replace_all_uses_with(blocks)
    program.graph.erase(wait)


def awaited_twice(program: Program, ctx: PassContext) -> None:
    wait = find(program, "_c10d_functional.wait_tensor")
    raw(program, "_c10d_functional.wait_tensor", *wait.args, like=wait.result, before=wait)


def rank_dependent_attribute(program: Program, ctx: PassContext) -> None:
    exchange = find(program, "autosp.all_to_all")
    graph, integer = program.graph, TensorType((), torch.int64, torch.device("cpu"))
    rank = graph.create("autosp.axis_index", ("sp", 4), type=integer.on_axis("sp", Replicate()), before=exchange)
    number = ScalarType("int", sympy.Symbol("u0", integer=True))
    dim = graph.create("aten._local_scalar_dense", (rank.result,), type=number, before=exchange, name="dim")
    exchange.set_args(*exchange.with_arg("split_dim", dim.result))


def swapped_effects(program: Program, ctx: PassContext) -> None:
    program.graph.move(program.graph.value("second").producer, before=program.graph.value("first").producer)


def undeclared_fact(program: Program, ctx: PassContext) -> None:
    program.facts.add("padded")


def forgotten_collective(program: Program, ctx: PassContext) -> None:
    start = find(program, "_c10d_functional.all_reduce")
    (wait,) = start.users
    kept = raw(program, "autosp.all_reduce", start.operands[0], "sp", 4, like=wait.result, before=wait)
    wait.result.replace_all_uses_with(kept)
    program.graph.erase(wait)
    program.graph.erase(start)


def wrong_dimension(program: Program, ctx: PassContext) -> None:
    exchange = find(program, "autosp.all_to_all")
    rewriter = ctx.rewriter(program)
    rewriter.set_args(exchange, *exchange.with_arg("split_dim", 3))
    rewriter.reinfer([exchange])


def wrong_dimension_raw(program: Program, ctx: PassContext) -> None:
    exchange = find(program, "autosp.all_to_all")
    exchange.set_args(*exchange.with_arg("concat_dim", 3))


def dropped_collective(program: Program, ctx: PassContext) -> None:
    exchange = find(program, "autosp.all_to_all")
    exchange.result.replace_all_uses_with(exchange.operands[0])
    program.graph.erase(exchange)


def dropped_identity(program: Program, ctx: PassContext) -> None:
    identity = find(program, "autosp.invariant_to_replicate")
    identity.result.replace_all_uses_with(identity.operands[0])
    program.graph.erase(identity)


def raises(program: Program, ctx: PassContext) -> None:
    raise KeyError("no such layer")


def rewrites_for_ever(program: Program, ctx: PassContext) -> None:
    rewriter = ctx.rewriter(program)
    node = find(program, "autosp.attention").next
    while node is not None:
        with rewriter.after(node):
            node = rewriter.create("aten.alias", (node.result,)).producer


PLANTED: list[tuple[str, Callable[[Program, PassContext], None], type[AutoSPError], str, str]] = [
    ("ulysses", use_before_definition, VerifyError, "%attention_1 is read before it is defined", "getitem"),
    ("ulysses", stale_use_list, VerifyError, "the use list of %reshape does not match", "reshape"),
    ("ulysses", wrong_type, VerifyError, r"%linear_3 is stored as f32\[2, 3, 17\]", "linear_3"),
    ("ulysses", wrong_layout, LayoutError, r"%linear_3 is stored as S\(2\)", "linear_3"),
    ("token-partition", nonlinear_on_partial, LayoutError, "exp", "exp"),
    ("token-partition", partial_output, LayoutError, "output 'loss' leaves the program as P", "div"),
    ("lower-comm", never_awaited, VerifyError, "is awaited never", "all_to_all_single"),
    ("lower-comm", awaited_twice, VerifyError, "is awaited 2 times", "all_to_all_single"),
    ("ulysses", rank_dependent_attribute, VerifyError, "%dim depends on the rank", "all_to_all"),
    ("ulysses", undeclared_fact, PassError, "establishes 'padded' without declaring it", ""),
    ("lower-comm", forgotten_collective, VerifyError, "still autosp.all_reduce", "all_reduce"),
    ("ulysses", wrong_dimension, UnsupportedError, "attention shapes do not fit", "attention_1"),
    ("ulysses", wrong_dimension_raw, VerifyError, "%all_to_all is stored as", "all_to_all"),
    ("ulysses", dropped_collective, VerifyError, "%attention_1 is stored as", "attention_1"),
    ("token-partition", dropped_identity, LayoutError, "%p_out_weight is Invariant, needs a gradient", "linear_3"),
    ("ulysses", raises, PassError, "KeyError: 'no such layer' .*test_planted_bugs.py", ""),
    ("ulysses", rewrites_for_ever, TerminationError, "more changes than", ""),
]


@pytest.mark.parametrize(
    ("correct", "mistake", "kind", "message", "node"), PLANTED, ids=[case[1].__name__ for case in PLANTED]
)
def test_a_wrong_pass_is_caught_at_that_pass(
    correct: str, mistake: Callable[[Program, PassContext], None], kind: type[AutoSPError], message: str, node: str
) -> None:
    bad, started = wrong(correct, mistake), Started()
    with pytest.raises(kind, match=message) as caught:
        PassManager(line_with(bad), instruments=[started]).run(block(), mesh=MESH)
    error = caught.value
    assert error.pass_name == started.names[-1] == bad.name  # no later pass has begun
    assert f"[{bad.name}]" in str(error)
    assert error.hint
    assert not node or f"--> %{node}" in str(error)


def test_a_site_that_a_pass_promised_to_rewrite_is_missed() -> None:
    bad, started = wrong("ulysses", lambda program, ctx: None, instead=True), Started()
    with pytest.raises(LayoutError, match="still cut along the tokens") as caught:
        PassManager(line_with(bad), instruments=[started]).run(block(), mesh=MESH)
    assert caught.value.pass_name == started.names[-1] == "wrong-ulysses"
    assert "--> %attention" in str(caught.value)


def test_random_numbers_drawn_in_another_order_are_caught() -> None:
    swapping = wrong("canonicalize", swapped_effects)
    with pytest.raises(VerifyError, match="%second has an effect and was moved across another one") as caught:
        PassManager([swapping, "token-partition"]).run(noise(), mesh=MESH)
    assert caught.value.pass_name == "wrong-canonicalize"
    assert "--> %second" in str(caught.value)


def test_a_pass_that_loops_without_rewriting_runs_out_of_time() -> None:
    def waits(program: Program, ctx: PassContext) -> None:
        while True:
            try:
                program.stage.title()
            except Exception:  # a pass may well swallow whatever is raised in it
                continue

    with pytest.raises(TerminationError, match="still running after") as caught:
        PassManager(["canonicalize", "token-partition", wrong("ulysses", waits)], timeout=2).run(block(), mesh=MESH)
    assert caught.value.pass_name == "wrong-ulysses"
    assert "test_planted_bugs.py" in caught.value.reason


class Swap(Pass):
    """Meant to do nothing to a difference; at one of them it swaps the operands, which have the same type."""

    name = "swap-one"

    class Options(Pass.Options):
        at: int = 0

    def run(self, program: Program, ctx: PassContext) -> None:
        rewriter = ctx.rewriter(program)
        for position, node in enumerate(program.find("aten.sub.Tensor")):
            if not rewriter.allows(node, "rebuild"):
                continue
            x, y = node.args
            with rewriter.before(node):
                operands = (y, x) if position == self.options.at else (x, y)
                rebuilt = rewriter.create("aten.sub.Tensor", operands)
            rewriter.replace(node, rebuilt)


def test_swapped_operands_of_one_type_are_caught_by_their_numbers() -> None:
    verified = PassManager([Swap(at=3)]).run(layers(8)).program
    verified.verify()  # nothing is wrong with it but its values
    with pytest.raises(EquivalenceError, match="the program after the pass against the one before"):
        check_pass(Swap(at=3), before=layers(8))


@pytest.mark.parametrize("at", range(8))
def test_bisection_names_the_swap(at: int) -> None:
    before = layers(8)

    def good(program: Program) -> bool:
        assert_same_numbers(before, program)
        return True

    found = air.bisect(["canonicalize", Swap(at=at)], before, good)
    assert found.site is not None
    assert (found.pass_name, found.site.index, found.site.rule) == ("swap-one", at + 1, "rebuild")
    assert found.runs <= 5  # log2(9 units) + 2
    assert found.site.source == f"model.py:{10 + at}"
    (removed,), (created,) = (
        [line for line in lines if "aten.sub.Tensor" in line and f"model.py:{10 + at}" in line]
        for lines in (found.changes.removed, found.changes.created)
    )
    assert removed != created
    assert "test_planted_bugs.py" in str(found)
