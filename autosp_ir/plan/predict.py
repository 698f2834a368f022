"""Peak memory and time of one program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autosp_ir.analysis.cost import Device, Link
from autosp_ir.analysis.fused import Fusion, fused_durations, fused_liveness
from autosp_ir.analysis.liveness import liveness
from autosp_ir.analysis.timeline import durations, run
from autosp_ir.ir.program import Program


@dataclass(frozen=True)
class Prediction:
    """What one rank takes for one step.

    Args:
        name: Of the pipeline.
        pipeline: Its text.
        peak_bytes: Most memory at once: parameters, inputs, gradients, saved values and work. The states of an
            optimizer, the runtime's own memory and what a kernel takes inside are not in it.
        input_bytes: Parameters, buffers and inputs, which are part of it.
        saved_bytes: What the forward leaves for the backward.
        host_bytes: What waits in host memory between forward and backward, beside all of these.
        seconds: Of forward, backward and reduction of gradients.
        exposed_seconds: Communication that no compute covers, which is part of it.
        curve: Bytes alive while each operation runs, in program order.
        at_peak: The peak in parts: `inputs`, `saved`, `gradients`, `workspace` and `working`.
    """

    name: str
    pipeline: str
    peak_bytes: int
    input_bytes: int
    saved_bytes: int
    host_bytes: int
    seconds: float
    exposed_seconds: float
    curve: tuple[int, ...]
    at_peak: Mapping[str, int] = field(default_factory=dict)


def predict(program: Program, name: str, pipeline: str, device: Device, link: Link, fused: bool) -> Prediction:
    """Estimate one step.

    Args:
        program: A lowered program.
        name: Of the pipeline that made it.
        pipeline: Its text.
        device: What computes.
        link: What connects the ranks.
        fused: Whether a compiler fuses the program, as Inductor does.

    Raises:
        UnsupportedError: An extent is symbolic.
    """
    nodes = [n for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]
    if fused:
        fusion = Fusion(program)
        memory, priced = fused_liveness(fusion, count_inputs=True, device=device), fused_durations(fusion, device, link)
    else:
        memory, priced = liveness(program, count_inputs=True, device=device), durations(program, device, link)
    timeline = run(nodes, priced)
    return Prediction(
        name=name,
        pipeline=pipeline,
        peak_bytes=memory.peak_bytes,
        # Before the first operation there is nothing but inputs.
        input_bytes=memory.curve[0],
        saved_bytes=memory.saved_bytes,
        host_bytes=memory.host_bytes,
        seconds=timeline.makespan,
        exposed_seconds=timeline.exposed,
        curve=memory.curve,
        at_peak=memory.at_peak,
    )


__all__ = ["Prediction", "predict"]
