"""`differentiate`: from a forward program to the joint program of forward and backward."""

from __future__ import annotations

from typing import Any

from autosp_ir.capture.joint import SharedOutputsError, joint_program
from autosp_ir.emit.fx_export import executable
from autosp_ir.errors import PassError
from autosp_ir.ir.graph import Phase, Value
from autosp_ir.ir.program import OutputKind, Program
from autosp_ir.ir.verify import output_leaves
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.float32_sums import accumulate_in_float32
from autosp_ir.rewrite.rewriter import Rewriter


class Differentiate(Pass):
    """Trace the backward and add it to the program.

    The program gets a tangent input for every differentiable output and a gradient output for every parameter and
    user input that requires one. Collectives of the backward come from the backward of the layout operators.
    """

    name = "differentiate"
    stage = "forward"
    produces = "joint"
    provides = frozenset({"differentiated"})

    class Options(Pass.Options):
        """Options of `differentiate`."""

        decompose: bool = False
        """Trace with Inductor's decompositions: losses, norms and activations become small operations that `remat`
        can price one by one and that Inductor fuses; without it the program stays shorter to read."""

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        """Turn `program` into its joint program.

        Raises:
            PassError: torch cannot trace the backward.
            UnsupportedError: The forward writes one of its inputs.
        """
        forward = program.clone()
        rewriter = Rewriter(forward, self.name)
        _flatten_outputs(rewriter)
        try:
            joint = joint_program(forward, executable(forward), decompose=self.options.decompose)
        except SharedOutputsError as shared:
            # torch regenerates such outputs outside the graph; here every output gets storage of its own.
            _separate_outputs(rewriter, shared.positions)
            joint = _second_attempt(forward, self.options.decompose)
        _become(program, joint)
        _infer_layouts(program)
        if "tiled" in program.facts:
            ctx.count("float32_sums", accumulate_in_float32(program, ctx.rewriter(program)))
        gradients = sum(o.kind is OutputKind.GRADIENT for o in program.signature.outputs)
        ctx.count("gradients", gradients)
        ctx.count("backward_nodes", sum(n.phase is Phase.BACKWARD for n in program.graph.nodes))
        if not gradients:
            ctx.remark("missed", None, "nothing requires a gradient: the program has no backward")


def _second_attempt(forward: Program, decompose: bool) -> Program:
    try:
        return joint_program(forward, executable(forward), decompose=decompose)
    except SharedOutputsError as shared:
        names = [forward.signature.outputs[i].name for i in shared.positions]
        raise PassError(
            f"the outputs {names} share storage with others even when copied",
            pass_name=Differentiate.name,
            hint="return other outputs: air.capture(…, outputs=[…])",
        ) from shared


def _flatten_outputs(rewriter: Rewriter) -> None:
    """One flat tuple; what is written back to buffers is not differentiated."""
    output = rewriter.graph.output_node
    leaves = output_leaves(rewriter.graph)
    specs = rewriter.program.signature.outputs
    with rewriter.before(output):
        flat = [
            rewriter.create("aten.detach", (leaf,), type=leaf.type)
            if spec.kind is OutputKind.BUFFER_MUTATION and isinstance(leaf, Value)
            else leaf
            for leaf, spec in zip(leaves, specs, strict=True)
        ]
    rewriter.set_args(output, (tuple(flat),))


def _separate_outputs(rewriter: Rewriter, positions: list[int]) -> None:
    output = rewriter.graph.output_node
    leaves: list[Any] = output_leaves(rewriter.graph)
    with rewriter.before(output):
        for position in positions:
            leaf = leaves[position]
            leaves[position] = rewriter.create("aten.clone", (leaf,), type=leaf.type)
    rewriter.set_args(output, (tuple(leaves),))


def _become(program: Program, joint: Program) -> None:
    program.graph = joint.graph
    program.signature = joint.signature
    program.stage = joint.stage
    program.tensors = joint.tensors
    program.attrs = joint.attrs


def _infer_layouts(program: Program) -> None:
    if not program.mesh:
        return
    from autosp_ir.comm.layout import infer_layouts

    infer_layouts(program)
