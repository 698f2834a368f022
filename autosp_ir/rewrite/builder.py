"""A builder so short that a test reads like the IR it builds.

```python
b = ProgramBuilder(mesh={"sp": 4})
x = b.autosp.shard(b.input("x", (1, 8, 16)), 1, "sp", 4)
w = b.autosp.invariant_to_replicate(b.parameter("w", (16, 16)), "sp", 4)
b.output(y=b.autosp.all_gather(b.aten.linear(x, w), 1, "sp", 4))
program = b.build()
```
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import autosp_ir.comm.attention
import autosp_ir.comm.chunks
import autosp_ir.comm.ops  # noqa: F401  # all register the autosp operators
from autosp_ir.errors import VerifyError
from autosp_ir.ir.graph import Graph, Node, Origin, Phase, Value
from autosp_ir.ir.program import InputKind, OutputKind, OutputSpec, Program, Signature, Stage
from autosp_ir.ir.types import Dim, Layout, Placement, TensorType, TupleType, Type
from autosp_ir.rewrite.operations import OpName
from autosp_ir.rewrite.rewriter import Rewriter

if TYPE_CHECKING:
    from collections.abc import Iterator

Placements = Layout | Mapping[str, Placement]


class ProgramBuilder:
    """Builds a program node by node; types and layouts are inferred.

    `b.aten.relu(x)`, `b.autosp.attention(q, k, v, causal=True)` and any other IR name written as attributes create
    nodes. Overloads other than the default one are named: `b.aten.mul.Tensor(x, y)`, `b.aten.sum.dim_IntList(x, [1])`.

    Args:
        mesh: Axis sizes; none for one device. Operators over an axis take its name and this size as well.
        stage: forward, joint or lowered.
        facts: Facts the program starts with.
        info: JSON-able facts.
    """

    def __init__(
        self,
        mesh: Mapping[str, int] | None = None,
        *,
        stage: Stage | str = Stage.FORWARD,
        facts: Iterable[str] = (),
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.program = Program(Graph(), Signature(), Stage(stage), dict(mesh or {}))
        self.program.facts = set(facts)
        self.program.info = dict(info or {})
        self._rewriter = Rewriter(self.program)
        self._outputs: list[tuple[OutputSpec, Value]] = []
        self._unpacked: list[Node] = []
        self._phase = Phase(Phase.FORWARD)
        self._origin = Origin()

    def __getattr__(self, namespace: str) -> OpName:
        if namespace.startswith("_"):
            raise AttributeError(namespace)
        return OpName(namespace, self.call)

    def input(
        self,
        name: str,
        shape: Iterable[Dim],
        dtype: torch.dtype = torch.float32,
        *,
        layout: Placements | None = None,
        requires_grad: bool = False,
        device: str = "cpu",
    ) -> Value:
        """Add a user input.

        A program verifies with Invariant inputs only: cut them with `b.autosp.shard(x, 1, "sp", 4)`. Other layouts are
        for trying a single layout rule.
        """
        kind = _tensor_type(shape, dtype, layout, device)
        return self._placeholder(InputKind.USER_INPUT, name, kind, requires_grad)

    def parameter(
        self,
        name: str,
        shape: Iterable[Dim] | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        tensor: Tensor | None = None,
        layout: Placements | None = None,
        requires_grad: bool = True,
    ) -> Value:
        """Add a parameter, by shape or bound to a tensor."""
        return self._bound(InputKind.PARAMETER, name, shape, dtype, tensor, layout, requires_grad)

    def buffer(
        self,
        name: str,
        shape: Iterable[Dim] | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        tensor: Tensor | None = None,
        layout: Placements | None = None,
    ) -> Value:
        """Add a buffer, by shape or bound to a tensor."""
        return self._bound(InputKind.BUFFER, name, shape, dtype, tensor, layout, False)

    def constant(self, name: str, tensor: Tensor) -> Value:
        """Add a constant."""
        return self._bound(InputKind.CONSTANT, name, None, tensor.dtype, tensor, None, False)

    def tangent(self, name: str, like: Value) -> Value:
        """Add the incoming gradient of the output `name`, of the type of `like`."""
        return self._placeholder(InputKind.TANGENT, name, like.type, False)

    def call(
        self,
        op: str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        type: Type | None = None,
        layout: Placements | None = None,
    ) -> Any:
        """Create a node, with a name, type or layout of your own where the inferred one will not do.

        Returns:
            Its value, or a tuple of values for an operation with several results.
        """
        value = self._rewriter.create(op, args, kwargs, type=type, layout=layout, name=name, phase=self._phase)
        value.producer.origin = self._origin
        if not isinstance(value.type, TupleType):
            return value
        elements = self._rewriter.unpack(value)
        for element in elements:
            element.producer.phase, element.producer.origin = self._phase, self._origin
        self._unpacked.extend(e.producer for e in elements)
        return elements

    def output(self, *values: Value, **named: Value) -> None:
        """Return values to the user, as `out0`, `out1`, … or by name."""
        start = len(self._outputs)
        pairs = [*((f"out{start + i}", v) for i, v in enumerate(values)), *named.items()]
        for name, value in pairs:
            self._outputs.append((OutputSpec(name, OutputKind.USER_OUTPUT, name), value))

    def gradient(self, target: str, value: Value) -> None:
        """Return the gradient of a parameter or user input."""
        self._outputs.append((OutputSpec(f"grad of {target}", OutputKind.GRADIENT, target), value))

    def mutation(self, target: str, value: Value) -> None:
        """Return the new value of a buffer."""
        self._outputs.append((OutputSpec(target, OutputKind.BUFFER_MUTATION, target), value))

    @contextmanager
    def phase(self, phase: Phase | str) -> Iterator[None]:
        """Create in another phase inside this `with`."""
        before, self._phase = self._phase, Phase(phase)
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def source(self, line: str | None = None, module: str | None = None) -> Iterator[None]:
        """Give what is created inside this `with` a source line (`model.py:12`) and a module path."""
        before, self._origin = self._origin, Origin(line, module)
        try:
            yield
        finally:
            self._origin = before

    def build(self) -> Program:
        """Close the program and return it; elements of multi-result operations that nothing reads are left out.

        Raises:
            VerifyError: It has no output.
        """
        if not self._outputs:
            raise VerifyError("the program returns nothing", hint="call b.output(name=value) before b.build()")
        self.program.graph.create("output", (tuple(value for _, value in self._outputs),), phase=self._phase)
        self.program.signature.outputs = [spec for spec, _ in self._outputs]
        for node in self._unpacked:
            if not node.result.uses:
                self.program.graph.erase(node)
        return self.program

    def _placeholder(self, kind: InputKind, target: str, type: Type, requires_grad: bool) -> Value:
        return self._rewriter.add_input(kind, target, type, requires_grad=requires_grad)

    def _bound(
        self,
        kind: InputKind,
        name: str,
        shape: Iterable[Dim] | None,
        dtype: torch.dtype,
        tensor: Tensor | None,
        layout: Placements | None,
        requires_grad: bool,
    ) -> Value:
        if tensor is not None:
            self.program.tensors[name] = tensor
            shape, dtype = tuple(tensor.shape), tensor.dtype
        if shape is None:
            raise VerifyError(f"{kind} {name!r} has neither shape nor tensor", hint="give one of them")
        device = str(tensor.device) if tensor is not None else "cpu"
        return self._placeholder(kind, name, _tensor_type(shape, dtype, layout, device), requires_grad)


def _tensor_type(shape: Iterable[Dim], dtype: torch.dtype, layout: Placements | None, device: str) -> TensorType:
    return TensorType(tuple(shape), dtype, torch.device(device), Layout(layout))


__all__ = ["ProgramBuilder"]
