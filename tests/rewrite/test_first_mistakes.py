"""Mistakes of a first program by hand: each is a named error that says what to write instead."""

import logging

import pytest
import torch

import autosp_ir as air

torch.library.define("first_mistakes::cap", "(Tensor x) -> Tensor")
torch.library.register_fake("first_mistakes::cap", torch.empty_like)


def sharded_sum(mesh: dict[str, int], axis: str, size: int, *, reduced: bool = True) -> air.Program:
    b = air.ProgramBuilder(mesh=mesh)
    total = b.aten.sum(b.autosp.shard(b.input("x", (2, 8)), 1, axis, size))
    b.output(loss=b.autosp.all_reduce(total, axis, size) if reduced else total)
    return b.build()


@pytest.mark.parametrize(
    ("mesh", "axis", "size"), [({"sp": 4}, "sp", 2), ({"sp": 4}, "tp", 4), ({}, "sp", 4), ({"sp": 2}, "sp", 4)]
)
@pytest.mark.parametrize("reduced", [False, True])
def test_operators_are_made_for_the_axes_of_the_mesh(mesh: dict[str, int], axis: str, size: int, reduced: bool) -> None:
    program = sharded_sum(mesh, axis, size, reduced=reduced)
    # Along an axis that the mesh lacks nothing but this says that the sum is one rank's.
    with pytest.raises(air.LayoutError, match=rf"made for {size} rank\(s\) on axis '{axis}'" if reduced else "axis"):
        program.verify()
    with pytest.raises(air.SimulationError, match=rf"built for {size} rank\(s\)"):
        air.simulate(program, {"x": torch.ones(2, 8)})


def test_an_axis_of_one_rank_may_be_missing() -> None:
    program = sharded_sum({}, "sp", 1)
    program.verify()
    assert air.simulate(program, {"x": torch.ones(2, 8)}).loss == 16


def test_two_inputs_of_one_name() -> None:
    b = air.ProgramBuilder()
    b.output(y=b.aten.add.Tensor(b.input("x", (2,)), b.input("x", (2,))))
    with pytest.raises(air.VerifyError, match="two inputs of the program are called 'x'"):
        b.build().verify()


def test_the_wrong_overload(caplog: pytest.LogCaptureFixture) -> None:
    b = air.ProgramBuilder()
    x = b.input("x", (2, 3))
    with pytest.raises(air.VerifyError, match=r"another overload: aten\.mul\.Scalar, aten\.mul\.Tensor$"):
        b.aten.mul(x, x)
    with pytest.raises(air.VerifyError, match=r"another overload: aten\.sum\.dim_IntList"):
        b.aten.sum(x, 1)
    with pytest.raises(air.VerifyError, match="the arguments of its schema: autosp::shard"):
        b.autosp.shard(x, 1)
    with caplog.at_level(logging.ERROR), pytest.raises(air.VerifyError, match="check the shapes"):
        b.aten.add.Tensor(x, b.input("y", (2, 4)))
    assert not caplog.records  # torch's own stack of Python calls


@pytest.mark.parametrize(
    ("name", "hint"),
    [("relu", "did you mean 'aten.relu'"), ("nowhere.softcap_of_mine", "registered with air.register_op")],
)
def test_an_unknown_operator(name: str, hint: str) -> None:
    b = air.ProgramBuilder()
    with pytest.raises(air.AutoSPError, match=hint) as caught:
        b.call(name, (b.input("x", (2,)),))
    assert ".name'" not in str(caught.value)


def test_a_layout_rule_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosp_ir.comm.rules.base.RULES", {})
    with pytest.raises(air.AutoSPError, match=r"unknown operation 'first_mistakes\.cup'"):
        air.layout_rule("first_mistakes.cup")(lambda ctx: air.Shard(0))
    air.layout_rule("aten.not_in_this_release")(lambda ctx: air.Shard(0))


def test_an_operator_without_a_rule_says_how_it_gets_one() -> None:
    b = air.ProgramBuilder(mesh={"sp": 2})
    x = b.autosp.shard(b.input("x", (2,)), 0, "sp", 2)
    with pytest.raises(air.LayoutError, match=r"air\.layout_rule"):
        b.first_mistakes.cap(x)


def test_an_operator_registered_twice() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def triple(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    air.register_op(air.OpDef("first_mistakes.scale", double))
    with pytest.raises(air.AutoSPError, match="registered already"):
        air.register_op(air.OpDef("first_mistakes.scale", triple))


def test_a_notebook_cell_may_register_again() -> None:
    cell = "def scale(x):\n    return x * {}\nair.register_op(air.OpDef('first_mistakes.cell', scale))"
    for factor in (2, 3):
        exec(cell.format(factor), {"air": air, "__name__": "__main__"})
    b = air.ProgramBuilder()
    b.output(y=b.first_mistakes.cell(b.input("x", (1,))))
    assert air.simulate(b.build(), {"x": torch.ones(1)}).outputs[0]["y"] == 3


def test_a_program_is_built_once() -> None:
    b = air.ProgramBuilder()
    b.output(y=b.input("x", (1,)))
    b.build()
    with pytest.raises(air.VerifyError, match="built once"):
        b.build()
