"""What every layout rule accepts, kept in `accepted.json`: a count and a digest for each probe."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from autosp_ir.testing.golden import UPDATE_VARIABLE
from tests.comm.layout_probe import Probe

TABLE = Path(__file__).with_name("accepted.json")


def probe_names(probes: Sequence[Probe]) -> dict[int, str]:
    """A name for each probe, by its `id`: the operation, and its number among the probes of that operation."""
    seen: Counter[str] = Counter()
    names = {}
    for probe in probes:
        names[id(probe)] = f"{probe.op} {seen[probe.op]}"
        seen[probe.op] += 1
    return names


def check_accepted(name: str, answers: Sequence[str]) -> None:
    """Compare what a rule answered with the table, which `pytest --update-golden` (in one process) rewrites.

    Args:
        name: Of the probe.
        answers: One line for each combination of placements that the rule accepts.
    """
    digest = hashlib.sha256("\n".join(sorted(answers)).encode()).hexdigest()[:8]
    entry = f"{len(answers)} {digest}"
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if os.environ.get(UPDATE_VARIABLE) and table.get(name) != entry:
        TABLE.write_text(json.dumps(dict(sorted((table | {name: entry}).items())), indent=0) + "\n")
        return
    assert table.get(name) == entry, (
        f"{name} accepts other combinations than {TABLE.name} says ({table.get(name)}, now {entry}); if that is meant, "
        "run pytest --update-golden on this file:\n" + "\n".join(answers)
    )
