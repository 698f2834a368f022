"""Small programs and passes for the tests of this folder."""

from typing import Literal

from autosp_ir.ir.program import Program
from autosp_ir.pipeline import Pass, PassContext
from autosp_ir.rewrite import ProgramBuilder


def small_program() -> Program:
    b = ProgramBuilder(info={"seq_dims": {"x": 1}})
    x = b.input("x", (2, 3))
    w = b.parameter("w", (2, 3))
    with b.source("model.py:7", "block"):
        y = b.aten.relu(b.aten.relu(x))
    b.output(loss=b.aten.sum(b.aten.mul.Tensor(y, w)))
    return b.build()


class FoldRelu(Pass):
    """relu(relu(x)) is relu(x)."""

    name = "fold-relu"
    provides = frozenset({"folded"})

    def run(self, program: Program, ctx: PassContext) -> None:
        rewriter = ctx.rewriter(program)
        for node in program.find("aten.relu"):
            source = node.operands[0].producer
            if not source.is_op("aten.relu"):
                ctx.remark("missed", node, "its operand is no relu")
                continue
            ctx.remark("applied", node, "folded")
            rewriter.replace(node, source.result)
            ctx.count("folded")


class Cut(Pass):
    """Sets the mesh, as token-partition does."""

    name = "cut"
    requires = frozenset({"folded"})
    provides = frozenset({"cut"})

    class Options(Pass.Options):
        axis: str = "sp"
        mode: Literal["even", "ragged"] = "even"

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        program.mesh = {self.options.axis: ctx.mesh[self.options.axis]}


class Whole(Pass):
    """Cannot run once the program is cut."""

    name = "whole"
    conflicts = frozenset({"cut"})

    def run(self, program: Program, ctx: PassContext) -> None:
        pass


class Join(Pass):
    """Moves a program to the joint stage."""

    name = "join"
    produces = "joint"
    removes = frozenset({"folded"})

    def run(self, program: Program, ctx: PassContext) -> None:
        program.stage = type(self).stage_after(program.stage)


class OnJoint(Pass):
    """Accepts joint programs only."""

    name = "on-joint"
    stage = "joint"

    def run(self, program: Program, ctx: PassContext) -> None:
        pass
