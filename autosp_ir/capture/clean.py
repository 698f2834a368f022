"""From an exported program to a plain flat graph: one placeholder per tensor, nothing dead, asserted or idle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind as ExportInput
from torch.export.graph_signature import OutputKind as ExportOutput

from autosp_ir._torch_compat import OpOverload
from autosp_ir.capture.regions import where
from autosp_ir.errors import CaptureError, UnsupportedError
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec

aten = torch.ops.aten

_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"}
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_REPRODUCED = {aten.bernoulli.p, aten.scaled_dot_product_attention.default, aten.native_dropout.default}
_CASTS = {"to", "type_as"}
_SAME = {"alias", "lift_fresh_copy", "lift_fresh", "lift"}
_PREFIX = "model."
_HERE = str(Path(__file__).parent)


@dataclass
class CleanGraph:
    """A flat graph with the meaning of its placeholders and outputs.

    Attributes:
        module: The graph module; parameters and buffers are placeholders.
        inputs: One entry per placeholder.
        outputs: One entry per element of the output tuple.
        tensors: Parameters, buffers and constants by name.
    """

    module: fx.GraphModule
    inputs: list[InputSpec]
    outputs: list[OutputSpec]
    tensors: dict[str, Tensor]


def clean(
    program: ExportedProgram, model: nn.Module, user_inputs: list[tuple[str, bool]], outputs: list[str]
) -> CleanGraph:
    """Rebuild an exported graph.

    Args:
        program: Export of a wrapper whose attribute `model` is the model, regions inlined, mutation functional.
        model: The model, for canonical names: tied weights get one placeholder under the first name.
        user_inputs: Name and whether a gradient is wanted, in order.
        outputs: Names of the user outputs, in order.

    Raises:
        UnsupportedError: A random operator is active, or an input of the model is written to.
        CaptureError: A recorded check does not hold, or a shape depends on values.
    """
    return _Cleaner(program, model, user_inputs, outputs).run()


class _Cleaner:
    def __init__(
        self, program: ExportedProgram, model: nn.Module, user_inputs: list[tuple[str, bool]], outputs: list[str]
    ) -> None:
        self.program = program
        self.model = model
        self.user_inputs = user_inputs
        self.user_outputs = outputs
        self.graph = fx.Graph()
        self.mapping: dict[fx.Node, Any] = {}
        self.inputs: list[InputSpec] = []
        self.tensors: dict[str, Tensor] = {}
        self.canonical = _canonical_names(model)

    def run(self) -> CleanGraph:
        nodes = list(self.program.graph_module.graph.nodes)
        live = _live(nodes)
        self._placeholders([n for n in nodes if n.op == "placeholder"])
        for node in nodes:
            if _operator_name(node) in _CHECKS:
                _check_metadata(node)
            elif node in live and node.op not in ("placeholder", "output"):
                self._copy(node)
        outputs = self._output(next(n for n in nodes if n.op == "output"))
        self._drop_dead()
        module = fx.GraphModule(self.program.graph_module, self.graph)
        return CleanGraph(module, self.inputs, outputs, self.tensors)

    def _placeholders(self, nodes: list[fx.Node]) -> None:
        by_tensor: dict[str, fx.Node] = {}
        users = iter(self.user_inputs)
        for node, spec in zip(nodes, self.program.graph_signature.input_specs, strict=True):
            if spec.kind is ExportInput.USER_INPUT:
                name, wanted = next(users)
                self._placeholder(node, name, InputSpec("", InputKind.USER_INPUT, name, wanted))
                continue
            if spec.kind not in (ExportInput.PARAMETER, ExportInput.BUFFER, ExportInput.CONSTANT_TENSOR):
                raise CaptureError(
                    f"the captured graph has an input of kind {spec.kind.name} ({spec.target})",
                    hint="keep script objects and effect tokens out of the model's forward",
                )
            self._tensor(node, spec, by_tensor)

    def _tensor(self, node: fx.Node, spec: Any, by_tensor: dict[str, fx.Node]) -> None:
        name = str(spec.target).removeprefix(_PREFIX)
        if spec.kind is ExportInput.CONSTANT_TENSOR:
            tensor = self.program.constants[spec.target]
            self.tensors[name] = tensor
            self._placeholder(node, "c_" + name, InputSpec("", InputKind.CONSTANT, name))
            return
        name = self.canonical[name]
        if name in by_tensor:
            self.mapping[node] = by_tensor[name]
            return
        parameter = spec.kind is ExportInput.PARAMETER
        tensor = _lookup(self.model, name)
        kind = InputKind.PARAMETER if parameter else InputKind.BUFFER
        hint = ("p_" if parameter else "b_") + name
        by_tensor[name] = self._placeholder(node, hint, InputSpec("", kind, name, parameter and tensor.requires_grad))
        self.tensors[name] = tensor

    def _placeholder(self, node: fx.Node, hint: str, spec: InputSpec) -> fx.Node:
        name = "".join(c if c.isalnum() else "_" for c in hint)
        made = self.graph.create_node("placeholder", name, name=name)
        made.meta = dict(node.meta)
        self.mapping[node] = made
        self.inputs.append(InputSpec(made.name, spec.kind, spec.target, spec.requires_grad))
        return made

    def _copy(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            raise CaptureError(f"the captured graph refers to {node.target}", hint="register it as a buffer")
        operator = _operator_name(node)
        _refuse_random(node)
        source = _identity_source(node, operator)
        if source is not None:
            self.mapping[node] = self.mapping[source]
            return
        if operator == "copy":
            self.mapping[node] = self._written_values(node)
            return
        _refuse_value_dependent_shape(node)
        made = self.graph.node_copy(node, lambda n: self.mapping[n])
        if operator == "detach_":
            made.target = aten.detach.default
        made.meta["nn_module_stack"] = _without_prefix(node.meta.get("nn_module_stack") or {})
        made.meta["stack_trace"] = _without_capture_frames(node.meta.get("stack_trace") or "")
        self.mapping[node] = made

    def _written_values(self, node: fx.Node) -> fx.Node:
        """What `target.copy_(source)` leaves in the target: the source, cast and broadcast; torch cannot derive it."""
        target, source = node.all_input_nodes[0], node.all_input_nodes[-1]
        wanted = node.meta["val"]
        made: fx.Node = self.mapping[source]
        if source.meta["val"].dtype != wanted.dtype:
            made = self.graph.call_function(aten._to_copy.default, (made,), {"dtype": wanted.dtype})
            made.meta = {**node.meta, "val": source.meta["val"].to(wanted.dtype)}
        if source.meta["val"].shape != wanted.shape:
            made = self.graph.call_function(aten.expand_as.default, (made, self.mapping[target]))
            made.meta = dict(node.meta)
        return made

    def _output(self, node: fx.Node) -> list[OutputSpec]:
        specs: list[OutputSpec] = []
        users = iter(self.user_outputs)
        for spec in self.program.graph_signature.output_specs:
            target = str(spec.target).removeprefix(_PREFIX)
            if spec.kind is ExportOutput.USER_OUTPUT:
                name = next(users)
                specs.append(OutputSpec(name, OutputKind.USER_OUTPUT, name))
            elif spec.kind is ExportOutput.BUFFER_MUTATION:
                target = self.canonical.get(target, target)
                specs.append(OutputSpec(f"new {target}", OutputKind.BUFFER_MUTATION, target))
            else:
                raise UnsupportedError(
                    f"the model writes to {target or 'one of its inputs'} in its forward",
                    hint="clone the tensor before changing it",
                )
        returned: Any = node.args[0]
        made = self.graph.output(tuple(self.mapping[n] for n in returned))
        made.meta = dict(node.meta)
        return specs

    def _drop_dead(self) -> None:
        live = _live(list(self.graph.nodes))
        for node in reversed(list(self.graph.nodes)):
            if node not in live:
                self.graph.erase_node(node)


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every parameter and buffer name to the first name of the same tensor, as `named_parameters()` reports it."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for iterate in (model.named_parameters, model.named_buffers):
        for name, tensor in iterate(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names


def _lookup(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), attribute)
    return found


def _live(nodes: list[fx.Node]) -> set[fx.Node]:
    """Placeholders, the output, and what they read."""
    live: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op in ("placeholder", "output") or node in live:
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def _operator_name(node: fx.Node) -> str:
    if isinstance(node.target, OpOverload) and node.target.namespace == "aten":
        return node.target._schema.name.partition("::")[2]
    return ""


def _argument(node: fx.Node, *names: str) -> Any:
    """An argument of an operator by schema name; None when the operator has none of that name."""
    if not isinstance(node.target, OpOverload):
        return None
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name not in names:
            continue
        if argument.name in node.kwargs:
            return node.kwargs[argument.name]
        if position < len(node.args) and not argument.kwarg_only:
            return node.args[position]
        return argument.default_value
    return None


def _check_metadata(node: fx.Node) -> None:
    """The dtype and device that export asserted are those of the traced value; anything else is a torch bug."""
    tensor = node.args[0]
    value = tensor.meta.get("val") if isinstance(tensor, fx.Node) else None
    if not isinstance(value, Tensor):
        return
    for attribute in ("dtype", "device"):
        wanted = node.kwargs.get(attribute)
        if wanted is not None and wanted != getattr(value, attribute):
            raise CaptureError(
                f"export recorded {attribute} {wanted} for a tensor of {attribute} {getattr(value, attribute)}"
                f"{where(node)}",
                hint="move the model and the batch to one device before capturing",
            )


def _identity_source(node: fx.Node, operator: str) -> fx.Node | None:
    """The operand that `node` returns unchanged, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if operator in _SAME or (operator in _DROPOUTS and _draws_nothing(node)):
        return source
    if node.target is getitem and _operator_name(source) == "broadcast_tensors":
        return _unless_broadcast(node, source)
    if operator in _CASTS and not _argument(node, "copy") and _argument(node, "memory_format") is None:
        before, after = source.meta.get("val"), node.meta.get("val")
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            return source if (before.dtype, before.device) == (after.dtype, after.device) else None
    return None


def _unless_broadcast(node: fx.Node, broadcast: fx.Node) -> fx.Node | None:
    """The tensor that one result of `broadcast_tensors` is, if it had the common shape before."""
    tensors: Any = broadcast.args[0]
    tensor: fx.Node = tensors[node.args[1]]
    return tensor if tensor.meta["val"].shape == node.meta["val"].shape else None


def _refuse_random(node: fx.Node) -> None:
    """A random number that the parallel program could not reproduce; dropout is what `canonicalize` makes exact."""
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return
    if (
        target.namespace == "autosp"
        or _operator_name(node) in _DROPOUTS
        or target in _REPRODUCED
        or _draws_nothing(node)
    ):
        return
    stack = _without_prefix(node.meta.get("nn_module_stack") or {})
    module = next((path for path, _ in reversed(list(stack.values())) if path), "the model")
    raise UnsupportedError(
        f"{target} in {module} draws random numbers, which ranks would draw differently{where(node)}",
        hint="draw it outside the model and pass it in, or call model.eval() before capturing; dropout may be active",
    )


def _draws_nothing(node: fx.Node) -> bool:
    """Whether a random operation is switched off."""
    return _argument(node, "train", "training") is False or _argument(node, "p", "dropout_p", "dropout") == 0


def _refuse_value_dependent_shape(node: fx.Node) -> None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return
    extents: list[Any] = list(value.shape)
    free = {s for d in extents if isinstance(d, torch.SymInt) for s in d.node.expr.free_symbols}
    if any(str(s).startswith(("u", "zu")) for s in free):
        raise CaptureError(
            f"the shape of {node.target} depends on the values of its operands{where(node)}",
            hint="use torch.where or a mask instead of indexing with a bool tensor, nonzero or unique",
        )


def _without_prefix(stack: Mapping[str, Any]) -> dict[str, Any]:
    """Module stack entries as seen from the model: the capture's own wrapper is taken out."""
    cleaned: dict[str, Any] = {}
    for key, (path, kind) in stack.items():
        if path == "":
            continue
        cleaned[key] = (path.removeprefix(_PREFIX) if path != "model" else "", kind)
    return cleaned


def _without_capture_frames(trace: str) -> str:
    """A stack trace without the frames of the capture itself, so that the last one is the model's."""
    kept: list[str] = []
    skipping = False
    for line in trace.splitlines():
        if line.lstrip().startswith("File "):
            skipping = f'"{_HERE}' in line
        if not skipping:
            kept.append(line)
    return "\n".join(kept)


__all__ = ["CleanGraph", "clean"]
