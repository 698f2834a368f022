"""What an examination finds: one verdict per number of ranks, and the facts behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """What may be said of a model on a number of ranks, from the best to the worst."""

    EXACT = "exact"
    """Loss, outputs and every gradient are the dense model's."""

    EXACT_WITH_GATHERS = "exact with gathers"
    """Exact, but some work over tokens runs whole on every rank."""

    REFUSED = "refused"
    """A named error before a step runs."""

    WRONG = "WRONG"
    """The program runs and computes something else: a bug of this library."""

    CRASH = "CRASH"
    """An exception that is no named error: a bug of this library."""

    @property
    def is_exact(self) -> bool:
        """Whether the program computes what the model computes."""
        return self in (Verdict.EXACT, Verdict.EXACT_WITH_GATHERS)

    @property
    def is_bug(self) -> bool:
        """Whether the verdict is one that must not be."""
        return self in (Verdict.WRONG, Verdict.CRASH)


@dataclass(frozen=True)
class Failure:
    """Why there is no exact program.

    Args:
        stage: "capture", "passes" or "check".
        error: Name of the exception's class.
        reason: One or two sentences.
        hint: What the user can do next.
        context: The IR around the fault, or the end of a traceback.
        pass_name: The pass that was running.
    """

    stage: str
    error: str
    reason: str
    hint: str | None = None
    context: str | None = None
    pass_name: str | None = None

    @property
    def summary(self) -> str:
        """The error and the first line of its reason."""
        first = self.reason.strip().splitlines()[0] if self.reason.strip() else ""
        where = f" [{self.pass_name}]" if self.pass_name else ""
        return f"{self.error}{where}: {first}"


@dataclass(frozen=True)
class Gather:
    """An operation that reads tokens of all ranks.

    Args:
        node: Its name in the program.
        operation: Its IR name.
        family: The family of its layout rule.
        bytes: Of the gathered tensors that it reads, whole.
        source: The model's source line.
    """

    node: str
    operation: str
    family: str
    bytes: int
    source: str | None = None


@dataclass(frozen=True)
class FamilyCount:
    """How the floating-point operations of one family run, of those that depend on the batch.

    Args:
        family: Operations with layout rules of one file, such as "matmul".
        cut: Number of those that run on their rank's tokens alone.
        gathered: Of those that read gathered tokens.
        whole: Of those that run whole on every rank without reading gathered tokens, such as what follows a gather.
        bytes: Of gathered tensors that they read.
    """

    family: str
    cut: int = 0
    gathered: int = 0
    whole: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class RankFinding:
    """What was found for one number of ranks.

    Args:
        ranks: Number of ranks on the sequence axis.
        verdict: What may be said of it.
        families: How operations run, by family; empty when token-partition was not reached.
        gathers: Every operation that reads gathered tokens, in order.
        gathered_bytes: Bytes of all gathered tensors, each once.
        spread: Part of the bytes of the forward's intermediate results of which each rank holds its share alone.
        notes: Remarks of kind "missed" that the passes made.
        failure: Why it is refused, wrong or a crash.
        error: Largest relative error of loss, outputs and gradients, in float64; None when nothing was compared.
    """

    ranks: int
    verdict: Verdict
    families: tuple[FamilyCount, ...] = ()
    gathers: tuple[Gather, ...] = ()
    gathered_bytes: int = 0
    spread: float | None = None
    notes: tuple[str, ...] = ()
    failure: Failure | None = None
    error: float | None = None

    @property
    def reason(self) -> str:
        """What kept the verdict from "exact", in one line; empty when nothing did."""
        if self.failure is not None:
            return self.failure.summary
        if self.verdict is not Verdict.EXACT_WITH_GATHERS:
            return ""
        if not self.gathers:
            return "nothing is cut: every rank computes the whole model"
        counts: dict[str, int] = {}
        for gather in self.gathers:
            counts[gather.operation] = counts.get(gather.operation, 0) + 1
        return "gathered: " + ", ".join(f"{n} × {operation}" for operation, n in counts.items())


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Args:
        model: The model's class, or the name it was given.
        parameters: Number of parameters.
        inputs: Shape of every input tensor, by name.
        findings: One per number of ranks.
        capture_error: Largest relative error of the captured program against the eager model, in the model's own
            precision; None when it was not captured.
    """

    model: str
    parameters: int
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    findings: tuple[RankFinding, ...] = ()
    capture_error: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the law holds: exact or refused by name, for every number of ranks."""
        return not any(f.verdict.is_bug for f in self.findings)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict."""
        order = list(Verdict)
        return max((f.verdict for f in self.findings), key=order.index, default=Verdict.EXACT)

    def on(self, ranks: int) -> RankFinding:
        """The finding for a number of ranks.

        Raises:
            KeyError: It was not examined.
        """
        return {f.ranks: f for f in self.findings}[ranks]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        plain = asdict(self)
        plain["inputs"] = {name: list(shape) for name, shape in self.inputs.items()}
        plain["findings"] = [asdict(f) | {"reason": f.reason} for f in self.findings]
        return plain | {"ok": self.ok, "verdict": self.verdict}

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.parameters:,} parameters"]
        for finding in self.findings:
            reason = f": {finding.reason}" if finding.reason else ""
            lines.append(f"{finding.ranks} ranks: {finding.verdict}{reason}")
        return "\n".join(lines)


__all__ = ["Diagnosis", "Failure", "FamilyCount", "Gather", "RankFinding", "Verdict"]
