"""Losses that run as a loop: results and gradient in one loop, so that no logits are computed twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from autosp_ir.comm.chunk_loop import Loop
from autosp_ir.ir.graph import Node, Phase, Value, map_values
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_ir.rewrite.rewriter import Rewriter

_FORWARD, _BACKWARD = "autosp.chunk_loop", "autosp.chunk_loop_backward"


class LoopedLoss(NamedTuple):
    """A loop that ends in one number, and its gradient.

    Args:
        forward: The loop.
        backward: Its gradient, of one number that arrives.
    """

    forward: Node
    backward: Node

    @property
    def arrives(self) -> Value:
        """The gradient of the number, which is only known in the backward."""
        value: Value = self.backward.arg("tangents")[0]
        return value


def looped_losses(program: Program) -> Iterator[LoopedLoss]:
    """The loops of a joint program whose whole gradient is some tensors times one number."""
    loops = program.find(_FORWARD)
    for node in program.find(_BACKWARD):
        tangents = node.arg("tangents")
        if len(tangents) != 1 or tangents[0].tensor_type.ndim or node.phase is not Phase.BACKWARD:
            continue
        match = next((f for f in loops if f.phase is Phase.FORWARD and _same_work(f, node)), None)
        if match is not None:
            yield LoopedLoss(match, node)


def reason_to_stay(loss: LoopedLoss) -> str | None:
    """Why the gradient cannot be computed beside the loss, or None."""
    kinds = (v.type for v in (*loss.backward.operands, *(u.result for u in loss.backward.users)))
    if any(isinstance(k, TensorType) and k.dtype is torch.float16 for k in kinds):
        return "float16: small gradients vanish unless they are scaled first"
    return None


def compute_together(loss: LoopedLoss, rewriter: Rewriter) -> None:
    """Run both in the forward, for the number 1; the backward multiplies by the number that arrives."""
    forward, backward = loss
    arrives = loss.arrives
    kind = arrives.tensor_type
    with rewriter.before(forward):
        one = rewriter.create("aten.full", ([], 1.0), {"dtype": kind.dtype, "device": kind.device}, type=kind)
        loop = rewriter.create(
            _BACKWARD,
            ([one], list(forward.arg("operands")), list(backward.arg("wanted")), *Loop.of(forward), True),
            origin_from=forward,
        )
        made = rewriter.unpack(loop)
    results = len(Loop.of(forward).joins)
    for reader in list(forward.users):
        rewriter.replace(reader, made[int(reader.args[1])])
    for reader in list(backward.users):
        with rewriter.before(reader):
            scaled = rewriter.create(
                "aten.mul.Tensor",
                (made[results + int(reader.args[1])], arrives),
                phase=Phase.BACKWARD,
                origin_from=reader,
            )
        rewriter.replace(reader, scaled)


def _same_work(forward: Node, backward: Node) -> bool:
    if Loop.of(forward) != Loop.of(backward):
        return False
    pairs = zip(forward.arg("operands"), backward.arg("operands"), strict=True)
    return all(_same_value(a, b) for a, b in pairs)


def _same_value(original: Value, other: Value) -> bool:
    """Whether a value is another one, or that one computed again by `remat`."""
    if original is other:
        return True
    mine, theirs = original.producer, other.producer
    if theirs.phase is not Phase.RECOMPUTE or mine.op is not theirs.op or _attributes(mine) != _attributes(theirs):
        return False
    return all(_same_value(a, b) for a, b in zip(mine.operands, theirs.operands, strict=True))


def _attributes(node: Node) -> tuple[object, object]:
    """The arguments with nothing in the places of values."""
    return map_values(node.args, lambda _: None), map_values(dict(node.kwargs), lambda _: None)


__all__ = ["LoopedLoss", "compute_together", "looped_losses", "reason_to_stay"]
