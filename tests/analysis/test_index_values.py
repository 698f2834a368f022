"""What is known of a value as a function of its index is true, and masks say what is claimed of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from autosp_ir.analysis.index_domain import Affine, Choice, Condition, IndexValue
from autosp_ir.analysis.index_values import IndexValues, index_values
from autosp_ir.analysis.masks import MaskForm, mask_form
from autosp_ir.capture.program import capture
from autosp_ir.ir.program import Program
from autosp_ir.sim.lockstep import simulate

torch.set_num_threads(1)


class Masks(nn.Module):
    """Returns a mask of the input's length."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.register_buffer("table", torch.tril(torch.ones(1, 1, 64, 64)))

    def forward(self, x: Tensor) -> Tensor:
        """Ids `[B, S]` to whatever `make` builds, plus nothing else."""
        return self.make(x)


def _i(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def tril_of_ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def triu_inverted(x: Tensor) -> Tensor:
    return ~torch.triu(torch.ones(x.shape[1], x.shape[1]), diagonal=1).bool()


def compared_positions(x: Tensor) -> Tensor:
    return (_i(x)[None, :] <= _i(x)[:, None])[None, None]


def filled_with_infinity(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[1], x.shape[1]).masked_fill(_i(x)[:, None] < _i(x), float("-inf"))


def one_minus_times_minimum(x: Tensor) -> Tensor:
    allowed = (_i(x)[:, None] >= _i(x)).float()
    return (1.0 - allowed) * torch.finfo(torch.float32).min


def numbered_from_one(x: Tensor) -> Tensor:
    steps = torch.ones_like(x[:1]).cumsum(-1) - 1
    return steps[:, None, :, None] >= steps[:, None, None, :]


def window_of_three(x: Tensor) -> Tensor:
    distance = _i(x)[:, None] - _i(x)
    return torch.logical_and(distance >= 0, distance < 3)


def both_sides(x: Tensor) -> Tensor:
    distance = _i(x)[:, None] - _i(x)
    return (distance <= 2) & (distance >= -2)


def everything(x: Tensor) -> Tensor:
    return (_i(x)[:, None] + _i(x)) >= 0


def shifted_causal(x: Tensor) -> Tensor:
    return _i(x)[:, None] + 1 >= _i(x)


def blocks(x: Tensor) -> Tensor:
    return _i(x)[:, None] // 4 == _i(x) // 4


def of_the_data(x: Tensor) -> Tensor:
    return x[:, :, None] >= x[:, None, :]


def narrow_positions(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1], dtype=torch.bfloat16)
    return i[:, None] >= i


def strict(x: Tensor) -> Tensor:
    return _i(x)[:, None] > _i(x)


CAUSAL = MaskForm(True, None)
FORMS: list[tuple[Callable[[Tensor], Tensor], MaskForm | None]] = [
    (tril_of_ones, CAUSAL),
    (triu_inverted, CAUSAL),
    (compared_positions, CAUSAL),
    (filled_with_infinity, CAUSAL),
    (one_minus_times_minimum, CAUSAL),
    (numbered_from_one, CAUSAL),
    (window_of_three, MaskForm(True, 3)),
    (both_sides, MaskForm(False, 3)),
    (everything, MaskForm(False, None)),
    (shifted_causal, None),
    (strict, None),
    (blocks, None),
    (of_the_data, None),
    (narrow_positions, None),
]


def _program(make: Callable[[Tensor], Tensor], dynamic: bool) -> Program:
    x = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    return capture(Masks(make), (x,), dynamic=dynamic)


def _number(value: Any, symbols: dict[sympy.Symbol, int]) -> float:
    return float(value.subs(symbols)) if isinstance(value, sympy.Expr) else float(value)


def _at(known: IndexValue, index: Sequence[int], symbols: dict[sympy.Symbol, int]) -> float:
    def affine(a: Affine) -> float:
        return sum(c * i for c, i in zip(a.coefficients, index, strict=True)) + _number(a.constant, symbols)

    def holds(c: Condition) -> bool:
        return c.at_least_zero is not None and all(affine(a) >= 0 for a in c.at_least_zero)

    if isinstance(known, Affine):
        return affine(known)
    if isinstance(known, Choice):
        return _number(known.then if holds(known.condition) else known.otherwise, symbols)
    return float(holds(known))


def assert_true_of(values: IndexValues, program: Program, length: int) -> int:
    """Compare everything that is known with what a run computes; returns how many values were known."""
    x = torch.randint(0, 50, (2, length))
    result = simulate(program, (x,), gradients=False, trace=True)
    symbols = {s: length for v in program.graph.inputs for s in _symbols(v.result.type)}
    checked = 0
    for value, known in values.known.items():
        actual = result.values[0][value.name].double()
        for index in itertools.product(*(range(min(extent, 3)) for extent in actual.shape)):
            assert actual[index].item() == _at(known, index, symbols), (value, known, index)
        checked += 1
    return checked


def _symbols(kind: object) -> set[sympy.Symbol]:
    shape = getattr(kind, "shape", ())
    return {s for extent in shape if isinstance(extent, sympy.Expr) for s in extent.free_symbols}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("make", "form"), FORMS, ids=lambda p: getattr(p, "__name__", ""))
def test_masks_say_what_is_claimed(make: Callable[[Tensor], Tensor], form: MaskForm | None, dynamic: bool) -> None:
    program = _program(make, dynamic)
    values = index_values(program)
    mask = program.graph.output_node.args[0][0]
    assert mask_form(values, mask) == form
    assert_true_of(values, program, 8)
    if dynamic:
        assert_true_of(values, program, 11)


def test_a_buffer_is_recognised_by_its_values() -> None:
    class Buffered(Masks):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.table, Tensor)
            return self.table[:, :, : x.shape[1], : x.shape[1]] != 0

    x = torch.zeros(2, 8, dtype=torch.int64)
    for dynamic in (False, True):
        program = capture(Buffered(tril_of_ones), (x,), dynamic=dynamic)
        values = index_values(program)
        assert mask_form(values, program.graph.output_node.args[0][0]) == CAUSAL
    model = Buffered(tril_of_ones)
    model.get_buffer("table")[..., 5, 2] = 0
    program = capture(model, (x,))
    assert mask_form(index_values(program), program.graph.output_node.args[0][0]) is None


def test_facts_are_inherited() -> None:
    def padded(x: Tensor) -> Tensor:
        return (x[:, None, :] == 1) & (_i(x)[:, None] >= _i(x))

    program = capture(Masks(padded), (torch.ones(2, 8, dtype=torch.int64),))
    values = index_values(program)
    mask = program.graph.output_node.args[0][0]
    assert mask_form(values, mask) == CAUSAL
    assert values.facts[mask] == {"x"}
    del program.info["example_facts"]
    assert mask_form(index_values(program), mask) is None


def test_an_empty_vector_joined_to_a_matrix_is_no_range() -> None:
    def joined(x: Tensor) -> Tensor:
        return torch.cat([x.new_empty(0), _i(x)[None]], dim=1)

    program = _program(joined, False)
    assert_true_of(index_values(program), program, 8)
