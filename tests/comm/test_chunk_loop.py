"""`autosp.chunk_loop`: what it computes, how it is placed, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autosp_ir as air
from autosp_ir.comm.chunk_loop import SUM, WHOLE, Loop
from autosp_ir.comm.inference import infer_layout
from autosp_ir.ir.graph import Value
from autosp_ir.ir.program import Stage
from autosp_ir.ir.types import INVARIANT, PARTIAL, Placement, Shard
from autosp_ir.rewrite.builder import ProgramBuilder

torch.set_num_threads(1)

# Rows of a chunk [B, 4, 3] by a weight [5, 3]; the rows themselves, and the sum of their squares.
BODY = """autosp-ir 1
stage: forward

program(
    %x0: f64[2, 4, 3] = input "x0" grad,
    %x1: f64[5, 3] = input "x1" grad,
) -> (
    "out0": output "out0",
    "out1": output "out1",
):
    %v2: f64[2, 4, 5] = aten.linear(%x0, %x1)
    %v3: f64[2, 4, 5] = aten.pow.Tensor_Scalar(%v2, 2)
    %v4: f64[] = aten.sum(%v3)
    return (%v2, %v4)
"""
CUTS, JOINS = [1, WHOLE], [1, SUM]
LOOP: tuple[Any, ...] = (BODY, 3, CUTS, JOINS, "eager")


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 12, 3), (5, 3)))
    return x.requires_grad_(), weight.requires_grad_()


def dense(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.nn.functional.linear(x, weight)
    return y, y.pow(2).sum()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_loop_and_its_gradient_equal_the_whole(backend: str) -> None:
    x, weight = operands()
    rows, total = torch.ops.autosp.chunk_loop([x, weight], *LOOP[:-1], backend)
    (rows.cos().sum() + 3 * total).backward()
    found = [x.grad, weight.grad]
    x, weight = operands()
    expected = dense(x, weight)
    (expected[0].cos().sum() + 3 * expected[1]).backward()
    for one, other in zip((rows, total, *found), (*expected, x.grad, weight.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_operands_may_lie_in_any_strides() -> None:
    x, weight = operands()
    turned = x.detach().permute(1, 0, 2).contiguous().permute(1, 0, 2)
    found = torch.ops.autosp.chunk_loop([turned, weight.detach().t().contiguous().t()], *LOOP)
    for one, other in zip(found, dense(x, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_torch_holds_it_for_a_proper_operator() -> None:
    torch.library.opcheck(torch.ops.autosp.chunk_loop.default, ([*operands()], *LOOP))


def test_only_what_is_wanted_gets_a_gradient() -> None:
    x, weight = operands()
    _, total = torch.ops.autosp.chunk_loop([x.detach(), weight], *LOOP)
    total.backward()
    assert weight.grad is not None
    expected = dense(x.detach(), weight)[1]
    torch.testing.assert_close(weight.grad, torch.autograd.grad(expected, weight)[0])


def test_many_small_gradients_are_added_up_in_float32() -> None:
    """In bfloat16 the sum of 256 equal terms stops growing long before the end."""
    body = BODY.replace("f64", "bf16").replace("[2, 4,", "[2, 1,")
    x, weight = torch.ones(2, 256, 3).bfloat16(), torch.full((5, 3), 0.125).bfloat16().requires_grad_()
    torch.ops.autosp.chunk_loop([x, weight], body, 256, CUTS, JOINS, "eager")[1].backward()
    assert weight.grad is not None and weight.grad.dtype is torch.bfloat16
    torch.testing.assert_close(weight.grad.float(), torch.full((5, 3), 2 * 2 * 256 * 0.375), rtol=0.004, atol=0)


@pytest.mark.parametrize(
    ("shapes", "change", "reason"),
    [
        (((2, 11, 3), (5, 3)), {}, r"operand 0 of a loop over 3 chunks is torch.float64\[2, 11, 3\]"),
        (((2, 12, 3), (4, 3)), {}, r"its body wants torch.float64\[5, 3\]"),
        (((2, 12, 3),), {}, "1 operand.* its body has 2 input"),
        (((2, 12, 3), (5, 3)), {"joins": [1]}, "1 join.* 2 result"),
        (((2, 12, 3), (5, 3)), {"cuts": [1]}, "names 1 cut"),
        (((2, 12, 3), (5, 3)), {"chunks": 0}, "over 0 chunk"),
    ],
)
def test_operands_that_the_body_was_not_written_for_are_refused(
    shapes: tuple[tuple[int, ...], ...], change: dict[str, Any], reason: str
) -> None:
    loop = {"body": BODY, "chunks": 3, "cuts": CUTS, "joins": JOINS, "backend": "eager"} | change
    operands = [torch.zeros(s, dtype=torch.float64) for s in shapes]
    tangents = [torch.zeros(2, 12, 5, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    gradient = {"tangents": tangents, "wanted": [True] * len(operands), "results": False}
    for device in ("cpu", "meta"):
        given = [x.to(device) for x in operands]
        with pytest.raises(air.LayoutError, match=reason):
            torch.ops.autosp.chunk_loop(given, **loop)
        with pytest.raises(air.LayoutError, match=reason):
            torch.ops.autosp.chunk_loop_backward(operands=given, **gradient, **loop)


def test_a_loop_is_known_by_what_it_does() -> None:
    loop = Loop(BODY, 3, (1, WHOLE), (1, SUM))
    assert [tuple(k.shape) for k in loop.results] == [(2, 4, 5), ()]
    assert loop == Loop(str(air.parse(BODY)), 3, (1, WHOLE), (1, SUM))


# -- layouts -----------------------------------------------------------------------------------------------------------

S0, S1, S2 = Shard(0), Shard(1), Shard(2)
BLOCKS = Shard(1, 2)


def placed(x: Placement, weight: Placement, *tangents: Placement) -> tuple[Placement, ...]:
    """How the results lie on an axis of two ranks: of the loop, or of its gradient if there are tangents."""
    builder = ProgramBuilder(mesh={"sp": 2}, stage=Stage.JOINT)

    def given(name: str, shape: tuple[int, ...], placement: Placement) -> Value:
        return builder.input(name, shape, torch.float64, layout={"sp": placement})

    values = [given("x", (2, 12, 3), x), given("w", (5, 3), weight)]
    if not tangents:
        made = builder.call("autosp.chunk_loop", (values, *LOOP))
    else:
        upstream = [given(f"t{i}", s, p) for i, (s, p) in enumerate(zip(((2, 12, 5), ()), tangents, strict=True))]
        made = builder.call("autosp.chunk_loop_backward", (upstream, values, [True, True], *LOOP, False))
    return tuple(value.type.layout["sp"] for value in made)


@pytest.mark.parametrize(
    ("operands", "results"),
    [
        ((INVARIANT, INVARIANT), (INVARIANT, INVARIANT)),
        ((S1, INVARIANT), (S1, PARTIAL)),
        ((S0, INVARIANT), (S0, PARTIAL)),
        ((INVARIANT, S0), (S2, PARTIAL)),
        ((S1, INVARIANT, S1, INVARIANT), (S1, PARTIAL)),
        ((S0, INVARIANT, S0, INVARIANT), (S0, PARTIAL)),
        ((INVARIANT, INVARIANT, INVARIANT, INVARIANT), (INVARIANT, INVARIANT)),
        ((INVARIANT, INVARIANT, PARTIAL, INVARIANT), None),
    ],
)
def test_a_loop_lies_as_its_body_does(operands: tuple[Placement, ...], results: tuple[Placement, ...] | None) -> None:
    if results is not None:
        assert placed(*operands) == results
        return
    with pytest.raises(air.LayoutError):
        placed(*operands)


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        ((PARTIAL, INVARIANT), "partial sum"),
        ((S2, INVARIANT), "cut"),
        ((BLOCKS, INVARIANT), "whole blocks"),
        ((S1, PARTIAL), "partial sum"),
        ((S1, INVARIANT, BLOCKS, INVARIANT), "whole blocks"),
        ((BLOCKS, INVARIANT, S1, INVARIANT), "whole blocks"),
        ((S1, INVARIANT, S0, INVARIANT), "cut"),
        ((S1, INVARIANT, S1, PARTIAL), "partial sum"),
    ],
)
def test_what_its_body_refuses_is_refused(operands: tuple[Placement, ...], reason: str) -> None:
    with pytest.raises(air.LayoutError, match=reason):
        placed(*operands)


def test_results_joined_along_blocks_are_refused() -> None:
    """Joined chunk by chunk, the blocks of what each rank holds would come apart."""
    body = BODY.replace("f64[2, 4, 5] = aten.linear(%x0, %x1)", "f64[8, 3] = aten.view(%x0, [8, 3])")
    body = body.replace("f64[2, 4, 5] = aten.pow", "f64[8, 3] = aten.pow")
    builder = ProgramBuilder(mesh={"sp": 2}, stage=Stage.JOINT)
    x = builder.input("x", (2, 12, 3), torch.float64, layout={"sp": S1})
    weight = builder.input("w", (5, 3), torch.float64)
    with pytest.raises(air.LayoutError, match="whole blocks"):
        builder.call("autosp.chunk_loop", ([x, weight], body, 3, CUTS, [0, SUM], "eager"))


def test_operands_in_blocks_are_refused_though_only_their_sum_is_handed_on() -> None:
    body = BODY.replace('    "out0": output "out0",\n', "").replace("return (%v2, %v4)", "return (%v4,)")
    builder = ProgramBuilder(mesh={"sp": 2}, stage=Stage.JOINT)
    x = builder.input("x", (2, 12, 3), torch.float64, layout={"sp": BLOCKS})
    weight = builder.input("w", (5, 3), torch.float64)
    with pytest.raises(air.LayoutError, match="whole blocks"):
        builder.call("autosp.chunk_loop", ([x, weight], body, 3, CUTS, [SUM], "eager"))


def test_what_no_result_depends_on_has_a_gradient_of_zeros_that_is_whole() -> None:
    body = BODY.replace("aten.linear(%x0, %x1)", "aten.linear(%x0, %x0_w)").replace(
        '    %x1: f64[5, 3] = input "x1" grad,\n',
        '    %x1: f64[5, 3] = input "x1" grad,\n    %x0_w: f64[5, 3] = input "x0_w" grad,\n',
    )
    loop = (body, 3, [*CUTS, WHOLE], JOINS, "eager")
    builder = ProgramBuilder(mesh={"sp": 2}, stage=Stage.JOINT)
    x = builder.input("x", (2, 12, 3), torch.float64, layout={"sp": S1})
    unused, weight = (builder.input(n, (5, 3), torch.float64) for n in ("unused", "weight"))
    rows = builder.input("rows", (2, 12, 5), torch.float64, layout={"sp": S1})
    total = builder.input("total", (), torch.float64)
    made = builder.call(
        "autosp.chunk_loop_backward", ([rows, total], [x, unused, weight], [False, True, True], *loop, False)
    )
    assert [v.type.layout["sp"] for v in made] == [INVARIANT, PARTIAL]
    given = [torch.ones(2, 12, 3), torch.ones(5, 3), torch.ones(5, 3)]
    numbers = [v.double().requires_grad_() for v in given]
    torch.ops.autosp.chunk_loop(numbers, *loop)[1].backward()
    assert numbers[1].grad is not None and not numbers[1].grad.any()
    assert numbers[2].grad is not None and numbers[2].grad.any()


def test_a_body_is_for_the_shapes_of_one_rank() -> None:
    """Asked before a program is cut, it answers for whole operands alone."""
    builder = ProgramBuilder(mesh={"sp": 2})
    x = builder.input("x", (2, 12, 3), torch.float64)
    made = builder.call("autosp.chunk_loop", ([x, builder.input("w", (5, 3), torch.float64)], *LOOP))
    node = made[0].producer.operands[0].producer
    whole = dict.fromkeys(node.operands, INVARIANT)
    assert infer_layout(node, builder.program, "sp", placements=whole) == (INVARIANT, INVARIANT)
    with pytest.raises(air.LayoutError, match="shapes of one rank"):
        infer_layout(node, builder.program, "sp", placements=whole | {x: S1})


def test_a_weight_that_every_rank_uses_alike_needs_its_gradient_summed() -> None:
    builder = ProgramBuilder(mesh={"sp": 2})
    x = builder.input("x", (2, 12, 3), torch.float64, layout={"sp": S1})
    weight = builder.parameter("w", (5, 3), torch.float64)
    with pytest.raises(air.LayoutError, match="invariant_to_replicate"):
        builder.call("autosp.chunk_loop", ([x, weight], *LOOP))
