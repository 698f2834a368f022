"""Heads x length x mask x accumulation x data groups, on simulated ranks in float64: exact, token by token.

The programs of a sample, which holds every pair of heads, length and kind of mask, run in each test run; the others
with `-m long`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from autosp_ir.ir.program import Program
from autosp_ir.pipeline import PassManager
from autosp_ir.sim.lockstep import Simulation, simulate
from autosp_ir.testing import DenseReference
from autosp_ir.testing.equivalence import compare_runs
from autosp_ir.testing.promote import promote, promote_batch
from tests.e2e import grid
from tests.e2e.line import partitioned

_OWN_PRECISION = 2e-5


def programs(sampled: bool) -> list[tuple[str, str, str]]:
    """Half of the combinations of heads, length and family: those of even index sums, or the others."""
    product = itertools.product(enumerate(grid.KV_HEADS), enumerate(grid.LENGTHS), enumerate(grid.FAMILIES))
    return [(h, n, f) for (i, h), (j, n), (k, f) in product if ((i + j + k) % 2 == 0) is sampled]


def total(program: Program, batches: Sequence[grid.Batch]) -> Simulation:
    """What a step over micro-batches gives: losses and gradients added up."""
    runs = [simulate(program, promote_batch(batch)) for batch in batches]
    return dataclasses.replace(
        runs[0],
        outputs=[
            {name: torch.stack([r.outputs[rank][name] for r in runs]).sum(0) for name in outputs}
            for rank, outputs in enumerate(runs[0].outputs)
        ],
        grads={name: torch.stack([r.grads[name] for r in runs]).sum(0) for name in runs[0].grads},
    )


def check_whole_batch(model: nn.Module, batches: Sequence[grid.Batch], found: Simulation) -> None:
    """Token-weighted micro-batches add up to the eager model's step on all of the data at once."""
    model.zero_grad()
    output = model(**grid.concatenated(batches))
    output["loss"].backward()
    assert abs(float(found.loss) - float(output["loss"].detach())) <= _OWN_PRECISION * abs(float(found.loss))
    largest = max(float(g.abs().max()) for g in found.grads.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert float((found.grads[name] - parameter.grad).abs().max()) <= _OWN_PRECISION * largest, name


def check_program(heads: str, length: str, family: str) -> None:
    """Every mask of a family in every cell, through one program."""
    size, ranks = grid.LENGTHS[length], grid.RANKS[length]
    masks = grid.FAMILIES[family]
    model = grid.model_of(heads, masks[0], size)
    reference = DenseReference.of(model, grid.weighted([grid.micro_batch(masks[-1], size, 0)])[0])
    reference.capture.check()
    dense = promote(PassManager("differentiate").run(reference.program, mesh={}).program)
    program = promote(partitioned(reference.program, ranks))
    for mask in masks:
        parts = [grid.micro_batch(mask, size, part) for part in range(4)]
        assert len({int(grid.valid([part])) for part in parts}) > 1
        for cell, members in grid.CELLS.items():
            batches = grid.weighted([parts[i] for i in members])
            expected = total(dense, batches)
            title = f"{heads}, {length} length, {mask}, {cell}, on {ranks} ranks"
            compare_runs(total(program, batches), expected, title=title).check()
        check_whole_batch(model, batches, expected)


@pytest.mark.parametrize(("heads", "length", "family"), programs(sampled=True))
def test_a_sample_of_the_grid_is_exact(heads: str, length: str, family: str) -> None:
    check_program(heads, length, family)


@pytest.mark.long
@pytest.mark.parametrize(("heads", "length", "family"), programs(sampled=False))
def test_the_rest_of_the_grid_is_exact(heads: str, length: str, family: str) -> None:
    check_program(heads, length, family)
