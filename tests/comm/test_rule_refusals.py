"""What rules refuse although numbers alone would not show it: the kernel fails first, or only some sizes are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch

from autosp_ir.comm.layout import infer_layout
from autosp_ir.comm.rules.base import quotient
from autosp_ir.errors import LayoutError
from autosp_ir.ir.graph import Value
from autosp_ir.ir.program import Stage
from autosp_ir.ir.types import INVARIANT, PARTIAL, Placement, Shard, TensorType
from autosp_ir.rewrite.builder import ProgramBuilder

SP = "sp"
I64, F64 = torch.int64, torch.float64


class T:
    """An operand: local shape, placement, dtype; `zeros` makes it by `aten.zeros`."""

    def __init__(
        self, shape: tuple[int, ...], placement: Placement = INVARIANT, dtype: torch.dtype = F64, zeros: bool = False
    ) -> None:
        self.shape, self.placement, self.dtype, self.zeros = shape, placement, dtype, zeros

    def __repr__(self) -> str:
        # Names of tests have to be the same in every process.
        return f"{list(self.shape)} {self.placement}{' zeros' if self.zeros else ''}"

    def build(self, b: ProgramBuilder) -> Value:
        """The operand's value."""
        if self.zeros:
            made: Value = b.call("aten.zeros", (list(self.shape),), {"dtype": self.dtype})
            return made
        return b.input(f"x{len(b.program.signature.inputs)}", self.shape, self.dtype, layout={SP: self.placement})


def placed(op: str, *args: Any, **kwargs: Any) -> Placement:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)

    def built(item: Any) -> Any:
        if isinstance(item, T):
            return item.build(b)
        return type(item)(map(built, item)) if isinstance(item, list | tuple) else item

    made = b.call(op, tuple(map(built, args)), kwargs)
    found: Placement = (made[0] if isinstance(made, tuple) else made).type.layout[SP]
    return found


IDS, CUT_IDS, SUMMED_IDS = T((4,), dtype=I64), T((4,), Shard(0), I64), T((4,), PARTIAL, I64)
INDEX, MASK = T((4, 4), dtype=I64), T((4, 4), dtype=torch.bool)


NORM_OF_CUT_FEATURES = (T((4, 4), Shard(1)), T((4, 4), Shard(1)), [4], T((4, 1)), T((4, 1)), T((4,)), T((4,)))


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("aten.embedding", (T((4, 4)), SUMMED_IDS)),
        ("aten.embedding", (T((4, 4), Shard(0)), IDS)),
        ("aten.embedding_dense_backward", (T((4, 4), Shard(0)), IDS, 8, -1, False)),
        ("aten.embedding_dense_backward", (T((4, 4), Shard(0)), CUT_IDS, 8, -1, True)),
        ("aten.one_hot", (SUMMED_IDS, 4)),
        ("aten.gather", (T((4, 4)), 0, T((4, 4), PARTIAL, I64))),
        ("aten.gather", (T((4, 4), PARTIAL), 0, T((4, 4), Shard(0), I64))),
        ("aten.gather", (T((4, 4), Shard(0)), 0, INDEX)),
        ("aten.gather", (T((4, 4), Shard(1)), 0, T((4, 2), Shard(1), I64))),
        ("aten.scatter_add", (T((4, 4), Shard(0)), 0, T((4, 4), Shard(0), I64), T((4, 4), Shard(0)))),
        ("aten.scatter_add", (T((4, 4)), 0, T((4, 4), Shard(0), I64), T((4, 4), Shard(0)))),
        ("aten.scatter_add", (T((4, 4), zeros=True), 0, INDEX, T((4, 4), Shard(0)))),
        ("aten.scatter_add", (T((4, 4), Shard(1)), 0, T((4, 2), Shard(1), I64), T((4, 2), Shard(1)))),
        ("aten.scatter_add", (T((4, 4), PARTIAL), 0, INDEX, T((4, 4)))),
        ("aten.scatter_add", (T((4, 4)), 0, INDEX, T((4, 4), PARTIAL))),
        ("aten.scatter_add", (T((4, 4), PARTIAL), 0, T((4, 4), Shard(0), I64), T((4, 4), PARTIAL))),
        ("aten.scatter.value", (T((4, 4), PARTIAL), 0, INDEX, 1.0)),
        ("aten.scatter.value", (T((4, 4), Shard(0)), 0, T((4, 4), Shard(0), I64), 1.0)),
        ("aten.index_add", (T((4, 4)), 0, CUT_IDS, T((4, 4), Shard(0)))),
        ("aten.index_add", (T((4, 4), zeros=True), 0, CUT_IDS, T((4, 4)))),
        ("aten.index_add", (T((4, 4), zeros=True), 0, CUT_IDS, T((4, 4), Shard(1)))),
        ("aten.index_add", (T((4, 4), zeros=True), 0, CUT_IDS, T((4, 4), Shard(0, 2)))),
        ("aten.index_add", (T((4, 4)), 0, CUT_IDS, T((4, 4)))),
        ("aten.index_add", (T((4, 4), Shard(0)), 0, IDS, T((4, 4), Shard(0)))),
        ("aten.index_add", (T((4, 4), PARTIAL), 0, IDS, T((4, 4)))),
        ("aten.index_select", (T((4, 4)), 0, SUMMED_IDS)),
        ("aten.index_select", (T((4, 4), Shard(1)), 0, CUT_IDS)),
        ("aten.index_select", (T((4, 4), Shard(0)), 0, IDS)),
        ("aten.index.Tensor", (T((4, 4), PARTIAL), [CUT_IDS])),
        ("aten.index.Tensor", (T((4, 4), Shard(0)), [IDS])),
        ("aten.index.Tensor", (T((4, 4), Shard(1)), [CUT_IDS])),
        ("aten.index.Tensor", (T((4, 4, 4)), [CUT_IDS, None, CUT_IDS])),
        ("aten.index_put", (T((4, 4), Shard(1)), [IDS], T((4, 4)), True)),
        ("aten.index_put", (T((4, 4)), [CUT_IDS], T((4, 4), Shard(0)), True)),
        ("aten.index_put", (T((4, 4), Shard(0)), [IDS], T((4, 4)), True)),
        # A cut mask is as long as a shard of what it indexes, which is whole.
        ("aten.index_put", (T((4, 4), zeros=True), [T((4,), Shard(0), torch.bool)], T((4, 4), Shard(0)), True)),
        # A mask of two dimensions indexes two, and the index behind it the third, which is cut.
        ("aten.index_put", (T((4, 4, 4, 4), Shard(2)), [MASK, IDS], T((4, 4, 4, 4), Shard(2)))),
        ("aten.slice_backward", (T((4, 2), Shard(0)), [8, 4], 1, 0, 2, 1)),
        ("aten.slice_backward", (T((4, 2), Shard(1)), [4, 4], 1, 0, 2, 1)),
        ("aten.select_backward", (T((4,), Shard(0)), [8, 4], 1, 0)),
        ("aten.cross_entropy_loss", (T((4, 4, 4), Shard(1)), T((4, 4), dtype=I64), None, 2)),
        ("aten.cross_entropy_loss", (T((4, 4, 4), Shard(1)), T((4, 4), Shard(1), I64), None, 2)),
        ("aten.cross_entropy_loss", (T((4, 4)), CUT_IDS, None, 2)),
        # The probabilities of the classes of one token.
        ("aten.cross_entropy_loss", (T((4,), Shard(0)), T((4,), Shard(0)), None, 2)),
        ("aten.cross_entropy_loss", (T((4, 4), Shard(0)), IDS, None, 2)),
        ("aten.cross_entropy_loss", (T((4, 4), Shard(0)), CUT_IDS, None, 1)),
        ("aten.cross_entropy_loss", (T((4, 4), Shard(0)), CUT_IDS, T((4,), Shard(0)), 2)),
        ("aten.cross_entropy_loss", (T((4, 4), PARTIAL), IDS, None, 2)),
        ("aten.nll_loss_backward", (T((4,), Shard(0)), T((4, 4)), IDS, None, 0, -100, T(()))),
        ("aten.nll_loss_backward", (T((), PARTIAL), T((4, 4), Shard(0)), CUT_IDS, None, 2, -100, T(()))),
        # As long as a shard, but not the same everywhere: no rank's part of it is known.
        ("aten.mm", (T((4, 4), Shard(1)), T((4, 4)))),
        ("aten.index_add", (T((4, 4), Shard(1)), 0, IDS, T((4, 4)))),
        ("aten.addmm", (T((4,), Shard(0)), T((4, 4), Shard(0)), T((4, 4)))),
        ("aten.addmm", (T((4, 4)), T((4, 4), Shard(0)), T((4, 4)))),
        ("aten.addmm", (T((4,)), T((4, 4), Shard(1)), T((4, 4), Shard(0)))),
        ("aten.layer_norm", (T((4, 4), Shard(0)), [4], T((4,), Shard(0)))),
        ("aten.layer_norm", (T((4, 4), Shard(1)), [4])),
        ("aten.native_layer_norm_backward", (*NORM_OF_CUT_FEATURES, [True, True, True])),
        # The mask has no layout before canonicalize makes it a value.
        ("aten.dropout", (T((4, 4)), 0.5, True)),
        ("aten.dropout", (T((4, 4), Shard(0)), 0.5, True)),
        ("aten.dropout", (T((4, 4), PARTIAL), 0.5, True)),
        ("aten.diff", (T((4, 4), Shard(1)), 1, 0, T((1, 4)))),
        ("aten.diff", (T((4, 4), Shard(0)), 1, 0)),
        ("aten.cat", ([T((4, 4), Shard(0)), T((4, 4))], 1)),
        ("aten.cat", ([T((4, 4), PARTIAL), T((4, 4))], 1)),
        ("aten.slice.Tensor", (T((4, 4), Shard(0)), 0, 0, 4)),
        ("aten.slice.Tensor", (T((4, 4), Shard(0)), 0, 1, None)),
        ("aten.masked_fill.Scalar", (T((4, 4), PARTIAL), T((4, 4), Shard(0), torch.bool), 0)),
        ("aten.view", (T((1, 1, 4), Shard(1)), [1, 4])),
        ("aten.einsum", ("ab,bc,cd->ad", [T((4, 4), Shard(0)), T((4, 4)), T((4, 4))])),
        ("aten.einsum", ("ab,bc", [T((4, 4), Shard(0)), T((4, 4))])),
        ("aten.einsum", ("aa,bc->abc", [T((4, 4), Shard(0)), T((4, 4))])),
        ("aten.addmm", (T((4,)), T((4, 4)), T((4, 4), Shard(1)))),
        ("aten.repeat", (T((4, 4), Shard(0)), [2, 1])),
        ("aten.view_as_complex", (T((4, 2), Shard(1)),)),
    ],
    ids=str,
)
def test_refused(op: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(LayoutError):
        placed(op, *args)


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        ("aten.one_hot", (CUT_IDS, 4), Shard(0)),
        ("aten.view", (T((2, 3, 1, 4), Shard(2)), [6, 1, 4]), Shard(1)),
        ("aten.view", (T((2, 3, 2, 4), Shard(2, 2)), [6, 2, 4]), Shard(1, 2)),
        ("aten.cross_entropy_loss", (T((2, 4, 4), Shard(2)), T((2, 4, 4), Shard(2)), None, 2), PARTIAL),
        ("aten.unflatten.int", (T((2, 4, 6), Shard(2)), 1, [2, 2]), Shard(3)),
        ("aten.unflatten.int", (T((2, 4, 6), Shard(2, 3)), 1, [2, 2]), Shard(3, 3)),
        ("aten.unflatten.int", (T((2, 4, 6), Shard(0)), 1, [2, 2]), Shard(0)),
        ("aten.unflatten.int", (T((2, 4, 6), Shard(1)), 1, [2, 2]), Shard(1)),
        ("aten.unflatten.int", (T((2, 4, 6), Shard(1, 2)), 1, [2, 2]), Shard(2)),
        ("aten.unflatten.int", (T((2, 8, 2), Shard(1, 4)), 1, [2, 4]), Shard(2, 2)),
        ("aten.unbind.int", (T((2, 4), Shard(1)), 0), Shard(0)),
        ("aten.flatten.using_ints", (T((2, 2, 2, 4), Shard(3)), 1, 2), Shard(2)),
        ("aten.tile", (T((4, 4), Shard(0)), [2]), Shard(0)),
        ("aten.addmm", (T((4,), zeros=True), T((4, 4)), T((4, 4), Shard(1))), Shard(1)),
        ("_c10d_functional.all_to_all_single", (T((2,), Shard(0, 2)), [1, 1], [1, 1], SP), Shard(0, 2)),
        ("aten.unbind.int", (T((2, 4), Shard(0)), 1), Shard(0)),
        ("aten.mm", (T((4, 4), Shard(1)), T((4, 4), zeros=True)), PARTIAL),
        ("aten.index_add", (T((4, 4), Shard(1)), 0, IDS, T((4, 4), zeros=True)), Shard(1)),
        ("aten.index_add", (T((4, 4), zeros=True), 0, CUT_IDS, T((4, 4), Shard(0))), PARTIAL),
        ("aten.index_add", (T((4, 4), zeros=True), 1, CUT_IDS, T((4, 4), Shard(1))), PARTIAL),
        ("aten.addmm", (T((4, 4), zeros=True), T((4, 4), Shard(0)), T((4, 4))), Shard(0)),
        ("aten.cat", ([T((4, 4), Shard(0)), T((4, 4), zeros=True)], 1), Shard(0)),
        ("aten.cat", ([T((0,)), T((0,))], 0), INVARIANT),
        ("aten.sum_to_size", (T((4, 4), Shard(0)), [1, 4]), PARTIAL),
        ("aten.sum_to_size", (T((4, 4), Shard(0)), [4]), PARTIAL),
        ("aten.sum_to_size", (T((4, 4), Shard(1)), [4]), Shard(0)),
        ("aten.dropout", (T((4, 4), Shard(0)), 0.5, False), Shard(0)),
        ("aten.dropout", (T((4, 4), Shard(1)), 0.0, True), Shard(1)),
        ("aten.slice.Tensor", (T((4, 4), Shard(0)), 0, 0, None), Shard(0)),
        ("aten.index.Tensor", (T((4, 4), PARTIAL), [IDS]), PARTIAL),
        ("aten.index.Tensor", (T((4, 4), Shard(1)), [IDS]), Shard(1)),
        ("aten.index.Tensor", (T((4, 4)), [CUT_IDS]), Shard(0)),
        ("aten.index.Tensor", (T((2, 4, 4)), [None, CUT_IDS]), Shard(1)),
        ("aten.index_put", (T((4, 4), Shard(1)), [IDS], T((4, 4), Shard(1)), True), Shard(1)),
        ("aten.index_put", (T((4, 4), zeros=True), [CUT_IDS], T((4, 4), Shard(0)), True), PARTIAL),
        ("aten.slice_backward", (T((4, 2), Shard(0)), [4, 4], 1, 0, 2, 1), Shard(0)),
        ("aten.select_backward", (T((4,), Shard(0)), [4, 4], 1, 0), Shard(0)),
        ("aten.select_backward", (T((4,), Shard(0)), [4, 4], 0, 0), Shard(1)),
        ("aten.nll_loss_backward", (T((4,), Shard(0)), T((4, 4), Shard(0)), CUT_IDS, None, 0, -100, T(())), Shard(0)),
        ("aten.nll_loss_backward", (T(()), T((4, 4), Shard(0)), CUT_IDS, None, 2, -100, T(())), Shard(0)),
        (
            "aten.nll_loss2d_backward",
            (
                *(T((2, 2, 4), Shard(2)), T((2, 4, 2, 4), Shard(3)), T((2, 2, 4), Shard(2), I64)),
                *(None, 0, -100, T(())),
            ),
            Shard(3),
        ),
    ],
    ids=str,
)
def test_accepted(op: str, args: tuple[Any, ...], expected: Placement) -> None:
    assert placed(op, *args) == expected


def test_numbers_that_measure_a_shard_make_no_values() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (4, 6), F64, layout={SP: Shard(0)})
    own, whole = b.call("aten.sym_size.int", (x, 0)), b.call("aten.sym_size.int", (x, 1))
    with pytest.raises(LayoutError, match="measures a sharded dimension"):
        b.call("aten.full", ([4], own), {"dtype": F64})
    # Nor a shard: the whole model's value is full of another number.
    filled = b.program.graph.create("aten.full", ([4], own), {"dtype": F64}, type=TensorType((4,), F64))
    with pytest.raises(LayoutError, match="the fill value measures"):
        infer_layout(filled, b.program, SP, hint=Shard(0))
    with pytest.raises(LayoutError, match="one rank's length"):
        b.call("aten.arange", (own,), {"dtype": I64})
    assert b.call("aten.full", ([4], whole), {"dtype": F64}).type.layout[SP] == INVARIANT
    assert b.call("aten.arange", (whole,), {"dtype": I64}).type.layout[SP] == INVARIANT


@pytest.mark.parametrize(
    "length",
    [
        lambda b, own, other: own,
        lambda b, own, other: b.call("operator.mul", (own, 3)),
        lambda b, own, other: b.call("operator.mul", (other, own)),
        lambda b, own, other: b.call("operator.add", (own, own)),
        lambda b, own, other: b.call("operator.floordiv", (b.call("operator.mul", (own, 6)), 3)),
    ],
)
def test_lengths_of_a_shard_are_parts_of_the_whole_length(length: Any) -> None:
    b, own, other = _measured()
    made = b.program.graph.create(
        "aten.ones", ([length(b, own, other), 3],), {"dtype": F64}, type=TensorType((4, 3), F64)
    )
    assert infer_layout(made, b.program, SP, hint=Shard(0)) == Shard(0)
    with pytest.raises(LayoutError, match="measures a sharded dimension"):
        infer_layout(made, b.program, SP)


@pytest.mark.parametrize(
    "length",
    [
        lambda b, own, other: b.call("operator.add", (own, 1)),
        lambda b, own, other: b.call("operator.sub", (other, own)),
        lambda b, own, other: b.call("operator.mul", (own, own)),
        lambda b, own, other: b.call("operator.mul", (b.call("operator.add", (own, 1)), 2)),
        lambda b, own, other: b.call("operator.add", (own, b.call("operator.add", (own, 1)))),
        lambda b, own, other: b.call("operator.floordiv", (own, 3)),
        lambda b, own, other: b.call("operator.floordiv", (other, own)),
        lambda b, own, other: b.call("operator.mod", (own, 3)),
    ],
)
def test_other_numbers_made_of_one_ranks_length_are_no_length_of_a_shard(length: Any) -> None:
    b, own, other = _measured()
    made = b.program.graph.create(
        "aten.ones", ([length(b, own, other), 3],), {"dtype": F64}, type=TensorType((4, 3), F64)
    )
    for hint in (Shard(0), Shard(1), None):
        with pytest.raises(LayoutError, match="measures a sharded dimension"):
            infer_layout(made, b.program, SP, hint=hint)


@pytest.mark.parametrize("measure", [("aten.sym_numel",), ("aten.sym_stride.int", 0)])
def test_counts_and_strides_of_a_shard_are_one_ranks_numbers(measure: tuple[Any, ...]) -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (4, 6), F64, layout={SP: Shard(1)})
    number = b.call(measure[0], (x, *measure[1:]))
    with pytest.raises(LayoutError, match="measures a sharded dimension"):
        b.call("aten.ones", ([number],), {"dtype": F64})
    assert b.call("aten.ones", ([b.call("aten.sym_stride.int", (x, 1))],), {"dtype": F64}).type.layout[SP] == INVARIANT


def _measured() -> tuple[ProgramBuilder, Value, Value]:
    """A builder, the length of a shard, and the length along another dimension of it."""
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (4, 6), F64, layout={SP: Shard(0)})
    return b, b.call("aten.sym_size.int", (x, 0)), b.call("aten.sym_size.int", (x, 1))


def test_a_hypothetical_placement_stands_in_for_the_stored_one() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (4, 6), F64)
    made = b.aten.silu(x).producer
    assert infer_layout(made, b.program, SP) == INVARIANT
    assert infer_layout(made, b.program, SP, placements={x: Shard(1)}) == Shard(1)


def test_a_hypothetical_cut_is_of_the_whole_length() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (4, 8), F64)
    every, half = (b.aten.slice.Tensor(x, 1, 0, end).producer for end in (8, 4))
    assert infer_layout(every, b.program, SP, placements={x: Shard(1)}) == Shard(1)
    with pytest.raises(LayoutError, match="a slice along dimension 1"):
        infer_layout(half, b.program, SP, placements={x: Shard(1)})


def test_a_hint_chooses_where_the_ranks_stand_in_a_split_dimension() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (2, 4, 6), F64, layout={SP: Shard(1, 2)})
    made = b.call("aten.unflatten.int", (x, 1, [2, 2])).producer
    assert infer_layout(made, b.program, SP, hint=Shard(1, 2)) == Shard(1, 2)
    assert infer_layout(made, b.program, SP, hint=Shard(2)) == Shard(2)


def test_a_partial_sum_divided_by_itself_is_no_partial_sum() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (4, 4), F64, layout={SP: PARTIAL})
    with pytest.raises(LayoutError, match="read twice"):
        b.aten.div.Tensor(x, x)


def test_a_number_that_measures_a_shard_meets_no_whole_value() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x, w = b.input("x", (4, 6), F64, layout={SP: Shard(0)}), b.input("w", (6,), F64)
    own = b.call("aten.sym_size.int", (x, 0))
    for call in (("aten.add.Tensor", (x, w), {"alpha": own}), ("aten.mul.Tensor", (w, own))):
        with pytest.raises(LayoutError, match="measures a sharded dimension"):
            b.call(*call)
    assert b.call("aten.mul.Tensor", (w, b.call("aten.sym_size.int", (x, 1)))).type.layout[SP] == INVARIANT


def test_a_number_that_measures_a_shard_bounds_no_slice() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x, table = b.input("x", (4, 6), F64, layout={SP: Shard(0)}), b.input("table", (8, 8), F64)
    own, other = b.call("aten.sym_size.int", (x, 0)), b.call("aten.sym_size.int", (x, 1))
    columns = b.input("columns", (8, 4), F64, layout={SP: Shard(1)})
    for value in (table, columns):
        for op in ("aten.slice.Tensor", "aten.narrow"):
            with pytest.raises(LayoutError, match="measures a sharded dimension"):
                b.call(op, (value, 0, 0, own))
    assert b.aten.slice.Tensor(table, 0, 0, other).type.layout[SP] == INVARIANT
    assert b.aten.narrow(table, 0, 0, other).type.layout[SP] == INVARIANT


@pytest.mark.parametrize("call", ["expand", "ones", "view", "repeat"])
def test_a_value_as_long_as_a_shard_is_no_whole_value(call: str) -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x, w = b.input("x", (4, 6), F64, layout={SP: Shard(0)}), b.input("w", (), F64)
    own, other = b.call("aten.sym_size.int", (x, 0)), b.call("aten.sym_size.int", (x, 1))

    def made(length: Value) -> Value:
        if call == "ones":
            ones: Value = b.aten.ones([length], dtype=F64)
            return ones
        source = b.input("rows", (2, 12), F64) if call == "view" else w
        shaped: Value = b.call(f"aten.{call}", (source, [length, -1] if call == "view" else [length]))
        return shaped

    with pytest.raises(LayoutError, match="measures a sharded dimension, and the result is not cut"):
        made(own)
    assert made(other).tensor_type.layout[SP] == INVARIANT
    if call in ("expand", "ones"):
        # Any part of it is like any other, so that it may be made as the shard of a value that is the same everywhere.
        shard = b.program.graph.create(
            f"aten.{call}", ([own],) if call == "ones" else (w, [own]), type=TensorType((4,), F64)
        )
        assert infer_layout(shard, b.program, SP, hint=Shard(0)) == Shard(0)


def test_two_operands_cut_differently_in_one_einsum_are_refused() -> None:
    with pytest.raises(LayoutError):
        placed("aten.einsum", "ab,bc->ac", [T((4, 4), Shard(0)), T((4, 4), Shard(1))])


def test_a_mask_of_two_dimensions_looks_up_in_two() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x, ids = T((4, 4, 4, 4), Shard(2)).build(b), IDS.build(b)
    found = b.program.graph.create("aten.index.Tensor", (x, [MASK.build(b), ids]), type=TensorType((4, 4), F64))
    with pytest.raises(LayoutError, match="only adjacent integer indices"):
        infer_layout(found, b.program, SP)


def test_what_is_made_of_zeros_need_not_be_zero() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    terms, zeros = T((4, 4), PARTIAL).build(b), b.aten.zeros([16], dtype=F64)
    assert b.aten.add.Tensor(terms, b.aten.view(zeros, [4, 4])).type.layout[SP] == PARTIAL
    with pytest.raises(LayoutError, match="every rank would add again"):
        b.aten.add.Tensor(terms, b.aten.view(b.aten.cos(zeros), [4, 4]))


@pytest.mark.parametrize("placement", [Shard(0), PARTIAL])
def test_dropout_on_one_rank_is_of_whole_values(placement: Placement) -> None:
    b = ProgramBuilder(mesh={SP: 1}, stage=Stage.JOINT)
    assert b.aten.dropout(T((4, 4)).build(b), 0.5, True).type.layout[SP] == INVARIANT
    with pytest.raises(LayoutError, match="draws other numbers on a shard"):
        b.aten.dropout(T((4, 4), placement).build(b), 0.5, True)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        # No kernel runs these, and no rule relies on that.
        ("aten.embedding_dense_backward", (T((8, 4), zeros=True), CUT_IDS, 8, -1, False)),
        ("aten.embedding_dense_backward", (T((), zeros=True), CUT_IDS, 8, -1, False)),
        ("aten.index_add", (T((4, 4), Shard(1)), 0, IDS, T((4, 8), zeros=True))),
        ("aten.index_add", (T((4, 4), Shard(1)), 0, IDS, T((4,), zeros=True))),
        ("autosp.shard", (T((3, 4)), 0, SP, 2)),
        ("autosp.shard", (T(()), 0, SP, 2)),
        ("autosp.reduce_scatter", (T((4, 3), PARTIAL), 1, SP, 2)),
        ("autosp.all_to_all", (T((4, 3), Shard(0)), 1, 0, SP, 2)),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused_by_the_rule_too(op: str, args: tuple[Any, ...]) -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    made = b.program.graph.create(op, tuple(a.build(b) if isinstance(a, T) else a for a in args))
    with pytest.raises(LayoutError):
        infer_layout(made, b.program, SP)


def test_the_gradient_of_a_slice_of_a_length_that_is_a_value() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    columns = b.call("aten.sym_size.int", (b.input("w", (4, 6), F64), 1))
    sliced = T((4, 2), Shard(0)).build(b)
    assert b.call("aten.slice_backward", (sliced, [4, columns], 1, 0, 2, 1)).type.layout[SP] == Shard(0)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("repeat_interleave.self_int", lambda own: (own, 1)),
        ("constant_pad_nd", lambda own: ([0, own],)),
        ("topk", lambda own: (own, 1)),
        ("roll", lambda own: ([own], [1])),
        ("repeat", lambda own: ([1, own],)),
        ("split.Tensor", lambda own: (own, 1)),
        ("select.int", lambda own: (1, own)),
        ("view", lambda own: ([4, own, 4],)),
        ("unflatten.int", lambda own: (1, [own, 4])),
    ],
)
def test_a_number_that_measures_a_shard_is_a_length_of_what_is_cut_and_nothing_else(
    op: str, args: Callable[[Value], tuple[Any, ...]]
) -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = T((4, 16), Shard(0)).build(b)
    own = b.call("aten.sym_size.int", (x, 0))
    with pytest.raises(LayoutError, match="measures a sharded dimension and is not the length"):
        b.call(f"aten.{op}", (x, *args(own)))


def test_what_is_made_with_a_shard_s_length_is_cut_in_one_dimension() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = T((4, 4), Shard(0)).build(b)
    own, other = (b.call("aten.sym_size.int", (x, d)) for d in range(2))
    for sizes, dim in (([own, other], 0), ([other, own], 1)):
        made = b.program.graph.create("aten.new_ones", (x, sizes), type=TensorType((4, 4), F64))
        assert infer_layout(made, b.program, SP, hint=Shard(dim)) == Shard(dim)
        with pytest.raises(LayoutError, match="is not the length"):
            infer_layout(made, b.program, SP, hint=Shard(1 - dim))
    square = b.program.graph.create("aten.new_ones", (x, [own, own]), type=TensorType((4, 4), F64))
    with pytest.raises(LayoutError, match="is not the length"):
        infer_layout(square, b.program, SP, hint=Shard(0))


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("view", lambda own: ([own, 4, 4],)),
        ("view", lambda own: ([own, -1],)),
        ("slice.Tensor", lambda own: (0, 0, None)),
        ("slice_backward", lambda own: ([own, 32], 1, 0, 16, 1)),
        ("select_backward", lambda own: ([own, 3, 16], 1, 0)),
    ],
)
def test_a_length_of_what_is_cut_may_be_measured(op: str, args: Callable[[Value], tuple[Any, ...]]) -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = T((4, 16), Shard(0)).build(b)
    own = b.call("aten.sym_size.int", (x, 0))
    assert b.call(f"aten.{op}", (x, *args(own))).type.layout[SP] == Shard(0)


def test_a_dimension_is_split_by_the_length_of_a_shard() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    own = b.call("aten.sym_size.int", (T((4, 2), Shard(0)).build(b), 0))
    x = T((2, 8), Shard(1)).build(b)
    assert b.call("aten.unflatten.int", (x, 1, [own, 2])).type.layout[SP] == Shard(1)
    with pytest.raises(LayoutError, match="is not the length"):
        b.call("aten.unflatten.int", (T((8, 8), Shard(0)).build(b), 1, [own, 2]))


@pytest.mark.parametrize(("op", "sizes"), [("slice.Tensor", False), ("slice_backward", True)])
def test_a_slice_ends_at_the_whole_model_s_length(op: str, sizes: bool) -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = T((4, 16), Shard(0)).build(b)
    own = b.call("aten.sym_size.int", (x, 0))
    end = b.call("operator.mul", (own, 2))
    assert b.call(f"aten.{op}", (x, *([[own, 16]] if sizes else []), 0, 0, end, 1)).type.layout[SP] == Shard(0)
    with pytest.raises(LayoutError, match="measures a sharded dimension"):
        b.call(f"aten.{op}", (x, *([[own, 16]] if sizes else []), 1, 0, own, 1))


def test_no_length_is_divided_by_zero() -> None:
    s = sympy.Symbol("s", integer=True, positive=True)
    assert [quotient(total, 0) for total in (4, 0, s)] == [None] * 3
    assert (quotient(2 * s, 2), quotient(2 * s, s), quotient(s, 2), quotient(4, s)) == (s, 2, None, None)
    assert type(quotient(sympy.Integer(4), 2)) is int, "an extent without symbols is a plain number"


def test_an_expansion_is_placed_by_the_number_of_its_sizes() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    untyped = b.program.graph.create("aten.expand", (T((4, 4), Shard(0)).build(b), [2, 4, 4]))
    assert infer_layout(untyped, b.program, SP) == Shard(1)


def test_what_one_rank_draws_is_whole_and_what_is_never_drawn_is_too() -> None:
    for size, p in ((1, 0.5), (2, 0.0)):
        b = ProgramBuilder(mesh={SP: size}, stage=Stage.JOINT)
        assert b.aten.bernoulli.p(T((4, 4)).build(b), p).type.layout[SP] == INVARIANT


def test_a_slice_to_an_end_that_no_length_reaches() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    tokens = sympy.Symbol("s", integer=True, positive=True)
    kind = TensorType((4, tokens), F64).on_axis(SP, Shard(1))
    x = b.program.graph.create("placeholder", ("x",), type=kind).result
    every = b.program.graph.create("aten.slice.Tensor", (x, 1, 0, 2**62), type=kind)
    assert infer_layout(every, b.program, SP) == Shard(1)


def test_a_view_of_a_shard_is_placed_by_its_shape_alone() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    untyped = b.program.graph.create("aten.view", (T((4, 4), Shard(0)).build(b), [2, 2, 4]))
    with pytest.raises(LayoutError, match="no type yet"):
        infer_layout(untyped, b.program, SP)


@pytest.mark.parametrize("blocks", [1, 3])
def test_an_exchange_needs_a_block_for_every_rank(blocks: int) -> None:
    with pytest.raises(LayoutError, match="does not hold 2 blocks"):
        placed("_c10d_functional.all_to_all_single", T((blocks, 4, 8), Shard(1)), [blocks], [blocks], SP)


@pytest.mark.parametrize("index", [0, (slice(0, 2),), (None, ...), (slice(None), 1)], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_brackets_behind_a_shard_move_its_dimensions(index: object, dim: int) -> None:
    with pytest.raises(LayoutError, match="has no layout rule"):
        placed("operator.getitem", T((4, 4, 4), Shard(dim)), index)


def test_brackets_behind_a_whole_value() -> None:
    assert placed("operator.getitem", T((4, 4)), 0) == INVARIANT
    with pytest.raises(LayoutError, match="has no layout rule"):
        placed("operator.getitem", T((4, 4)), (CUT_IDS,))
    with pytest.raises(LayoutError, match="has no layout rule"):
        placed("operator.getitem", T((4, 4), PARTIAL), (CUT_IDS,))


def test_a_hypothetical_placement_of_several_results_is_that_of_each() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    first, _ = b.call("aten.split.Tensor", (b.input("x", (4, 6), F64), 2))
    pair = first.producer.operands[0]
    assert infer_layout(first.producer, b.program, SP, placements={pair: Shard(1)}) == Shard(1)
    assert infer_layout(first.producer, b.program, SP, placements={pair: (PARTIAL, INVARIANT)}) == PARTIAL
