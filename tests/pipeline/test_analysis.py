"""Analyses: computed once per version of a program."""

from collections.abc import Callable

import pytest

from autosp_ir.errors import PassError
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import Shard, TensorType
from autosp_ir.pipeline import Analysis, PassContext, PassManager, register_pass
from autosp_ir.pipeline.registry import Registry
from tests.pipeline.toys import small_program

runs: list[int] = []


class NodeCount(Analysis[int]):
    def run(self, program: Program) -> int:
        runs.append(len(program.graph))
        return runs[-1]


@pytest.fixture(autouse=True)
def forget() -> None:
    runs.clear()


def test_a_result_is_kept_while_nothing_changes() -> None:
    ctx = PassContext(program=small_program())
    assert ctx.analysis(NodeCount) == ctx.analysis(NodeCount)
    assert len(runs) == 1


def test_a_plain_function_is_an_analysis() -> None:
    def relus(program: Program) -> int:
        return len(program.find("aten.relu"))

    assert PassContext(program=small_program()).analysis(relus) == 2


def test_every_kind_of_mutation_invalidates() -> None:
    program = small_program()
    ctx = PassContext(program=program)
    rewriter = ctx.rewriter(program)
    first, second = program.find("aten.relu")
    kind = first.result.tensor_type

    def retype() -> None:
        first.result.type = TensorType(kind.shape, kind.dtype, kind.device).on_axis("sp", Shard(1))

    mutations: list[Callable[[], object]] = [
        lambda: rewriter.replace(second, first.result),
        lambda: rewriter.create("aten.abs", (first.result,)),
        rewriter.dead_code,
        retype,
        lambda: program.mesh.update(sp=4),
        lambda: program.info.update(padded=3),
    ]
    for done, mutate in enumerate(mutations, start=1):
        ctx.analysis(NodeCount)
        assert len(runs) == done
        mutate()
    ctx.analysis(NodeCount)
    assert len(runs) == len(mutations) + 1


def test_results_survive_from_pass_to_pass_until_the_program_changes() -> None:
    registry = Registry()

    @register_pass("look", registry=registry)
    def look(program: Program, ctx: PassContext) -> None:
        ctx.analysis(NodeCount)

    @register_pass("touch", registry=registry)
    def touch(program: Program, ctx: PassContext) -> None:
        ctx.rewriter(program).dead_code()
        program.graph.create("aten.abs", (program.graph.value("x"),), type=program.graph.value("x").type)

    PassManager([look(), look(), touch(), look()]).run(small_program())
    assert len(runs) == 2


def test_two_programs_do_not_share_results() -> None:
    ctx = PassContext(program=small_program())
    ctx.analysis(NodeCount)
    ctx.analysis(NodeCount, small_program())
    assert len(runs) == 2


def test_without_a_program_there_is_a_named_error() -> None:
    with pytest.raises(PassError, match="no program to analyse"):
        PassContext().analysis(NodeCount)
