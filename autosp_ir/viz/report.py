"""One HTML file that shows a recorded run: it opens from disk, without a network and without a server."""

from __future__ import annotations

import base64
import gzip
import html
from importlib.resources import files
from pathlib import Path
from string import Template

from autosp_ir.viz.recording import Recording
from autosp_ir.viz.recording_json import dumps

_SCRIPTS = ("data.js", "compare.js", "listing.js", "details.js", "charts.js", "app.js")


def report_html(recording: Recording, title: str | None = None) -> str:
    """The report as a page.

    Args:
        recording: A recorded run.
        title: Its heading; the pipeline when None.
    """
    # What comes from the model travels compressed, and the page only ever puts it into text nodes.
    packed = gzip.compress(dumps(recording).encode(), compresslevel=6, mtime=0)
    return Template(_asset("page.html")).substitute(
        title=html.escape(title if title is not None else _title(recording)),
        style=_asset("style.css"),
        recording=base64.b64encode(packed).decode(),
        script="\n".join(_asset(name) for name in _SCRIPTS),
    )


def write_report(recording: Recording, path: str | Path, title: str | None = None) -> Path:
    """Write `report_html` to a file."""
    target = Path(path)
    target.write_text(report_html(recording, title), encoding="utf-8")
    return target


def _title(recording: Recording) -> str:
    mesh = recording.stages[-1].mesh if recording.stages else {}
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
    passes = ",".join(s.text for s in recording.stages[1:])
    return f"{passes}{f'  on  {axes}' if axes else ''}"


def _asset(name: str) -> str:
    return (files("autosp_ir.viz") / "assets" / name).read_text(encoding="utf-8")


__all__ = ["report_html", "write_report"]
