"""What is taken for constant along a dimension is: a slice of it is like any other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import autosp_ir as air
from autosp_ir.comm.rules.constants import constant, uniform
from autosp_ir.ir.graph import Value
from autosp_ir.sim.lockstep import simulate

Build = Callable[[air.ProgramBuilder], Value]


def _input(b: air.ProgramBuilder, *shape: int) -> Value:
    return b.input("_".join(("x", *map(str, shape))), shape, torch.float64)


def _row(b: air.ProgramBuilder) -> Value:
    """A row of four numbers, three times: constant along the first dimension."""
    value: Value = b.aten.expand(_input(b, 1, 4), [3, 4])
    return value


CASES: dict[str, tuple[Build, set[int]]] = {
    "an input": (lambda b: _input(b, 3, 4), set()),
    "zeros": (lambda b: b.aten.zeros([3, 4], dtype=torch.float64), {0, 1}),
    "a view of ones": (lambda b: b.aten.view(b.aten.ones([3, 4], dtype=torch.float64), [12]), {0}),
    "one number": (lambda b: _input(b, 1, 1), {0, 1}),
    "expanded": (_row, {0}),
    "expanded, in front": (lambda b: b.aten.expand(_input(b, 4), [3, 4]), {0}),
    "times its like": (lambda b: b.aten.mul.Tensor(_row(b), 2.0), {0}),
    "times a column": (lambda b: b.aten.mul.Tensor(_row(b), _input(b, 3, 1)), set()),
    "a row times a constant column": (
        lambda b: b.aten.mul.Tensor(_input(b, 4), b.aten.ones([3, 1], dtype=torch.float64)),
        {0},
    ),
    "two columns": (lambda b: b.aten.mul.Tensor(_input(b, 3, 1), b.aten.ones([1, 4], dtype=torch.float64)), {1}),
    "a batch of rows": (lambda b: b.aten.add.Tensor(_input(b, 2, 1, 4), _row(b)), {1}),
    "copied": (lambda b: b.aten.clone(_row(b)), {0}),
    "split behind": (lambda b: b.aten.view(_row(b), [3, 2, 2]), {0}),
    "split in front": (lambda b: b.aten.view(b.aten.expand(_input(b, 1, 4), [6, 4]), [2, 3, 4]), set()),
    "merged": (lambda b: b.aten.view(_row(b), [12]), set()),
    "merged in front of its like": (
        lambda b: b.aten.view(b.aten.expand(_input(b, 1, 3, 4), [4, 3, 4]), [12, 4]),
        set(),
    ),
    "merged behind a constant": (
        lambda b: b.aten.view(b.aten.expand(_input(b, 3, 4, 1), [3, 4, 4]), [12, 4]),
        {1},
    ),
    "with a dimension of one": (lambda b: b.aten.unsqueeze(_row(b), 0), {1}),
    "permuted": (lambda b: b.aten.permute(b.aten.expand(_input(b, 2, 1, 4), [2, 3, 4]), [1, 2, 0]), {0}),
    "permuted from behind": (lambda b: b.aten.permute(b.aten.expand(_input(b, 2, 1, 4), [2, 3, 4]), [-1, 0, -2]), {2}),
    "transposed": (lambda b: b.aten.transpose.int(b.aten.expand(_input(b, 2, 1, 4), [2, 3, 4]), -2, 0), {0}),
    "turned": (lambda b: b.aten.t(_row(b)), {1}),
    "summed": (lambda b: b.aten.sum.dim_IntList(_row(b), [1]), set()),
}


@pytest.mark.parametrize(("build", "dims"), CASES.values(), ids=CASES)
def test_constant_along_a_dimension(build: Build, dims: set[int]) -> None:
    b = air.ProgramBuilder(mesh={"sp": 1})
    value = build(b)
    b.output(out=value)
    program = b.build()
    assert {d for d in range(value.tensor_type.ndim) if uniform(value, d)} == dims
    batch = {
        n.name: torch.randn(n.result.tensor_type.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i, n in enumerate(program.graph.inputs)
    }
    found = simulate(program, batch).outputs[0]["out"]
    for d in dims:
        assert torch.equal(found, found.narrow(d, 0, 1).expand_as(found)), "it only is if it is in numbers"


BLOCKS: dict[str, tuple[Build, int, int, bool]] = {
    "repeated rows, merged behind": (lambda b: b.aten.view(_blocks(b), [6, 4]), 0, 2, True),
    "in other blocks": (lambda b: b.aten.view(_blocks(b), [6, 4]), 0, 3, False),
    "in one block": (lambda b: b.aten.view(_blocks(b), [6, 4]), 0, 1, False),
    "repeated blocks": (lambda b: b.aten.view(b.aten.expand(_input(b, 1, 2, 4), [3, 2, 4]), [6, 4]), 0, 3, False),
    "copied in between": (lambda b: b.aten.mul.Tensor(b.aten.view(b.aten.clone(_blocks(b)), [6, 4]), 2.0), 0, 2, True),
    "turned": (lambda b: b.aten.t(b.aten.view(_blocks(b), [6, 4])), 1, 2, True),
    "of three dimensions": (
        lambda b: b.aten.view(b.aten.expand(_input(b, 2, 2, 1, 4), [2, 2, 3, 4]), [12, 4]),
        0,
        4,
        True,
    ),
}


def _blocks(b: air.ProgramBuilder) -> Value:
    """Two rows of four numbers, each three times."""
    value: Value = b.aten.expand(_input(b, 2, 1, 4), [2, 3, 4])
    return value


@pytest.mark.parametrize(("build", "dim", "outer", "expected"), BLOCKS.values(), ids=BLOCKS)
def test_constant_in_each_block_of_a_dimension(build: Build, dim: int, outer: int, expected: bool) -> None:
    b = air.ProgramBuilder(mesh={"sp": 1})
    value = build(b)
    b.output(out=value)
    assert uniform(value, dim, outer) == expected
    program = b.build()
    found = simulate(
        program, {n.name: torch.randn(n.result.tensor_type.shape, dtype=torch.float64) for n in program.graph.inputs}
    )
    blocks = found.outputs[0]["out"].unflatten(dim, (outer, -1))
    assert torch.equal(blocks, blocks.narrow(dim + 1, 0, 1).expand_as(blocks)) == expected


def test_the_number_of_a_constant() -> None:
    b = air.ProgramBuilder(mesh={"sp": 1})
    x = b.input("x", (3,), torch.float64)
    assert constant(b.aten.view(b.aten.ones([3, 4]), [12])) == 1
    assert constant(b.aten.full([3], 2.5)) == 2.5
    assert constant(b.aten.full([3], b.aten.item(b.aten.sum(x)))) is ...
    assert constant(x) is None
