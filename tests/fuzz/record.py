"""What a run did so far, in one small file that a later run goes on from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.fuzz.cases import EXACT, FINDING, REFUSED, Case, Outcome

_LONGEST_DETAILS = 4000


@dataclass
class KindRecord:
    """One kind of case: seeds 0 to `done` (exclusive) have run.

    Args:
        done: First seed that has not run.
        exact: Cases that came out exact.
        refused: Cases refused by a named error, by reason.
        features: How many exact cases made use of what.
        seconds: Processor time.
    """

    done: int = 0
    exact: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one case that is no finding."""
        if outcome.verdict == EXACT:
            self.exact += 1
            self.features.update(outcome.features)
        elif outcome.verdict == REFUSED:
            self.refused[outcome.reason] += 1


@dataclass
class Record:
    """All kinds, the findings, and which code ran.

    Args:
        command: How to repeat it.
        code: Commits that ran, and how many cases each.
        kinds: By name.
        findings: Open ones.
        resolved: Findings that ran again with another verdict.
    """

    command: str = ""
    code: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, KindRecord] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    resolved: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def load(path: Path) -> Record:
        """A record that `save` wrote."""
        data = json.loads(path.read_text())
        kinds = {
            name: KindRecord(k["done"], k["exact"], Counter(k["refused"]), Counter(k["features"]), k["seconds"])
            for name, k in data["kinds"].items()
        }
        return Record(data["command"], Counter(data["code"]), kinds, data["findings"], data["resolved"])

    def save(self, path: Path) -> None:
        """Write the record; a reader never sees half of it."""
        kinds = {
            name: asdict(replace(kind, refused=Counter(), features=Counter()))
            | {
                "seconds": round(kind.seconds, 1),
                "refused": dict(kind.refused.most_common()),
                "features": dict(sorted(kind.features.items())),
            }
            for name, kind in self.kinds.items()
        }
        data = {
            "command": self.command,
            "totals": self.totals(),
            "code": dict(self.code),
            "kinds": kinds,
            "findings": self.findings,
            "resolved": self.resolved,
        }
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(data, indent=1) + "\n")
        beside.replace(path)

    def totals(self) -> dict[str, Any]:
        """Counts over all kinds."""
        kinds = self.kinds.values()
        return {
            "cases": sum(k.done for k in kinds),
            "exact": sum(k.exact for k in kinds),
            "refused": sum(k.refused.total() for k in kinds),
            "findings": len(self.findings),
            "resolved": len(self.resolved),
        }

    def kind(self, name: str) -> KindRecord:
        """The record of a kind, empty at first."""
        return self.kinds.setdefault(name, KindRecord())

    def add(self, name: str, outcomes: Iterable[Outcome], seconds: float, code: str) -> None:
        """Count the next seeds of a kind."""
        record = self.kind(name)
        record.seconds += seconds
        for outcome in outcomes:
            record.done += 1
            self.code[code] += 1
            record.add(outcome)
            if outcome.verdict == FINDING:
                self.findings.append(
                    {"case": outcome.case, "reason": outcome.reason, "details": outcome.details[-_LONGEST_DETAILS:]}
                )

    def recheck(self, finding: dict[str, Any], outcome: Outcome, code: str) -> None:
        """Take a finding that has gone out of the list, and count its case as what it is now."""
        if outcome.verdict == FINDING:
            finding |= {"reason": outcome.reason, "details": outcome.details[-_LONGEST_DETAILS:]}
            return
        self.findings.remove(finding)
        self.kind(Case.parse(finding["case"]).kind).add(outcome)
        short = {name: finding[name] for name in ("case", "reason")}
        self.resolved.append(short | {"now": outcome.verdict, "code": code})
