"""The report is one file without a network, and nothing in a model's names can break out of it."""

from __future__ import annotations

import re
from pathlib import Path

from autosp_ir.viz.recording import Line, Recording, Stage
from autosp_ir.viz.report import report_html, write_report
from tests.viz.recorded import llama_recording

HOSTILE = "</script><script>alert(1)</script><!-- & \" ' \u2028"


def hostile_recording() -> Recording:
    line = Line(0, HOSTILE, "placeholder", HOSTILE, HOSTILE, HOSTILE, (), HOSTILE, HOSTILE, "forward", (), ())
    return Recording([line], [Stage(HOSTILE, HOSTILE, "forward", lines=(0,)), Stage("a", HOSTILE, "forward")])


def test_the_report_is_self_contained() -> None:
    page = report_html(llama_recording())
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in page


def test_hostile_names_stay_text() -> None:
    page = report_html(hostile_recording())
    assert "alert(1)</script>" not in page
    assert page.count("</script>") == 2


def test_reports_of_one_recording_are_equal(tmp_path: Path) -> None:
    first = write_report(llama_recording(), tmp_path / "a.html").read_bytes()
    assert first == write_report(llama_recording(), tmp_path / "b.html").read_bytes()
