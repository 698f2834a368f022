"""Random partitioned programs, each with its one-rank twin.

A walk draws operations over the values made so far and keeps those that the layout rules accept. Replaying the same
steps for one rank, with the sizes of the whole model, gives the oracle.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autosp_ir.errors import AutoSPError
from autosp_ir.ir.graph import Value
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import Invariant, Partial, Placement, Replicate, Shard
from autosp_ir.rewrite.builder import ProgramBuilder

AXIS = "sp"
_INPUTS = {"x": (2, 8, 4), "y": (8, 4), "z": (2, 8, 1)}
_PARAMETERS = {"w": (4, 4), "v": (8, 4), "b": (4,), "c": (8,)}
_UNARY = ("tanh", "sigmoid", "neg", "relu", "sin", "clone")
_BINARY = ("add.Tensor", "sub.Tensor", "mul.Tensor", "maximum")
_MOST_ELEMENTS = 4096
_WEIGHTS: dict[type[Placement], int] = {Invariant: 1, Replicate: 2, Shard: 6, Partial: 12}


@dataclass(frozen=True)
class Step:
    """One operation on values by index; `sizes` is the argument that lists local sizes, cut along `shard`."""

    op: str
    args: tuple[Any, ...]
    sizes: int | None = None
    shard: Shard | None = None


@dataclass(frozen=True)
class Ref:
    """A value by its position in the walk."""

    index: int


def random_pair(seed: int, ranks: int, steps: int = 24) -> tuple[Program, Program, dict[str, Tensor]]:
    """A random program for `ranks` ranks, its twin for one, and a batch."""
    walk = Walk(seed, ranks)
    walk.walk(steps)
    outputs = [step for step in walk.outputs() if walk.take(step)]
    walk.builder.output(*walk.values[-len(outputs) :])
    walk.twin.output(*walk.twins[-len(outputs) :])
    generator = torch.Generator().manual_seed(seed)
    batch = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in _INPUTS.items()}
    return walk.builder.build(), walk.twin.build(), batch


def _start(seed: int, size: int) -> tuple[ProgramBuilder, list[Value]]:
    builder = ProgramBuilder(mesh={AXIS: size})
    generator = torch.Generator().manual_seed(seed + 1)
    values = [builder.input(n, s, torch.float64) for n, s in _INPUTS.items()]
    for name, shape in _PARAMETERS.items():
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        values.append(builder.parameter(name, tensor=torch.nn.Parameter(tensor)))
    return builder, values


def replay(builder: ProgramBuilder, values: list[Value], step: Step, size: int, ranks: int) -> Value:
    """Take one step in a program of `size` ranks; the sizes in its arguments are those of one of `ranks`."""
    args = list(_resolved(step.args, values))
    if step.op.startswith("autosp."):
        args = [size if a is ... else a for a in args]
    if step.sizes is not None and step.shard is not None and size == 1:
        sizes = list(args[step.sizes])
        sizes[step.shard.dim] *= ranks
        args[step.sizes] = sizes
    made = builder.call(step.op, tuple(args))
    value: Value = made[0] if isinstance(made, tuple) else made
    return value


def _resolved(item: Any, values: list[Value]) -> Any:
    if isinstance(item, Ref):
        return values[item.index]
    if isinstance(item, tuple | list):
        return type(item)(_resolved(i, values) for i in item)
    return item


class Walk:
    """The values made so far, for several ranks and for one."""

    def __init__(self, seed: int, ranks: int) -> None:
        self.random = random.Random(seed)
        self.ranks = ranks
        self.builder, self.values = _start(seed, ranks)
        self.twin, self.twins = _start(seed, 1)

    def walk(self, steps: int) -> None:
        """Take so many steps, as far as the layouts of what was made allow."""
        taken = 0
        for _ in range(40 * steps):
            step = self.random.choice(_STEPS)(self)
            taken += step is not None and self.take(step)
            if taken == steps:
                return

    def take(self, step: Step) -> bool:
        """Add an operation to both programs, if the rules accept it here and the shapes fit there."""
        try:
            value = replay(self.builder, self.values, step, self.ranks, self.ranks)
        except AutoSPError:
            return False
        here = self.placement(value)
        if step.sizes is not None and isinstance(here, Shard):
            step = replace(step, shard=here)
        try:
            twin = replay(self.twin, self.twins, step, 1, self.ranks)
        except AutoSPError:
            # A constant of local shape stood for its slice, which has no counterpart of the same shape.
            self.builder.program.graph.erase(value.producer)
            return False
        self.values.append(value)
        self.twins.append(twin)
        return True

    def outputs(self) -> list[Step]:
        """Complete the last values; a Replicate one cannot leave a program that is differentiated."""
        found: list[Step] = []
        for index in reversed(range(len(self.values))):
            here = self.placement(self.values[index])
            if isinstance(here, Partial):
                found.append(Step("autosp.all_reduce", (Ref(index), AXIS, ...)))
            elif isinstance(here, Shard) and here.outer == 1:
                found.append(Step("autosp.all_gather", (Ref(index), here.dim, AXIS, ..., "invariant")))
            elif isinstance(here, Invariant):
                found.append(Step("aten.clone", (Ref(index),)))
            if len(found) == 4:
                break
        return found

    def placement(self, value: Value) -> Placement:
        return value.tensor_type.layout[AXIS]

    def pick(self, least: int = 0) -> tuple[int, Value]:
        """A value of at least so many dimensions, those that are cut or partial more often."""
        fitting = [i for i in self.floats() if self.values[i].tensor_type.ndim >= least]
        weights = [_WEIGHTS[type(self.placement(self.values[i]))] for i in fitting]
        index = self.random.choices(fitting, weights)[0]
        return index, self.values[index]

    def partner(self, value: Value) -> int:
        """A value that broadcasts with another one."""

        def fits(other: Value) -> bool:
            shapes = (reversed(value.tensor_type.shape), reversed(other.tensor_type.shape))
            return all(a == b or 1 in (a, b) for a, b in zip(*shapes, strict=False))

        return self.random.choice([i for i in self.floats() if fits(self.values[i])])

    def floats(self) -> list[int]:
        """Positions of floating-point values that are not too large."""
        kinds = [v.tensor_type for v in self.values]
        return [i for i, k in enumerate(kinds) if k.dtype.is_floating_point and 0 < int(k.numel) <= _MOST_ELEMENTS]


def _unary(w: Walk) -> Step:
    return Step(f"aten.{w.random.choice(_UNARY)}", (Ref(w.pick()[0]),))


def _scaled(w: Walk) -> Step:
    return Step("aten.mul.Tensor", (Ref(w.pick()[0]), w.random.choice([0.5, -2.0])))


def _binary(w: Walk) -> Step:
    index, value = w.pick()
    return Step(f"aten.{w.random.choice(_BINARY)}", (Ref(index), Ref(w.partner(value))))


def _select_by_mask(w: Walk) -> Step:
    index, value = w.pick()
    return Step("aten.masked_fill.Scalar", (Ref(index), _mask(w, w.partner(value)), 0))


def _mask(w: Walk, index: int) -> Ref:
    masks = [i for i, v in enumerate(w.values) if v.tensor_type.dtype == torch.bool]
    return Ref(w.random.choice(masks)) if masks else Ref(index)


def _compare(w: Walk) -> Step:
    return Step("aten.gt.Scalar", (Ref(w.pick()[0]), 0.1))


def _matmul(w: Walk) -> Step | None:
    index, value = w.pick(2)
    inner = value.tensor_type.shape[-1]
    fitting = [i for i in w.floats() if w.values[i].tensor_type.ndim == 2 and w.values[i].tensor_type.shape[0] == inner]
    return Step("aten.matmul", (Ref(index), Ref(w.random.choice(fitting)))) if fitting else None


def _linear(w: Walk) -> Step | None:
    index, value = w.pick(1)
    inner = value.tensor_type.shape[-1]
    fitting = [i for i in w.floats() if w.values[i].tensor_type.ndim == 2 and w.values[i].tensor_type.shape[1] == inner]
    return Step("aten.linear", (Ref(index), Ref(w.random.choice(fitting)))) if fitting else None


def _view(w: Walk) -> Step:
    index, value = w.pick(1)
    rest, sizes = math.prod(int(e) for e in value.tensor_type.shape), list[int]()
    while rest > 1 and len(sizes) < 4:
        factor = w.random.choice([f for f in range(1, rest + 1) if rest % f == 0])
        sizes.append(factor)
        rest //= factor
    return Step("aten.reshape", (Ref(index), [*sizes, rest]), sizes=1)


def _expand(w: Walk) -> Step:
    index, value = w.pick(1)
    sizes = [2, *(w.random.choice([e, 3]) if e == 1 else int(e) for e in value.tensor_type.shape)]
    return Step("aten.expand", (Ref(index), sizes), sizes=1)


def _move(w: Walk) -> Step:
    index, value = w.pick(2)
    dims = list(range(value.tensor_type.ndim))
    w.random.shuffle(dims)
    return Step("aten.permute", (Ref(index), dims))


def _part(w: Walk) -> Step:
    index, value = w.pick(1)
    dim = w.random.randrange(value.tensor_type.ndim)
    end = w.random.choice([1, 2, 2**63 - 1])
    return Step("aten.slice.Tensor", (Ref(index), dim, w.random.choice([0, 1]), end))


def _unsqueeze(w: Walk) -> Step:
    index, value = w.pick()
    return Step("aten.unsqueeze", (Ref(index), w.random.randint(0, value.tensor_type.ndim)))


def _cat(w: Walk) -> Step:
    index, value = w.pick(1)
    same = [i for i in w.floats() if w.values[i].tensor_type.shape == value.tensor_type.shape]
    return Step("aten.cat", ([Ref(index), Ref(w.random.choice(same))], w.random.randrange(value.tensor_type.ndim)))


def _reduce(w: Walk) -> Step:
    index, value = w.pick(1)
    dims = w.random.sample(range(value.tensor_type.ndim), w.random.randint(1, value.tensor_type.ndim))
    here = w.placement(value)
    if isinstance(here, Shard) and w.random.random() < 0.5:
        return Step("aten.sum.dim_IntList", (Ref(index), [here.dim], w.random.random() < 0.5))
    return Step(
        f"aten.{w.random.choice(['sum.dim_IntList', 'mean.dim', 'amax'])}", (Ref(index), dims, bool(len(dims) % 2))
    )


def _along(w: Walk) -> Step:
    index, value = w.pick(1)
    dim = w.random.randrange(value.tensor_type.ndim)
    return Step("aten._softmax", (Ref(index), dim, False)) if dim % 2 else Step("aten.cumsum", (Ref(index), dim))


def _norm(w: Walk) -> Step:
    index, value = w.pick(1)
    return Step("aten.native_layer_norm", (Ref(index), [int(value.tensor_type.shape[-1])], None, None, 1e-2))


def _communicate(w: Walk) -> Step:
    index, value = w.pick()
    here, ndim = w.placement(value), max(value.tensor_type.ndim, 1)
    dim, other = w.random.randrange(ndim), w.random.randrange(ndim)
    if isinstance(here, Shard):
        target = w.random.choice(["invariant", "replicate"])
        gathers = Step("autosp.all_gather", (Ref(index), here.dim, AXIS, ..., target))
        return w.random.choice([gathers, Step("autosp.all_to_all", (Ref(index), other, here.dim, AXIS, ...))])
    if isinstance(here, Partial):
        scatters = Step("autosp.reduce_scatter", (Ref(index), dim, AXIS, ...))
        return w.random.choice([scatters, Step("autosp.all_reduce", (Ref(index), AXIS, ...))])
    cuts = Step("autosp.shard", (Ref(index), dim, AXIS, ...))
    return w.random.choice([cuts, Step("autosp.invariant_to_replicate", (Ref(index), AXIS, ...))])


LOCAL_STEPS: tuple[Callable[[Walk], Step | None], ...] = (
    *(_unary, _scaled, _binary, _binary, _select_by_mask, _compare, _matmul, _linear, _view, _expand, _move, _part),
    *(_unsqueeze, _cat, _reduce, _reduce, _along, _norm),
)
"""Operations that every rank does alone."""
_STEPS = (*(_communicate,) * 6, *LOCAL_STEPS)
