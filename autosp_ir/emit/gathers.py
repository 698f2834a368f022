"""Logarithms of probabilities picked from rows whose gradient is computed at once: found along with the rows' sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autosp_ir._torch_compat import FakeTensorMode, OpOverload

_ATEN = torch.ops.aten


def pick_along_with_sums(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Let the gradient of logits take their place, where it is computed beside the loss.

    The loss picks one element of a row of `x - max - log(sum)`. As a gather it reads the logits after the kernel that
    finds maximum and sum, which could otherwise write the gradient over them. So the pick becomes a sum over the row
    with zeros elsewhere, in that kernel, and the gradient depends on it: the logarithm of the sum is at least 0 and the
    shifted pick at most 0, so that the larger of both is the logarithm, bit for bit.

    Args:
        graph: A decomposed graph with fake values in `meta["val"]`. It is changed.
        fake_mode: The mode of those values.
    """
    for node in graph.find_nodes(op="call_function", target=_ATEN.gather.default):
        found = _match(node)
        if found is not None:
            with fake_mode, graph.inserting_before(node):
                _rewrite(found, _Builder(graph))


@dataclass(frozen=True)
class _Pick:
    """`gather(source, dim, index)`, where `source` is `(logits - maximum) - logarithm`."""

    node: fx.Node
    index: fx.Node
    dim: int
    source: fx.Node
    shifted: fx.Node
    logits: fx.Node
    maximum: fx.Node
    logarithm: fx.Node


class _Builder:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        given, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*given, **named)
        return node


def _rewrite(found: _Pick, new: _Builder) -> None:
    value: Tensor = found.logits.meta["val"]
    extent, shape = value.shape[found.dim], [1] * value.dim()
    shape[found.dim] = extent
    counting = {"start": 0, "step": 1, "dtype": torch.int64, "device": value.device, "requires_grad": False}
    places = new(_ATEN.reshape.default, new(torch.ops.prims.iota.default, extent, **counting), shape)
    here = new(_ATEN.eq.Tensor, places, found.index)
    nothing = new(_ATEN.full.default, [], 0, dtype=value.dtype, device=value.device)
    alone = new(_ATEN.where.self, here, found.logits, nothing)
    picked = new(_ATEN.sub.Tensor, new(_ATEN.sum.dim_IntList, alone, [found.dim], True), found.maximum)
    logarithm = new(_ATEN.maximum.default, found.logarithm, picked)
    source = new(_ATEN.sub.Tensor, found.shifted, logarithm)
    # A gather from nothing: an index that is out of range stays an error.
    zeros = new(_ATEN.full.default, list(value.shape), 0, dtype=value.dtype, device=value.device)
    checked = new(_ATEN.gather.default, zeros, found.dim, found.index)
    result = new(_ATEN.add.Tensor, new(_ATEN.sub.Tensor, picked, logarithm), checked)
    found.node.replace_all_uses_with(result)
    found.source.replace_all_uses_with(source)
    for old in (found.node, found.source):
        new.graph.erase_node(old)


def _match(node: fx.Node) -> _Pick | None:
    source, dim, index = _arguments(node, _ATEN.gather.default, 3)
    shifted, logarithm = _arguments(source, _ATEN.sub.Tensor)
    logits, maximum = _arguments(shifted, _ATEN.sub.Tensor)
    powers, *summed = _arguments(_arguments(logarithm, _ATEN.log.default, 1)[0], _ATEN.sum.dim_IntList, 3)
    exponent = _arguments(powers, _ATEN.exp.default, 1)[0]
    largest, *reduced = _arguments(maximum, _ATEN.amax.default, 3)
    over = [[dim], True]
    if logits is None or exponent is not shifted or largest is not logits or summed != over or reduced != over:
        return None
    found = _Pick(node, index, dim, source, shifted, logits, maximum, logarithm)
    return found if _picks_one_a_row(found) and _gives_a_gradient(found) else None


def _arguments(node: Any, target: OpOverload, count: int = 2) -> tuple[Any, ...]:
    """The first arguments of a node that calls `target`; None for each where it does not."""
    if not isinstance(node, fx.Node) or node.target is not target or len(node.args) != count or node.kwargs:
        return (None,) * count
    return node.args


def _picks_one_a_row(found: _Pick) -> bool:
    rows = list(found.logits.meta["val"].shape)
    rows[found.dim] = 1
    return list(found.index.meta["val"].shape) == rows


def _gives_a_gradient(found: _Pick) -> bool:
    """Whether all else that is computed from `source` comes later, some of it element by element."""
    others = [user for user in found.source.users if user is not found.node]
    return all(found.node < user for user in others) and any(map(_is_elementwise, others))


def _is_elementwise(node: fx.Node) -> bool:
    if node.target is _ATEN.alias.default:
        return any(map(_is_elementwise, node.users))
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


__all__ = ["pick_along_with_sums"]
