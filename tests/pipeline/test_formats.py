"""Pipelines as text, TOML and JSON: each reads back to the same passes, and says what is wrong with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autosp_ir.errors import ParseError, PipelineError
from autosp_ir.pipeline import DEFAULT_PIPELINE, Pass, PassManager
from autosp_ir.pipeline.formats import from_data, from_json, from_toml, to_data, to_json, to_toml
from tests.pipeline.test_spec import REGISTRY, Policy, Wide
from tests.pipeline.toys import Cut, FoldRelu

SCALARS = st.integers() | st.floats(allow_nan=False) | st.text() | st.booleans()
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text(),
        "flag": st.booleans(),
        "chunk_count": st.integers(1, 10**12),
        "peak": st.floats(allow_nan=False),
        "mode": st.sampled_from(["one", "none", "3"]),
        "policy": st.sampled_from(Policy),
        "either": SCALARS.filter(lambda value: not isinstance(value, float)),
        "sizes": st.lists(st.integers()),
        "names": st.lists(st.text()).map(tuple),
        "mixed": st.lists(SCALARS),
        "kinds": st.frozensets(st.sampled_from(Policy)),
        "path": st.just(Path("a folder/é.toml")),
    },
)


@settings(max_examples=80, deadline=None)
@given(OPTIONS)
def test_every_format_reads_back_to_the_same_passes(options: dict[str, object]) -> None:
    passes: list[Pass] = [FoldRelu(), Wide(**options), Cut(axis="cp")]
    assert from_toml(to_toml(passes), REGISTRY) == passes
    assert from_json(to_json(passes), REGISTRY) == passes
    assert from_data(to_data(passes), REGISTRY) == passes


def test_the_default_pipeline_goes_through_every_format(tmp_path: Path) -> None:
    manager = PassManager(DEFAULT_PIPELINE.replace("ulysses", "ulysses{fuse=qkv}"))
    manager.to_toml(tmp_path / "pipeline.toml")
    manager.to_json(tmp_path / "pipeline.json")
    for read in (PassManager.from_toml(tmp_path / "pipeline.toml"), PassManager.from_json(tmp_path / "pipeline.json")):
        assert str(read) == str(manager)
    assert 'name = "ulysses"\noptions = { fuse = "qkv" }\n' in manager.to_toml()


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert to_data([Cut(), Wide(chunk_count=3)]) == {
        "passes": [{"name": "cut"}, {"name": "wide", "options": {"chunk-count": 3}}]
    }
    assert from_toml(to_toml([]), REGISTRY) == []


def test_pipeline_text_inside_a_document() -> None:
    assert from_toml('pipeline = "fold-relu,cut{axis=cp}"', REGISTRY) == [FoldRelu(), Cut(axis="cp")]


def test_numbers_that_are_no_json() -> None:
    assert from_toml(to_toml([Wide(peak=math.inf)]), REGISTRY) == [Wide(peak=math.inf)]


def test_toml_has_no_none() -> None:
    passes = [Wide(mixed=[1, None])]
    with pytest.raises(PipelineError, match="option of wide is None, which TOML cannot say"):
        to_toml(passes)
    assert from_json(to_json(passes), REGISTRY) == passes


@pytest.mark.parametrize(
    ("text", "line"),
    [('[[passes]]\nname = "cut\n', 2), ("[[passes]\n", 1), ('[[passes]]\nname = "cut"\noptions = { axis = \n', 3)],
)
def test_malformed_toml_says_where(text: str, line: int) -> None:
    with pytest.raises(ParseError, match="malformed TOML") as caught:
        from_toml(text, REGISTRY)
    assert caught.value.line == line


def test_malformed_json_says_where() -> None:
    with pytest.raises(ParseError, match="malformed JSON") as caught:
        from_json('{"passes": [\n  {"name": }]}', REGISTRY)
    assert (caught.value.line, caught.value.column) == (2, 12)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('[[passes]]\nname = "fold-rely"', "no pass is called 'fold-rely'", "did you mean 'fold-relu'?"),
        ('[[passes]]\nname = "cut"\noptions = { axes = "sp" }', "cut has no option 'axes'", "did you mean 'axis'?"),
        ('[[passes]]\nname = "cut"\noption = { axis = "sp" }', r"unknown key 'option'", "did you mean 'options'?"),
        ('[[pass]]\nname = "cut"', "unknown key 'pass'", "did you mean 'passes'?"),
        ('[[passes]]\noptions = { axis = "sp" }', "pass 1 of the document has no name", "name"),
        ('passes = ["cut"]', "pass 1 of the document has no name", "name"),
        ('[[passes]]\nname = "cut"\noptions = 3', "are not a table", "options"),
        ('passes = "cut"', "has no list of passes", "passes"),
        ("", "has no list of passes", "passes"),
        ('pipeline = "cut"\n[[passes]]\nname = "cut"', "one of two kinds", "passes"),
        ('[[passes]]\nname = "cut"\noptions = { mode = "odd" }', "option 'mode' of cut", "mode"),
        ('pipeline = "cut{"', "expected an option name", "pipelines like"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, hint: str) -> None:
    with pytest.raises((PipelineError, ParseError), match=message) as caught:
        from_toml(text, REGISTRY)
    assert hint in str(caught.value.hint)


def test_a_document_that_is_no_table() -> None:
    with pytest.raises(PipelineError, match="a pipeline document is a table, not list"):
        from_json("[]", REGISTRY)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(PipelineError, match=r"missing\.toml cannot be read"):
        PassManager.from_toml("missing.toml")
