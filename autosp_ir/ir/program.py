"""A program: a graph with its signature, its stage and the mesh it is written for."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch.fx.experimental.symbolic_shapes import ShapeEnv

from autosp_ir._torch_compat import FakeTensorMode
from autosp_ir.errors import AutoSPError
from autosp_ir.ir.graph import Graph, Node
from autosp_ir.ir.infer import infer_type
from autosp_ir.ir.types import Type

if TYPE_CHECKING:
    import networkx as nx
    from graphviz import Digraph
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.fx import GraphModule

    from autosp_ir.viz.dot import Drawing


class Stage(enum.StrEnum):
    """How far a program has been taken."""

    FORWARD = "forward"
    JOINT = "joint"
    LOWERED = "lowered"


class InputKind(enum.StrEnum):
    """What a placeholder stands for."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    USER_INPUT = "input"
    TANGENT = "tangent"
    SAVED = "saved"


class OutputKind(enum.StrEnum):
    """What an element of the output tuple stands for."""

    USER_OUTPUT = "output"
    GRADIENT = "gradient"
    BUFFER_MUTATION = "mutation"
    SAVED = "saved"


@dataclass(frozen=True)
class InputSpec:
    """One placeholder.

    Args:
        name: The placeholder's value name.
        kind: What it stands for.
        target: The canonical parameter or buffer name, the user input's name, or the output a tangent belongs to.
        requires_grad: Whether a gradient is wanted (parameters and inputs).
    """

    name: str
    kind: InputKind
    target: str
    requires_grad: bool = False


@dataclass(frozen=True)
class OutputSpec:
    """One element of the output tuple.

    Args:
        name: A readable name ("loss", "grad of lm_head.weight").
        kind: What it stands for.
        target: The output's own name, the parameter or input a gradient belongs to, or the mutated buffer.
    """

    name: str
    kind: OutputKind
    target: str


@dataclass
class Signature:
    """Inputs in placeholder order and outputs in output order."""

    inputs: list[InputSpec] = field(default_factory=list)
    outputs: list[OutputSpec] = field(default_factory=list)

    def copy(self) -> Signature:
        """A copy that can be edited."""
        return Signature(list(self.inputs), list(self.outputs))

    def input(self, kind: InputKind, target: str) -> InputSpec | None:
        """The input of a kind and target, or None."""
        return next((i for i in self.inputs if i.kind is kind and i.target == target), None)


class Program:
    """A graph, what its inputs and outputs mean, and the mesh it is written for.

    Attributes:
        graph: The dataflow graph.
        signature: Meaning of placeholders and outputs.
        stage: forward, joint or lowered.
        mesh: Mesh axis sizes; empty while the program is written for one device.
        tensors: Parameters, buffers and constants by name, by reference; never printed.
        attrs: Targets of `get_attr` nodes: nested graphs or objects.
        facts: What passes have established, such as `"token-partitioned"`.
        info: JSON-able facts that later passes need; printed in the header.
        capture: How the program was captured; None for programs from text or from plain graphs.
    """

    def __init__(
        self,
        graph: Graph,
        signature: Signature | None = None,
        stage: Stage = Stage.FORWARD,
        mesh: dict[str, int] | None = None,
    ) -> None:
        self.graph = graph
        self.signature = signature or Signature()
        self.stage = stage
        self.mesh: dict[str, int] = dict(mesh or {})
        self.tensors: dict[str, Tensor] = {}
        self.attrs: dict[str, Any] = {}
        self.facts: set[str] = set()
        self.info: dict[str, Any] = {}
        self.capture: Any = None
        self._fake_mode: FakeTensorMode | None = None

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The fake-tensor mode that owns this program's symbols; made on first use."""
        if self._fake_mode is None:
            self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        return self._fake_mode

    @fake_mode.setter
    def fake_mode(self, mode: FakeTensorMode) -> None:
        self._fake_mode = mode

    def infer(self, node: Node) -> Type:
        """The node's result type by its operation's fake kernel, layouts left Invariant."""
        return infer_type(node, self.fake_mode)

    def find(self, op_name: str) -> list[Node]:
        """Every node whose operation is called `op_name`, in order; nested graphs are not searched."""
        return [n for n in self.graph.nodes if n.op.name == op_name]

    def clone(self) -> Program:
        """A copy whose graph can be rewritten; tensors, nested objects and capture info are shared."""
        graph, _ = self.graph.clone()
        copy = Program(graph, self.signature.copy(), self.stage, self.mesh)
        copy.tensors = dict(self.tensors)
        copy.attrs = {k: v.clone()[0] if isinstance(v, Graph) else v for k, v in self.attrs.items()}
        copy.facts = set(self.facts)
        copy.info = _copied(self.info)
        copy.capture = self.capture
        copy._fake_mode = self._fake_mode
        return copy

    def bind(self, module: nn.Module) -> Program:
        """Bind parameters and buffers by name and return this program.

        Raises:
            AutoSPError: The module lacks one of them, or its shape or dtype differs.
        """
        available = {**dict(module.named_buffers()), **dict(module.named_parameters())}
        for spec in self.signature.inputs:
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
                continue
            tensor = available.get(spec.target)
            if tensor is None:
                raise AutoSPError(
                    f"the module has no {spec.kind} called {spec.target!r}",
                    hint=f"bind the module that this program was captured from; it has {sorted(available)[:8]} …",
                )
            self._check_binding(spec, tensor)
            self.tensors[spec.target] = tensor
        return self

    def _check_binding(self, spec: InputSpec, tensor: Tensor) -> None:
        stored = self.graph.value(spec.name).tensor_type
        if tuple(tensor.shape) != tuple(stored.shape) or tensor.dtype != stored.dtype:
            raise AutoSPError(
                f"{spec.target} is {tensor.dtype}{list(tensor.shape)} but the program wants "
                f"{stored.dtype}{list(stored.shape)}",
                hint="bind a module of the same configuration",
            )

    def verify(self) -> None:
        """Check every rule of the IR that holds at this stage.

        Raises:
            VerifyError: A rule is broken; the message names the node. LayoutError for layouts.
        """
        from autosp_ir.ir.verify import verify_program  # verify imports Program

        verify_program(self)

    def to_graph_module(self) -> GraphModule:
        """The program as FX, node for node: the inverse of `import_graph`.

        Raises:
            AutoSPError: An attribute that the graph reads is not bound.
        """
        from autosp_ir.emit.fx_export import export_graph  # emission imports Program

        return export_graph(self)

    def to_python(self) -> str:
        """The program as a Python function over torch operators, with types as comments."""
        from autosp_ir.emit.pycode import to_python  # emission imports Program

        return to_python(self)

    def to_networkx(self) -> nx.MultiDiGraph[str]:
        """The dataflow as a networkx graph: one node per IR node, one edge per use."""
        from autosp_ir.ir.network import to_networkx  # the view imports Program

        return to_networkx(self)

    def to_dot(self, module: str | None = None, depth: int | None = None) -> Digraph:
        """The dataflow as Graphviz DOT, clustered by module.

        Args:
            module: Draw only this module and its direct neighbours.
            depth: Draw modules nested deeper than this as one box each.
        """
        from autosp_ir.viz.dot import to_dot  # pictures import Program

        return to_dot(self, module=module, depth=depth)

    def show(self, module: str | None = None, depth: int | None = None) -> Drawing:
        """The drawing of `to_dot`: an SVG in a notebook where Graphviz is installed, DOT source elsewhere."""
        from autosp_ir.viz.dot import Drawing  # pictures import Program

        return Drawing(self.to_dot(module, depth).source)

    def to_json(self) -> str:
        """The program as a JSON document that `from_json` reads back."""
        from autosp_ir.ir.json_format import to_json  # the format imports Program

        return to_json(self)

    @staticmethod
    def from_json(text: str) -> Program:
        """The unbound program of a JSON document.

        Raises:
            ParseError: The document is malformed.
        """
        from autosp_ir.ir.json_format import from_json  # the format imports Program

        return from_json(text)

    def emit(
        self, mesh: DeviceMesh | None = None, backend: Literal["inductor", "aot_eager", "eager"] = "aot_eager"
    ) -> nn.Module:
        """Emit a captured program as a module that shares the captured model's parameters.

        Args:
            mesh: A device mesh that has the program's axes; None when all ranks are its only axis.
            backend: `eager` runs a forward program under autograd, `aot_eager` runs the joint program's ATen graphs,
                `inductor` compiles them.

        Returns:
            The model with another forward: same signature and output type, same parameters.

        Raises:
            UnsupportedError: The program cannot run, for example because attention over cut tokens is unresolved.
            RuntimeMismatchError: The running ranks do not match the program's mesh.
        """
        from autosp_ir.emit.parallelize import emit

        return emit(self, mesh, backend)

    def __str__(self) -> str:
        from autosp_ir.ir.text import print_program  # the printer imports Program

        return print_program(self)

    def _repr_html_(self) -> str:
        from autosp_ir.viz.notebook import program_html  # pictures import Program

        return program_html(self)

    def __eq__(self, other: object) -> bool:
        from autosp_ir.ir.text import structurally_equal  # the comparison imports Program

        return isinstance(other, Program) and structurally_equal(self, other) is None

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<Program {self.stage} of {len(self.graph)} nodes, mesh {self.mesh or 'none'}>"


def _copied(info: Any) -> Any:
    if isinstance(info, dict):
        return {k: _copied(v) for k, v in info.items()}
    if isinstance(info, list):
        return [_copied(v) for v in info]
    return info


Check = Callable[[Program], None]
"""A verifier rule: raises VerifyError when the program breaks it."""

__all__ = ["Check", "InputKind", "InputSpec", "OutputKind", "OutputSpec", "Program", "Signature", "Stage"]
