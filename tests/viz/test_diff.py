"""The terminal diff: what changed, by identity."""

from __future__ import annotations

import io

from rich.console import Console

import autosp_ir as air
from tests.pipeline.toys import Cut, FoldRelu, small_program
from tests.viz.recorded import llama_program


def printed(*passes: air.Pass | str, program: air.Program | None = None) -> str:
    screen = io.StringIO()
    diff = air.instruments.Diff(Console(file=screen, width=400), context=1)
    manager = air.PassManager(list(passes), instruments=[diff])
    manager.run(program if program is not None else small_program(), mesh={"sp": 4})
    return screen.getvalue()


def test_what_a_pass_removed_and_changed_is_shown() -> None:
    text = printed(FoldRelu())
    assert "fold-relu  -1 removed  ~1 changed" in text
    assert "  - %relu_1: f32[2, 3] = aten.relu(%relu)" in text
    assert "+ %mul: f32[2, 3] = aten.mul.Tensor(%relu, %w)" in text


def test_a_pass_that_changes_no_line_says_so() -> None:
    assert "cut  no change" in printed(FoldRelu(), Cut())


def test_far_lines_are_left_out() -> None:
    text = printed("canonicalize,pad-tokens,token-partition,ulysses", program=llama_program())
    assert "⋯" in text
    assert "+ %all_to_all: f32" in text
    assert "modeling_llama.py" in text


def test_colours_are_for_terminals() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=400)
    air.PassManager([FoldRelu()], instruments=[air.instruments.Diff(console)]).run(small_program())
    assert "\x1b[31m" in screen.getvalue()
