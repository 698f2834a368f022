"""Running the bodies of `autosp.chunk_loop`: forward, and their gradients, one chunk after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx

from autosp_ir._torch_compat import compile_with_inductor, exact_autocast, trace_decomposed
from autosp_ir.analysis import loops as prices  # attaches what loops cost
from autosp_ir.analysis.products import product_of
from autosp_ir.capture.joint import SharedOutputsError, joint_program
from autosp_ir.comm.chunk_loop import SUM, WHOLE, Loop, use_runner
from autosp_ir.emit.fx_export import executable
from autosp_ir.emit.version import version_of_operators
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Value
from autosp_ir.ir.infer import fake_of
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature
from autosp_ir.ir.types import TensorType
from autosp_ir.ir.verify import output_leaves
from autosp_ir.rewrite.float32_sums import round_once
from autosp_ir.rewrite.rewriter import Rewriter

T = TypeVar("T")
_HALF = (torch.bfloat16, torch.float16)


class Gradient(NamedTuple):
    """The gradient of a body, of which products with a whole operand's shape are left to the loop to add up.

    Args:
        program: From some of the body's inputs and tangents to the parts of the gradients.
        reads: Per input of the program: whether it is a tangent, and which one or which operand.
        parts: Per result, if they come first, and per wanted operand: positions of its one or two outputs; of two, the
            gradient is the product.
    """

    program: Program
    reads: tuple[tuple[bool, int], ...]
    parts: tuple[tuple[int, ...], ...]


def _elsewhere(work: Callable[[], T]) -> T:
    """Do something in a thread of its own.

    What runs inside of an operator inherits that autograd and modes are switched off there, and would be traced so.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@lru_cache(maxsize=256)
def _joint(body: str, decompose: bool = False) -> Program:
    """From the body's inputs and tangents to its results, then the gradients of its floating inputs."""
    forward = Loop(body, 1, (), ()).program.clone()
    specs = [
        replace(s, requires_grad=forward.graph.value(s.name).tensor_type.dtype.is_floating_point)
        for s in forward.signature.inputs
    ]
    forward.signature = Signature(specs, forward.signature.outputs)
    try:
        return _elsewhere(lambda: joint_program(forward, executable(forward), decompose=decompose))
    except SharedOutputsError as shared:
        raise UnsupportedError(
            f"results {shared.positions} of a loop's body share storage", hint="copy them inside of the body"
        ) from shared


@lru_cache(maxsize=256)
def _differentiated(body: str, wanted: tuple[bool, ...], results: bool, decompose: bool = False) -> Program:
    """From the body's inputs and tangents to the gradients of its wanted inputs, with or without the results first.

    What no result depends on has the gradient None.
    """
    program = _joint(body, decompose).clone()
    outputs = list(zip(program.signature.outputs, output_leaves(program.graph), strict=True))
    found = {s.target: (s, v) for s, v in outputs if s.kind is OutputKind.GRADIENT}
    kept = [(s, v) for s, v in outputs if s.kind is not OutputKind.GRADIENT and results]
    for spec, w in zip(_inputs(body), wanted, strict=True):
        if w:
            nothing = OutputSpec(f"grad of {spec.target}", OutputKind.GRADIENT, spec.target), None
            kept.append(found.get(spec.target, nothing))
    _return(program, kept)
    return program


@lru_cache(maxsize=256)
def gradient(
    body: str, wanted: tuple[bool, ...], cuts: tuple[int, ...], results: bool = False, decompose: bool = False
) -> Gradient:
    """The gradient of a body in parts; shared, not to be changed.

    Args:
        body: The body's text.
        wanted: Per input, whether its gradient is.
        cuts: As in `Loop`.
        results: Whether the body's results come first.
        decompose: Traced with Inductor's decompositions.
    """
    program = _differentiated(body, wanted, results, decompose).clone()
    operands = {s.name: i for i, s in enumerate(_inputs(body))}
    tangents = {name: i for i, name in enumerate(_tangents(body))}
    asked = [cut for cut, w in zip(cuts, wanted, strict=True) if w]
    first = len(output_leaves(program.graph)) - len(asked)
    rewriter = Rewriter(program)
    for place, cut in enumerate(asked, first):
        # Read anew each time: one sum may be the gradient of several operands.
        leaf = output_leaves(program.graph)[place]
        if cut != WHOLE and isinstance(leaf, Value):
            round_once(leaf, rewriter)
    leaves: list[Any] = output_leaves(program.graph)
    returned: list[Any] = leaves[:first]
    parts: list[tuple[int, ...]] = [(i,) for i in range(first)]
    for cut, leaf in zip(asked, leaves[first:], strict=True):
        factors = _factors(program, leaf) if cut == WHOLE and isinstance(leaf, Value) else [leaf]
        parts.append(tuple(range(len(returned), len(returned) + len(factors))))
        returned += factors
    _return(program, [(OutputSpec(f"part {i}", OutputKind.GRADIENT, ""), v) for i, v in enumerate(returned)])
    reads = tuple(
        (True, tangents[s.target]) if s.kind is InputKind.TANGENT else (False, operands[s.name])
        for s in program.signature.inputs
    )
    return Gradient(program, reads, tuple(parts))


def _inputs(body: str) -> list[InputSpec]:
    """The specs of a body's inputs."""
    return Loop(body, 1, (), ()).program.signature.inputs


def _tangents(body: str) -> list[str]:
    """The names of the outputs that have tangents, in order."""
    loop = Loop(body, 1, (), ())
    kinds = zip(loop.program.signature.outputs, loop.results, strict=True)
    return [spec.target for spec, kind in kinds if kind.dtype.is_floating_point]


def _return(program: Program, outputs: Sequence[tuple[OutputSpec, Any]]) -> None:
    program.signature.outputs = [spec for spec, _ in outputs]
    program.graph.output_node.set_args((tuple(value for _, value in outputs),))
    program.graph.dead_code()


def _factors(program: Program, leaf: Value) -> list[Value]:
    """The two matrices whose product a gradient is; the gradient itself if it is none."""
    found = product_of(leaf)
    if found is None or leaf.tensor_type.ndim != 2:
        return [leaf]
    factors = list(found.node.operands)
    if not found.transposed:
        return factors
    output = program.graph.output_node
    turned = []
    for factor in reversed(factors):
        kind = factor.tensor_type
        made = program.graph.create(
            "aten.permute", (factor, [1, 0]), type=replace(kind, shape=kind.shape[::-1]), before=output
        )
        turned.append(made.result)
    return turned


Call = Callable[[list[Any]], Sequence[Any]]


@lru_cache(maxsize=256)
def _body_call(body: str, backend: str) -> Call:
    return _elsewhere(lambda: _call(Loop(body, 1, (), ()).program, backend))


@lru_cache(maxsize=256)
def _gradient_call(body: str, wanted: tuple[bool, ...], cuts: tuple[int, ...], results: bool, backend: str) -> Call:
    program = gradient(body, wanted, cuts, results).program
    return _elsewhere(lambda: _call(program, backend))


def _call(program: Program, backend: str) -> Call:
    graph = executable(program)
    if backend != "inductor":
        return lambda arguments: graph(*arguments)
    with program.fake_mode:
        inputs = [fake_of(node.result.type, program.fake_mode) for node in program.graph.inputs]
    traced = trace_decomposed(graph, inputs, program.fake_mode)
    # Each chunk should leave nothing behind, least of all a buffer kept for a later one of its size.
    compiled, _ = compile_with_inductor(
        traced, inputs, program.fake_mode, is_backward=False, version=version_of_operators(), reuse=False
    )
    return compiled


def prepare_loops(graph: fx.Graph, backend: str) -> None:
    """Have the bodies of a graph's loops ready before a step runs.

    Args:
        graph: A graph to be run. It is changed: its loops run their bodies on `backend` from now on.
        backend: As in `Loop`. Inductor compiles a graph without looking into its loops.
    """
    operators = torch.ops.autosp
    for target in (operators.chunk_loop.default, operators.chunk_loop_backward.default):
        names = [a.name for a in target._schema.arguments]
        for node in graph.find_nodes(op="call_function", target=target):
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs, "backend": backend}
            node.args, node.kwargs = tuple(given[name] for name in names), {}
            if "wanted" in names:
                wanted, cuts = tuple(given["wanted"]), tuple(given["cuts"])
                _gradient_call(given["body"], wanted, cuts, given["results"], backend)
            else:
                _body_call(given["body"], backend)


class ChunkRunner:
    """Runs loops, chunk by chunk."""

    def forward(self, loop: Loop, operands: Sequence[Tensor]) -> list[Tensor]:
        """The results over all chunks; sums of half-precision numbers are kept in float32 until the end."""
        call = _body_call(loop.body, loop.backend)
        joined = _joined_results(loop, operands[0])
        with torch.no_grad(), exact_autocast():
            for index in range(loop.chunks):
                _take(joined, index, call(_of_chunk(operands, loop, index)), [(i,) for i in range(len(joined))])
        return [one.result() for one in joined]

    def backward(
        self,
        loop: Loop,
        tangents: Sequence[Tensor],
        operands: Sequence[Tensor],
        wanted: Sequence[bool],
        results: bool = False,
    ) -> list[Tensor]:
        """The results if asked for, then the gradients of the wanted operands."""
        asked = tuple(map(bool, wanted))
        found = gradient(loop.body, asked, loop.cuts, results)
        call = _gradient_call(loop.body, asked, loop.cuts, results, loop.backend)
        inputs = [n.result.tensor_type for n in loop.program.graph.inputs]
        joined = _joined_results(loop, operands[0]) if results else []
        joined += [
            _Joined(kind, cut, loop.chunks, operands[0])
            for kind, cut, w in zip(inputs, loop.cuts, asked, strict=True)
            if w
        ]
        joins = [j for j, k in zip(loop.joins, loop.results, strict=True) if k.dtype.is_floating_point]
        upstream = Loop(loop.body, loop.chunks, tuple(joins), ())
        with torch.no_grad(), exact_autocast():
            for index in range(loop.chunks):
                given = _of_chunk(operands, loop, index), _of_chunk(tangents, upstream, index)
                arguments = [given[tangent][position] for tangent, position in found.reads]
                del given
                _take(joined, index, call(arguments), found.parts)
        return [one.result() for one in joined]

    def joint(self, loop: Loop, wanted: tuple[bool, ...]) -> Program:
        """See `Runner`."""
        return _differentiated(loop.body, wanted, True)

    def gradient(
        self, loop: Loop, wanted: tuple[bool, ...], results: bool, *, in_parts: bool = False, decompose: bool = False
    ) -> Program:
        """See `Runner`."""
        if in_parts:
            return gradient(loop.body, wanted, loop.cuts, results, decompose).program
        return _differentiated(loop.body, wanted, results, decompose)


def _of_chunk(values: Sequence[Tensor], loop: Loop, index: int) -> list[Tensor]:
    """What one chunk reads, in the strides that bodies are compiled for."""
    found = []
    for value, cut in zip(values, loop.cuts, strict=True):
        if cut != WHOLE:
            extent = value.shape[cut] // loop.chunks
            value = value.narrow(cut, index * extent, extent)
        found.append(value.contiguous())
    return found


def _joined_results(loop: Loop, like: Tensor) -> list[_Joined]:
    return [_Joined(k, j, loop.chunks, like) for k, j in zip(loop.results, loop.joins, strict=True)]


def _take(joined: Sequence[_Joined], index: int, parts: Sequence[Any], places: Sequence[tuple[int, ...]]) -> None:
    """Take in what one chunk gave, none of which may be alive when the next one runs."""
    for one, positions in zip(joined, places, strict=True):
        one.take(index, *(parts[p] for p in positions))


class _Joined:
    """One result over all chunks: put together along a dimension, or added up."""

    def __init__(self, kind: TensorType, join: int, chunks: int, like: Tensor) -> None:
        self._join, self._dtype = join, kind.dtype
        shape: list[Any] = list(kind.shape)
        if join == SUM:
            wide = torch.float32 if kind.dtype in _HALF else kind.dtype
            self._whole = like.new_zeros(shape, dtype=wide)
            return
        self._extent = shape[join]
        shape[join] *= chunks
        self._whole = like.new_empty(shape, dtype=kind.dtype)

    def take(self, index: int, *parts: Any) -> None:
        """The part of one chunk, or two matrices whose product it is; None is nothing."""
        if len(parts) == 2:
            torch.ops.autosp.addmm_float32_(self._whole, *parts)
        elif self._join != SUM:
            place = self._whole.narrow(self._join, index * self._extent, self._extent)
            place.zero_() if parts[0] is None else place.copy_(parts[0])
        elif parts[0] is not None:
            self._whole.add_(parts[0])

    def result(self) -> Tensor:
        """The whole result."""
        return self._whole.to(self._dtype)


use_runner(ChunkRunner())

__all__ = ["ChunkRunner", "Gradient", "gradient", "prepare_loops", "prices"]
