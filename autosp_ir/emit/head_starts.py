"""Where a collective gets a head start over the operation that it is to run beside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

import autosp_ir.comm.head_start  # noqa: F401  (registers torch.ops.autosp.head_start)

COSTED = (
    "aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten.baddbmm.default",
    "autosp.attention.default", "autosp.attention_backward.default",
    "autosp.attention_bias_backward.default", "autosp.chunk_loop.default", "autosp.chunk_loop_backward.default",
)  # fmt: skip
"""What fills a device, as it is called in a graph that was decomposed."""

# A collective of this size takes as long as the head start does, over the fastest of links.
_WORTH_IT = 4 * 2**20
# Devices that one operation can fill.
_FILLED = ("cuda",)


def is_costed(node: fx.Node) -> bool:
    """Whether a node of a decomposed graph is one of `COSTED`."""
    return str(node.target) in COSTED


def give_head_starts(graph: fx.Graph, fills: Callable[[fx.Node], bool] = is_costed) -> None:
    """Pass an operand of each costed operation in front of which a collective set out through `autosp.head_start`.

    Only where the collective is not awaited in between, and worth it.

    Args:
        graph: A graph of a half, in the order in which it runs, with fake values in `meta["val"]` where they are known.
            It is changed.
        fills: Whether a node fills a device.
    """
    setting_out: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.target is torch.ops._c10d_functional.wait_tensor.default:
            setting_out = [n for n in setting_out if n is not node.args[0]]
        elif str(getattr(node.target, "namespace", "")) == "_c10d_functional":
            setting_out.append(node)
        elif node.op == "call_function" and fills(node):
            sent = [t for n in setting_out if (t := _tensor(n)) is not None and t.device.type in _FILLED]
            if any(t.nbytes >= _WORTH_IT for t in sent):
                operand = node.all_input_nodes[-1]
                with graph.inserting_before(node):
                    given = graph.call_function(torch.ops.autosp.head_start.default, (operand,))
                given.meta["val"] = operand.meta.get("val")
                node.replace_input_with(operand, given)
            setting_out = []


def _tensor(start: fx.Node) -> Tensor | None:
    """What a collective gives, or what it is given: of the same size but for the number of ranks."""
    values = (n.meta.get("val") for n in (start, *start.all_input_nodes))
    return next((v for v in values if isinstance(v, Tensor)), None)


__all__ = ["COSTED", "give_head_starts", "is_costed"]
