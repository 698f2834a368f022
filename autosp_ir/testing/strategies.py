"""Hypothesis strategies for layouts, types and whole programs.

    @given(programs())
    def test_my_pass_keeps_every_program(program):
        check_pass("my-pass", before=program)

Needs the package `hypothesis`; `autosp_ir.testing` does not import this module by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st

from autosp_ir.ir.program import Program
from autosp_ir.ir.types import INVARIANT, PARTIAL, REPLICATE, Layout, Placement, Shard, TensorType
from autosp_ir.sim.fuzz import random_graph

_FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def placements(ndim: int, *, partial: bool = True) -> st.SearchStrategy[Placement]:
    """A placement of a value with `ndim` dimensions along one mesh axis.

    Args:
        ndim: Dimensions that may be cut.
        partial: Whether the value may be a sum over ranks.
    """
    whole = [INVARIANT, REPLICATE, *([PARTIAL] if partial else [])]
    return st.sampled_from([*whole, *map(Shard, range(ndim))])


def layouts(mesh: Mapping[str, int] | Sequence[str], ndim: int, *, partial: bool = True) -> st.SearchStrategy[Layout]:
    """A layout over the axes of a mesh, in which no two axes cut the same dimension.

    Args:
        mesh: Axis sizes, or axis names.
        ndim: Dimensions of the value.
        partial: Whether the value may be a sum over ranks.
    """
    each = st.fixed_dictionaries({axis: placements(ndim, partial=partial) for axis in mesh})
    return each.filter(_cuts_apart).map(Layout)


def _cuts_apart(layout: Mapping[str, Placement]) -> bool:
    cut = [p.dim for p in layout.values() if isinstance(p, Shard)]
    return len(cut) == len(set(cut))


@st.composite
def tensor_types(
    draw: st.DrawFn,
    mesh: Mapping[str, int] | None = None,
    *,
    min_dims: int = 0,
    max_dims: int = 4,
    dtypes: Sequence[torch.dtype] = _FLOATS,
) -> TensorType:
    """A tensor type with a small shape, and a layout when there is a mesh; shapes are those of one rank.

    Args:
        draw: Given by hypothesis.
        mesh: Axis sizes; None for one device.
        min_dims: Fewest dimensions.
        max_dims: Most dimensions.
        dtypes: To choose from.
    """
    shape = draw(st.lists(st.integers(1, 8), min_size=min_dims, max_size=max_dims))
    layout = draw(layouts(mesh, len(shape))) if mesh else Layout()
    return TensorType(tuple(shape), draw(st.sampled_from(dtypes)), torch.device("cpu"), layout)


def programs(*, min_nodes: int = 4, max_nodes: int = 40) -> st.SearchStrategy[Program]:
    """A valid forward program for one rank, over a few dozen ATen operations; it shrinks to few nodes.

    Args:
        min_nodes: About how many operations it has at least.
        max_nodes: About how many it has at most.
    """
    return st.builds(random_graph, st.integers(0, 2**20), st.integers(min_nodes, max_nodes))


__all__ = ["layouts", "placements", "programs", "tensor_types"]
