"""Printing, parsing and comparing programs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autosp_ir._torch_compat import symbol_facts, symbolic_functions
from autosp_ir.errors import AutoSPError, UnsupportedError, VerifyError
from autosp_ir.ir.expressions import format_expression
from autosp_ir.ir.graph import Graph, Origin, Phase
from autosp_ir.ir.literals import same_attribute
from autosp_ir.ir.ops import OpDef, op_for_target
from autosp_ir.ir.parser import parse_expression
from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.text import describe_node, parse, print_program, structurally_equal
from autosp_ir.ir.types import (
    PARTIAL,
    REPLICATE,
    Layout,
    NoneType,
    ObjectType,
    Partial,
    ScalarType,
    Shard,
    TensorType,
    TupleType,
)
from autosp_ir.sim.fuzz import random_graph
from tests.ir.programs import everything, find, linear, node, tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def check_round_trip(program: Program) -> Program:
    text = print_program(program)
    parsed = parse(text)
    assert structurally_equal(program, parsed) is None
    assert print_program(parsed) == text
    return parsed


@pytest.mark.parametrize("build", [linear, everything], ids=["linear", "everything"])
def test_the_text_is_the_golden_one(build: Any, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"{build.__name__}.ir"
    text = print_program(build())
    if request.config.getoption("--update-golden", default=False):
        path.write_text(text)
    assert text == path.read_text()


def test_everything_reads_back() -> None:
    parsed = check_round_trip(everything())
    assert parsed.stage is Stage.JOINT
    assert parsed.mesh == {"sp": 4, "tp": 2}
    assert parsed.facts == {"token-partitioned", "canonical"}
    assert find(parsed, "view").origin == find(everything(), "view").origin
    assert find(parsed, "body").origin == Origin(None, "model")
    assert isinstance(parsed.attrs["body"], Graph)
    assert parsed.graph.output_node.phase is Phase.BACKWARD


def test_symbols_are_known_to_the_fake_mode_of_the_parsed_program() -> None:
    parsed = parse(print_program(everything()))
    kind = find(parsed, "size").result.type
    assert isinstance(kind, ScalarType) and kind.expr is not None
    (symbol,) = kind.expr.free_symbols
    assert symbol_facts(parsed.fake_mode.shape_env, symbol) == (64, 2, 2048)


def test_inference_fixes_no_symbol() -> None:
    text = """autosp-ir 1
stage: forward
symbols: {"s0": {"assume": ["integer", "positive"], "hint": 32, "range": [2, null]}}

program(
    %labels: i64[1, s0] = input "labels",
) -> (
    "out0": output "out0",
):
    %pad: i64[1, s0 + 1] = aten.pad(%labels, [0, 1], "constant", -100.0)
    return (%pad,)
"""
    program = parse(text)
    program.verify()
    assert program.fake_mode.shape_env is not None
    assert not program.fake_mode.shape_env.replacements
    wrong = parse(text.replace("s0 + 1]", "33]"))
    with pytest.raises(VerifyError, match=r"%pad is stored as i64\[1, 33\]"):
        wrong.verify()


@pytest.mark.parametrize("block", range(5))
def test_random_programs_read_back(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        check_round_trip(random_graph(seed))


CONSTANTS = (
    *(torch.float32, torch.bool, torch.float8_e4m3fn, torch.device("cuda:1"), torch.device("cpu"), torch.strided),
    *(torch.sparse_coo, torch.contiguous_format, torch.preserve_format, torch.per_tensor_affine, ..., None),
    *(torch.ops.aten.add.Tensor, torch.ops.higher_order.cond, torch.nn.attention.SDPBackend.MATH, math.floor, Phase),
)
constants: st.SearchStrategy[Any] = st.sampled_from(CONSTANTS)
leaves: st.SearchStrategy[Any] = (
    st.integers() | st.floats() | st.booleans() | st.text() | st.complex_numbers(allow_nan=True) | constants
)
attributes: st.SearchStrategy[Any] = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        | st.builds(slice, inner, inner, inner)
    ),
    max_leaves=8,
)


@given(attributes, attributes)
@settings(max_examples=300, deadline=None)
def test_every_attribute_reads_back_exactly(positional: Any, keyword: Any) -> None:
    program = linear()
    made = program.graph.create("aten.relu", (find(program, "x").result, positional), {"key": keyword})
    parsed = find(check_round_trip(program), made.name)
    assert same_attribute(parsed.args[1], made.args[1])
    assert same_attribute(parsed.kwargs["key"], made.kwargs["key"])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ([1], (1,)),
        ("1", 1),
        (None, False),
        ({"a": 1}, {"a": True}),
        (slice(1), slice(2)),
    ],
)
def test_attributes_that_compare_equal_in_python_stay_apart(a: Any, b: Any) -> None:
    assert not same_attribute(a, b)
    assert same_attribute(a, a)


dims = st.integers(0, 2**40) | st.sampled_from(
    [sympy.Symbol("s0", integer=True, positive=True), 2 * sympy.Symbol("u1", integer=True) + 1]
)
placements = st.builds(Shard, st.integers(0, 3), dims) | st.sampled_from(
    [REPLICATE, PARTIAL, Partial("max"), Partial("avg")]
)
layouts = st.dictionaries(st.sampled_from(["sp", "tp", "dp_shard"]), placements, max_size=2).map(Layout)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
devices = st.sampled_from([torch.device("cpu"), torch.device("cuda:3"), torch.device("meta")])
tensors = st.builds(TensorType, st.lists(dims, max_size=4).map(tuple), dtypes, devices, layouts)
types: st.SearchStrategy[Any] = st.recursive(
    tensors
    | st.builds(ScalarType, st.sampled_from(["int", "float", "bool"]))
    | st.just(ScalarType("int", sympy.Symbol("s0", integer=True, positive=True) + 1))
    | st.just(NoneType())
    | st.builds(ObjectType, st.text()),
    lambda inner: st.lists(inner, max_size=3).map(lambda e: TupleType(tuple(e))),
    max_leaves=5,
)


@given(types, types)
@settings(max_examples=200, deadline=None)
def test_every_type_reads_back(first: Any, second: Any) -> None:
    program = linear()
    node(program.graph, "get_attr", first, "a", name="a", phase=Phase.RECOMPUTE)
    node(program.graph, "get_attr", second, "b", name="b")
    check_round_trip(program)


S0, S1 = sympy.symbols("s0 s1", integer=True, positive=True)
FUNCTIONS = symbolic_functions()


def _ordered(extent: Any) -> bool:
    """Whether sympy can compare an extent; it leaves some numbers as they are, such as `(1/3)//1`, and then cannot."""
    return not extent.is_number or bool(extent.is_comparable)


extents = st.recursive(
    st.sampled_from([S0, S1]) | st.integers(-3, 9).map(sympy.Integer),
    lambda inner: (
        st.builds(lambda a, b: a + b, inner, inner)
        | st.builds(lambda a, b: a - b, inner, inner)
        | st.builds(lambda a, b: a * b, inner, inner)
        | st.builds(lambda a, b: FUNCTIONS["FloorDiv"](a, b), inner, st.sampled_from([sympy.Integer(4), S1]))
        | st.builds(lambda a, b: FUNCTIONS["PythonMod"](a, b), inner, st.sampled_from([sympy.Integer(3), S0]))
        | st.tuples(inner, inner)
        .filter(lambda pair: all(map(_ordered, pair)))
        .map(lambda pair: FUNCTIONS["Max"](*pair))
        | st.builds(lambda a: a**2, inner)
        | st.builds(lambda a: a / 3, inner)
    ),
    max_leaves=6,
)


@given(extents)
@settings(max_examples=300, deadline=None)
def test_every_extent_reads_back(extent: Any) -> None:
    try:
        text = format_expression(extent)
    except UnsupportedError:
        # Sympy rewrites a few of its own expressions when they are built again; those are refused, never changed.
        return
    assert parse_expression(text, {"s0": S0, "s1": S1}) == extent


@pytest.mark.parametrize(
    ("extent", "text"),
    [
        (S0 + 1, "s0 + 1"),
        (S0 - 1, "s0 - 1"),
        (2 * S0 + S1, "2*s0 + s1"),
        (FUNCTIONS["FloorDiv"](S0, 4), "s0//4"),
        (4 * FUNCTIONS["FloorDiv"](S0, 4), "4*(s0//4)"),
        (S0 / 4, "s0/4"),
        (FUNCTIONS["Max"](S0, 1 + S1), "Max(s0, s1 + 1)"),
        (sympy.Eq(S0, 4), "Equality(s0, 4)"),
        (S0**2, "s0**2"),
    ],
)
def test_extents_read_naturally(extent: Any, text: str) -> None:
    assert format_expression(extent) == text
    assert parse_expression(text, {"s0": S0, "s1": S1}) == extent


def test_two_symbols_of_one_name_are_refused() -> None:
    program = linear()
    node(program.graph, "get_attr", tensor(S0), "a")
    node(program.graph, "get_attr", tensor(sympy.Symbol("s0", integer=True)), "b")
    with pytest.raises(UnsupportedError, match="two different symbols are called s0"):
        print_program(program)


def test_what_does_not_read_back_is_refused_with_its_node() -> None:
    program = linear()
    program.graph.create("aten.relu", (find(program, "x").result, object()), name="strange")
    with pytest.raises(UnsupportedError, match="of type object cannot be written") as caught:
        str(program)
    assert "--> %strange" in str(caught.value)


def test_a_lambda_is_refused_because_its_name_leads_nowhere() -> None:
    program = linear()
    strange = OpDef("elsewhere.<lambda>", lambda x: x)
    program.graph.create(strange, (find(program, "x").result,))
    with pytest.raises(UnsupportedError, match="does not lead back to its target"):
        str(program)


def test_info_that_is_not_json_is_refused() -> None:
    program = linear()
    program.info["seen"] = {1, 2}
    with pytest.raises(UnsupportedError, match=r"program\.info cannot be written as JSON"):
        str(program)


def test_operation_names_that_are_no_identifiers_are_quoted() -> None:
    program = linear()
    program.graph.create(op_for_target("blocks.a-b", "call_module"), (find(program, "x").result,))
    assert "`module.blocks.a-b`(%x)" in str(program)
    check_round_trip(program)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda p: setattr(p, "stage", Stage.JOINT), "stage: forward against joint"),
        (lambda p: p.mesh.update(sp=2), "mesh: {} against {'sp': 2}"),
        (lambda p: p.facts.add("canonical"), "facts: [] against ['canonical']"),
        (lambda p: p.info.update(a=1), 'info: {} against {"a": 1}'),
        (lambda p: p.signature.outputs.clear(), "signature outputs"),
        (lambda p: p.attrs.update(body=Graph()), "nested graphs: [] against ['body']"),
        (lambda p: p.graph.rename(p.graph.value("half"), "h"), "node 4, name"),
        (lambda p: find(p, "half").set_args((p.graph.value("split"), 0)), "node 4, arguments"),
        (lambda p: setattr(find(p, "half"), "phase", Phase.BACKWARD), "node 4, phase"),
        (lambda p: setattr(p.graph.value("x"), "type", tensor(2, 6, 4, sp=Shard(1))), "node 1, type"),
        (lambda p: p.graph.create("aten.relu", (p.graph.value("x"),)), "node 6, operation"),
    ],
)
def test_the_first_difference_is_named(change: Any, difference: str) -> None:
    first, second = linear(), linear()
    assert first == second
    assert hash(first) != hash(second)
    change(second)
    found = structurally_equal(first, second)
    assert found is not None
    assert difference in found
    assert first != second


def test_origins_and_meta_do_not_count() -> None:
    first, second = linear(), linear()
    find(second, "half").origin = Origin("other.py:1")
    find(second, "half").meta["val"] = 1
    assert first == second


def test_a_node_is_described_with_its_neighbours_and_source_line() -> None:
    program = linear()
    here = find(program, "linear")
    here.origin = Origin(f"{__file__}:1", "layers.0", ("pad-tokens", "ulysses"))
    described = describe_node(here, context=1)
    assert described.splitlines()[:3] == [
        "    %x: f32[2, 6, 4] = placeholder()",
        "--> %linear: f32[2, 6, 8] = aten.linear(%x, %weight)   # test_text.py:1 layers.0 [pad-tokens, ulysses]",
        "    %split: (f32[2, 6, 4], f32[2, 6, 4]) = aten.split.Tensor(%linear, 4, -1)",
    ]
    assert f"model source: {__file__}:1 in layers.0" in described
    assert '"""Printing, parsing and comparing programs."""' in described
    assert "made by passes: pad-tokens → ulysses" in described


def test_an_erased_node_can_still_be_described() -> None:
    program = linear()
    extra = program.graph.create("aten.relu", (find(program, "x").result,), name="extra")
    program.graph.erase(extra)
    assert describe_node(extra).startswith("--> %extra")
    assert "--> %extra" in str(AutoSPError("wrong", node=extra))
