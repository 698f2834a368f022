"""Hand-built programs that use every notation of the text."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from autosp_ir._torch_compat import declare_symbol, symbolic_functions
from autosp_ir.ir.graph import Graph, Node, Origin, Phase, Value
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature, Stage
from autosp_ir.ir.types import (
    PARTIAL,
    REPLICATE,
    Layout,
    NoneType,
    ObjectType,
    Placement,
    ScalarType,
    Shard,
    TensorType,
    TupleType,
    Type,
)

CPU = torch.device("cpu")


def tensor(*shape: Any, dtype: torch.dtype = torch.float32, device: str = "cpu", **layout: Placement) -> TensorType:
    """A tensor type; keywords give the layout by axis."""
    return TensorType(shape, dtype, torch.device(device), Layout(layout))


def node(graph: Graph, op: str, kind: Type, *args: Any, **settings: Any) -> Value:
    """A node of a type, and its value; `kwargs=` are its keyword arguments."""
    return graph.create(op, args, settings.pop("kwargs", None), type=kind, **settings).result


def linear() -> Program:
    """A small program at stage forward that verifies."""
    graph = Graph()
    weight = node(graph, "placeholder", tensor(8, 4), name="weight")
    x = node(graph, "placeholder", tensor(2, 6, 4), name="x")
    where = Origin("/home/user/model.py:12", "layers.0.proj")
    made = node(graph, "aten.linear", tensor(2, 6, 8), x, weight, name="linear", origin=where)
    pair_type = TupleType((tensor(2, 6, 4), tensor(2, 6, 4)))
    pair = node(graph, "aten.split.Tensor", pair_type, made, 4, -1, name="split")
    half = node(graph, "operator.getitem", tensor(2, 6, 4), pair, 1, name="half")
    total = node(graph, "aten.sum.dim_IntList", tensor(), half, [0, 1, 2], name="total")
    graph.create("output", ((total,),))
    inputs = [
        InputSpec("weight", InputKind.PARAMETER, "proj.weight", True),
        InputSpec("x", InputKind.USER_INPUT, "x"),
    ]
    return Program(graph, Signature(inputs, [OutputSpec("loss", OutputKind.USER_OUTPUT, "loss")]))


def find(program: Program, name: str) -> Node:
    """The node of a name."""
    return program.graph.value(name).producer


def everything() -> Program:
    """Every notation at once: symbols, layouts, phases, devices, opaque types, nested graphs, all attribute kinds.

    It prints and parses; it is not meant to verify.
    """
    length = sympy.Symbol("s0", integer=True, positive=True)
    graph = Graph()
    weight = node(graph, "placeholder", tensor(8, 4, device="cuda:0"), name="weight")
    x = node(graph, "placeholder", tensor(2, length, device="cuda:0", sp=Shard(1)), (7,), name="x")
    tangent = node(graph, "placeholder", tensor(device="cpu"), name="tangent", phase=Phase.BACKWARD)
    size = node(graph, "aten.sym_size.int", ScalarType("int", length), x, 1, name="size")
    node(graph, "operator.truediv", ScalarType("float"), size, 2, name="ratio")
    flat = tensor(2 * length, dtype=torch.bfloat16, device="cuda:0", sp=Shard(0, outer=2), tp=PARTIAL)
    where = Origin("modeling_llama.py:243", "model.layers.0.self_attn", ("token-partition", "ulysses"))
    view = node(graph, "aten.view", flat, x, [-1], name="view", origin=where)
    floor = symbolic_functions()["FloorDiv"](length, 4)
    quarter = node(graph, "aten.mean", tensor(floor, length + 1, device="cuda:0", sp=REPLICATE), view, name="quarter")
    node(graph, "get_attr", ObjectType("Graph"), "body", name="body", origin=Origin(None, "model"))
    node(
        graph,
        "torch.nn.functional.relu",
        TupleType((tensor(1, dtype=torch.int64), NoneType(), TupleType((tensor(dtype=torch.bool),)))),
        quarter,
        [1, 1.0, True, -0.0, float("inf"), float("-inf"), float("nan"), 10**30, 1e-5],
        (None, ..., 'a "quoted" % # text\n', complex(1, -0.0), ()),
        kwargs={
            "dtype": torch.bfloat16,
            "device": torch.device("cuda", 1),
            "layout": torch.strided,
            "memory_format": torch.channels_last,
            "index": [slice(None, size, 2), (slice(1, 2, None),)],
            "table": {"a": 1, "b": [], 3: (weight, view)},
            "op": torch.ops.aten.add.Tensor,
            "backend": torch.nn.attention.SDPBackend.MATH,
        },
        name="odd",
        phase=Phase.RECOMPUTE,
    )
    gradient = node(graph, "aten.mul.Tensor", tensor(8, 4, device="cuda:0"), weight, tangent, phase=Phase.BACKWARD)
    graph.create("output", ((quarter, [gradient, None]),), phase=Phase.BACKWARD)
    inputs = [
        InputSpec("weight", InputKind.PARAMETER, "layers.0.weight", True),
        InputSpec("x", InputKind.USER_INPUT, "input ids"),
        InputSpec("tangent", InputKind.TANGENT, "loss"),
    ]
    outputs = [
        OutputSpec("loss", OutputKind.USER_OUTPUT, "loss"),
        OutputSpec("grad of layers.0.weight", OutputKind.GRADIENT, "layers.0.weight"),
        OutputSpec("none", OutputKind.USER_OUTPUT, "none"),
    ]
    program = Program(graph, Signature(inputs, outputs), Stage.JOINT, {"sp": 4, "tp": 2})
    program.facts = {"token-partitioned", "canonical"}
    program.info = {"seq_dims": {"input_ids": 1}, "unpad": None}
    program.attrs["body"] = _body()
    declare_symbol(program.fake_mode.shape_env, length, 64, 2, 2048)
    return program


def _body() -> Graph:
    graph = Graph()
    x = node(graph, "placeholder", tensor(2, 3), name="x")
    relu = node(graph, "aten.relu", tensor(2, 3), x, origin=Origin("model.py:1", None, ("fold",)))
    graph.create("output", ((relu,),))
    return graph
