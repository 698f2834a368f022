"""The catalogue says what the passes say of themselves, and the committed page is up to date."""

from __future__ import annotations

import json
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import autosp_ir as air
from autosp_ir.pipeline.catalogue import catalogue, catalogue_json, catalogue_markdown
from autosp_ir.pipeline.registry import ENTRY_POINT_GROUP, Registry
from tests.pipeline.test_spec import Wide
from tests.pipeline.toys import Cut

PAGE = Path(__file__).parents[2] / "passes" / "README.md"


def test_the_page_is_up_to_date() -> None:
    made = catalogue_markdown(catalogue(package="autosp_passes"))
    hint = "run `autosp-ir passes --markdown --package autosp_passes --output passes/README.md`"
    assert PAGE.read_text() == made, hint


def test_an_entry_says_where_a_pass_may_stand() -> None:
    (entry,) = [e for e in catalogue() if e.name == "ulysses"]
    assert (entry.stages, entry.produces) == (["forward"], None)
    assert entry.requires == ["token-partitioned"]
    assert entry.provides == entry.conflicts == ["attention-resolved"]
    assert entry.summary.startswith("Insert the all-to-alls")
    fuse, axis = entry.options
    assert (fuse.name, fuse.type, fuse.default) == ("fuse", '"none" | "qkv"', '"none"')
    assert fuse.doc == "One collective for q, k and v (`qkv`), or three (`none`)."
    assert (axis.type, axis.default) == ("string | none", "null")


def test_every_built_in_option_is_documented() -> None:
    undocumented = [f"{e.name}.{o.name}" for e in catalogue(package="autosp_passes") for o in e.options if not o.doc]
    assert not undocumented


def test_options_of_every_kind() -> None:
    (entry,) = catalogue([Wide])
    types = {option.name: option.type for option in entry.options}
    assert types["chunk-count"] == "integer"
    assert types["policy"] == '"save-all" | "min-cut"'
    assert types["sizes"] == "list of integer"
    assert types["limit"] == "integer | none"
    assert {o.name: o.doc for o in entry.options}["chunk-count"] == "How many pieces."


def test_json_holds_the_schema_of_the_options() -> None:
    data = json.loads(catalogue_json(catalogue([Cut, Wide])))
    assert list(data) == ["cut", "wide"]
    assert data["cut"]["schema"] == Cut.Options.model_json_schema()
    assert air.get_pass("ulysses").Options.model_json_schema()["properties"]["fuse"]["description"]


def test_the_text_of_a_table_cell_does_not_end_it() -> None:
    assert '`"even" \\| "ragged"`' in catalogue_markdown(catalogue([Cut]))


def test_a_plugin_that_fails_to_import_is_named_once_in_a_warning() -> None:
    registry = Registry(lambda: [EntryPoint("gone", "a_module_that_is_not_there:Gone", ENTRY_POINT_GROUP)])
    registry.add(Cut)
    with pytest.warns(RuntimeWarning, match="the pass 'gone' cannot be loaded: a_module_that_is_not_there:Gone"):
        assert list(registry.loaded()) == ["cut"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(registry.loaded()) == ["cut"]
