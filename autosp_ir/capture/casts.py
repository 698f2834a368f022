"""Autocast made explicit: the casts that torch inserts while a model runs become casts in its captured graph.

Export records operators above autocast: the dtypes of their results are those of the autocast run, but the casts in
front of the kernels are missing. Which ones they are depends on the operator, the device and the release of torch, so
torch is asked: each operator runs on fake tensors under its autocast state, and is then rewritten until it calls the
same kernels with the same dtypes without autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from autosp_ir._torch_compat import OpOverload
from autosp_ir.capture.autocast import Autocast
from autosp_ir.capture.kernels import Run, observe
from autosp_ir.capture.regions import take_region, where
from autosp_ir.errors import CaptureError, UnsupportedError

aten = torch.ops.aten

_OFF = Autocast()
_DEPENDS_ON_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_ORIGIN = ("stack_trace", "nn_module_stack")

Rewrite = Callable[[fx.Node], list[fx.Node]]
"""Inserts nodes in front of a node; the last of them computes what the node computes under autocast."""


def make_casts_explicit(module: fx.GraphModule) -> None:
    """Insert the casts that autocast makes in a flat graph whose nodes know their regions.

    Raises:
        UnsupportedError: What autocast makes of an operator cannot be written as casts of its operands.
    """
    kept: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        state, scope = take_region(node)
        if not state.dtypes or not _may_be_cast(node):
            continue
        for cast in _explicit(node, state):
            source, dtype = cast.args
            first = kept.setdefault((source, dtype, scope), cast) if _is_cached(source, dtype, state) else cast
            if first is not cast:
                cast.replace_all_uses_with(first)
                module.graph.erase_node(cast)
    module.recompile()


def _may_be_cast(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or any(tag in node.target.tags for tag in _DEPENDS_ON_VALUES):
        return False
    return bool(_floating(node)) and node.target is not aten._assert_tensor_metadata.default


def _floating(node: fx.Node) -> list[fx.Node]:
    values = [(n, n.meta.get("val")) for n in node.all_input_nodes]
    return [n for n, v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _is_cached(source: Any, dtype: Any, state: Autocast) -> bool:
    """What torch casts once for all its readers: float32 leaves with a gradient, to the dtype of autocast."""
    value = source.meta["val"]
    leaf = source.op == "placeholder" and value.requires_grad and value.dtype == torch.float32
    return bool(state.cached and leaf and (value.device.type, dtype) in state.dtypes)


def _explicit(node: fx.Node, state: Autocast) -> list[fx.Node]:
    """Rewrite a node so that it computes without autocast what it computes under `state`; the casts inserted."""
    wanted = observe([node], state)
    if wanted.error is None and wanted == observe([node], _OFF):
        return []
    for rewrite in _rewrites(node, wanted):
        with node.graph.inserting_before(node):
            *inserted, last = rewrite(node)
        if observe([*inserted, last], _OFF).computes_like(wanted):
            node.target, node.args, node.kwargs = last.target, last.args, last.kwargs
            node.graph.erase_node(last)
            return [n for n in inserted if n.target is aten.to.dtype]
        for each in (last, *reversed(inserted)):
            node.graph.erase_node(each)
    raise UnsupportedError(
        f"{node.target} under {state} {wanted.error or 'computes in dtypes that no casts of its operands give'}"
        f"{where(node)}",
        hint="cast its operands in the model, for example with .float(), or run it in a nested region "
        "torch.autocast(device, enabled=False)",
    )


# How autocast can be spelled out; each is tried, none is trusted -----------------------------------------------------


def _rewrites(node: fx.Node, wanted: Run) -> Iterator[Rewrite]:
    yield _casting(wanted.own)
    for dtype in dict.fromkeys(dtype for _, dtype in wanted.casts):
        yield _casting({n: dtype for n in _floating(node) if n.meta["val"].dtype not in (dtype, torch.float64)})
    target: Any = node.target
    if any(a.name == "dtype" for a in target._schema.arguments) and "dtype" not in node.kwargs:
        yield _casting({}, dtype=torch.float32)
    if target is aten.cross_entropy_loss.default:
        yield _in_two_steps


def _casting(dtypes: dict[fx.Node, torch.dtype], **attributes: Any) -> Rewrite:
    """Cast some operands, and set attributes."""

    def rewrite(node: fx.Node) -> list[fx.Node]:
        casts = {n: _insert(node, aten.to.dtype, n, dtype) for n, dtype in dtypes.items()}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: casts.get(n, n))
        return [*casts.values(), _insert(node, node.target, *args, **kwargs, **attributes)]

    return rewrite


def _in_two_steps(node: fx.Node) -> list[fx.Node]:
    """Cross entropy whose two halves have dtypes of their own, as on CUDA: half-precision logits, a float32 loss."""
    logits, target, *rest = node.args
    if not isinstance(logits, fx.Node):
        raise CaptureError(
            f"{node.name} takes the loss of {logits!r}, which is no tensor of the graph",
            hint="compute the loss from the model's output",
        )
    value = logits.meta["val"]
    logs = _insert(node, aten.log_softmax.int, logits, 1 if value.ndim > 1 else 0, value.dtype)
    wide = _insert(node, aten.to.dtype, logs, torch.float32)
    return [logs, wide, _insert(node, aten.nll_loss_nd.default, wide, target, *rest[:3])]


def _insert(origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    made = origin.graph.call_function(target, args, kwargs)
    made.meta = {key: origin.meta[key] for key in _ORIGIN if key in origin.meta}
    return made


__all__ = ["make_casts_explicit"]
