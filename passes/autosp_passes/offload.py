"""`offload`: keep saved activations in pinned host memory between forward and backward.

    forward:   x = …   h = offload(x)   …   host = wait_copy(h, x)
    backward:  r = reload(host)   …   back = wait_copy(r, host)   … reads back

A storage is offloaded only where the cost model says that both copies hide: the one to the host under the rest of the
forward, the one back under the backward in front of its first reader, each on a stream of its own that runs its copies
one by one. Times are the shortest there can be, those of a fused program whose communication all hides, so that copies
hide under whatever the program becomes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from autosp_ir.analysis.cost import LINKS, Device, Link, device, host_link
from autosp_ir.analysis.fused import Fusion, fused_durations
from autosp_ir.analysis.liveness import liveness
from autosp_ir.analysis.timeline import Durations, run
from autosp_ir.comm.host_memory import OFFLOAD, RELOAD, WAIT_COPY, starts_copy
from autosp_ir.ir.graph import Phase, Value, map_values
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import OutputKind, Program, Stage
from autosp_ir.ir.types import TensorType
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_passes._host_copies import Candidates
from autosp_passes._host_schedule import FULL, HostSchedule, Selection, Slot, select
from autosp_passes._remat.budget import parse_size


class Offload(Pass):
    """Keep saved activations in host memory where the copies hide: `offload{host=64GiB host_link=pcie5}`.

    What lies idle longest goes first, until the peak falls no more, or `peak` or `fraction` is met, or `host` is used
    up. Parameters, inputs and outputs stay, and what shares memory with them. Needs `remat` before it, and is best the
    last pass: where the peak stands and what copies run beside is known when the order is.
    """

    name = "offload"
    stage = (Stage.JOINT, Stage.LOWERED)
    requires = frozenset({"rematerialised"})
    provides = frozenset({"offloaded"})
    conflicts = frozenset({"offloaded"})

    class Options(Pass.Options):
        """Options of `offload`."""

        peak: str | int | None = None
        """What the step may hold beside parameters and inputs, such as 40GiB, or a number of bytes."""
        fraction: float | None = Field(None, gt=0, le=1)
        """The same, as a part of what it holds without this pass."""
        host: str | int = "64GiB"
        """Pinned host memory that one rank may use, as torch's allocator takes it: in powers of two."""
        smallest: str | int = "1MiB"
        """What takes less stays on the device: copying it is mostly latency."""
        device: str = "h100"
        """What computes, for the estimate: h100, h200, a100 or cpu."""
        host_link: str = "pcie5"
        """What connects a device to host memory: pcie5, pcie4 or nvlink-c2c."""

        @field_validator("peak", "host", "smallest")
        @classmethod
        def _is_size(cls, value: str | int | None) -> str | int | None:
            if value is not None and parse_size(value) < 0:
                raise ValueError("a size is not negative")
            return value

        @model_validator(mode="after")
        def _one_target(self) -> Offload.Options:
            if self.peak is not None and self.fraction is not None:
                raise ValueError("give peak or fraction, not both")
            return self

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place.

        A program without a backward, with a symbolic length, or that writes in place stays as it is, with a remark.

        Raises:
            UnsupportedError: The tables do not know the device or the link.
        """
        on, over = device(self.options.device), host_link(self.options.host_link)
        kept = _reason_to_keep(program)
        if kept is not None:
            ctx.remark("missed", None, kept)
            return
        candidates = Candidates(program, parse_size(self.options.smallest))
        before = liveness(program, device=on)
        curve = dict(zip(before.names, before.curve, strict=True))
        selection = self._selected(candidates, curve, _durations(program, on, over), over)
        _Writer(program, ctx, candidates).write(selection)
        self._report_what_stays(ctx, candidates, selection)
        after = liveness(program, device=on)
        nodes = [n for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]
        exposed = run(nodes, _durations(program, on, over)).exposed
        ctx.count("peak_bytes_before", before.peak_bytes)
        ctx.count("peak_bytes", after.peak_bytes)
        ctx.count("exposed_us", round(exposed * 1e6))
        if after.peak_bytes > (target := self._target(before.peak_bytes)) > 0:
            ctx.remark(
                "missed", None, f"the peak is {_text(after.peak_bytes)}, more than the {_text(target)} asked for"
            )

    def _report_what_stays(self, ctx: PassContext, candidates: Candidates, selection: Selection) -> None:
        if not candidates.found and not candidates.stays:
            ctx.remark("missed", None, "nothing is saved between forward and backward")
        chosen = {reason: [(c.node, c.bytes) for c in stays] for reason, stays in selection.stays.items()}
        for reason, stays in {**candidates.stays, **chosen}.items():
            node, size = max(stays, key=lambda entry: entry[1])
            total = _text(sum(each for _, each in stays))
            why = f"nothing fits into host={self.options.host}" if reason == FULL and not selection.chosen else reason
            ctx.count(f"stays, {reason}", len(stays))
            ctx.remark("missed", node, f"{len(stays)} stay, {total}, the largest here with {_text(size)}: {why}")

    def _target(self, whole: int) -> float:
        """Bytes that are low enough; 0 for as low as can be."""
        if self.options.peak is not None:
            return parse_size(self.options.peak)
        return self.options.fraction * whole if self.options.fraction is not None else 0.0

    def _selected(
        self, candidates: Candidates, curve: Mapping[str, int], priced: Durations, to_host: Link
    ) -> Selection:
        schedule = HostSchedule(
            [priced.compute[n] for n in candidates.order],
            candidates.forward,
            to_host,
            [curve[n.name] for n in candidates.order],
        )
        return select(
            candidates.found, schedule, parse_size(self.options.host), self._target(max(curve.values(), default=0))
        )


def _durations(program: Program, on: Device, to_host: Link) -> Durations:
    """What everything takes, collectives nothing."""
    priced = fused_durations(Fusion(program), on, LINKS["nvlink4"], to_host)
    compute = {n: 0.0 if n.op.has(Trait.COLLECTIVE) else seconds for n, seconds in priced.compute.items()}
    return Durations(compute, {n: seconds for n, seconds in priced.comm.items() if starts_copy(n)})


def _reason_to_keep(program: Program) -> str | None:
    if not any(o.kind is OutputKind.GRADIENT for o in program.signature.outputs):
        return "the program has no gradient, so nothing is saved"
    writer = next((n for n in program.graph.nodes if n.op.has(Trait.MUTATES)), None)
    if writer is not None:
        return f"%{writer.name} writes in place, so what is saved stays where it is"
    shapes = (v.type.shape for n in program.graph.nodes for v in n.results if isinstance(v.type, TensorType))
    if any(not isinstance(extent, int) for shape in shapes for extent in shape):
        return "the length is symbolic, so that nothing can be priced; capture it with dynamic=False"
    return None


def _text(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


class _Writer:
    """Writes copies into a program."""

    def __init__(self, program: Program, ctx: PassContext, candidates: Candidates) -> None:
        self._ctx = ctx
        self._rewriter = ctx.rewriter(program)
        self._order = candidates.order
        self._forward = candidates.forward

    def write(self, selection: Selection) -> None:
        """Write the copies of every site that may be rewritten, in the order of their way back."""
        sites = [c for c in selection.chosen if self._rewriter.allows(c.node, "offload")]
        for slot in selection.slots:
            if slot.of in sites:
                with self._rewriter.rewrite("offload"):
                    self._write(slot)
        for candidate in sites:
            self._ctx.count("storages")
            self._ctx.count("host_bytes", candidate.host_bytes)

    def _write(self, slot: Slot) -> None:
        value = slot.copy.value
        away, back_at = self._order[slot.freed].name, self._order[slot.reload].name
        self._ctx.count("offloaded_bytes", slot.copy.bytes)
        self._ctx.remark(
            "applied",
            value,
            f"{_text(slot.copy.bytes)} leave the device before %{away} and come back from %{back_at} on",
        )
        readers = [u for u in value.users if u.phase is not Phase.FORWARD]
        with self._rewriter.after(value.producer):
            started = self._rewriter.create(OFFLOAD, (value,), name=f"{value.name}_to_host")
        host = self._create(slot.freed, WAIT_COPY, (started, value), Phase.FORWARD, value, "on_host")
        kind = {"device": value.tensor_type.device}
        coming = self._create(slot.reload, RELOAD, (host,), Phase.RECOMPUTE, value, "from_host", kind)
        back = self._create(slot.copy.read, WAIT_COPY, (coming, host), Phase.RECOMPUTE, value, "back")

        def swapped(operand: Value) -> Value:
            return back if operand is value else operand

        for reader in readers:
            self._rewriter.set_args(reader, map_values(reader.args, swapped), map_values(dict(reader.kwargs), swapped))

    def _create(
        self, place: int, op: str, args: tuple[Value, ...], phase: Phase, of: Value, name: str, kwargs: Any = None
    ) -> Value:
        """A node in front of what stands at a place of the order."""
        with self._rewriter.before(self._order[place]):
            return self._rewriter.create(
                op, args, kwargs, phase=phase, origin_from=of.producer, name=f"{of.name}_{name}"
            )
