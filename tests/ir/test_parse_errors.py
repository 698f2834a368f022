"""Malformed text is refused with the place and the way out."""

from __future__ import annotations

import pytest

from autosp_ir.errors import ParseError
from autosp_ir.ir.program import Program
from autosp_ir.ir.text import parse, print_program, structurally_equal
from tests.ir.programs import everything, linear

LINEAR = print_program(linear())
EVERYTHING = print_program(everything())


def refusal(text: str) -> ParseError:
    with pytest.raises(ParseError) as caught:
        parse(text)
    return caught.value


def position(text: str, needle: str) -> tuple[int, int]:
    """The 1-based line and column of the first occurrence."""
    before = text[: text.index(needle)]
    return before.count("\n") + 1, len(before) - before.rfind("\n")


CASES = [
    # what is written, what is written instead, reason, hint, what the error points at
    ("autosp-ir 1", "autosp-ir 2", "format version 2, this reader knows up to 1", "upgrade autosp_ir", "2"),
    ("autosp-ir 1", "program", "expected `autosp-ir 1`, the format version", None, "program"),
    ("stage: forward", "stage: frward", "unknown stage 'frward'", "did you mean forward?", "frward"),
    ("stage: forward", "sage: forward", "expected a header line or `program(`", "did you mean stage?", "sage"),
    ("stage: forward\n", "", "the header has no `stage:` line", None, "program"),
    ("stage: forward", "stage: forward\nmesh: {1}", "mesh is not valid JSON", None, "1}"),
    ("stage: forward", 'stage: forward\nmesh: {"sp": 0}', "mesh must be axis sizes by name", None, '{"sp"'),
    ("stage: forward", "stage: forward\nfacts: [1]", "facts must be a list of names", None, "[1]"),
    ("stage: forward", "stage: forward\ninfo: []", "info must be a JSON object", None, "[]"),
    ("stage: forward", 'stage: forward\ndevice: "gpu"', "device must be a device", None, '"gpu"'),
    ("stage: forward", 'stage: forward\nsymbols: {"s": {}}', "symbols must be entries such as", None, '{"s"'),
    ("aten.linear", "aten.linaer", "unknown operation 'aten.linaer'", "did you mean 'aten.linear'?", "aten.linaer"),
    ("aten.linear", "output", "the output is written `return", None, "output(%x"),
    ("aten.linear", "%linear", "expected the name of an operation", None, "%linear("),
    ("%linear, 4", "%liner, 4", "unknown value `%liner`", "did you mean %linear?", "%liner, 4"),
    ("%linear, 4", "%half, 4", "unknown value `%half`", "defined before they are used", "%half, 4"),
    ("%half:", "%split:", "%split is defined twice", None, "%split: f32["),
    ("%x: f32", "%x: f33", "unknown dtype `f33`", "did you mean f32?", "f33"),
    ("%x: f32[2, 6, 4]", "%x: float32", "unknown type `float32`", "did you mean", "float32"),
    ("%x: f32[2", "%x: f32[s0", "unknown symbol `s0`", "declare it in the `symbols:` line", "s0"),
    ("%x: f32[2", "%x: f32[2.5", " is no extent", "extents are integers", "2.5"),
    ("%x: f32[2", "%x: f32[Log(2)", "unknown function `Log`", None, "Log"),
    ("%x: f32[2, 6, 4]", "%x: f32[2, 6, 4]@gpu", "'gpu' is no device", None, "gpu"),
    ("%x: f32[2, 6, 4]", "%x: f32[2, 6, 4] {sp: T(1)}", "unknown placement `T`", None, "T(1)"),
    ("%x: f32[2, 6, 4]", "%x: f32[2, 6, 4] {sp S(1)}", "expected `:`, found `S`", None, "S(1)"),
    ("%x: f32[2, 6, 4]", "%x: f32[2, 6, 4] {sp: S}", "expected `(`, found `}`", None, "}"),
    ('= input "x"', '= inptu "x"', "unknown kind of input `inptu`", "did you mean input?", "inptu"),
    ('= input "x"', "= input x", "expected the input's own name in quotes", None, "x,"),
    ('output "loss"', 'gradent "loss"', "unknown kind of output `gradent`", "did you mean gradient?", "gradent"),
    ('output "loss"', 'output "loss', "the string is not closed", None, '"loss,'),
    ("[0, 1, 2]", "[0, 1 2]", "expected `,` or `]`, found `2`", None, "2])"),
    ("[0, 1, 2]", "[0, 1, 2", "expected `,` or `]`, found `)`", None, ")\n    return"),
    ("[0, 1, 2]", "(0)", "a tuple of one item needs a comma", None, "(0)"),
    ("[0, 1, 2]", "0)", "expected the end of the line, found `)`", None, None),
    ("[0, 1, 2]", "slice(0)", "slice takes start, stop and step", None, "slice"),
    ("[0, 1, 2]", "complex(1)", "complex takes two floats", None, "complex"),
    ("[0, 1, 2]", "device(0)", "device takes one string", None, "device"),
    ("[0, 1, 2]", 'device("gpu")', "'gpu' is no device", None, "device"),
    ("[0, 1, 2]", "torch.add", "`torch.add` is no dtype", None, "torch.add"),
    ("[0, 1, 2]", "half", "expected a value or a literal, found `half`", "values are written %name", "half)"),
    ("[0, 1, 2]", 'object("os:nothing")', "there is no object 'os:nothing'", "import os before parsing", "object"),
    ("[0, 1, 2]", 'op("aten.ad")', "unknown operation 'aten.ad'", "did you mean", "op("),
    ("[0, 1, 2]", "{[1]: 2}", "cannot be the key of a dict", None, "[1]: 2"),
    ("[0, 1, 2]", "-x", "expected a number, found `x`", None, "x)"),
    ("[0, 1, 2]", "a=1, 2", "a positional argument stands behind a keyword", None, "2)"),
    ("[0, 1, 2]", "a=1, a=2", "the argument a is given twice", None, "a=2"),
    ("[0, 1, 2]", "?", "unexpected character '?'", None, "?"),
    ("[0, 1, 2]", '"\\x"', "is not a valid string", None, '"\\x"'),
    ("return (%total,)", "retrn (%total,)", "unknown statement `retrn`", "did you mean return?", "retrn"),
    ("return (%total,)\n", "", "expected a value such as %x, found the end of the text", None, None),
    ("return (%total,)", "return *[%total]", "expected a tuple", None, "[%total]"),
    ("return (%total,)", "return (%total,) @bckward", "unknown phase `bckward`", "did you mean backward?", "bckward"),
    ("return (%total,)", "return (%total,) %x", "expected the end of the line", None, None),
    ("return (%total,)", "return (%total,)\nmore", "expected `graph` or the end of the text", None, "more"),
    ("return (%total,)", "return (%total,", "`(` is never closed", None, "(%total,"),
]


@pytest.mark.parametrize(("written", "instead", "reason", "hint", "at"), CASES, ids=[f"{c[1]!r}" for c in CASES])
def test_a_slip_is_located_and_explained(
    written: str, instead: str, reason: str, hint: str | None, at: str | None
) -> None:
    text = LINEAR.replace(written, instead, 1)
    assert text != LINEAR
    error = refusal(text)
    assert reason in error.reason
    assert hint is None or (error.hint is not None and hint in error.hint)
    assert at is None or (error.line, error.column) == position(text, at)
    assert f"line {error.line}, column {error.column}: " in str(error)


@pytest.mark.parametrize("text", ["", "\n\n", "hello", "autosp-ir x", "autosp-ir 1\nstage: forward"])
def test_what_is_no_program_is_refused(text: str) -> None:
    assert refusal(text).line >= 1


def test_every_truncation_is_refused_as_a_parse_error() -> None:
    last = len(EVERYTHING.rstrip())
    starts = [i for i in range(0, last, 7) if not is_whole(EVERYTHING[:i])]
    for cut in starts:
        refusal(EVERYTHING[:cut])


def is_whole(text: str) -> bool:
    _, returned, rest = text.partition("return (%quarter, [%mul, None])")
    return bool(returned) and rest.strip() in ("", "@backward")


def test_people_may_write_freely() -> None:
    program = parse(
        """
# a comment in front
autosp-ir 1
# and here
stage: forward

program(%x: f32[2, 6, 4] = input "x", %weight: f32[8, 4] = parameter "w" grad) -> ("y": output "y"):

    # a comment of several words is no origin
    %y: f32[2, 6, 8] = aten.linear(   # neither is this one
        %x,
        %weight,
    )   # model.py:3 layers.0
      # done
    return (%y,)"""
    )
    assert program.graph.value("y").producer.origin.module == "layers.0"
    assert [s.target for s in program.signature.inputs] == ["x", "w"]
    program.verify()


def test_text_without_the_optional_header_lines_has_none_of_their_facts() -> None:
    program = parse(LINEAR)
    assert isinstance(program, Program)
    assert (program.mesh, program.facts, program.info) == ({}, set(), {})
    assert structurally_equal(program, linear()) is None
