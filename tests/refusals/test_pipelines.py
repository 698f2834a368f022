"""Pipelines, programs and texts that cannot work are refused before anything of them runs."""

from __future__ import annotations

from typing import Any

import pytest

import autosp_ir as air
from tests.models import build
from tests.refusals.refusal import check_message, refused

_FORWARD = "canonicalize,pad-tokens,token-partition"


@pytest.fixture(scope="module")
def program() -> air.Program:
    model, batch = build("llama-gqa")
    return air.capture(model, batch)


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("canonicalize,ulysses,token-partition", ["ulysses", "token-partition", "put token-partition before ulysses"]),
        ("token-partition", ["canonical", "insert canonicalize before token-partition"]),
        ("canonicalize,token-partition,pad-tokens", ["pad-tokens", "token-partitioned", "put pad-tokens first"]),
        (f"{_FORWARD},ulysses,ulysses", ["ulysses", "attention-resolved"]),
        ("canonicalize,remat", ["remat", "joint", "differentiate"]),
        ("canonicalize,differentiate,token-partition", ["put token-partition before differentiate"]),
        (f"{_FORWARD},ulysses,differentiate,lower-comm,grad-sync", ["grad-sync", "put grad-sync before lower-comm"]),
    ],
)
def test_passes_in_an_order_that_cannot_work(program: air.Program, pipeline: str, words: list[str]) -> None:
    with refused(air.PipelineError, *words):
        air.PassManager(pipeline).run(program, mesh={"sp": 2})


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("canonicalise", ["canonicalise", "did you mean 'canonicalize'?"]),
        ("tokenpartition", ["tokenpartition", "did you mean 'token-partition'?"]),
        ("ulysses{fuze=qkv}", ["fuze", "did you mean 'fuse'?"]),
        ("ulysses{fuse=qvk}", ["qvk", "qkv"]),
        ("remat{policy=mincut}", ["mincut", "min-cut"]),
        ("zero", ["zero", "canonicalize"]),
    ],
)
def test_passes_and_options_that_do_not_exist(pipeline: str, words: list[str]) -> None:
    with refused(air.PipelineError, *words):
        air.PassManager(pipeline)


@pytest.mark.parametrize(("pipeline", "column"), [("ulysses{fuse=qkv", 17), ("canonicalize,,ulysses", 14)])
def test_pipeline_text_that_does_not_parse(pipeline: str, column: int) -> None:
    with refused(air.ParseError, "line 1", f"column {column}"):
        air.PassManager(pipeline)


def test_pass_that_does_not_exist_by_name() -> None:
    with refused(air.PipelineError, "ulises", "did you mean 'ulysses'?"):
        air.get_pass("ulises")


def test_attention_that_no_strategy_resolved(program: air.Program) -> None:
    partitioned = air.PassManager(_FORWARD).run(program, mesh={"sp": 2}).program
    with refused(air.UnsupportedError, "attention", "ulysses", source="modeling_llama.py"):
        partitioned.emit(backend="eager")
    with refused(air.UnsupportedError, "attention", "ulysses", source="modeling_llama.py"):
        air.simulate(partitioned, build("llama-gqa")[1])


def test_attention_unresolved_cannot_be_differentiated(program: air.Program) -> None:
    with pytest.raises(air.AutoSPError) as raised:
        air.PassManager(f"{_FORWARD},differentiate").run(program, mesh={"sp": 2})
    check_message(raised.value, type(raised.value), "attention", "ulysses")


def test_a_mesh_without_the_axis(program: air.Program) -> None:
    with refused(air.PassError, "sp", "dp"):
        air.PassManager(air.DEFAULT_PIPELINE).run(program, mesh={"dp": 2})
    with refused(air.PassError, "sp"):
        air.PassManager(air.DEFAULT_PIPELINE).run(program)
    with refused(air.PassError, "cp", "sp"):
        air.PassManager("canonicalize,token-partition{axis=cp}").run(program, mesh={"sp": 2})


@pytest.mark.parametrize("size", [0, -2, 2.5, "2", True])
def test_an_axis_size_that_is_none(program: air.Program, size: Any) -> None:
    with refused(air.PipelineError, "sp", repr(size)):
        air.PassManager(air.DEFAULT_PIPELINE).run(program, mesh={"sp": size})


def test_another_mesh_than_the_programs(program: air.Program) -> None:
    partitioned = air.PassManager(f"{_FORWARD},ulysses").run(program, mesh={"sp": 2}).program
    with refused(air.PipelineError, "sp=2", "sp=4"):
        air.PassManager("differentiate").run(partitioned, mesh={"sp": 4})


def test_a_length_that_nobody_padded() -> None:
    model, batch = build("llama-gqa", length=33)
    with refused(air.PassError, "33", "2 ranks", "pad-tokens"):
        air.PassManager("canonicalize,token-partition").run(air.capture(model, batch), mesh={"sp": 2})


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("aten.linear(", "aten.linaer(", ["aten.linaer", "did you mean 'aten.linear'?"]),
        ("= aten.", "aten.", ["expected"]),
        ("f32[", "f33[", ["f33", "did you mean f32?"]),
        ("stage: forward", "stage: forwards", ["forwards", "forward"]),
    ],
)
def test_malformed_text(program: air.Program, old: str, new: str, words: list[str]) -> None:
    text = str(program)
    broken = text.replace(old, new, 1)
    line = text[: text.index(old)].count("\n") + 1
    with refused(air.ParseError, f"line {line}, column ", *words):
        air.parse(broken)


def test_a_symbolic_length_that_nobody_padded() -> None:
    model, batch = build("llama-gqa")
    program = air.capture(model, batch, dynamic=True)
    with refused(air.PassError, "symbolic", "2 ranks", "pad-tokens"):
        air.PassManager("canonicalize,token-partition").run(program, mesh={"sp": 2})
    air.PassManager("canonicalize,token-partition").run(program, mesh={"sp": 1})


def test_text_that_is_cut_off(program: air.Program) -> None:
    lines = str(program).rstrip().splitlines()[:-3]
    with refused(air.ParseError, "line ", "column ", "expected", "end of the text"):
        air.parse("\n".join(lines))


def test_a_program_from_text_has_no_model_to_emit(program: air.Program) -> None:
    with refused(air.UnsupportedError, "not captured", "air.capture"):
        air.parse(str(program)).emit()
