"""Rules of the verifier about inputs, reads of tuples, and regions inside a program."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from autosp_ir.errors import VerifyError
from autosp_ir.ir.graph import Graph, Phase
from autosp_ir.ir.program import InputKind, OutputKind, OutputSpec, Program, Stage
from autosp_ir.ir.types import ObjectType, ScalarType, TensorType, TupleType
from autosp_ir.ir.verify import check_effects, check_signature, check_structure
from autosp_ir.ir.verify_types import same_type
from autosp_ir.rewrite.builder import ProgramBuilder

F64 = torch.float64


def two_inputs() -> Program:
    b = ProgramBuilder()
    b.output(y=b.aten.add.Tensor(b.input("x", (4,), F64), b.input("y", (4,), F64)))
    return b.build()


def test_two_inputs_have_two_names() -> None:
    program = two_inputs()
    program.verify()
    program.signature.inputs[1] = replace(program.signature.inputs[1], target="x")
    with pytest.raises(VerifyError, match="two inputs of the program are called 'x'"):
        program.verify()


def test_a_placeholder_reads_nothing() -> None:
    program = two_inputs()
    first, second = program.graph.inputs
    second.set_args((first.result,), {})
    with pytest.raises(VerifyError, match="reads values"):
        program.verify()


def test_an_element_is_read_by_its_number() -> None:
    b = ProgramBuilder()
    parts = b.call("aten.split.Tensor", (b.input("x", (4,), F64), 2))
    b.output(y=b.aten.add.Tensor(*parts))
    program = b.build()
    element = parts[0].producer
    element.set_args((element.args[0],), {})
    with pytest.raises(VerifyError, match="takes a value and an index"):
        program.verify()


@pytest.mark.parametrize("fault", ["structure", "wait"])
def test_regions_are_checked_like_the_program(fault: str) -> None:
    program = two_inputs()
    region = Graph()
    x = region.create("placeholder", name="x", type=TensorType((4,), F64)).result
    if fault == "wait":
        region.create("_c10d_functional.all_reduce", (x, "sum", "sp"), type=TensorType((4,), F64))
    if fault == "wait":
        region.create("output", ((x,),))
    program.attrs["region"] = region
    with pytest.raises(VerifyError, match="in nested graph 'region'"):
        program.verify()


def test_scalars_of_one_kind_and_expression_are_one_type() -> None:
    assert same_type(ScalarType("int", 3), ScalarType("int", 3))
    assert same_type(ScalarType("int", None), ScalarType("int", 3))
    assert same_type(ScalarType("int", 3), ScalarType("int", None))
    assert not same_type(ScalarType("int", 3), ScalarType("int", 4))
    assert not same_type(ScalarType("float", None), ScalarType("int", None))


def test_pairs_are_one_type_where_each_element_is() -> None:
    four, five = TensorType((4,), F64), TensorType((5,), F64)
    assert same_type(TupleType((four, five)), TupleType((four, five)))
    assert not same_type(TupleType((four, five)), TupleType((four, four)))
    assert not same_type(TupleType((four,)), four)
    assert not same_type(four, TupleType((four,)))


def test_a_comparison_is_no_number() -> None:
    s = sympy.Symbol("s", integer=True, positive=True)
    truth, number = ScalarType("bool", s < 3), ScalarType("bool", s)
    assert same_type(truth, truth)
    assert not same_type(truth, number)
    assert not same_type(number, truth)


@pytest.mark.parametrize("index", [0, -1, (slice(0, 2),), slice(0, 2)], ids=str)
def test_brackets_behind_a_tensor_or_around_a_slice_are_no_number_of_an_element(index: object) -> None:
    b = ProgramBuilder()
    x = b.input("x", (4, 4), F64)
    b.output(y=b.call("operator.getitem", (x, index)))
    b.build().verify()


@pytest.mark.parametrize("index", [0, 1, -1, -2])
def test_an_element_may_be_counted_from_behind(index: int) -> None:
    b = ProgramBuilder()
    first, _ = b.call("aten.split.Tensor", (b.input("x", (4,), F64), 2))
    b.output(y=first)
    program = b.build()
    first.producer.set_args((first.producer.operands[0], index), {})
    program.verify()


def test_the_first_of_two_values_is_not_called_like_the_second() -> None:
    program = two_inputs()
    first, second = program.graph.inputs
    first.result.name = second.result.name
    with pytest.raises(VerifyError, match="two values are called %y"):
        check_structure(program.graph)


def test_a_mutation_is_of_a_buffer() -> None:
    program = two_inputs()
    program.signature.inputs[0] = replace(program.signature.inputs[0], kind=InputKind.BUFFER)
    program.signature.outputs[0] = OutputSpec("x", OutputKind.BUFFER_MUTATION, "x")
    check_signature(program)
    program.signature.outputs[0] = OutputSpec("y", OutputKind.BUFFER_MUTATION, "y")
    with pytest.raises(VerifyError, match="is the mutation of 'y', which is no input"):
        check_signature(program)


@pytest.mark.parametrize("phase", [Phase.RECOMPUTE, Phase.BACKWARD])
def test_what_nothing_has_overwritten_is_recomputed_and_the_backward_reads_what_is_there(phase: Phase) -> None:
    b = ProgramBuilder(stage=Stage.JOINT)
    x = b.input("x", (4,), F64)
    y = b.aten.neg(x)
    if phase is Phase.BACKWARD:
        b.call("aten.add_.Tensor", (y, 1))
    with b.phase(phase):
        again = b.aten.add.Tensor(x, y)
    b.output(y=again)
    check_effects(b.program)


def test_what_is_made_from_nothing_has_the_type_it_is_made_with() -> None:
    b = ProgramBuilder()
    b.output(y=b.aten.mul.Tensor(b.input("x", (4,), F64), b.aten.zeros([4], dtype=F64)))
    program = b.build()
    program.verify()
    program.find("aten.zeros")[0].result.type = TensorType((5,), F64)
    with pytest.raises(VerifyError, match=r"is stored as f64\[5\] but aten.zeros returns f64\[4\]"):
        program.verify()


def test_an_attribute_that_an_operation_does_not_support_is_an_invalid_program() -> None:
    b = ProgramBuilder()
    out, _ = b.autosp.attention(*(b.input(name, (2, 2, 4, 4), F64) for name in "qkv"), window=2)
    b.output(y=out)
    program = b.build()
    attention = program.find("autosp.attention")[0]
    attention.set_args(*attention.with_arg("window", 0))
    with pytest.raises(VerifyError, match=f"%{attention.name}: an attention window of 0 sees nothing"):
        program.verify()


def test_what_is_read_from_an_opaque_pair_is_taken_at_its_word() -> None:
    program = two_inputs()
    pair = program.graph.create("get_attr", ("pair",), type=TupleType((ObjectType("Box"), TensorType((4,), F64))))
    program.attrs["pair"] = object()
    read = program.graph.create("operator.getitem", (pair.result, 1), type=TensorType((4,), F64))
    program.graph.output_node.set_args(((read.result,),))
    program.verify()
