"""The joint graph: forward and backward of a program in one ATen graph, traced by AOTAutograd and imported.

Tracing runs on fake tensors and needs no process group: the backward of a layout operator is another one. Every
node is tagged with the forward node it came from; the tag reaches the backward too, so source lines, modules and
layouts carry over exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autosp_ir._torch_compat import describe_joint_value, trace_joint
from autosp_ir.capture.fx_import import Imported, import_fx
from autosp_ir.errors import AutoSPError, PassError, UnsupportedError
from autosp_ir.ir.graph import Graph, Node, Phase, Value
from autosp_ir.ir.infer import fake_of
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature, Stage
from autosp_ir.ir.types import ScalarType, Type, without_layout

_TAG = "autosp_forward_node"
_ASSERTIONS = ("aten._assert_async", "aten._assert_scalar", "aten._assert_tensor_metadata")
_HINT = "simplify the module at that line, or report it: the forward graph itself is valid"


class SharedOutputsError(Exception):
    """Some outputs share storage with an input or another output, so torch left them out of the backward.

    Args:
        positions: Their positions among the outputs.
    """

    def __init__(self, positions: Sequence[int]) -> None:
        super().__init__(positions)
        self.positions = list(positions)


def joint_program(forward: Program, module: fx.GraphModule, *, decompose: bool = False) -> Program:
    """Differentiate a forward program.

    Args:
        forward: A forward-stage program whose output is a flat tuple.
        module: `forward` as an executable FX graph, one node per IR node. Its meta is tagged.
        decompose: Trace with Inductor's decompositions.

    Returns:
        The joint program, with new placeholders for tangents and one gradient output per parameter and user input
        that requires one. Layouts of forward values are those of `forward` where a value is the same; others are
        left Invariant.

    Raises:
        SharedOutputsError: Outputs alias; give each of them storage of its own.
        PassError: torch cannot trace the backward. UnsupportedError: it traced something without IR meaning.
    """
    for node, exported in zip(forward.graph.nodes, module.graph.nodes, strict=True):
        exported.meta["custom"] = {**exported.meta.get("custom", {}), _TAG: node.name}
    traced, shared = _trace(forward, module, decompose)
    if shared:
        raise SharedOutputsError(shared)
    return _JointImport(forward, module, traced).run()


def _trace(forward: Program, module: fx.GraphModule, decompose: bool) -> tuple[fx.GraphModule, list[int]]:
    specs = {s.name: s for s in forward.signature.inputs}
    try:
        with forward.fake_mode:
            inputs = [_fake_input(n, specs.get(n.name), forward) for n in forward.graph.inputs]
        return trace_joint(module, inputs, forward.fake_mode, decompose=decompose)
    except AutoSPError:
        raise
    except Exception as error:  # any torch failure becomes a named error
        raise PassError(
            f"the backward cannot be traced: {type(error).__name__}: {error}", pass_name="differentiate", hint=_HINT
        ) from error


def _fake_input(node: Node, spec: InputSpec | None, forward: Program) -> Any:
    """A fake leaf with the strides that were recorded for the input, if its type is still the same."""
    made = fake_of(node.result.type, forward.fake_mode)
    if not isinstance(made, Tensor):
        return made
    recorded = node.meta.get("val")
    if isinstance(recorded, Tensor) and recorded.shape == made.shape and recorded.layout is torch.strided:
        made = torch.empty_strided(made.shape, recorded.stride(), dtype=made.dtype, device=made.device)
    differentiable = made.is_floating_point() or made.is_complex()
    return made.requires_grad_(spec is not None and spec.requires_grad and differentiable)


class _JointImport:
    """Imports one traced joint graph."""

    def __init__(self, forward: Program, module: fx.GraphModule, traced: fx.GraphModule) -> None:
        self._forward = forward
        self._module = module
        self._traced = traced
        self._by_name = {n.name: n for n in forward.graph.nodes}
        self._tensors: dict[str, Tensor] = {}

    def run(self) -> Program:
        imported = import_fx(self._traced.graph, self._traced)
        sources = self._take_tags(imported)
        signature = Signature(self._inputs(imported), self._outputs(imported))
        _erase_assertions(imported.graph)
        _erase_detaches(imported.graph)
        imported.graph.dead_code()
        _set_phases(imported.graph, signature)
        self._set_origins(imported.graph, sources)
        self._set_layouts(imported.graph, signature, sources)
        return self._program(imported, signature)

    def _program(self, imported: Imported, signature: Signature) -> Program:
        forward = self._forward
        joint = Program(imported.graph, signature, Stage.JOINT, forward.mesh)
        joint.tensors = {**forward.tensors, **self._tensors}
        joint.attrs = imported.attrs
        joint.facts = set(forward.facts)
        joint.info = dict(forward.info)
        joint.capture = forward.capture
        joint.fake_mode = forward.fake_mode
        return joint

    def _take_tags(self, imported: Imported) -> dict[Node, Node]:
        """Joint node -> the forward node it came from; takes the tags out of the meta."""
        sources: dict[Node, Node] = {}
        for node in imported.graph.nodes:
            custom = node.meta.get("custom")
            if not isinstance(custom, Mapping) or _TAG not in custom:
                continue
            rest = {k: v for k, v in custom.items() if k != _TAG}
            node.meta = {**{k: v for k, v in node.meta.items() if k != "custom"}, **({"custom": rest} if rest else {})}
            sources[node] = self._by_name[custom[_TAG]]
        return sources

    # Signature --------------------------------------------------------------------------------------------------

    def _inputs(self, imported: Imported) -> list[InputSpec]:
        specs = []
        for node in imported.graph.inputs:
            described = describe_joint_value(node.meta.pop("desc", None))
            name, kind, target, wanted = self._input(described, node)
            imported.graph.rename(node.result, name)
            specs.append(InputSpec(node.name, kind, target, wanted))
        return specs

    def _input(self, described: tuple[str, Any], node: Node) -> tuple[str, InputKind, str, bool]:
        if described[0] == "tangent" and described[1][0] == "output":
            target = self._forward.signature.outputs[described[1][1]].target
            return f"tangent_{target}", InputKind.TANGENT, target, False
        if described[0] in ("input", "attribute"):
            spec = self._source(described)
            return spec.name, spec.kind, spec.target, spec.requires_grad
        raise UnsupportedError(
            f"torch traced an input of kind {described} that has no meaning in the IR", node=node, hint=_HINT
        )

    def _source(self, described: tuple[str, Any]) -> InputSpec:
        """The input spec of a described input of the traced call."""
        kind, target = described
        if kind == "input":
            spec: InputSpec = self._forward.signature.inputs[target]
            return spec
        if kind != "attribute":
            raise UnsupportedError(f"torch traced a gradient or mutation of {described}", hint=_HINT)
        tensor = _attribute(self._module, target)
        self._tensors[target] = tensor
        if isinstance(tensor, torch.nn.Parameter):
            return InputSpec(target, InputKind.PARAMETER, target, tensor.requires_grad)
        return InputSpec(target, InputKind.BUFFER, target)

    def _outputs(self, imported: Imported) -> list[OutputSpec]:
        """Specs of the outputs; drops the Nones that stand for gradients nobody asked for."""
        node = imported.graph.output_node
        kept: list[Any] = []
        specs: list[OutputSpec] = []
        leaves = list(node.args[0])
        for leaf, descriptor in zip(leaves, node.meta.pop("desc", [None] * len(leaves)), strict=True):
            described = describe_joint_value(descriptor)
            if leaf is None and described[0] != "output":
                continue
            kept.append(leaf)
            specs.append(self._output(described, node))
        order = sorted(range(len(specs)), key=lambda i: specs[i].kind is OutputKind.GRADIENT)
        node.set_args((tuple(kept[i] for i in order),))
        return [specs[i] for i in order]

    def _output(self, described: tuple[str, Any], node: Node) -> OutputSpec:
        kind, target = described
        if kind == "output":
            returned: OutputSpec = self._forward.signature.outputs[target]
            return returned
        if kind in ("gradient", "mutation"):
            spec = self._source(target)
            if kind == "gradient":
                return OutputSpec(f"grad of {spec.target}", OutputKind.GRADIENT, spec.target)
            if spec.kind is InputKind.BUFFER:
                return OutputSpec(spec.target, OutputKind.BUFFER_MUTATION, spec.target)
        raise UnsupportedError(
            f"torch traced an output of kind {described} that has no meaning in the IR",
            node=node,
            hint="a forward may write buffers only, not its inputs",
        )

    # Origins and layouts ----------------------------------------------------------------------------------------

    def _set_origins(self, graph: Graph, sources: Mapping[Node, Node]) -> None:
        for node in graph.nodes:
            if node in sources:
                node.origin = sources[node].origin
            elif node.op.kind == "placeholder":
                known = self._by_name.get(node.name)
                node.origin = known.origin if known is not None else node.origin
            if node.phase is Phase.BACKWARD:
                node.origin = node.origin.touched_by("differentiate")

    def _set_layouts(self, graph: Graph, signature: Signature, sources: Mapping[Node, Node]) -> None:
        for spec in signature.inputs:
            node = graph.value(spec.name).producer
            known = self._by_name.get(spec.name)
            if known is not None and _same(known.result.type, node.result.type):
                node.result.type = known.result.type
        last: dict[Node, Node] = {}
        for node in graph.nodes:
            source = sources.get(node)
            if source is None or node.phase is not Phase.FORWARD or not source.results or not node.results:
                continue
            if _same(source.result.type, node.result.type):
                last[source] = node
        for source, node in last.items():
            node.result.type = source.result.type


def _same(one: Type, other: Type) -> bool:
    return without_layout(one) == without_layout(other)


def _attribute(module: fx.GraphModule, path: str) -> Tensor:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    tensor: Tensor = found
    return tensor


def _erase_assertions(graph: Graph) -> None:
    """Checks of values that decompositions add, such as of class ids; capture drops the model's own alike."""
    for node in list(graph.nodes):
        if node.op.name.startswith(_ASSERTIONS) and not node.result.uses:
            graph.erase(node)


def _erase_detaches(graph: Graph) -> None:
    """A detach says nothing in a graph that is not differentiated again."""
    for node in list(graph.nodes):
        if node.is_op("aten.detach"):
            node.result.replace_all_uses_with(node.operands[0])
            graph.erase(node)


def _set_phases(graph: Graph, signature: Signature) -> None:
    """Forward is what the forward's outputs need, and what a backward could only pay for.

    A result of a forward node's tuple is forward too, as are sizes, which are free to keep, and random operations,
    whose order is part of their meaning.
    """
    inputs = {s.name: s.kind for s in signature.inputs}
    needed: set[Node] = set()
    dependent: set[Node] = set()
    for node in graph.nodes:
        tangent = node.op.kind == "placeholder" and inputs[node.name] is InputKind.TANGENT
        if tangent or any(v.producer in dependent for v in node.operands):
            dependent.add(node)
    leaves = graph.output_node.args[0]
    stack = [
        leaf.producer
        for leaf, spec in zip(leaves, signature.outputs, strict=True)
        if isinstance(leaf, Value) and spec.kind is not OutputKind.GRADIENT
    ]
    stack += [n for n in graph.nodes if n not in dependent and n.results and _belongs_to_forward(n)]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(v.producer for v in node.operands)
    for node in graph.nodes:
        if node.op.kind == "placeholder":
            forward = node not in dependent
        elif node.is_op("operator.getitem") and node.operands:
            forward = node.operands[0].producer.phase is Phase.FORWARD
        else:
            forward = node in needed
        node.phase = Phase.FORWARD if forward else Phase.BACKWARD


def _belongs_to_forward(node: Node) -> bool:
    return isinstance(node.result.type, ScalarType) or bool(node.op.traits & {Trait.RANDOM, Trait.MUTATES})


__all__ = ["SharedOutputsError", "joint_program"]
