"""docs/support.md, written from what the doctor finds: `python -m tests.doctor.support_page`."""

from __future__ import annotations

from pathlib import Path

import torch

from autosp_ir.doctor import Diagnosis, RankFinding, Verdict, diagnose
from tests.models.architectures import ARCHITECTURES, LENGTH, small

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
RANKS = (2, 4)

_HEAD = f"""# What works

Small models of {len(ARCHITECTURES)} transformers architectures, two layers each and {LENGTH} tokens long (mamba: 8),
through the default pipeline on two and on four simulated ranks, in float64. None is wrong, and none crashes.

- *exact*: the loss and every gradient are the dense model's to 1e-10.
- *gathers*: exact too, but some operations over tokens read those of all ranks, and run whole on every rank.
- *refused*: a named error before a step runs.
- *spread*: the part of the forward's intermediate results, in bytes, of which a rank holds its share alone.

For a model of your own:

    autosp-ir doctor config.json --ranks 2,4 --length 64
    autosp-ir doctor my_package.my_module:factory        # returns (model, batch)

It says what is cut and what is gathered, with source lines and bytes, and exits with 1 when a result is wrong or
something crashes. `air.doctor.diagnose(model, batch)` is the same from Python. Dropout is 0 in these configs.
`make support` writes this page anew, and the tests hold it to what the doctor says.

| kind | architecture | 2 ranks | 4 ranks | spread | gathered, or why refused |
|---|---|---|---|---|---|
"""


def examined(name: str, ranks: tuple[int, ...] = RANKS) -> Diagnosis:
    """What the doctor says of an architecture."""
    torch.set_num_threads(1)
    model, batch = small(name)
    return diagnose(model, batch, ranks, name=name, **ARCHITECTURES[name].settings)


def cell(finding: RankFinding) -> str:
    """A verdict, in one word."""
    return "gathers" if finding.verdict is Verdict.EXACT_WITH_GATHERS else str(finding.verdict)


def row(name: str, diagnosis: Diagnosis) -> str:
    """The line of an architecture."""
    first = diagnosis.findings[0]
    spread = "" if first.spread is None else f"{first.spread:.0%}"
    cells = (ARCHITECTURES[name].group, name, *(cell(f) for f in diagnosis.findings), spread, _reason(diagnosis))
    return f"| {' | '.join(cells)} |"


def _reason(diagnosis: Diagnosis) -> str:
    first = diagnosis.findings[0]
    if first.failure is not None:
        return first.failure.summary.replace("|", "\\|")
    operations = dict.fromkeys(gather.operation for f in diagnosis.findings for gather in f.gathers)
    return ", ".join(f"`{operation}`" for operation in operations) or first.reason


def committed_rows() -> dict[str, str]:
    """The lines of the committed page, by architecture."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {line.split(" | ")[1]: line for line in rows[1:]}


def main() -> None:
    """Write the page."""
    from rich.progress import track

    rows = [row(name, examined(name)) for name in track(ARCHITECTURES)]
    PAGE.write_text(_HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
