"""The rows as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table with one line per case.

    Args:
        rows: With `case`, `ranks`, and for each side what `children` measured.
    """
    lines = ["| case | ranks | AutoSP: what happened | ours |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['case']} | {row['ranks']} | {described(row['autosp'])} | {described(row['ours'])} |")
    return "\n".join(lines)


def described(side: dict[str, Any]) -> str:
    """What one side did, in words."""
    parts = [_outcome(side)] if "outcome" in side else []
    if "all_to_alls" in side:
        calls = side["all_to_alls"]
        parts.append(f"{calls['forward']} all-to-alls forward, {calls['backward']} backward")
    if "bytes" in side:
        parts.append(f"{side['bytes']:,} bytes")
    return "; ".join(parts)


def _outcome(side: dict[str, Any]) -> str:
    outcome = side["outcome"]
    if "message" in side:
        # Torch adds the node that it was at.
        message = side["message"].partition(" While executing ")[0]
        return f"**{outcome}**: {message}".replace("|", "\\|")
    if outcome == "exact":
        return f"exact ({side['gradient_error']:.0e})"
    if outcome != "silent":
        return str(outcome)
    wrong = {name: side[f"{name}_error"] for name in ("gradient", "loss")}
    return "**silent**: " + ", ".join(f"{n} error {'NaN' if e is None else format(e, '.2g')}" for n, e in wrong.items())
