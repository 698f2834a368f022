"""A recording as large as wanted, without a model: cheap to make, shaped like a decoder's."""

from __future__ import annotations

from autosp_ir.viz.recording import Delta, Line, Recording, Stage

_PER_LAYER = 100


class _Maker:
    def __init__(self) -> None:
        self.recording = Recording()
        self.keys = 0

    def line(self, key: int, op: str, operands: tuple[int, ...], layer: int, phase: str = "forward") -> int:
        """Index of a new line."""
        reads = ", ".join(f"%v{o}" for o in operands)
        made = Line(
            key=key,
            name=f"v{key}",
            op=op,
            args=f"({reads})" if op != "placeholder" else f'parameter "layers.{layer}.weight" grad',
            type="f32[1, 4096, 4096] {sp: S(1)}",
            layout="sp: S(1)",
            operands=operands,
            module=f"model.layers.{layer}.{'self_attn' if key % _PER_LAYER < 50 else 'mlp'}",
            source=f"modeling.py:{key % _PER_LAYER}",
            phase=phase,
            passes=(),
            traits=("collective",) if op == "autosp.all_to_all" else (),
        )
        self.recording.lines.append(made)
        return len(self.recording.lines) - 1

    def key(self) -> int:
        self.keys += 1
        return self.keys - 1

    def program(self, count: int) -> list[int]:
        """Lines of a chain of layers."""
        first = self.keys
        found = []
        for n in range(count):
            key = self.key()
            operands = tuple(k for k in (key - 1, key - 7) if k >= first)
            op = "placeholder" if n < 10 else ("aten.mul.Tensor", "aten.add.Tensor", "aten.linear")[n % 3]
            phase = "forward" if n < count // 2 else "backward"
            found.append(self.line(key, op, operands if n >= 10 else (), n // _PER_LAYER, phase))
        return found


def synthetic_recording(count: int, rewrites: int) -> Recording:
    """A recording of `count` nodes: a pass of `rewrites` rewrites, then a new graph.

    Each rewrite replaces a node by two, changes another and moves a third.
    """
    maker = _Maker()
    recording = maker.recording
    start = maker.program(count)
    memory = tuple((n % _PER_LAYER + n // 50) << 20 for n in range(count - 1))
    recording.stages.append(Stage("input", "input", "forward", lines=tuple(start), memory=memory))
    keys = [recording.lines[i].key for i in start]
    step = max(8, (count - 100) // max(1, rewrites))
    deltas = []
    for n in range(rewrites):
        at = 20 + n * step
        gone, behind, changed, moved, to = keys[at], keys[at - 1], keys[at + 1], keys[at + 3], keys[at + 5]
        first, second = maker.key(), maker.key()
        placed = (
            (maker.line(first, "autosp.all_to_all", (behind,), at // _PER_LAYER), behind),
            (maker.line(second, "aten.linear", (first,), at // _PER_LAYER), first),
            (start[at + 3], to),
        )
        reads = (second, moved) if n % 2 else (second,)
        deltas.append(
            Delta(
                rule=f"passes/toy.py:{n % 40}",
                at=n * 1e-4,
                ms=0.05,
                removed=(gone,),
                placed=placed,
                changed=(maker.line(changed, "aten.add.Tensor", reads[:1], at // _PER_LAYER),),
            )
        )
    recording.stages.append(Stage("toy", "toy", "forward", modified=True, rewrites=deltas, seconds=0.2))
    whole = maker.program(count)
    recording.stages.append(
        Stage(
            "differentiate",
            "differentiate",
            "joint",
            modified=True,
            lines=tuple(whole),
            matches=tuple((k, recording.lines[i].key) for k, i in zip(keys[:1000], whole, strict=False)),
            memory=memory,
        )
    )
    return recording
