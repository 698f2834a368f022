"""Random valid programs, for properties that must hold of every program."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from autosp_ir._torch_compat import FakeTensorMode
from autosp_ir.ir.graph import Graph, Node, Origin, Value
from autosp_ir.ir.infer import infer_type
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature
from autosp_ir.ir.types import TensorType, TupleType

_EXTENTS = (1, 2, 3, 4, 6)
_MODULES = ("model.embed", "model.layers.0.attn", "model.layers.0.mlp", "model.layers.1.attn", "head", None)


def random_graph(seed: int, nodes: int = 24) -> Program:
    """A random typed program over a few dozen ATen operations; the same one for the same seed.

    Every program verifies and can be evaluated: indices are in range and no operation is random. It holds operations
    with several results, views, scalars, lists with and without None, and keyword arguments of every usual kind.

    Args:
        seed: Chooses the program.
        nodes: About how many operations it has.

    Returns:
        A forward-stage program with parameters and inputs, and one to three outputs.
    """
    return _Generator(seed).program(nodes)


@functools.cache
def _mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


class _Generator:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.graph = Graph()
        self.specs: list[InputSpec] = []
        self.floats: list[Value] = []
        self.masks: list[Value] = []
        self.ints: list[Value] = []
        self.sizes: list[Value] = []

    def program(self, nodes: int) -> Program:
        for name in ("x", "y"):
            shape = tuple(self.random.choice(_EXTENTS) for _ in range(self.random.randint(2, 4)))
            self.input(name, InputKind.USER_INPUT, shape)
        while len(self.graph) < nodes:
            self.random.choice(_STEPS)(self)
        found = self.random.sample(self.floats, k=min(len(self.floats), self.random.randint(1, 3)))
        self.graph.create("output", (tuple(found),))
        outputs = [OutputSpec(f"out{i}", OutputKind.USER_OUTPUT, f"out{i}") for i in range(len(found))]
        program = Program(self.graph, Signature(self.specs, outputs))
        program.fake_mode = _mode()
        return program

    def input(self, name: str, kind: InputKind, shape: tuple[int, ...]) -> Value:
        """A new placeholder behind the others."""
        last = self.graph.inputs[-1] if self.graph.inputs else None
        first = next(self.graph.nodes, None)
        spot: dict[str, Any] = {"after": last} if last is not None else {"before": first}
        node = self.graph.create("placeholder", name=name, type=TensorType(shape, torch.float32), **spot)
        self.specs.append(InputSpec(node.name, kind, node.name.replace("_", "."), kind is InputKind.PARAMETER))
        self.floats.append(node.result)
        return node.result

    def weight(self, *shape: int) -> Value:
        """A parameter of a shape, an existing one where possible."""
        for value in self.floats:
            if value.tensor_type.shape == shape and value.producer.op.kind == "placeholder":
                return value
        return self.input("p_weight", InputKind.PARAMETER, shape)

    def add(self, op: str, *args: Any, **kwargs: Any) -> Value:
        """A new node, with the type that its operation infers, filed by kind."""
        origin = Origin(f"model.py:{self.random.randint(1, 99)}", self.random.choice(_MODULES))
        node = self.graph.create(op, args, kwargs, origin=origin)
        node.result.type = infer_type(node, _mode())
        self._file(node)
        return node.result

    def _file(self, node: Node) -> None:
        kind = node.result.type
        if not isinstance(kind, TensorType) or kind.numel == 0:
            return
        if kind.dtype == torch.float32:
            self.floats.append(node.result)
        elif kind.dtype == torch.bool:
            self.masks.append(node.result)

    def unpack(self, value: Value) -> None:
        """Read some results of an operation that has several."""
        if not isinstance(value.type, TupleType):
            return
        count = len(value.type.elements)
        for index in sorted(self.random.sample(range(count), k=self.random.randint(1, count))):
            self.add("operator.getitem", value, index)

    def tensor(self, least: int = 0) -> Value:
        """A float tensor of at least so many dimensions."""
        fitting = [v for v in self.floats if v.tensor_type.ndim >= least]
        return self.random.choice(fitting) if fitting else self.weight(*(2,) * least)

    def shape(self, value: Value) -> tuple[int, ...]:
        return tuple(int(extent) for extent in value.tensor_type.shape)

    def dim(self, value: Value) -> int:
        """A dimension, counted from the front or the back."""
        ndim = value.tensor_type.ndim
        return self.random.randrange(-ndim, ndim)

    def partner(self, value: Value) -> Value:
        """A float tensor that broadcasts with `value`."""

        def fits(other: Value) -> bool:
            pairs = zip(reversed(self.shape(value)), reversed(self.shape(other)), strict=False)
            small = max(value.tensor_type.ndim, other.tensor_type.ndim) <= 5
            return small and all(a == b or 1 in (a, b) for a, b in pairs)

        return self.random.choice([v for v in self.floats if fits(v)])

    def indices(self, count: int, bound: int) -> Value:
        """Integers in `[0, bound)`."""
        steps = self.add("aten.arange", count, dtype=torch.int64, device=torch.device("cpu"), pin_memory=False)
        return self.add("aten.remainder.Scalar", steps, bound)


_Step = Callable[[_Generator], None]
_UNARY = ("relu", "neg", "tanh", "sigmoid", "silu", "abs", "cos", "sin", "exp", "rsqrt", "detach", "alias")
_BINARY = ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum", "minimum")
_COMPARISONS = ("gt", "lt", "eq", "ne", "le", "ge")
_REDUCTIONS = ("sum.dim_IntList", "mean.dim", "amax", "logsumexp")


def _unary(g: _Generator) -> None:
    g.add(f"aten.{g.random.choice(_UNARY)}", g.tensor())


def _binary(g: _Generator) -> None:
    x = g.tensor()
    g.add(f"aten.{g.random.choice(_BINARY)}", x, g.partner(x))


def _keywords(g: _Generator) -> None:
    x = g.tensor()
    choices: list[Callable[[], Value]] = [
        lambda: g.add("aten.add.Tensor", x, g.partner(x), alpha=g.random.choice([2, -1.5])),
        lambda: g.add("aten.gelu", x, approximate=g.random.choice(["none", "tanh"])),
        lambda: g.add("aten.clone", x, memory_format=torch.contiguous_format),
        lambda: g.add("aten._to_copy", x, dtype=g.random.choice([torch.float32, torch.bfloat16, torch.float64])),
        lambda: g.add("aten.nan_to_num", x, nan=-0.0, posinf=math.inf, neginf=None),
        lambda: g.add("aten.zeros_like", x, dtype=torch.float32, layout=torch.strided, device=torch.device("cpu")),
    ]
    g.random.choice(choices)()


def _scalars(g: _Generator) -> None:
    x = g.tensor()
    number = g.random.choice([0, 1, 2, -1, 0.5, 1e-6, -0.0, math.inf])
    name = g.random.choice(["add.Scalar", "mul.Scalar", "clamp", "pow.Tensor_Scalar", "leaky_relu"])
    g.add(f"aten.{name}", x, number)


def _comparison(g: _Generator) -> None:
    x, name = g.tensor(), g.random.choice(_COMPARISONS)
    mask = g.add(f"aten.{name}.Tensor", x, g.partner(x)) if g.random.random() < 0.5 else None
    mask = mask or g.add(f"aten.{name}.Scalar", x, g.random.choice([0, 0.5]))
    if g.random.random() < 0.5:
        g.add("aten.logical_not", mask)


def _select_by_mask(g: _Generator) -> None:
    x = g.tensor()
    mask = g.add("aten.gt.Scalar", x, 0)
    if g.random.random() < 0.5:
        g.add("aten.where.self", mask, x, g.partner(x))
    else:
        g.add("aten.masked_fill.Scalar", x, mask, g.random.choice([0, -math.inf, math.nan]))


def _view(g: _Generator) -> None:
    x = g.tensor()
    shape = list(g.shape(x))
    rest = math.prod(shape)
    sizes: list[Any] = []
    while rest > 1 and len(sizes) < 3:
        factor = g.random.choice([f for f in range(1, rest + 1) if rest % f == 0])
        sizes.append(factor)
        rest //= factor
    sizes.append(g.random.choice([rest, -1]))
    g.add(g.random.choice(["aten.view", "aten.reshape", "aten._unsafe_view"]), x, sizes)


def _view_by_size(g: _Generator) -> None:
    x = g.tensor(least=2)
    size = g.add("aten.sym_size.int", x, 0)
    if g.random.random() < 0.5:
        g.add("aten.view", x, [size, -1])
    else:
        g.add("aten.add.Tensor", x, g.add("operator.mul", size, g.random.choice([2, 0.5])))


def _permute(g: _Generator) -> None:
    x = g.tensor(least=2)
    ndim = x.tensor_type.ndim
    if g.random.random() < 0.5:
        g.add("aten.transpose.int", x, g.dim(x), g.dim(x))
    else:
        g.add("aten.permute", x, g.random.sample(range(ndim), k=ndim))


def _ones(g: _Generator) -> None:
    x = g.tensor()
    if x.tensor_type.ndim > 4:
        return
    wide = g.add("aten.unsqueeze", x, g.random.randint(0, x.tensor_type.ndim))
    single = g.shape(wide).index(1)
    if g.random.random() < 0.5:
        g.add("aten.squeeze.dim", wide, single)
    else:
        g.add("aten.expand", wide, [3 if i == single else -1 for i in range(wide.tensor_type.ndim)])


def _slice(g: _Generator) -> None:
    x = g.tensor(least=1)
    dim = g.dim(x)
    extent = g.shape(x)[dim]
    if g.random.random() < 0.3:
        g.add("aten.select.int", x, dim, g.random.randrange(extent))
        return
    start = g.random.randrange(extent)
    g.add("aten.slice.Tensor", x, dim, start, g.random.choice([extent, 2**63 - 1]), g.random.choice([1, 2]))


def _index_python(g: _Generator) -> None:
    x = g.tensor(least=1)
    if x.tensor_type.ndim < 5:
        g.add("operator.getitem", x, g.random.choice([(slice(None, 2, None), ...), (..., None), (slice(0, 1),)]))


def _reduce(g: _Generator) -> None:
    x = g.tensor(least=1)
    g.add(f"aten.{g.random.choice(_REDUCTIONS)}", x, [g.dim(x)], g.random.random() < 0.5)


def _along(g: _Generator) -> None:
    x = g.tensor(least=1)
    name = g.random.choice(["softmax.int", "log_softmax.int", "cumsum", "_softmax"])
    g.add(f"aten.{name}", x, g.dim(x), *([False] if name == "_softmax" else []))


def _linear(g: _Generator) -> None:
    x = g.tensor(least=2)
    features, out = g.shape(x)[-1], g.random.choice(_EXTENTS)
    bias = [g.weight(out)] if g.random.random() < 0.5 else []
    g.add("aten.linear", x, g.weight(out, features), *bias)


def _matmul(g: _Generator) -> None:
    x = g.tensor(least=2)
    rows = g.add("aten.reshape", x, [-1, g.shape(x)[-1]])
    out = g.random.choice(_EXTENTS)
    if g.random.random() < 0.5:
        g.add("aten.mm", rows, g.weight(g.shape(x)[-1], out))
    else:
        g.add("aten.addmm", g.weight(out), rows, g.weight(g.shape(x)[-1], out), beta=0.5, alpha=2)


def _bmm(g: _Generator) -> None:
    x = g.tensor(least=3)
    batched = g.add("aten.reshape", x, [-1, *g.shape(x)[-2:]])
    g.add("aten.bmm", batched, g.add("aten.transpose.int", batched, 1, 2))


def _norm(g: _Generator) -> None:
    x = g.tensor(least=1)
    features = g.shape(x)[-1]
    g.unpack(g.add("aten.native_layer_norm", x, [features], g.weight(features), None, 1e-5))


def _several(g: _Generator) -> None:
    x = g.tensor(least=1)
    dim = g.dim(x)
    choices: list[Callable[[], Value]] = [
        lambda: g.add("aten.split.Tensor", x, 2, dim),
        lambda: g.add("aten.chunk", x, 2, dim),
        lambda: g.add("aten.unbind.int", x, dim),
        lambda: g.add("aten.max.dim", x, dim, True),
        lambda: g.add("aten.topk", x, 1, dim),
        lambda: g.add("aten.var_mean.correction", x, [dim], correction=0, keepdim=True),
        lambda: g.add("aten.split_with_sizes", x, [g.shape(x)[dim]], dim),
    ]
    g.unpack(g.random.choice(choices)())


def _concatenate(g: _Generator) -> None:
    x = g.tensor(least=1)
    alike = [v for v in g.floats if v.tensor_type.shape == x.tensor_type.shape]
    if x.tensor_type.ndim < 5 and int(x.tensor_type.numel) < 500:
        name = g.random.choice(["cat", "stack"])
        g.add(f"aten.{name}", [x, *g.random.sample(alike, k=g.random.randint(1, min(2, len(alike))))], g.dim(x))


def _gather(g: _Generator) -> None:
    x = g.tensor(least=2)
    dim = g.random.choice([0, 1])
    index = g.indices(g.random.choice(_EXTENTS), g.shape(x)[dim])
    if g.random.random() < 0.5:
        g.add("aten.index.Tensor", x, [None] * dim + [index])
    else:
        g.add("aten.index_select", x, dim, index)


def _embedding(g: _Generator) -> None:
    g.add("aten.embedding", g.weight(6, 4), g.indices(g.random.choice(_EXTENTS), 6))


def _create(g: _Generator) -> None:
    device: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "pin_memory": False}
    choices: list[Callable[[], Value]] = [
        lambda: g.add("aten.full", [2, 3], g.random.choice([-0.0, math.inf, 1, True]), **device),
        lambda: g.add("aten.scalar_tensor", g.random.choice([0.1, math.nan]), dtype=torch.float32),
        lambda: g.add("aten.ones", [], **device),
        lambda: g.add("aten.new_zeros", g.tensor(), [1, 4], **device),
    ]
    g.random.choice(choices)()


_STEPS: tuple[_Step, ...] = (
    *(_unary, _binary, _keywords, _scalars, _comparison, _select_by_mask, _view, _view_by_size, _permute, _ones),
    *(_slice, _index_python, _reduce, _along, _linear, _matmul, _bmm, _norm, _several, _concatenate, _gather),
    *(_embedding, _create),
)

__all__ = ["random_graph"]
