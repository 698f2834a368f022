"""Operation definitions: what an IR node does, independent of where it stands.

Every ATen overload gets its `OpDef` on first use, with traits derived from its schema and tags. A target that is
not an operator overload (a builtin, a method, a submodule call) gets an opaque `OpDef`.
"""

from __future__ import annotations

import difflib
import enum
import importlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from autosp_ir._torch_compat import HigherOrderOperator, OpOverload, OpOverloadPacket, is_tensor_method
from autosp_ir.errors import AutoSPError

if TYPE_CHECKING:
    from autosp_ir.ir.graph import Node
    from autosp_ir.ir.types import Type


class Trait(enum.Enum):
    """What passes may assume of an operation."""

    PURE = "pure"
    RANDOM = "random"
    VIEW = "view"
    MUTATES = "mutates"
    COLLECTIVE = "collective"
    READS_RANK = "reads-rank"
    POINTWISE = "pointwise"
    ATTENTION = "attention"
    IDENTITY = "identity"


@dataclass(eq=False)
class OpDef:
    """The definition of an operation; one shared object per operation, extended in place by `extend_op`.

    Args:
        name: Its name in IR text, such as `aten.view` or `autosp.all_to_all`.
        target: The FX target it exports to: an operator overload, which stays whole through `differentiate`, or a
            Python function over tensors, which `differentiate` traces through.
        kind: The FX node kind: placeholder, get_attr, call_function, call_method, call_module, output.
        traits: What passes may assume; a promise that nothing checks. POINTWISE also gives it a layout rule.
        infer: Result type from the node; None runs `target` on fake tensors.
        layout_rule: Result placement from operand placements; None means "whole operands only", unless it is
            POINTWISE. `air.layout_rule` sets it.
        evaluate: Computes the node from concrete operands; None calls `target`.
        cost: Floating-point operations and bytes; None means unknown.
        workspace: Bytes that a node needs on any device beside its operands and results, given the node and whether a
            compiler fuses the program; None means none.
    """

    name: str
    target: Any
    kind: str = "call_function"
    traits: frozenset[Trait] = frozenset()
    infer: Callable[[Node], Type] | None = None
    layout_rule: Callable[..., Any] | None = None
    evaluate: Callable[..., Any] | None = None
    cost: Callable[[Node], Mapping[str, float]] | None = None
    workspace: Callable[[Node, bool], int] | None = None

    def has(self, trait: Trait) -> bool:
        """Whether the operation has `trait`."""
        return trait in self.traits

    @property
    def schema(self) -> torch.FunctionSchema | None:
        """The torch schema, for operator overloads."""
        return self.target._schema if isinstance(self.target, OpOverload) else None

    @property
    def short_name(self) -> str:
        """The name without namespace and overload, for naming results: `view` for `aten.view`."""
        parts = self.name.split(".")
        return parts[1] if self.schema is not None else parts[-1]

    def __repr__(self) -> str:
        return f"OpDef({self.name})"


_by_name: dict[str, OpDef] = {}
_by_target: dict[tuple[str, Any], OpDef] = {}
_COLLECTIVE_NAMESPACES = ("_c10d_functional", "c10d_functional", "_dtensor")
_AUTOSP_TRAITS = {
    "invariant_to_replicate": {Trait.PURE, Trait.IDENTITY},
    "shard": {Trait.PURE, Trait.READS_RANK},
    "axis_index": {Trait.PURE, Trait.READS_RANK},
    "all_gather": {Trait.COLLECTIVE},
    "reduce_scatter": {Trait.COLLECTIVE},
    "all_reduce": {Trait.COLLECTIVE},
    "all_to_all": {Trait.COLLECTIVE},
    "permute": {Trait.COLLECTIVE},
    "attention": {Trait.PURE, Trait.ATTENTION},
    "attention_backward": {Trait.PURE, Trait.ATTENTION},
    "attention_bias_backward": {Trait.PURE, Trait.ATTENTION},
    "random_state": {Trait.RANDOM},
}


def _overload_name(target: OpOverload) -> str:
    namespace, _, base = target._schema.name.partition("::")
    suffix = f".{target._overloadname}" if target._overloadname != "default" else ""
    return f"{namespace}.{base}{suffix}"


def name_of_target(target: Any, kind: str) -> str:
    """The IR name of an FX target."""
    if kind in ("placeholder", "get_attr", "output"):
        return kind
    if kind == "call_method":
        return f"method.{target}"
    if kind == "call_module":
        return f"module.{target}"
    if isinstance(target, OpOverload):
        return _overload_name(target)
    if isinstance(target, HigherOrderOperator):
        return f"hop.{target.name()}"
    if isinstance(target, OpOverloadPacket):
        return f"torch.ops.{target}"
    module = getattr(target, "__module__", None) or "builtins"
    qualified = getattr(target, "__qualname__", getattr(target, "__name__", repr(target)))
    if module in ("_operator", "operator"):
        return f"operator.{qualified}"
    if module == "torch":
        # Builtins of torch say they live in a class that torch does not export.
        return f"torch.{qualified.removeprefix('_VariableFunctionsClass.')}"
    if is_tensor_method(target):
        return f"torch.Tensor.{target.__name__}"
    return f"{module}.{qualified}"


def _traits_of(target: Any, kind: str) -> frozenset[Trait]:
    if target is operator.getitem:
        return frozenset({Trait.PURE})
    if not isinstance(target, OpOverload):
        known_pure = kind in ("placeholder", "get_attr") or getattr(target, "__module__", "") in ("_operator", "math")
        return frozenset({Trait.PURE} if known_pure else ())
    schema = target._schema
    if target.namespace == "autosp":
        return frozenset(_AUTOSP_TRAITS.get(schema.name.partition("::")[2], {Trait.PURE}))
    traits = set()
    if torch.Tag.nondeterministic_seeded in target.tags:
        traits.add(Trait.RANDOM)
    if torch.Tag.pointwise in target.tags:
        traits.add(Trait.POINTWISE)
    if schema.is_mutable:
        traits.add(Trait.MUTATES)
    elif any(r.alias_info is not None for r in schema.returns):
        traits.add(Trait.VIEW)
    if target.namespace in _COLLECTIVE_NAMESPACES:
        traits.add(Trait.COLLECTIVE)
    if not schema.returns or traits & {Trait.RANDOM, Trait.MUTATES, Trait.COLLECTIVE}:
        return frozenset(traits)
    return frozenset(traits | {Trait.PURE})


def op_for_target(target: Any, kind: str = "call_function") -> OpDef:
    """The `OpDef` of an FX target, made from its schema on first use."""
    key = (kind, target) if kind not in ("placeholder", "get_attr", "output") else (kind, None)
    found = _by_target.get(key)
    if found is not None:
        return found
    name = name_of_target(target, kind)
    made = OpDef(name, target if key[1] is not None else None, kind, _traits_of(target, kind))
    _by_target[key] = made
    _by_name.setdefault(name, made)
    return made


def register_op(op: OpDef) -> OpDef:
    """Register an operation under its name and target.

    Run again in the same notebook cell, it replaces what it registered before.

    Raises:
        AutoSPError: The name was registered before with another definition.
    """
    known = _by_name.get(op.name)
    if known is not None and known is not op and not _same_notebook_cell(known.target, op.target):
        raise AutoSPError(
            f"an operation named {op.name!r} is registered already",
            hint="choose another name; air.layout_rule(name) gives an operation that exists its layout rule",
        )
    _by_name[op.name] = op
    _by_target[(op.kind, op.target)] = op
    return op


def _same_notebook_cell(known: Any, new: Any) -> bool:
    """Whether `new` is the function `known` defined again, as when a notebook cell is run twice."""
    names = [(getattr(f, "__module__", None), getattr(f, "__qualname__", None)) for f in (known, new)]
    return names[0] == names[1] and names[0][0] == "__main__" and names[0][1] is not None


def extend_op(target: Any, **fields: Any) -> OpDef:
    """Set fields (traits, layout_rule, infer, evaluate, cost) of the `OpDef` of a call_function target."""
    op = op_for_target(target)
    for field, value in fields.items():
        setattr(op, field, value)
    return op


def attach_layout_rule(target: Any, rule: Callable[..., Any]) -> None:
    """Give the operation of an FX target its layout rule."""
    extend_op(target, layout_rule=rule)


def op_by_name(name: str) -> OpDef:
    """Resolve an IR name to its operation, looking torch operators up on demand.

    Raises:
        AutoSPError: No such operation; the message names the closest one.
    """
    found = _by_name.get(name)
    if found is not None:
        return found
    target, kind = _resolve(name)
    if kind is None:
        close = difflib.get_close_matches(name, _known_names(name), n=1, cutoff=0.5)
        own = "an operation of your own is registered with air.register_op"
        suggestion = f"did you mean {close[0]!r}? {own.capitalize()}" if close else own
        raise AutoSPError(f"unknown operation {name!r}", hint=suggestion)
    return op_for_target(target, kind)


def _known_names(name: str) -> list[str]:
    namespace, _, rest = name.partition(".")
    overloads = overload_names(namespace, rest.partition(".")[0]) if rest else overload_names("aten", namespace)
    if overloads:
        return overloads
    packets = vars(getattr(torch.ops, namespace, None) or object)
    packet_names = [f"{namespace}.{n}" for n, packet in packets.items() if isinstance(packet, OpOverloadPacket)]
    return sorted({*_by_name, *packet_names})


def overload_names(namespace: str, base: str, *, tensors: bool = False) -> list[str]:
    """The IR names of a torch operator's overloads, the default one first; empty when there is no such operator.

    Args:
        namespace: Such as `aten`.
        base: The operator's name without namespace and overload.
        tensors: Only those that take a tensor and write to none.
    """
    packet = getattr(getattr(torch.ops, namespace, None), base, None)
    if not isinstance(packet, OpOverloadPacket):
        return []
    found = [getattr(packet, overload) for overload in packet.overloads()]
    return sorted(_overload_name(f) for f in found if not tensors or _takes_tensors(f._schema))


def _takes_tensors(schema: torch.FunctionSchema) -> bool:
    return not schema.is_mutable and any("Tensor" in str(a.type) for a in schema.arguments)


def _resolve(name: str) -> tuple[Any, str | None]:
    if name in ("placeholder", "get_attr", "output"):
        return name, name
    head, _, rest = name.partition(".")
    if head == "method":
        return rest, "call_method"
    if head == "module":
        return rest, "call_module"
    if head == "hop":
        found = getattr(torch.ops.higher_order, rest, None)
        return found, "call_function" if found is not None else None
    if head == "operator":
        found = getattr(operator, rest, None)
        return found, "call_function" if found is not None else None
    overload = _resolve_overload(head, rest)
    if overload is not None:
        return overload, "call_function"
    return _resolve_python(name)


def _resolve_overload(namespace: str, rest: str) -> Any:
    base, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace, None), base, None)
    if not isinstance(packet, OpOverloadPacket):
        return None
    return getattr(packet, overload or "default", None)


def _resolve_python(name: str) -> tuple[Any, str | None]:
    module_name, _, attribute = name.rpartition(".")
    while module_name:
        try:
            found: Any = importlib.import_module(module_name)
        except ImportError:
            module_name, _, head = module_name.rpartition(".")
            attribute = f"{head}.{attribute}"
            continue
        for part in attribute.split("."):
            found = getattr(found, part, None)
        return found, "call_function" if found is not None else None
    return None, None
