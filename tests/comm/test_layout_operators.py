"""Operators that change layouts or pass them on, one by one: every answer, every refusal, along both axes of a mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autosp_ir.errors import LayoutError
from autosp_ir.ir.graph import Value
from autosp_ir.ir.program import Stage
from autosp_ir.ir.types import INVARIANT, PARTIAL, REPLICATE, Placement, Shard, TensorType, TupleType
from autosp_ir.rewrite.builder import ProgramBuilder

SP, DP = "sp", "dp"
REFUSED = None


def builder(stage: Stage) -> ProgramBuilder:
    return ProgramBuilder(mesh={DP: 2, SP: 2}, stage=stage)


def value(b: ProgramBuilder, sp: Placement, dp: Placement = INVARIANT, shape: tuple[int, ...] = (4, 4, 8)) -> Value:
    return b.input(f"x{len(b.program.signature.inputs)}", shape, torch.float64, layout={SP: sp, DP: dp})


def layouts(made: Any, axis: str) -> list[Placement]:
    parts = made if isinstance(made, tuple) else (made,)
    kinds = [k for v in parts for k in (v.type.elements if isinstance(v.type, TupleType) else (v.type,))]
    return [k.layout[axis] for k in kinds if isinstance(k, TensorType)]


def asked(stage: Stage, op: str, sp: Placement, dp: Placement, *args: Any) -> dict[str, Placement] | None:
    b = builder(stage)
    x = value(b, sp, dp)
    try:
        made = b.call(op, (x, *args))
    except LayoutError:
        return REFUSED
    return {axis: layouts(made, axis)[0] for axis in (SP, DP)}


@pytest.mark.parametrize(
    ("op", "args", "sp", "dp", "expected"),
    [
        # Along its own axis an operator changes the layout, along another one it is local.
        ("shard", (1, SP, 2), INVARIANT, Shard(0), (Shard(1), Shard(0))),
        ("shard", (1, SP, 2), INVARIANT, Shard(1), REFUSED),
        ("shard", (1, SP, 2), INVARIANT, PARTIAL, (Shard(1), PARTIAL)),
        ("shard", (1, SP, 2), REPLICATE, INVARIANT, REFUSED),
        ("shard", (1, SP, 2), Shard(0), INVARIANT, REFUSED),
        ("shard", (-1, SP, 2), INVARIANT, REPLICATE, (Shard(2), REPLICATE)),
        ("invariant_to_replicate", (SP, 2), INVARIANT, Shard(1), (REPLICATE, Shard(1))),
        ("invariant_to_replicate", (SP, 2), INVARIANT, REPLICATE, (REPLICATE, REPLICATE)),
        ("invariant_to_replicate", (SP, 2), REPLICATE, INVARIANT, REFUSED),
        ("invariant_to_replicate", (SP, 2), PARTIAL, INVARIANT, REFUSED),
        ("all_gather", (1, SP, 2), Shard(1), Shard(0), (INVARIANT, Shard(0))),
        ("all_gather", (1, SP, 2, "replicate"), Shard(1), Shard(0), (REPLICATE, Shard(0))),
        ("all_gather", (1, SP, 2), Shard(1), PARTIAL, (INVARIANT, PARTIAL)),
        ("all_gather", (1, SP, 2), Shard(1), Shard(1), REFUSED),
        ("all_gather", (1, SP, 2), INVARIANT, INVARIANT, REFUSED),
        ("all_gather", (1, SP, 2), Shard(2), INVARIANT, REFUSED),
        ("reduce_scatter", (1, SP, 2), PARTIAL, Shard(0), (Shard(1), Shard(0))),
        ("reduce_scatter", (1, SP, 2), PARTIAL, Shard(1), REFUSED),
        ("reduce_scatter", (1, SP, 2), INVARIANT, INVARIANT, REFUSED),
        ("reduce_scatter", (1, SP, 2), Shard(1), INVARIANT, REFUSED),
        ("all_reduce", (SP, 2), PARTIAL, Shard(1), (INVARIANT, Shard(1))),
        ("all_reduce", (SP, 2), PARTIAL, PARTIAL, (INVARIANT, PARTIAL)),
        ("all_reduce", (SP, 2), REPLICATE, INVARIANT, REFUSED),
        ("all_reduce", (SP, 2), Shard(1), INVARIANT, REFUSED),
        ("all_to_all", (0, 1, SP, 2), Shard(1), Shard(2), (Shard(0), Shard(2))),
        ("all_to_all", (0, 1, SP, 2), Shard(1), Shard(0), REFUSED),
        ("all_to_all", (0, 1, SP, 2), Shard(1), Shard(1), REFUSED),
        ("all_to_all", (0, 1, SP, 2), Shard(0), INVARIANT, REFUSED),
        ("all_to_all", (0, 1, SP, 2), Shard(1, 2), INVARIANT, REFUSED),
        ("all_to_all", (0, 1, SP, 2), INVARIANT, INVARIANT, REFUSED),
        ("permute", ([1, 0], SP, 2), Shard(1), Shard(0), (Shard(1), Shard(0))),
    ],
)
def test_forward(
    op: str, args: tuple[Any, ...], sp: Placement, dp: Placement, expected: tuple[Placement, Placement] | None
) -> None:
    found = asked(Stage.FORWARD, f"autosp.{op}", sp, dp, *args)
    assert found == (None if expected is None else dict(zip((SP, DP), expected, strict=True)))


@pytest.mark.parametrize(
    ("op", "args", "sp", "expected"),
    [
        # Behind differentiation a whole value is stored as Invariant, and Replicate is as good.
        ("shard", (1, SP, 2), REPLICATE, Shard(1)),
        ("invariant_to_replicate", (SP, 2), INVARIANT, INVARIANT),
        ("invariant_to_replicate", (SP, 2), REPLICATE, INVARIANT),
        ("all_gather", (1, SP, 2, "replicate"), Shard(1), INVARIANT),
        ("shard", (1, SP, 2), PARTIAL, REFUSED),
    ],
)
def test_joint(op: str, args: tuple[Any, ...], sp: Placement, expected: Placement | None) -> None:
    found = asked(Stage.JOINT, f"autosp.{op}", sp, INVARIANT, *args)
    assert found == (None if expected is None else {SP: expected, DP: INVARIANT})


@pytest.mark.parametrize(("op", "args"), [("shard", (1,)), ("reduce_scatter", (1,)), ("all_to_all", (1, 0))])
def test_what_is_split_must_be_divided_by_the_ranks(op: str, args: tuple[int, ...]) -> None:
    placement = {"shard": INVARIANT, "reduce_scatter": PARTIAL, "all_to_all": Shard(0)}[op]
    b = builder(Stage.FORWARD)
    with pytest.raises(LayoutError, match=r"cannot be (split|cut)|not divisible|split"):
        b.call(f"autosp.{op}", (value(b, placement, shape=(4, 3, 8)), *args, SP, 2))


@pytest.mark.parametrize(
    ("op", "args", "sp", "dp", "expected"),
    [
        ("all_reduce", ("sum", SP), PARTIAL, Shard(1), (INVARIANT, Shard(1))),
        ("all_reduce", ("max", SP), PARTIAL, INVARIANT, REFUSED),
        ("all_reduce", ("sum", SP), Shard(1), INVARIANT, REFUSED),
        ("all_reduce", ("sum", SP), INVARIANT, INVARIANT, REFUSED),
        ("all_gather_into_tensor", (2, SP), Shard(1), Shard(2), (INVARIANT, Shard(2))),
        ("all_gather_into_tensor", (2, SP), Shard(1), Shard(0), REFUSED),
        ("all_gather_into_tensor", (2, SP), INVARIANT, INVARIANT, REFUSED),
        ("all_gather_into_tensor", (2, SP), PARTIAL, INVARIANT, REFUSED),
        ("reduce_scatter_tensor", ("sum", 2, SP), PARTIAL, Shard(1), (Shard(0), Shard(1))),
        ("reduce_scatter_tensor", ("sum", 2, SP), PARTIAL, Shard(0), REFUSED),
        ("reduce_scatter_tensor", ("max", 2, SP), PARTIAL, INVARIANT, REFUSED),
        ("reduce_scatter_tensor", ("sum", 2, SP), Shard(1), INVARIANT, REFUSED),
        ("all_to_all_single", ([2, 2], [2, 2], SP), Shard(1), Shard(2), (Shard(0, 2), Shard(2))),
        ("all_to_all_single", ([2, 2], [2, 2], SP), Shard(1), Shard(0), REFUSED),
        ("all_to_all_single", ([2, 2], [2, 2], SP), Shard(0, 2), INVARIANT, (Shard(0, 2), INVARIANT)),
        ("all_to_all_single", ([2, 2], [2, 2], SP), Shard(0), INVARIANT, REFUSED),
        ("all_to_all_single", ([2, 2], [2, 2], SP), PARTIAL, INVARIANT, REFUSED),
        ("all_to_all_single", ([2, 2], [1, 3], SP), Shard(1), INVARIANT, REFUSED),
        ("all_to_all_single", ([1, 3], [2, 2], SP), Shard(1), INVARIANT, REFUSED),
    ],
)
def test_lowered(
    op: str, args: tuple[Any, ...], sp: Placement, dp: Placement, expected: tuple[Placement, Placement] | None
) -> None:
    found = asked(Stage.LOWERED, f"_c10d_functional.{op}", sp, dp, *args)
    assert found == (None if expected is None else dict(zip((SP, DP), expected, strict=True)))


@pytest.mark.parametrize("placement", [INVARIANT, PARTIAL, Shard(0), Shard(1), Shard(2, 2)])
def test_chunks_keep_their_layout_and_give_it_back(placement: Placement) -> None:
    b = builder(Stage.JOINT)
    parts = b.call("autosp.chunk", (value(b, placement), 1, 2))
    assert layouts(parts, SP) == [placement, placement]
    assert layouts(b.call("autosp.unchunk", (list(parts), 1)), SP) == [placement]


@pytest.mark.parametrize(("dim", "refused"), [(0, False), (1, True), (-2, True), (2, False)])
def test_a_chunk_does_not_cut_blocks_apart(dim: int, refused: bool) -> None:
    b = builder(Stage.JOINT)
    blocks = value(b, Shard(1, 2))
    if not refused:
        assert layouts(b.call("autosp.chunk", (blocks, dim, 2)), SP) == [Shard(1, 2)] * 2
        assert layouts(b.call("autosp.unchunk", ([blocks, value(b, Shard(1, 2))], dim)), SP) == [Shard(1, 2)]
        return
    with pytest.raises(LayoutError, match="whole blocks"):
        b.call("autosp.chunk", (blocks, dim, 2))
    with pytest.raises(LayoutError, match="whole blocks"):
        b.call("autosp.unchunk", ([blocks, value(b, Shard(1, 2))], dim))


@pytest.mark.parametrize(
    "pair", [(Shard(1), INVARIANT), (INVARIANT, Shard(1)), (PARTIAL, INVARIANT), (Shard(1), Shard(2))]
)
def test_chunks_that_are_joined_are_placed_alike(pair: tuple[Placement, Placement]) -> None:
    b = builder(Stage.JOINT)
    with pytest.raises(LayoutError, match="placed differently"):
        b.call("autosp.unchunk", ([value(b, p) for p in pair], 0))


def test_whole_chunks_are_joined_to_a_whole() -> None:
    b = builder(Stage.JOINT)
    assert layouts(b.call("autosp.unchunk", ([value(b, INVARIANT), value(b, REPLICATE)], 0)), SP) == [INVARIANT]


def test_a_rank_s_own_index_has_no_layout_where_there_are_ranks() -> None:
    with pytest.raises(LayoutError, match="no layout"):
        builder(Stage.FORWARD).call("autosp.axis_index", (SP, 2))
    with pytest.raises(LayoutError, match="no layout"):
        ProgramBuilder(mesh={SP: 2}).call("autosp.axis_index", (SP, 2))
    alone = ProgramBuilder(mesh={SP: 1})
    assert layouts(alone.call("autosp.axis_index", (SP, 2)), SP) == [INVARIANT]
