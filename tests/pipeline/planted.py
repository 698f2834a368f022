"""Passes that are wrong on purpose: a correct pass, and one mistake behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.ir.text import parse
from autosp_ir.pipeline import Instrument, Pass, PassContext, PassManager, parse_pipeline
from autosp_ir.rewrite import ProgramBuilder

GOLDEN = Path(__file__).parents[1] / "golden"
LINE = "canonicalize,token-partition,ulysses,differentiate,remat,grad-sync,lower-comm"
MESH = {"sp": 4}

Mistake = Callable[[Program, PassContext], None]


class Started(Instrument):
    """The passes that began to run."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def before_pass(self, pass_: Pass, program: Program) -> None:
        self.names.append(pass_.name)


def wrong(correct: str, mistake: Mistake, *, instead: bool = False) -> Pass:
    """The pass `correct`, which then makes a mistake, or makes it instead; it is called `wrong-…`."""
    inner = parse_pipeline(correct)[0]

    def run(self: Pass, program: Program, ctx: PassContext) -> None:
        if not instead:
            type(inner).run(self, program, ctx)
        mistake(program, ctx)

    made: type[Pass] = type("Wrong", (type(inner),), {"name": f"wrong-{inner.name}", "run": run})
    return made(inner.options)


def line_with(bad: Pass) -> list[Pass]:
    """The built-in passes, with the wrong one in the place of the one that it imitates."""
    return [bad if f"wrong-{p.name}" == bad.name else p for p in parse_pipeline(LINE)]


@cache
def _block() -> str:
    return (GOLDEN / "block_captured.ir").read_text()


def block() -> Program:
    """One attention block, as captured."""
    return parse(_block())


def layers(count: int) -> Program:
    """A chain of differences, `tanh(x) - w`, each on a source line of its own."""
    b = ProgramBuilder(info={"seq_dims": {"x": 1}})
    x = b.input("x", (2, 8))
    for layer in range(count):
        w = b.parameter(f"w{layer}", (2, 8))
        with b.source(f"model.py:{10 + layer}", f"layers.{layer}"):
            x = b.aten.sub.Tensor(b.aten.tanh(x), w)
    b.output(loss=b.aten.sum(x))
    return b.build()


def noise() -> Program:
    """Two random operations in a row."""
    b = ProgramBuilder(info={"seq_dims": {"x": 1}})
    x = b.input("x", (2, 8))
    first = b.call("aten.rand_like", (x,), name="first")
    second = b.call("aten.rand_like", (x,), name="second")
    b.output(loss=b.aten.sum(b.aten.sub.Tensor(b.aten.mul.Tensor(x, first), second)))
    return b.build()


def find(program: Program, op: str, position: int = 0) -> Node:
    return program.find(op)[position]


def raw(program: Program, op: str, *args: Any, like: Value, before: Node) -> Value:
    """A node as a careless pass makes it: nothing is inferred."""
    return program.graph.create(op, args, type=like.type, before=before).result


def run(passes: Sequence[Pass | str], program: Program, **options: Any) -> Program:
    return PassManager(list(passes), **options).run(program, mesh=MESH).program
