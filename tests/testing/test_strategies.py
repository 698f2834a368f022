"""The hypothesis strategies make what they say, and enough of it."""

from __future__ import annotations

from hypothesis import find, given, settings
from hypothesis import strategies as st

from autosp_ir.ir.program import Program
from autosp_ir.ir.text import parse, structurally_equal
from autosp_ir.ir.types import Layout, Partial, Shard, TensorType
from autosp_ir.testing import check_pass
from autosp_ir.testing.strategies import layouts, placements, programs, tensor_types

FEW = settings(max_examples=25, deadline=None)
MESH = {"dp": 2, "sp": 4}


@given(layouts(MESH, 2))
def test_no_dimension_is_cut_twice(layout: Layout) -> None:
    cut = [p.dim for p in layout.values() if isinstance(p, Shard)]
    assert len(cut) == len(set(cut)) and all(0 <= dim < 2 for dim in cut)
    assert set(layout) <= set(MESH)


@given(st.integers(0, 3).flatmap(lambda n: placements(n, partial=False)))
def test_partial_is_left_out_on_request(placement: object) -> None:
    assert not isinstance(placement, Partial)


def test_every_kind_of_layout_is_found() -> None:
    find(layouts(["sp"], 3), lambda layout: layout.get("sp") == Shard(2))
    find(layouts(["dp", "sp"], 3), lambda layout: len(layout) == 2)
    find(layouts(["sp"], 3), lambda layout: isinstance(layout.get("sp"), Partial))


@given(tensor_types(MESH, min_dims=1, max_dims=3))
def test_types_read_back(kind: TensorType) -> None:
    assert 1 <= kind.ndim <= 3


@FEW
@given(programs(max_nodes=20))
def test_programs_are_valid_and_read_back(program: Program) -> None:
    program.verify()
    assert structurally_equal(program, parse(str(program))) is None


@settings(max_examples=5, deadline=None)
@given(programs(max_nodes=12))
def test_a_pass_can_be_checked_on_any_program(program: Program) -> None:
    check_pass("canonicalize", before=program)
