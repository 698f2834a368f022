"""What a pipeline did: one record per pass, with every rewrite it made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from autosp_ir.errors import AutoSPError
from autosp_ir.rewrite.events import RewriteEvent
from autosp_ir.rewrite.statistics import RuleStatistics

if TYPE_CHECKING:
    from autosp_ir.viz.recording import Recording


@dataclass
class PassRecord:
    """What one pass did.

    Args:
        name: The pass.
        text: The pass with its options, as in a pipeline.
        modified: Whether the program's structural hash changed.
        seconds: Time in `run`, without verification and instruments.
        hash: Structural hash of the program afterwards.
        statistics: What the pass counted; the hits of its rules among it.
        rules: Tries, hits and milliseconds of its rules, by name.
        rewrites: Its rewrites, in order.
    """

    name: str
    text: str
    modified: bool = False
    seconds: float = 0.0
    hash: str = ""
    statistics: dict[str, int] = field(default_factory=dict)
    rules: dict[str, RuleStatistics] = field(default_factory=dict)
    rewrites: list[RewriteEvent] = field(default_factory=list)


@dataclass
class Trace:
    """The records of a run, in pipeline order.

    With a `Recorder` among the instruments it also holds every version of the program, and can be saved and drawn.
    """

    records: list[PassRecord] = field(default_factory=list)
    _recorded: Callable[[], Recording] | None = field(default=None, repr=False, compare=False)

    def attach(self, recorded: Callable[[], Recording]) -> None:
        """Give the trace what a recorder kept; `recorded` is called when it is first wanted."""
        self._recorded = recorded

    @property
    def recording(self) -> Recording:
        """Every version of the program.

        Raises:
            AutoSPError: The run was not recorded.
        """
        if self._recorded is None:
            raise AutoSPError(
                "this run was not recorded, so there is nothing to save or draw",
                hint="run it with PassManager(…, instruments=[air.instruments.Recorder()])",
            )
        return self._recorded()

    def save(self, path: str | Path) -> Path:
        """Write the recording as JSON, for `Trace.load` and `autosp-ir report`.

        Raises:
            AutoSPError: The run was not recorded.
        """
        return self.recording.save(path)

    @staticmethod
    def load(path: str | Path) -> Trace:
        """The trace that `save` wrote. Ids in its rewrites are the recording's keys.

        Raises:
            AutoSPError: The file is no recording, or of another version.
        """
        from autosp_ir.viz.loading import load_trace  # pictures import Trace

        return load_trace(path)

    def report(self, path: str | Path) -> Path:
        """Write the run as one HTML file that opens without a network.

        Raises:
            AutoSPError: The run was not recorded.
        """
        from autosp_ir.viz.report import write_report  # pictures import Trace

        return write_report(self.recording, path)

    def figure(self, *, pass_: str, module: str, path: str | Path) -> Path:
        """Draw one module before and after a pass, one column wide, for a paper.

        Args:
            pass_: The pass, such as `ulysses`.
            module: Module path, such as `model.layers.0.self_attn`; its submodules are included.
            path: A file ending in `.svg`, or in `.pdf` or `.png`, which need matplotlib.

        Raises:
            AutoSPError: The run was not recorded, or pass or module is unknown.
            UnsupportedError: The format needs an extra that is not installed.
        """
        from autosp_ir.viz.figure import draw_figure  # pictures import Trace

        return draw_figure(self.recording, pass_=pass_, module=module, path=path)

    def chrome(self, path: str | Path) -> Path:
        """Write passes, rewrites and one step's communication as a Chrome trace, for Perfetto.

        Raises:
            AutoSPError: The run was not recorded.
        """
        from autosp_ir.viz.trace_events import write_trace_events  # pictures import Trace

        return write_trace_events(self.recording, path)

    @property
    def rewrites(self) -> Iterator[RewriteEvent]:
        """Every rewrite of every pass, in order."""
        for record in self.records:
            yield from record.rewrites

    def record(self, name: str) -> PassRecord | None:
        """The last record of the pass called `name`."""
        return next((r for r in reversed(self.records) if r.name == name), None)

    def __iter__(self) -> Iterator[PassRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __str__(self) -> str:
        return "\n".join(
            f"{r.text}: {'modified' if r.modified else 'unchanged'}, "
            f"{len(r.rewrites)} rewrites, {r.seconds * 1e3:.1f} ms"
            for r in self.records
        )
