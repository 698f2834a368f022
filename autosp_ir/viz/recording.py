"""A recorded pipeline: the program before it, every rewrite as a delta, and the program after any of them on demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autosp_ir.errors import AutoSPError

FORMAT = 2
"""Raised when a file of this version could be misread by an older reader."""

START = -1
"""Stands for the place in front of the first line."""


@dataclass(frozen=True, slots=True)
class Line:
    """One version of one node.

    Args:
        key: Identity of the node, unique in the recording and kept through every change of it.
        name: Name of its value, or `output`.
        op: Operation.
        args: Its arguments as text; for placeholders what they stand for.
        type: Result type as text, layouts included.
        layout: The first layout in the type, such as `sp: S(1)`; empty when Invariant.
        operands: Keys of the nodes it reads, in order.
        module: Module path in the model.
        source: The model's `file:line`.
        phase: forward, backward or recompute.
        passes: The passes that made or changed it.
        traits: Traits of its operation.
    """

    key: int
    name: str
    op: str
    args: str
    type: str
    layout: str
    operands: tuple[int, ...]
    module: str
    source: str
    phase: str
    passes: tuple[str, ...]
    traits: tuple[str, ...]

    @property
    def text(self) -> str:
        """The line as the IR prints it, without its comment."""
        if self.op == "output":
            return f"return {self.args}"
        call = self.args if self.op == "placeholder" else f"{self.op}{self.args}"
        return f"%{self.name}: {self.type} = {call}"

    @property
    def content(self) -> tuple[str, str]:
        """What makes two versions of a node differ: origins alone do not."""
        return self.text, self.phase


@dataclass(frozen=True, slots=True)
class Delta:
    """One rewrite.

    Lines are indices into `Recording.lines`. Apply it by taking out `removed`, then replacing `changed` in place, then
    putting each line of `placed`, in order, behind the node given with it. A placed node that was there before moved.

    Args:
        rule: `file:line` of the code that asked for it, or the name it gave.
        at: Seconds from the start of the pipeline to its end.
        ms: Milliseconds it took.
        removed: Keys of erased nodes.
        placed: (line, key of the node in front) of created and moved nodes.
        changed: Lines of nodes that stayed where they are.
    """

    rule: str
    at: float
    ms: float
    removed: tuple[int, ...]
    placed: tuple[tuple[int, int], ...]
    changed: tuple[int, ...]


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Args:
        name: The value that holds its result.
        op: `all_to_all`, `all_gather`, `reduce_scatter`, `all_reduce`, `permute` or `broadcast`.
        axis: The mesh axis.
        size: Number of ranks.
        bytes: Payload that each rank hands to it.
        phase: forward, backward or recompute.
        position: Position of its line in the program.
    """

    name: str
    op: str
    axis: str
    size: int
    bytes: int
    phase: str
    position: int


@dataclass(frozen=True)
class RecordedLane:
    """One stream of the estimated step.

    Args:
        name: Of the stream.
        slices: What runs: line of the program, microseconds from the beginning of the step, microseconds that it takes,
            and the kind of `viz.lanes.Slice`.
    """

    name: str
    slices: tuple[tuple[int, float, float, str], ...]


@dataclass
class Stage:
    """The program as one pass left it, or as the pipeline found it.

    Args:
        name: The pass; `input` for the first stage.
        text: The pass with its options.
        stage: forward, joint or lowered.
        mesh: Axis sizes.
        facts: What had been established.
        outputs: Names of the outputs.
        modified: Whether the pass changed the program.
        start: Seconds from the start of the pipeline to the pass.
        seconds: Time of the pass.
        statistics: What it counted.
        rewrites: Its rewrites.
        lines: The whole program, where the pass made a new graph (and for the first stage).
        matches: There, (key before, key after) of the nodes that are the same by structure.
        memory: Bytes alive while each line but the output runs; empty when unknown.
        communication: Collectives in program order.
        lanes: The estimated step, of a lowered program with known sizes.
    """

    name: str
    text: str
    stage: str
    mesh: dict[str, int] = field(default_factory=dict)
    facts: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    modified: bool = False
    start: float = 0.0
    seconds: float = 0.0
    statistics: dict[str, int] = field(default_factory=dict)
    rewrites: list[Delta] = field(default_factory=list)
    lines: tuple[int, ...] | None = None
    matches: tuple[tuple[int, int], ...] = ()
    memory: tuple[int, ...] = ()
    communication: list[Collective] = field(default_factory=list)
    lanes: tuple[RecordedLane, ...] = ()

    @property
    def steps(self) -> int:
        """Number of steps from the stage before to this one: its rewrites, and one for a new graph."""
        return len(self.rewrites) + (self.lines is not None)


@dataclass
class Recording:
    """Everything that a run of a pipeline did.

    Args:
        lines: Every version of every node.
        stages: The input, then one per pass.
    """

    lines: list[Line] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    def program(self, stage: int, step: int | None = None) -> list[Line]:
        """The program after some steps of a stage.

        Args:
            stage: Index of the stage; 0 is the input, negative ones count from the end.
            step: How many of the stage's steps; all when None.

        Returns:
            Its lines, in order.

        Raises:
            AutoSPError: There is no such stage or step.
        """
        index = range(len(self.stages))[stage] if -len(self.stages) <= stage < len(self.stages) else None
        if index is None:
            raise AutoSPError(f"there is no stage {stage}", hint=f"the recording has {len(self.stages)}, from 0")
        last = self.stages[index]
        wanted = last.steps if step is None else step
        if not 0 <= wanted <= last.steps:
            raise AutoSPError(f"stage {last.name} has no step {step}", hint=f"it has {last.steps} steps, from 0")
        if last.lines is not None and wanted == last.steps:
            return [self.lines[i] for i in last.lines]
        base = max((i for i in range(index) if self.stages[i].lines is not None), default=0)
        listing = Listing(self.lines, self.stages[base].lines or ())
        for between in self.stages[base + 1 : index]:
            for delta in between.rewrites:
                listing.apply(delta)
        for delta in last.rewrites[:wanted]:
            listing.apply(delta)
        return list(listing)

    def stage_of(self, name: str) -> int:
        """Index of the last stage of the pass called `name`.

        Raises:
            AutoSPError: No such pass ran.
        """
        found = [i for i, s in enumerate(self.stages) if s.name == name]
        if not found:
            ran = ", ".join(s.name for s in self.stages[1:])
            raise AutoSPError(f"no pass called {name!r} was recorded", hint=f"the passes are {ran}")
        return found[-1]

    def save(self, path: str | Path) -> Path:
        """Write the recording as JSON."""
        from autosp_ir.viz.recording_json import dumps  # the format imports Recording

        target = Path(path)
        target.write_text(dumps(self), encoding="utf-8")
        return target

    @staticmethod
    def load(path: str | Path) -> Recording:
        """Read what `save` wrote.

        Raises:
            AutoSPError: It is no recording, or of another version.
        """
        from autosp_ir.viz.recording_json import loads  # the format imports Recording

        return loads(Path(path).read_text(encoding="utf-8"))


class Listing:
    """A program to which deltas can be applied; each costs as much as it touches.

    Args:
        lines: Every version of every node.
        start: Indices of the lines to begin with.
    """

    def __init__(self, lines: Sequence[Line], start: Iterable[int]) -> None:
        self._lines = lines
        self._next: dict[int, int] = {START: START}
        self._prev: dict[int, int] = {START: START}
        self.current: dict[int, Line] = {}
        behind = START
        for index in start:
            self._place(lines[index], behind)
            behind = lines[index].key

    def apply(self, delta: Delta) -> None:
        """Do one rewrite."""
        for key in delta.removed:
            self._unlink(key)
            del self.current[key]
        for index in delta.changed:
            self.current[self._lines[index].key] = self._lines[index]
        for index, _ in delta.placed:
            if self._lines[index].key in self.current:
                self._unlink(self._lines[index].key)
        for index, behind in delta.placed:
            self._place(self._lines[index], behind)

    def __iter__(self) -> Iterator[Line]:
        key = self._next[START]
        while key != START:
            yield self.current[key]
            key = self._next[key]

    def _place(self, line: Line, behind: int) -> None:
        after = self._next[behind]
        self._next[behind] = self._prev[after] = line.key
        self._next[line.key], self._prev[line.key] = after, behind
        self.current[line.key] = line

    def _unlink(self, key: int) -> None:
        before, after = self._prev.pop(key), self._next.pop(key)
        self._next[before], self._prev[after] = after, before


__all__ = ["FORMAT", "START", "Collective", "Delta", "Line", "Listing", "RecordedLane", "Recording", "Stage"]
