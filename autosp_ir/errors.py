"""The errors a user of autosp_ir can meet.

Every error says what is wrong, shows the IR around it and the user's own source line, names the pass that was
running, and says what can be done next.
"""

from __future__ import annotations

from typing import Protocol


class DescribesItself(Protocol):
    """Anything that can show itself with its neighbours, such as an IR node."""

    def describe(self, context: int = 5) -> str:
        """Render itself with `context` neighbours on each side and its source line."""
        ...


class AutoSPError(Exception):
    """Base of every error raised on purpose by autosp_ir.

    Args:
        reason: What is wrong, one or two sentences.
        node: The IR node at fault; rendered with its neighbours and the model's source line.
        hint: What the user can do next.
        pass_name: The pass that was running, in kebab-case.
    """

    def __init__(
        self,
        reason: str,
        *,
        node: DescribesItself | None = None,
        hint: str | None = None,
        pass_name: str | None = None,
    ) -> None:
        self.reason = reason
        self.hint = hint
        self.pass_name = pass_name
        # Rendered at once: the graph may be mutated or freed before the message is read.
        self.context = node.describe(context=5) if node is not None else None
        super().__init__(reason)

    def __str__(self) -> str:
        parts = [f"[{self.pass_name}] {self.reason}" if self.pass_name else self.reason]
        if self.context:
            parts.append(self.context)
        if self.hint:
            parts.append(f"What you can do: {self.hint}")
        return "\n".join(parts)


class CaptureError(AutoSPError):
    """The model or batch cannot be captured as one graph."""


class ImportGraphError(AutoSPError):
    """An FX graph cannot be represented in the IR."""


class VerifyError(AutoSPError):
    """A program breaks a structural rule of the IR."""


class LayoutError(VerifyError):
    """A value's layout does not follow from its operands' layouts."""


class UnsupportedError(AutoSPError):
    """A construct that cannot be rewritten soundly, refused rather than guessed."""


class PassError(AutoSPError):
    """A pass failed or produced an invalid program."""


class RuleError(PassError):
    """A rewriting rule is malformed, or what it makes does not fit where it would stand."""


class TerminationError(PassError):
    """Rewriting does not come to an end: rules undo each other, or make ever more work."""


class PipelineError(AutoSPError):
    """A pipeline is malformed: an unknown pass or option, or passes in an order that cannot work."""


class ParseError(AutoSPError):
    """IR or pipeline text that does not parse; carries the position.

    Args:
        reason: What was expected.
        line: 1-based line.
        column: 1-based column.
        hint: What the user can do next; None points to the description of the text form.
    """

    def __init__(self, reason: str, *, line: int, column: int, hint: str | None = None) -> None:
        self.line = line
        self.column = column
        way_out = hint or "compare the line with what str(program) prints; docs/ir.md describes the text form"
        super().__init__(f"line {line}, column {column}: {reason}", hint=way_out)


class SimulationError(AutoSPError):
    """A simulated run went wrong, or the simulated ranks disagree where they must agree."""


class DeadlockError(SimulationError):
    """The ranks issue different collective sequences, so a real run would hang."""


class RuntimeMismatchError(AutoSPError):
    """An emitted step was called with a batch, mesh or process group that it was not built for."""


class RankFailureError(AutoSPError):
    """A rank died, stalled or failed, so that no rank can go on; raised on every other one."""


class NonFiniteError(AutoSPError):
    """A step gave a value that is not finite, on request; names the rank and the operation it came from."""
