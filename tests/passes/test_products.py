"""Products that repeat their right operand are written without the repetition, and stay the same product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import autosp_ir as air
from autosp_ir.ir.program import Stage
from autosp_ir.sim.lockstep import simulate
from autosp_passes._canonicalize.products import folded

TOKENS = 6
EXTENTS = st.sampled_from([1, 2, 3, TOKENS])


@st.composite
def operands(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes that `torch.matmul` takes: any extent of the batch of either operand may be one, or missing in front."""
    batch = draw(st.lists(EXTENTS, min_size=1, max_size=3))
    ones = [draw(st.sampled_from(["neither", "left", "right", "right"])) for _ in batch]
    left = [1 if one == "left" else extent for extent, one in zip(batch, ones, strict=True)]
    right = [1 if one == "right" else extent for extent, one in zip(batch, ones, strict=True)]
    missing = draw(st.integers(0, len(batch)))
    right = right[missing:]
    left = [*batch[:missing], *left[missing:]]
    rows, columns = draw(EXTENTS), draw(EXTENTS)
    return (*left, rows, 4), (*right, 4, columns)


def built(left: tuple[int, ...], right: tuple[int, ...]) -> air.Program:
    b = air.ProgramBuilder(mesh={"sp": 1})
    b.output(out=b.aten.matmul(b.input("x", left, torch.float64), b.input("y", right, torch.float64)))
    return b.build()


@given(operands())
@settings(max_examples=60, deadline=None)
def test_the_same_product_without_repetition(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    program = built(*shapes)
    assert program.stage is Stage.FORWARD
    canonical = air.PassManager(["canonicalize"]).run(program).program
    batch = {name: torch.randn(shape, dtype=torch.float64) for name, shape in zip("xy", shapes, strict=True)}
    one, other = (simulate(p, batch).outputs[0]["out"] for p in (program, canonical))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    (product,) = canonical.find("aten.matmul")
    left, right = (v.tensor_type.shape for v in product.operands)
    assert len(right) == 2 or all(b != 1 or a == 1 for a, b in zip(left[: len(left) - 2], right, strict=False))


@pytest.mark.parametrize(
    ("left", "right", "order", "joined"),
    [
        ((2, TOKENS, 3, 4), (2, 1, 4, 5), (0, 2, 1, 3), (2, 3 * TOKENS, 4)),
        ((2, 3, TOKENS, 4), (2, 1, 4, 5), (0, 1, 2, 3), (2, 3 * TOKENS, 4)),
        ((TOKENS, 2, 3, 4), (1, 2, 4, 5), (1, 2, 0, 3), (2, 3 * TOKENS, 4)),
    ],
)
def test_tokens_still_follow_one_another(
    left: tuple[int, ...], right: tuple[int, ...], order: tuple[int, ...], joined: tuple[int, ...]
) -> None:
    (product,) = built(left, right).find("aten.matmul")
    found = folded(product.operands[0], product.operands[1], TOKENS)
    assert found is not None and (found.order, found.left) == (order, joined)


@pytest.mark.parametrize("right", [(4, 5), (2, 3, 4, 5), (3, 4, 5)])
def test_nothing_is_folded_where_nothing_is_repeated(right: tuple[int, ...]) -> None:
    (product,) = built((2, 3, TOKENS, 4) if right != (3, 4, 5) else (3, TOKENS, 4), right).find("aten.matmul")
    assert folded(product.operands[0], product.operands[1], TOKENS) is None
