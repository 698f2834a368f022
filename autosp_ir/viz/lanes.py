"""Compute and communication of one step on a time axis: as estimated, and as measured by torch's profiler.

    lanes = predicted_lanes(result.program, device="h100", link="nvlink4", fused=True)
    Path("step.svg").write_text(lanes_svg({"predicted": lanes}))

The same lanes are drawn as SVG and written as Chrome-trace events for Perfetto.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autosp_ir.analysis.cost import device as device_named
from autosp_ir.analysis.cost import link as link_named
from autosp_ir.analysis.fused import Fusion, fused_durations
from autosp_ir.analysis.timeline import durations, run, stream_of
from autosp_ir.ir.graph import Node
from autosp_ir.ir.program import Program

Kind = Literal["attention", "product", "other", "communication", "stall"]

_COLOURS: dict[Kind, str] = {
    "attention": "#3b6ea8",
    "product": "#7aa6d6",
    "other": "#c9d6e5",
    "communication": "#d9822b",
    "stall": "#c23b3b",
}
_WIDTH, _LABEL, _HEIGHT, _GAP, _AXIS = 960, 150, 22, 6, 28
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "mm_float32", "addmm_float32", "addmm_float32_")
_KERNELS: dict[Kind, tuple[str, ...]] = {
    "communication": ("nccl",),
    "attention": ("attention", "fmha", "flash", "sdpa"),
    "product": ("gemm", "nvjet", "cutlass", "matmul"),
}


@dataclass(frozen=True)
class Slice:
    """Something that runs.

    Args:
        begin: Seconds from the beginning of the step.
        seconds: How long it runs.
        kind: Decides the colour.
        name: Of the operation or kernel.
    """

    begin: float
    seconds: float
    kind: Kind
    name: str


@dataclass(frozen=True)
class Lane:
    """One stream.

    Args:
        name: Of the stream.
        slices: In order of their beginning; they do not overlap.
    """

    name: str
    slices: tuple[Slice, ...]


def predicted_lanes(
    program: Program, device: str = "h100", link: str = "nvlink4", *, fused: bool = False
) -> list[Lane]:
    """The estimated step: the compute stream with its stalls, and each communication stream.

    Args:
        program: A lowered program without symbolic extents.
        device: What computes: h100, h200, a100 or cpu.
        link: What connects the ranks: nvlink4, nvlink3, pcie5, pcie or network-400g.
        fused: Whether a compiler fuses the program, as Inductor does.

    Raises:
        UnsupportedError: The tables do not know the device or link, or an extent is symbolic.
    """
    on, over = device_named(device), link_named(link)
    priced = fused_durations(Fusion(program), on, over) if fused else durations(program, on, over)
    nodes = [n for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]
    timeline = run(nodes, priced)
    compute: list[Slice] = []
    streams: dict[str, list[Slice]] = {}
    for node in nodes:
        if node in priced.comm:
            begin = timeline.begin[node]
            sent = Slice(begin, timeline.arrive[node] - begin, "communication", node.name)
            streams.setdefault(stream_of(node), []).append(sent)
            continue
        stall = timeline.stalls.get(node, 0.0)
        if stall:
            compute.append(Slice(timeline.begin[node] - stall, stall, "stall", node.name))
        if priced.compute[node]:
            compute.append(Slice(timeline.begin[node], priced.compute[node], _kind(node), node.name))
    found = [Lane("compute", tuple(compute))]
    return found + [Lane(name, tuple(sorted(s, key=lambda each: each.begin))) for name, s in sorted(streams.items())]


def measured_lanes(events: Iterable[Mapping[str, Any]]) -> list[Lane]:
    """The kernels of a profile, one lane for compute and one for communication.

    Args:
        events: `traceEvents` of a Chrome trace of `torch.profiler` that recorded CUDA activity, of one step.
    """
    kernels = sorted((e for e in events if e.get("ph") == "X" and e.get("cat") == "kernel"), key=lambda e: e["ts"])
    origin = min((e["ts"] for e in kernels), default=0.0)
    slices = [Slice((e["ts"] - origin) / 1e6, e["dur"] / 1e6, kernel_kind(e["name"]), e["name"]) for e in kernels]
    sent = tuple(s for s in slices if s.kind == "communication")
    return [Lane("compute", tuple(s for s in slices if s.kind != "communication")), Lane("communication", sent)]


def kernel_kind(name: str) -> Kind:
    """What a CUDA kernel does, by its name."""
    lower = name.lower()
    return next((kind for kind, marks in _KERNELS.items() if any(m in lower for m in marks)), "other")


def exposed_seconds(lanes: Sequence[Lane]) -> float:
    """Seconds of communication during which nothing is computed; a stall is not computing.

    Args:
        lanes: The compute lane, then those of communication.
    """
    busy = _merged(s for s in lanes[0].slices if s.kind != "stall")
    total = 0.0
    for begin, end in _merged(s for lane in lanes[1:] for s in lane.slices):
        covered = sum(max(0.0, min(end, e) - max(begin, b)) for b, e in busy)
        total += end - begin - covered
    return total


def _merged(slices: Iterable[Slice]) -> list[tuple[float, float]]:
    spans: list[tuple[float, float]] = []
    for each in sorted(slices, key=lambda s: s.begin):
        end = each.begin + each.seconds
        if spans and each.begin <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((each.begin, end))
    return spans


def lanes_svg(groups: Mapping[str, Sequence[Lane]]) -> str:
    """A picture on one time axis.

    Args:
        groups: Lanes by title, such as predicted and measured, from top to bottom.
    """
    end = max((s.begin + s.seconds for lanes in groups.values() for lane in lanes for s in lane.slices), default=1.0)
    scale = (_WIDTH - _LABEL) / end
    parts: list[str] = []
    y = _GAP
    for title, lanes in groups.items():
        for lane in lanes:
            label = html.escape(f"{title}: {lane.name}")
            parts.append(f'<text x="{_LABEL - 8}" y="{y + 15}" text-anchor="end">{label}</text>')
            parts += [_rectangle(s, y, scale) for s in lane.slices if s.seconds * scale >= 0.05]
            y += _HEIGHT + _GAP
        y += _GAP
    parts += _ticks(end, scale, y)
    legend = "".join(
        f'<rect x="{_LABEL + 130 * i}" y="{y + _AXIS}" width="12" height="12" fill="{colour}"/>'
        f'<text x="{_LABEL + 130 * i + 18}" y="{y + _AXIS + 11}">{kind}</text>'
        for i, (kind, colour) in enumerate(_COLOURS.items())
    )
    height = y + _AXIS + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH + 20} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}{legend}</svg>\n'
    )


def _rectangle(each: Slice, y: float, scale: float) -> str:
    name = html.escape(f"{each.name}: {each.seconds * 1e3:.3f} ms at {each.begin * 1e3:.3f} ms")
    return (
        f'<rect x="{_LABEL + each.begin * scale:.2f}" y="{y}" width="{max(each.seconds * scale, 0.1):.2f}" '
        f'height="{_HEIGHT}" fill="{_COLOURS[each.kind]}"><title>{name}</title></rect>'
    )


def _ticks(end: float, scale: float, y: float) -> list[str]:
    parts = []
    for step in range(6):
        x = _LABEL + end * step / 5 * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 5}" stroke="black"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle">{end * step / 5 * 1e3:.4g} ms</text>')
    return parts


def lanes_trace(groups: Mapping[str, Sequence[Lane]]) -> dict[str, Any]:
    """The same as Chrome-trace data: a process for each title, a thread for each lane.

    Args:
        groups: Lanes by title.
    """
    events: list[dict[str, Any]] = []
    for process, (title, lanes) in enumerate(groups.items(), start=1):
        events.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": title}})
        for thread, lane in enumerate(lanes, start=1):
            named = {"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": lane.name}}
            events.append(named)
            events += [
                {"ph": "X", "pid": process, "tid": thread, "name": s.name, "cat": s.kind, "ts": s.begin * 1e6,
                 "dur": s.seconds * 1e6}
                for s in lane.slices
            ]  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _kind(node: Node) -> Kind:
    if node.op.name.startswith("autosp.attention"):
        return "attention"
    return "product" if node.op.short_name in _PRODUCTS else "other"


__all__ = [
    "Lane",
    "Slice",
    "exposed_seconds",
    "kernel_kind",
    "lanes_svg",
    "lanes_trace",
    "measured_lanes",
    "predicted_lanes",
]
