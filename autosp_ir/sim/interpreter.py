"""One simulated rank: a plain interpreter that stops at every collective.

`RankInterpreter.run` is a generator: it yields a `Request` for each collective, is sent the collective's result, and
returns the outputs. The lockstep scheduler drives one such generator per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from torch import Tensor

from autosp_ir.analysis.aliasing import WAIT, holds_operand, passes_through
from autosp_ir.comm.host_memory import on_host
from autosp_ir.errors import AutoSPError, SimulationError
from autosp_ir.ir.graph import Graph, Node, Value, map_values
from autosp_ir.ir.infer import call_target
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.sim.collectives import COLLECTIVES
from autosp_ir.sim.memory import InFlight, MemoryMeter
from autosp_ir.sim.requests import Request, request_of

Steps = Generator[Request, Tensor, Any]

# Higher-order operators that only call a body: where the body stands, and where its operands start.
_BODIES = {
    "hop.wrap": (0, 1),
    "hop.tag_activation_checkpoint": (0, 1),
    "hop.invoke_subgraph": (0, 2),
    "hop.wrap_with_set_grad_enabled": (1, 2),
}


class RankInterpreter:
    """Runs a program as one rank.

    Args:
        program: The program; its graph is not changed.
        inputs: The concrete value of every placeholder, by placeholder name.
        coordinates: This rank's index on every mesh axis.
        meter: Counts live storage.
        keep: Called with the name and value of everything computed at top level, when a trace is wanted.
    """

    def __init__(
        self,
        program: Program,
        inputs: Mapping[str, Any],
        coordinates: Mapping[str, int],
        meter: MemoryMeter,
        keep: Callable[[str, Any], None] | None = None,
    ) -> None:
        self._program = program
        self._inputs = inputs
        self._coordinates = coordinates
        self._meter = meter
        self._keep = keep
        self._mutates = any(node.op.has(Trait.MUTATES) for node in program.graph.nodes)

    def run(self) -> Steps:
        """Step to each collective; return the flat list of outputs.

        Raises:
            SimulationError: An operation failed, or cannot be simulated.
        """
        operands = [self._inputs[node.name] for node in self._program.graph.inputs]
        for operand in operands:
            self._meter.ignore(operand)
        outputs = yield from self._graph(self._program.graph, operands, self._keep)
        return outputs

    def _graph(self, graph: Graph, operands: Iterable[Any], keep: Callable[[str, Any], None] | None) -> Steps:
        supplied = iter(operands)
        prefix = self._prefix(graph)
        last_use = _last_uses(graph)
        values: dict[Value, Any] = {}
        for node in graph.nodes:
            if node.op.kind == "output":
                outputs = _flat(_read(node, node.args[0], values))
                for value, held in values.items():
                    self._release(value, held)
                return outputs
            result = next(supplied) if node.op.kind == "placeholder" else (yield from self._node(node, values, prefix))
            values[node.result] = result
            if not on_host(node):
                self._meter.hold(result, node.op.workspace(node, False) if node.op.workspace is not None else 0)
            if keep is not None:
                keep(node.name, result.tensor if isinstance(result, InFlight) else result)
            for dead in last_use.get(node, ()):
                self._release(dead, values.pop(dead))
        raise SimulationError("the graph has no output node", hint="create one with graph.create('output', …)")

    def _release(self, value: Value, held: Any) -> None:
        if not on_host(value.producer):
            self._meter.release(held)

    def _prefix(self, graph: Graph) -> str:
        """In front of the attribute names of a nested graph stands its own name."""
        return next((f"{name}." for name, nested in self._program.attrs.items() if nested is graph), "")

    def _node(self, node: Node, values: Mapping[Value, Any], prefix: str) -> Steps:
        if node.op.kind == "get_attr":
            return self._attribute(node, f"{prefix}{node.args[0]}")
        if node.op.name == WAIT:
            return _awaited(node, values)
        args = _read(node, node.args, values)
        kwargs = dict(_read(node, dict(node.kwargs), values))
        if passes_through(node):
            operand = values[node.arg("x")]
            return operand.clone() if self._mutates else operand
        if node.op.has(Trait.COLLECTIVE):
            return (yield request_of(node, args, kwargs))
        if node.op.has(Trait.READS_RANK):
            return self._rank_dependent(node, args, kwargs)
        if node.op.name in _BODIES:
            body, first = _BODIES[node.op.name]
            return (yield from self._graph(args[body], args[first:], None))
        if node.op.kind == "call_module":
            return _compute(node, self._attribute(node, f"{prefix}{node.op.target}"), args, kwargs)
        return _compute(node, None, args, kwargs)

    def _attribute(self, node: Node, target: str) -> Any:
        for bound in (self._program.attrs, self._program.tensors):
            if target in bound:
                self._meter.ignore(bound[target])
                return bound[target]
        raise SimulationError(
            f"{node.op.kind} target {target!r} is not bound",
            node=node,
            hint="set program.attrs[target], or bind the module it was captured from",
        )

    def _rank_dependent(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """`shard` and `axis_index`: the pure function over the group, of which this rank needs its own result only."""
        axis, size = node.arg("axis"), node.arg("size")
        if size != (ranks := self._program.mesh.get(axis, 1)):
            raise SimulationError(
                f"{node.op.name} was built for {size} rank(s) on axis {axis!r}, but the mesh {self._program.mesh} "
                f"has {ranks}",
                node=node,
                hint="simulate the program on the mesh that it was partitioned for",
            )
        if node.op.name == "autosp.axis_index":
            return COLLECTIVES[node.op.name]((), axis=axis, size=size)[self._coordinates.get(axis, 0)]
        request = request_of(node, args, kwargs)
        # Every rank of the group holds the same operand, by the operator's typing rule: I -> S.
        return request.evaluate([request.operand] * size)[self._coordinates.get(axis, 0)]


def _compute(node: Node, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        if module is not None:
            return module(*args, **kwargs)
        if node.op.evaluate is not None:
            return node.op.evaluate(*args, **kwargs)
        return call_target(node, args, kwargs)
    except AutoSPError:
        raise
    except Exception as error:  # any torch failure becomes a named error at this node
        shapes = ", ".join(f"{a.dtype}{list(a.shape)}" for a in args if isinstance(a, Tensor))
        raise SimulationError(
            f"{node.op.name}({shapes}) failed: {type(error).__name__}: {error}",
            node=node,
            hint="run program.verify(): it finds the rewrite that made types and values differ",
        ) from error


def _read(node: Node, structure: Any, values: Mapping[Value, Any]) -> Any:
    def concrete(value: Value) -> Any:
        found = values[value]
        if isinstance(found, InFlight):
            raise SimulationError(
                f"%{value.name} is read while the collective that makes it may still be running",
                node=node,
                hint="read the result of its _c10d_functional.wait_tensor instead",
            )
        return found

    return map_values(structure, concrete)


def _awaited(node: Node, values: Mapping[Value, Any]) -> Any:
    found = values[node.operands[0]]
    return found.tensor if isinstance(found, InFlight) else found


def in_flight(request: Request, result: Tensor) -> Any:
    """What a rank is sent for a request: the result, to be awaited first if the collective is asynchronous."""
    if not request.starts:
        return result
    return InFlight(result, request.operand if holds_operand(request.node) else None)


def _flat(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def _last_uses(graph: Graph) -> dict[Node, list[Value]]:
    """The values that each node reads or makes last."""
    last: dict[Value, Node] = {}
    for node in graph.nodes:
        for value in (*node.operands, *node.results):
            last[value] = node
    dying: dict[Node, list[Value]] = {}
    for value, node in last.items():
        dying.setdefault(node, []).append(value)
    return dying
