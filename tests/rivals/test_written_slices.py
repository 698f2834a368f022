"""Tensors written slice by slice stay cut over tokens unless tokens are what the slices select; all are exact."""

from __future__ import annotations

import pytest

import autosp_ir as air
from tests.rivals.line import run_line
from tests.rivals.written_slices import ALONG_TOKENS, JOINED, WRITERS, build
from tests.sampling import sampled

_DIVISIBLE = ("heads_share_a_part", "every_second", "a_row_in_front")
"""Of a length that needs no padding."""


@pytest.mark.parametrize("name", sampled(WRITERS, 2))
def test_exact_and_gathered_only_along_tokens(name: str) -> None:
    line = run_line(*build(name, length=12 if name in _DIVISIBLE else 15), 4)
    assert (line.gathered == []) == (name not in ALONG_TOKENS), line.gathered
    if name not in ALONG_TOKENS:
        assert line.whole_products == []
        assert all(p == air.Shard(1) for p in line.attentions)


def scatters(program: air.Program) -> list[air.Node]:
    return [*program.find("aten.slice_scatter"), *program.find("aten.select_scatter")]


@pytest.mark.parametrize("name", [*sorted(JOINED), "every_second", "overlapping", "read_in_between"])
def test_slices_side_by_side_in_new_memory_are_a_concatenation(name: str) -> None:
    program = air.capture(*build(name))
    assert scatters(program)
    canonical = air.PassManager(["canonicalize"]).run(program, mesh={"sp": 2}).program
    assert (not scatters(canonical)) == (name in JOINED)
    assert bool(canonical.find("aten.cat")) == (name in JOINED | {"read_in_between"})


@pytest.mark.parametrize("name", ["heads_share_a_part", "every_second", "a_column", "numbers"])
def test_exact_as_a_compiler_sees_it(name: str) -> None:
    pipeline = air.DEFAULT_PIPELINE.replace("differentiate", "differentiate{decompose=true}")
    assert run_line(*build(name), 2, pipeline).gathered == []
