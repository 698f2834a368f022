"""From what a `Recorder` kept by reference to a `Recording`: text, identities across graphs, memory, communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autosp_ir._torch_compat import symbol_facts
from autosp_ir.errors import AutoSPError
from autosp_ir.ir.graph import Graph, Value, map_values
from autosp_ir.ir.literals import op_name
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.printer import show_argument, show_type
from autosp_ir.ir.program import InputSpec, Program
from autosp_ir.ir.program import Stage as ProgramStage
from autosp_ir.ir.types import TensorType, TupleType, Type
from autosp_ir.viz.costs import collectives_of, lanes_of, memory_of
from autosp_ir.viz.matching import match_lines
from autosp_ir.viz.recorder import RawDelta, RawStage, Version
from autosp_ir.viz.recording import START, Delta, Line, Recording, Stage

_SHOWN_TRAITS = (Trait.COLLECTIVE, Trait.ATTENTION, Trait.VIEW, Trait.RANDOM, Trait.MUTATES)


def assemble(raw: Sequence[RawStage], program: Program | None) -> Recording:
    """Work out everything that is shown.

    Args:
        raw: What was kept, in order.
        program: The program that the pipeline rewrote; it knows example values of symbols.
    """
    recording = Recording()
    writer = LineWriter(recording, _device(raw[0].nodes) if raw else torch.device("cpu"))
    symbols = _Symbols(program)
    for number, each in enumerate(raw):
        writer.enter(each, raw[number - 1] if number else None)
        made = _stage(each, writer)
        _add_costs(each, made, recording.stages[-1] if recording.stages else None, symbols)
        recording.stages.append(made)
        if number and made.lines is not None:
            before = recording.program(number - 1)
            made.matches = tuple(match_lines(before, recording.program(number)))
    return recording


def _stage(raw: RawStage, writer: LineWriter) -> Stage:
    rewrites = [writer.delta(d) for d in raw.deltas]
    if raw.new_graph:
        writer.new_graph()
    return Stage(
        name=raw.record.name,
        text=raw.record.text,
        stage=raw.stage,
        mesh=raw.mesh,
        facts=raw.facts,
        outputs=raw.outputs,
        modified=raw.record.modified,
        start=raw.start,
        seconds=raw.record.seconds,
        statistics=dict(raw.record.statistics),
        rewrites=rewrites,
        lines=tuple(writer.line(v) for v in raw.nodes) if raw.new_graph else None,
    )


class LineWriter:
    """Turns versions of nodes into lines, each once.

    Args:
        recording: Gets the lines.
        device: The device that types need not mention.
    """

    def __init__(self, recording: Recording, device: torch.device) -> None:
        self._recording = recording
        self._device = device
        self._keys: dict[int, int] = {}
        self._next_key = 0
        self._known: dict[int, tuple[Version, int]] = {}
        self._types: dict[Type, tuple[str, str]] = {}
        self._inputs: dict[str, InputSpec] = {}

    def enter(self, after: RawStage, before: RawStage | None) -> None:
        """Know what the placeholders of a stage stand for."""
        specs = [*(before.inputs if before is not None else ()), *after.inputs]
        self._inputs = {s.name: s for s in specs}

    def new_graph(self) -> None:
        """Node ids mean other nodes from here on."""
        self._keys = {}

    def line(self, version: Version) -> int:
        """Index of a version's line."""
        known = self._known.get(id(version))
        if known is not None:
            return known[1]
        kind, layout = self._type(version.type)
        operands: list[int] = []
        map_values((version.args, dict(version.kwargs)), lambda v: operands.append(self._key(v.producer.id)))
        made = Line(
            key=self._key(version.id),
            name=version.name,
            op=op_name(version.op),
            args=self._arguments(version),
            type=kind,
            layout=layout,
            operands=tuple(operands),
            module=version.origin.module or "",
            source=version.origin.source or "",
            phase=version.phase.value,
            passes=version.origin.passes,
            traits=tuple(t.value for t in _SHOWN_TRAITS if version.op.has(t)),
        )
        self._recording.lines.append(made)
        # The version is kept beside its line, so that its identity is not given to another.
        self._known[id(version)] = (version, len(self._recording.lines) - 1)
        return len(self._recording.lines) - 1

    def delta(self, raw: RawDelta) -> Delta:
        """A rewrite by lines."""
        return Delta(
            rule=raw.rule,
            at=raw.at,
            ms=raw.ms,
            removed=tuple(self._key(i) for i in raw.removed),
            placed=tuple((self.line(v), START if behind < 0 else self._key(behind)) for v, behind in raw.placed),
            changed=tuple(self.line(v) for v in raw.changed),
        )

    def _key(self, node_id: int) -> int:
        if node_id not in self._keys:
            self._keys[node_id] = self._next_key
            self._next_key += 1
        return self._keys[node_id]

    def _type(self, kind: Type | None) -> tuple[str, str]:
        if kind is None:
            return "", ""
        if kind not in self._types:
            self._types[kind] = (show_type(kind, self._device), _first_layout(kind))
        return self._types[kind]

    def _arguments(self, version: Version) -> str:
        if version.op.kind == "placeholder":
            spec = self._inputs.get(version.name)
            if spec is None:
                return "placeholder"
            return f'{spec.kind.value} "{spec.target}"{" grad" if spec.requires_grad else ""}'
        if version.op.kind == "output":
            return ", ".join(show_argument(a) for a in version.args)
        shown = [show_argument(a) for a in version.args]
        shown += [f"{k}={show_argument(v)}" for k, v in version.kwargs.items()]
        return f"({', '.join(shown)})"


def _first_layout(kind: Type) -> str:
    if isinstance(kind, TensorType):
        return ", ".join(f"{axis}: {placement}" for axis, placement in kind.layout.items())
    if isinstance(kind, TupleType):
        return next((found for e in kind.elements if (found := _first_layout(e))), "")
    return ""


def _device(nodes: Sequence[Version]) -> torch.device:
    return next((v.type.device for v in nodes if isinstance(v.type, TensorType)), torch.device("cpu"))


class _Symbols:
    """Example values of symbolic extents."""

    def __init__(self, program: Program | None) -> None:
        self._program = program

    def values(self, nodes: Sequence[Version]) -> dict[str, int]:
        found: dict[str, int] = {}
        for version in nodes:
            for extent in version.type.shape if isinstance(version.type, TensorType) else ():
                for symbol in getattr(extent, "free_symbols", ()):
                    hint = self._hint(symbol)
                    if hint is not None:
                        found[symbol.name] = hint
        return found

    def _hint(self, symbol: Any) -> int | None:
        return symbol_facts(self._program.fake_mode.shape_env, symbol)[0] if self._program is not None else None


def _add_costs(raw: RawStage, made: Stage, before: Stage | None, symbols: _Symbols) -> None:
    if before is not None and not made.modified:
        made.memory, made.communication, made.lanes = before.memory, before.communication, before.lanes
        return
    values = symbols.values(raw.nodes)
    try:
        graph = rebuild(raw.nodes)
        made.communication = collectives_of(graph, raw.mesh, values)
        made.memory = memory_of(graph, values)
        if raw.stage == ProgramStage.LOWERED.value and not values:
            made.lanes = lanes_of(graph, raw.mesh)
    except AutoSPError:
        # A program in the middle of a pipeline may hold what has no size yet; it is shown without a curve.
        made.memory = ()


def rebuild(nodes: Sequence[Version]) -> Graph:
    """A graph of these versions, for analyses."""
    graph = Graph()
    values: dict[int, Value] = {}

    def read(value: Value) -> Value:
        return values[value.producer.id]

    for version in nodes:
        node = graph.create(
            version.op,
            map_values(version.args, read),
            map_values(dict(version.kwargs), read),
            name=version.name,
            type=version.type,
            phase=version.phase,
            origin=version.origin,
        )
        if node.results:
            values[version.id] = node.result
    return graph


__all__ = ["assemble", "rebuild"]
