"""Are layouts numerically true? Every value of a simulated run, put together as its layout says, against one rank.

A layout is a claim about numbers: the slices of a Shard make up the whole value, the terms of a Partial sum to it,
and a whole value is the same everywhere. The oracle is the same program for one rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autosp_ir.comm.layout import Outcome
from autosp_ir.comm.rules.base import stored_placement
from autosp_ir.errors import LayoutError, SimulationError
from autosp_ir.ir.graph import Node
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import Partial, Placement, Shard
from autosp_ir.sim.binding import Batch
from autosp_ir.sim.lockstep import simulate


@dataclass
class TruthReport:
    """What was compared.

    Attributes:
        compared: Names of values whose layout is true.
        unmatched: Names of values that the oracle does not have, such as those of expanded collectives.
        reshaped: Names of values whose counterpart has another whole shape; empty unless that was allowed.
    """

    compared: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)


def split(value: Tensor, placement: Placement, size: int) -> list[Tensor]:
    """What each of `size` ranks holds of a whole value.

    Args:
        value: The whole value.
        placement: Its placement; the terms of a Partial are random numbers (integers for integer values).
        size: Number of ranks.

    Raises:
        LayoutError: The cut does not divide the value.
    """
    if isinstance(placement, Shard):
        opened = _opened(value, placement)
        if opened.shape[placement.dim + 1] % size:
            raise LayoutError(
                f"{list(value.shape)} cannot be cut along {placement} over {size} ranks",
                hint="cut a dimension whose extent behind the outer factor is a multiple of the ranks",
            )
        parts = opened.chunk(size, placement.dim + 1)
        return [p.flatten(placement.dim, placement.dim + 1).contiguous() for p in parts]
    if isinstance(placement, Partial):
        terms = [_noise(value) for _ in range(size - 1)]
        return [*terms, value - sum(terms, torch.zeros_like(value))]
    return [value.clone() for _ in range(size)]


def assemble(parts: Sequence[Tensor], placement: Placement) -> Tensor:
    """The whole value that the ranks hold together; the inverse of `split`.

    Raises:
        SimulationError: The value is whole on every rank, but the ranks differ.
    """
    if isinstance(placement, Shard):
        opened = [_opened(p, placement) for p in parts]
        return torch.cat(opened, placement.dim + 1).flatten(placement.dim, placement.dim + 1)
    if isinstance(placement, Partial):
        return torch.stack(list(parts)).sum(0, dtype=parts[0].dtype)
    for rank, part in enumerate(parts[1:], start=1):
        if not close(part, parts[0]):
            raise SimulationError(
                f"the value is whole but ranks 0 and {rank} hold different ones",
                hint="a reduction is missing, or a layout rule is wrong",
            )
    return parts[0]


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> bool:
    """Whether two tensors agree up to rounding, relative to the larger one's greatest element; NaN and inf alike."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_complex():
        return close(torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj()), tolerance)
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = other.isfinite()
    if not torch.equal(finite, one.isfinite()) or not torch.equal(_strange(one), _strange(other)):
        return False
    if not bool(finite.any()):
        return True
    scale = max(float(other[finite].abs().max()), float(one[finite].abs().max()), 1e-3)
    room = max(tolerance, 1e2 * torch.finfo(one.dtype).eps)
    return float((one[finite] - other[finite]).abs().max()) <= room * scale


def check_layout_truth(
    program: Program,
    oracle_program: Program,
    batch: Batch,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    tolerance: float = 1e-9,
    allow_reshaped: bool = False,
    gradients: bool = True,
) -> TruthReport:
    """Compare every value of a partitioned program with the one-rank program.

    Args:
        program: A program with layouts, for any mesh.
        oracle_program: The same pipeline run for one rank; values are matched by name or, where the node lists
            differ, in order by operation.
        batch: The full batch.
        tensors: Parameters and buffers in place of the bound ones.
        tolerance: Greatest difference relative to the value's greatest element, in float64.
        allow_reshaped: Report values whose whole shape differs instead of failing, for rewrites that depend on the
            number of ranks, such as replicated key and value heads.
        gradients: Differentiate a forward program first, and compare the values of its joint form.

    Returns:
        What was compared, and which values have no counterpart.

    Raises:
        SimulationError: A layout is not true; the message names the value.
    """
    many = simulate(program, batch, tensors=tensors, gradients=gradients, trace=True)
    one = simulate(oracle_program, batch, tensors=tensors, gradients=gradients, trace=True)
    counterparts = _aligned(many.program, one.program)
    report = TruthReport()
    sizes = dict(many.program.mesh)
    for node in many.program.graph.nodes:
        if not node.results or node.name not in many.values[0]:
            continue
        counterpart = counterparts.get(node.name)
        if counterpart is None or counterpart not in one.values[0]:
            report.unmatched.append(node.name)
            continue
        ranks = [values[node.name] for values in many.values]
        try:
            if _check_value(node, sizes, ranks, one.values[0][counterpart], tolerance):
                report.compared.append(node.name)
        except _ReshapedError:
            if not allow_reshaped:
                raise
            report.reshaped.append(node.name)
    return report


class _ReshapedError(SimulationError):
    """The whole shapes differ."""


def _aligned(program: Program, oracle: Program) -> dict[str, str]:
    """Each value's counterpart in the oracle, by name: made by the same operation."""
    mine, theirs = ([n for n in p.graph.nodes if n.results] for p in (program, oracle))
    if [(n.name, n.op.name) for n in mine] == [(n.name, n.op.name) for n in theirs]:
        # Of the same values, too: autograd differentiates a product in another order where extents are one.
        same: dict[str, str] = {}
        for a, b in zip(mine, theirs, strict=True):
            if [same.get(v.producer.name) for v in a.operands] == [v.producer.name for v in b.operands]:
                same[a.name] = b.name
        return same
    keys = [[(n.op.name, n.phase, n.origin.source, n.origin.module) for n in nodes] for nodes in (mine, theirs)]
    blocks = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks()
    return {mine[b.a + i].name: theirs[b.b + i].name for b in blocks for i in range(b.size)}


def _check_value(node: Node, sizes: Mapping[str, int], ranks: Sequence[Any], expected: Any, tolerance: float) -> bool:
    """Compare one value, tuples element by element; whether it holds any tensor."""
    outcomes = {axis: stored_placement(node.result, axis) for axis in sizes}
    if isinstance(expected, Tensor):
        _compare(node, sizes, outcomes, ranks, expected, tolerance)
        return True
    if not isinstance(expected, tuple | list):
        return False
    compared = False
    for index, element in enumerate(expected):
        if isinstance(element, Tensor):
            own = {a: o[index] if isinstance(o, tuple) else o for a, o in outcomes.items()}
            _compare(node, sizes, own, [r[index] for r in ranks], element, tolerance)
            compared = True
    return compared


def _compare(
    node: Node,
    sizes: Mapping[str, int],
    placements: Mapping[str, Outcome | None],
    ranks: Sequence[Tensor],
    expected: Tensor,
    tolerance: float,
) -> None:
    parts = list(ranks)
    try:
        # Ranks are numbered with the last axis fastest, so that axes are put together from the last.
        for axis, size in reversed(list(sizes.items())):
            placement = placements[axis]
            if isinstance(placement, Placement):
                parts = [assemble(parts[i : i + size], placement) for i in range(0, len(parts), size)]
    except SimulationError as error:
        raise SimulationError(f"%{node.name}: {error.reason}", node=node, hint=error.hint) from error
    whole = parts[0]
    if close(whole, expected, tolerance) or _same_constant(whole, expected):
        return
    reshaped = whole.shape != expected.shape
    difference = "its shape differs" if reshaped else f"off by {_distance(whole, expected):.3g}"
    raise (_ReshapedError if reshaped else SimulationError)(
        f"the layout of %{node.name} is not true: {list(whole.shape)} put together from {len(ranks)} ranks, "
        f"{list(expected.shape)} on one ({difference})",
        node=node,
        hint="the layout rule of this operation or of one above it is wrong",
    )


def _same_constant(value: Tensor, expected: Tensor) -> bool:
    """A constant may be whole in its local shape: any slice of it is like any other."""
    if not value.numel() or not expected.numel() or value.ndim != expected.ndim or value.dtype != expected.dtype:
        return False
    number = expected.flatten()[0]
    return bool((value == number).all()) and bool((expected == number).all())


def _opened(value: Tensor, shard: Shard) -> Tensor:
    opened: Tensor = value.unflatten(shard.dim, (int(shard.outer), -1))
    return opened


def _noise(value: Tensor) -> Tensor:
    if value.is_floating_point() or value.is_complex():
        return torch.randn_like(value)
    if value.dtype == torch.bool:
        raise LayoutError("a truth value is no sum", hint="give it another layout")
    return torch.randint_like(value, -3, 4)


def _strange(value: Tensor) -> Tensor:
    numbered: Tensor = value.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0)
    numbered[value.isfinite()] = 0.0
    return numbered


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())
