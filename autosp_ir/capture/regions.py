"""Cleaning an exported graph in place: regions inlined, mutation made functional.

Export wraps `torch.no_grad()` and `torch.autocast()` regions in higher-order operators. A `no_grad` region is inlined
with its results detached, which has the same gradients. Anything for which that would not hold is refused. The nodes
of an `autocast` region remember it, so that its casts can be made explicit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from autosp_ir._torch_compat import HigherOrderOperator, OpOverload
from autosp_ir.capture.autocast import Autocast
from autosp_ir.errors import CaptureError, UnsupportedError

aten = torch.ops.aten
_HERE = str(Path(__file__).parent)
_REGION = "autosp_autocast"
_BOOKKEEPING = {aten.detach_.default}
_RUNNING_STATISTICS = {aten.batch_norm.default: 5, aten.instance_norm.default: 5}


def inline_regions(module: fx.GraphModule, autocast: Autocast, scope: object = None) -> None:
    """Inline every `no_grad` and `autocast` region of `module`, detaching what the former return.

    Args:
        module: An exported graph.
        autocast: The state around it. Every node remembers the innermost state it runs in: see `take_region`.
        scope: The outermost autocast region around it, whose end empties torch's cache of casts.

    Raises:
        UnsupportedError: A region whose effect on gradients cannot be written as plain operators.
        CaptureError: A higher-order operator of another kind.
    """
    if scope is None and autocast.dtypes:
        scope = object()
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            node.meta.setdefault(_REGION, (autocast, scope))
            continue
        name = node.target.name()
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *operands = node.args
            if not enabled:
                _refuse_gradients_again(getattr(module, body.target))
            inline_regions(getattr(module, body.target), autocast, scope)
            _inline(module, node, body, operands, detach=not enabled)
        elif name == "wrap_with_autocast":
            device, dtype, enabled, _, body, *operands = node.args
            _refuse_lost_no_grad(getattr(module, body.target))
            state = autocast.region(device, dtype, bool(enabled))
            inline_regions(getattr(module, body.target), state, scope or object())
            _inline(module, node, body, operands, detach=False)
        else:
            raise CaptureError(
                f"the model uses the higher-order operator {name}, which cannot be captured yet{_where(node)}",
                hint="write the region with plain tensor operators (torch.where, a mask, an unrolled loop)",
            )
    module.recompile()


def take_region(node: fx.Node) -> tuple[Autocast, object]:
    """The autocast state a node runs in and the outermost region it is of; forgotten once taken."""
    region: tuple[Autocast, object] = node.meta.pop(_REGION, (Autocast(), None))
    return region


def _inline(module: fx.GraphModule, node: fx.Node, body: Any, operands: list[Any], detach: bool) -> None:
    inner: fx.GraphModule = getattr(module, body.target)
    detach = detach and any(_has_gradient(operand) for operand in operands)
    if detach:
        _refuse_hidden_writes(inner, operands)
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    mapping: dict[fx.Node, Any] = dict(zip(placeholders, operands, strict=True))
    with module.graph.inserting_before(node):
        for inside in inner.graph.nodes:
            if inside.op in ("placeholder", "output"):
                continue
            if inside.op == "get_attr":
                raise CaptureError(f"a nested region refers to {inside.target}", hint="simplify the nested regions")
            mapping[inside] = module.graph.node_copy(inside, lambda n: mapping[n])
        returned = _returned(inner)
        for getter in list(node.users):
            position: Any = getter.args[1]
            value = mapping[returned[position]]
            if detach and _is_floating(value):
                source, meta = value, dict(value.meta)
                value = module.graph.call_function(aten.detach.default, (source,))
                value.meta = meta
            getter.replace_all_uses_with(value)
            module.graph.erase_node(getter)
    module.graph.erase_node(node)
    if not body.users:
        module.graph.erase_node(body)


def _has_gradient(operand: Any) -> bool:
    """Whether a gradient could flow into `operand`: it depends on a parameter or a floating input."""
    pending, seen = [operand] if isinstance(operand, fx.Node) else [], set()
    while pending:
        node = pending.pop()
        if node in seen or not _is_floating(node) or node.target is aten.detach.default:
            continue
        seen.add(node)
        if node.op == "placeholder" and not node.name.startswith(("b_", "c_")):
            return True
        pending.extend(node.all_input_nodes)
    return False


def _returned(inner: fx.GraphModule) -> tuple[Any, ...]:
    output = next(n for n in inner.graph.nodes if n.op == "output")
    result = output.args[0]
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _is_floating(value: fx.Node) -> bool:
    """Whether a value could carry a gradient; containers count, so that the search passes through them."""
    found = value.meta.get("val")
    return not isinstance(found, torch.Tensor) or found.is_floating_point() or found.is_complex()


def _refuse_lost_no_grad(inner: fx.GraphModule) -> None:
    """Export drops the switches of gradients inside an autocast region; an empty region is what it leaves of one."""
    if all(node.op in ("placeholder", "output") for node in inner.graph.nodes):
        raise UnsupportedError(
            "gradients are switched off or on inside a torch.autocast region of the model, which torch.export loses",
            hint="put the autocast region inside torch.no_grad(), or use detach() in place of no_grad()",
        )


def _refuse_gradients_again(inner: fx.GraphModule) -> None:
    """A gradient that flows inside `no_grad` cannot be inlined."""
    for node in inner.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            continue
        if node.args[0] is True:
            raise UnsupportedError(
                f"gradients are enabled again inside a torch.no_grad() region{_where(node)}",
                hint="compute that part outside the no_grad region",
            )


def _refuse_hidden_writes(inner: fx.GraphModule, operands: list[Any]) -> None:
    """A write inside `no_grad`, which autograd would not see, cannot be inlined."""
    outside = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), operands, strict=True))
    for node in inner.graph.nodes:
        written = _written(node) if node.op == "call_function" else None
        if written is not None and _has_gradient(outside.get(_root(written))):
            raise UnsupportedError(
                f"a tensor from outside is changed in place inside torch.no_grad(){_where(node)}; autograd ignores "
                "that write, which a functional graph cannot express",
                hint="compute a new tensor instead of writing in place",
            )


def _written(node: fx.Node) -> fx.Node | None:
    """The tensor that a node changes in place, if it does."""
    if not isinstance(node.target, OpOverload) or node.target in _BOOKKEEPING:
        return None
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            return found if isinstance(found, fx.Node) else None
    return None


def _root(node: fx.Node) -> fx.Node:
    """The tensor whose storage `node` shares, through views."""
    while node.op == "call_function" and isinstance(node.target, OpOverload):
        aliases = any(r.alias_info is not None for r in node.target._schema.returns)
        source = node.args[0] if node.args else None
        if not aliases or not isinstance(source, fx.Node):
            return node
        node = source
    return node


def mutates(module: fx.GraphModule) -> bool:
    """Whether any node writes in place, or updates running statistics."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if _written(node) is not None:
            return True
        training = _RUNNING_STATISTICS.get(node.target)
        if training is not None and len(node.args) > training and node.args[training] and node.args[3] is not None:
            return True
    return False


def functionalize(program: ExportedProgram) -> ExportedProgram:
    """Replace in-place writes by new values; writes to buffers become outputs.

    Raises:
        UnsupportedError: A write through `detach()`, which autograd does not see.
    """
    for node in program.graph_module.graph.nodes:
        written = _written(node) if node.op == "call_function" else None
        if written is not None and _passes_detach(written):
            raise UnsupportedError(
                f"a tensor is changed in place through detach(){_where(node)}; autograd ignores that write, which a "
                "functional graph cannot express",
                hint="compute a new tensor instead of writing in place",
            )
    functional: ExportedProgram = program.run_decompositions({})
    return functional


def _passes_detach(node: fx.Node) -> bool:
    while isinstance(node.target, OpOverload) and node.args and isinstance(node.args[0], fx.Node):
        if node.target is aten.detach.default:
            return _root(node).op != "call_function" or not _is_fresh(_root(node))
        if not any(r.alias_info is not None for r in node.target._schema.returns):
            return False
        node = node.args[0]
    return False


def _is_fresh(node: fx.Node) -> bool:
    """Whether a tensor was made without reading another one, so that it has no gradient."""
    return not node.all_input_nodes


def where(node: fx.Node) -> str:
    """The model's source line of an exported node, for error messages."""
    return _where(node)


def _where(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    frames = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not frames:
        return ""
    own = [i for i in frames if "/torch/" not in lines[i] and _HERE not in lines[i]] or frames
    return "\nat " + " ".join(lines[own[-1] : own[-1] + 2])


__all__ = ["functionalize", "inline_regions", "mutates", "take_region", "where"]
