"""Chunks in a loop: `torch.ops.autosp.chunk_loop` and its gradient `torch.ops.autosp.chunk_loop_backward`.

A region that `tile` cuts in many chunks would be written out once for each. Here its body is written once, as the text
of a program for one chunk, and the operator runs it for one chunk after the other: a program with a hundred chunks is
no longer than one with two, and compiles as fast. Its gradient computes each chunk again right before the chunk's
gradients, so one chunk is alive at a time, and adds up the gradients of what all chunks read in float32. With
`results` it gives the results too, in front of the gradients, for a loss whose gradient is known beforehand.

The text is the body's whole identity. Nothing is registered beside it, so programs, caches of compiled code and other
processes can never mix bodies up. What runs a body is in `autosp_ir.emit.loops`, as it takes a program to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from autosp_ir.errors import LayoutError, UnsupportedError
from autosp_ir.ir.graph import Node
from autosp_ir.ir.program import Program
from autosp_ir.ir.text import parse
from autosp_ir.ir.types import TensorType
from autosp_ir.ir.verify import output_leaves

_LOOP = "str body, int chunks, int[] cuts, int[] joins, str backend"
SCHEMAS = (
    f"chunk_loop(Tensor[] operands, {_LOOP}) -> Tensor[]",
    f"chunk_loop_backward(Tensor[] tangents, Tensor[] operands, bool[] wanted, {_LOOP}, bool results) -> Tensor[]",
)
NAMES = ("autosp.chunk_loop", "autosp.chunk_loop_backward")
WHOLE = -1
"""In `cuts`: every chunk reads the whole operand."""
SUM = -1
"""In `joins`: the result is the sum over the chunks."""


class Loop(NamedTuple):
    """What one loop does, whatever its operands hold.

    Args:
        body: Text of a forward program for one chunk; its inputs are the operands, in order.
        chunks: How often it runs.
        cuts: Per operand, the dimension that the chunks divide among them, or `WHOLE`.
        joins: Per result, the dimension along which chunks are put together, or `SUM`.
        backend: "eager" interprets the body, "inductor" compiles it.
    """

    body: str
    chunks: int
    cuts: tuple[int, ...]
    joins: tuple[int, ...]
    backend: str = "eager"

    @classmethod
    def of(cls, node: Node) -> Loop:
        """The loop of an IR node, of either operator."""
        return cls(
            str(node.arg("body")),
            int(node.arg("chunks")),
            tuple(node.arg("cuts")),
            tuple(node.arg("joins")),
            str(node.arg("backend")),
        )

    @property
    def program(self) -> Program:
        """The body; shared, not to be changed."""
        return parsed(self.body)

    @property
    def results(self) -> list[TensorType]:
        """Types of the body's outputs, for one chunk."""
        return [leaf.tensor_type for leaf in output_leaves(self.program.graph)]


class Runner(Protocol):
    """What runs bodies and differentiates them."""

    def forward(self, loop: Loop, operands: Sequence[Tensor]) -> list[Tensor]:
        """The results over all chunks."""

    def backward(
        self, loop: Loop, tangents: Sequence[Tensor], operands: Sequence[Tensor], wanted: Sequence[bool], results: bool
    ) -> list[Tensor]:
        """The results if asked for, then the gradients of the wanted operands, in order."""

    def joint(self, loop: Loop, wanted: tuple[bool, ...]) -> Program:
        """From the body's inputs and tangents to its results and the gradients of the wanted inputs.

        Returns:
            A program that is shared and not to be changed.
        """

    def gradient(
        self, loop: Loop, wanted: tuple[bool, ...], results: bool, *, in_parts: bool = False, decompose: bool = False
    ) -> Program:
        """As `joint`, with or without the results.

        Args:
            loop: The loop.
            wanted: Per input of the body, whether its gradient is.
            results: Whether the body's results come first.
            in_parts: End in the factors of products to be added up, as it runs.
            decompose: Show the small operations that a compiler fuses.
        """


_runners: list[Runner] = []


def use_runner(runner: Runner) -> None:
    """Let `runner` run all loops from now on."""
    _runners[:] = [runner]


def runner() -> Runner:
    """What runs loops.

    Raises:
        UnsupportedError: `autosp_ir` was not imported as a whole.
    """
    if not _runners:
        raise UnsupportedError("nothing is there to run the body of a loop", hint="import autosp_ir first")
    return _runners[-1]


@lru_cache(maxsize=256)
def parsed(text: str) -> Program:
    """The program of a body; shared, not to be changed."""
    return parse(text)


LIBRARY = torch.library.Library("autosp", "FRAGMENT")
for _schema in SCHEMAS:
    # Operands of other strides than a body wants are copied by the loop itself, chunk by chunk.
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def _checked(
    operands: Sequence[Tensor], body: str, chunks: int, cuts: Sequence[int], joins: Sequence[int], backend: str
) -> Loop:
    """The loop over operands that its body was written for.

    Raises:
        LayoutError: An operand has another shape or dtype, or the loop names another number of operands or results.
    """
    loop = Loop(body, chunks, tuple(cuts), tuple(joins), backend)
    inputs = [node.result.tensor_type for node in loop.program.graph.inputs]
    if not len(inputs) == len(operands) == len(loop.cuts) or len(loop.joins) != len(loop.results) or loop.chunks < 1:
        raise LayoutError(
            f"a loop over {loop.chunks} chunk(s) of {len(operands)} operand(s) names {len(loop.cuts)} cut(s) and "
            f"{len(loop.joins)} join(s); its body has {len(inputs)} input(s) and {len(loop.results)} result(s)",
            hint="give one operand and one cut per input of the body, and one join per result",
        )
    for position, (kind, operand, cut) in enumerate(zip(inputs, operands, loop.cuts, strict=True)):
        shape = list(kind.shape)
        if cut != WHOLE:
            shape[cut] *= loop.chunks
        if list(operand.shape) != shape or operand.dtype != kind.dtype:
            raise LayoutError(
                f"operand {position} of a loop over {loop.chunks} chunks is {operand.dtype}{list(operand.shape)}, but "
                f"its body wants {kind.dtype}{shape}",
                hint="tile the region again for operands of this shape",
            )
    return loop


def _forward(operands: list[Tensor], *loop: Any) -> list[Tensor]:
    return runner().forward(_checked(operands, *loop), operands)


def _forward_fake(operands: list[Tensor], *loop: Any) -> list[Tensor]:
    return _fake_results(_checked(operands, *loop), operands)


def _fake_results(loop: Loop, operands: list[Tensor]) -> list[Tensor]:
    made = []
    for kind, join in zip(loop.results, loop.joins, strict=True):
        shape = list(kind.shape)
        if join != SUM:
            shape[join] *= loop.chunks
        made.append(operands[0].new_empty(shape, dtype=kind.dtype))
    return made


def _backward(tangents: list[Tensor], operands: list[Tensor], wanted: list[bool], *rest: Any) -> list[Tensor]:
    *loop, results = rest
    return runner().backward(_checked(operands, *loop), tangents, operands, wanted, results)


def _backward_fake(tangents: list[Tensor], operands: list[Tensor], wanted: list[bool], *rest: Any) -> list[Tensor]:
    *given, results = rest
    loop = _checked(operands, *given)
    made = _fake_results(loop, operands) if results else []
    asked = (x for x, w in zip(operands, wanted, strict=True) if w)
    return [*made, *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in asked)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    operands, *loop = inputs
    ctx.save_for_backward(*operands)
    ctx.loop = loop
    ctx.wanted = [x.requires_grad for x in operands]
    ctx.results = [(y.shape, y.dtype) for y in output]


def _gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    operands = list(ctx.saved_tensors)
    tangents = [
        grad if grad is not None else operands[0].new_zeros(shape, dtype=dtype)
        for grad, (shape, dtype) in zip(grads, ctx.results, strict=True)
        if dtype.is_floating_point
    ]
    found = iter(torch.ops.autosp.chunk_loop_backward(tangents, operands, ctx.wanted, *ctx.loop, False))
    return [next(found) if wanted else None for wanted in ctx.wanted], *(None for _ in ctx.loop)


def _no_second_gradient(ctx: Any, *grads: Any) -> Any:
    raise UnsupportedError(
        "the gradient of a loop over chunks cannot be differentiated again",
        hint="leave tile out, or give it fewer chunks than loop_from",
    )


torch.library.register_fake("autosp::chunk_loop", _forward_fake, lib=LIBRARY)
torch.library.register_fake("autosp::chunk_loop_backward", _backward_fake, lib=LIBRARY)
LIBRARY.impl("chunk_loop", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("chunk_loop_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_autograd("autosp::chunk_loop", _gradient, setup_context=_keep, lib=LIBRARY)
torch.library.register_autograd("autosp::chunk_loop_backward", _no_second_gradient, lib=LIBRARY)

IMPLEMENTATIONS: dict[Any, Callable[..., list[Tensor]]] = {
    torch.ops.autosp.chunk_loop.default: _forward,
    torch.ops.autosp.chunk_loop_backward.default: _backward,
}
"""What the operators run, for those who want to see the operations inside."""

__all__ = ["IMPLEMENTATIONS", "NAMES", "SUM", "WHOLE", "Loop", "Runner", "runner", "use_runner"]
