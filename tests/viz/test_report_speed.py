"""A report of 30,000 nodes in a real browser; `benchmarks.report_speed` times it."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosp_ir.viz.report import write_report
from tests.viz.browser import CHROMIUM, opened
from tests.viz.synthetic import synthetic_recording

pytest.importorskip("playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

_HALF_WAY = "const panes = document.getElementById('panes'); panes.scrollTop = panes.scrollHeight / 2;"
_ACTIONS = ("", "report.step(1500);", "report.pass(1);", "report.search('self_attn');", "report.search('');", _HALF_WAY)


def test_thirty_thousand_nodes_are_no_more_elements_than_fit_the_window(tmp_path: Path) -> None:
    path = write_report(synthetic_recording(30_000, 3_000), tmp_path / "report.html")
    assert path.stat().st_size < 10e6
    with opened(path) as (page, _):
        for action in _ACTIONS:
            elements = page.evaluate(
                f"(async () => {{ {action} await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));"
                " return document.querySelectorAll('*').length; })()"
            )
            assert 100 < elements < 3000, action
