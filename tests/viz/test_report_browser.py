"""The report in a real browser: it shows what was recorded, and answers fast enough for 30,000 nodes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from autosp_ir.viz.matching import compare
from autosp_ir.viz.recording import Line, Listing, Recording
from autosp_ir.viz.report import write_report
from tests.viz.browser import CHROMIUM, opened
from tests.viz.recorded import llama_recording

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest.importorskip("playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    path = write_report(llama_recording(layers=4), tmp_path_factory.mktemp("report") / "report.html")
    with opened(path) as (page, _):
        yield page


def counts(before: list[Line], after: list[Line], matches: tuple[tuple[int, int], ...] | None) -> dict[str, int]:
    rows = compare(before, after, matches)
    found = Counter(r.kind for r in rows if r.kind != "moved" or r.after is not None)
    return {kind: found[kind] for kind in ("same", "changed", "removed", "added", "moved")}


def steps_of(recording: Recording) -> Iterator[dict[str, int]]:
    for number, stage in enumerate(recording.stages[1:], start=1):
        before = recording.program(number - 1)
        index = {line: i for i, line in enumerate(recording.lines)}
        listing = Listing(recording.lines, [index[n] for n in before])
        for delta in stage.rewrites:
            listing.apply(delta)
            after = list(listing)
            yield counts(before, after, None)
            before = after
        if stage.lines is not None:
            yield counts(before, recording.program(number), stage.matches)


def test_every_rewrite_of_four_layers_shows_what_the_recorder_knows(page: Page) -> None:
    shown = page.evaluate(
        """() => report.recording.steps.map((_, n) => { report.step(n + 1); return report.rows.counts; })"""
    )
    assert shown == list(steps_of(llama_recording(layers=4)))


def test_every_pass_shows_the_program_that_it_left(page: Page) -> None:
    recording = llama_recording(layers=4)
    for number in range(len(recording.stages)):
        texts: list[str] = page.evaluate(
            "(s) => { report.pass(s); return Array.from(report.sides.after, (i) => report.recording.text(i)); }", number
        )
        assert texts == [n.text for n in recording.program(number)]


def test_arrow_keys_step_and_a_click_shows_the_origin(page: Page) -> None:
    recording = llama_recording(layers=4)
    ulysses = recording.stage_of("ulysses")
    page.evaluate("(s) => report.pass(s)", ulysses)
    page.locator("#panes").focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#what") == "ulysses, rewrite 1"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#what") == "ulysses, rewrite 2"
    page.locator(".row.added .cell.right").first.click()
    details = page.inner_text("#details")
    assert "Made by ulysses, rewrite 2 by autosp_passes/ulysses.py:" in details
    assert "(autosp.attention)" in details
    assert "modeling_llama.py" in details
    assert page.locator("#details .neighbourhood .box").count() > 2


def test_search_finds_by_module_operation_and_source(page: Page) -> None:
    recording = llama_recording(layers=4)
    last = len(recording.stages) - 1
    page.evaluate("(s) => report.pass(s)", last)
    for query in ("layers.3.mlp", "all_to_all", "modeling_llama.py:258"):
        page.fill("#search", query)
        found = int(page.evaluate("report.found.length"))
        assert found > 0
        page.wait_for_selector(".cell.found")
    page.fill("#search", "")


def test_modules_fold(page: Page) -> None:
    page.evaluate("report.pass(4)")
    page.click("#close-all")
    folded = int(page.evaluate("report.panes.items.length"))
    page.click("#open-all")
    assert folded < int(page.evaluate("report.panes.items.length"))
    page.locator("[data-group]").first.click()
    page.check("#only")
    page.wait_for_selector(".row.added")
    page.uncheck("#only")


def test_memory_and_communication_are_shown(page: Page) -> None:
    recording = llama_recording(layers=4)
    page.evaluate("(s) => report.pass(s)", len(recording.stages) - 1)
    assert page.locator("#memory .peak").count() == 1
    assert page.locator("#memory .tick").count() == len(recording.stages[-1].communication)
    assert page.locator("#communication [data-position]").count() == len(recording.stages[-1].communication)


def test_the_estimated_streams_are_shown(page: Page) -> None:
    last = len(llama_recording(layers=4).stages) - 1
    page.evaluate("report.pass(0)")
    assert page.inner_text("#makespan") == ""
    page.evaluate("(s) => report.pass(s)", last)
    assert re.fullmatch(r"[\d.]+ ms, [\d.]+ of it waiting.*", page.inner_text("#makespan"))
    for kind in ("attention", "product", "communication", "stall"):
        assert page.locator(f"#lanes .slice.{kind}").count() > 0
    box = page.locator("#lanes .slice.attention").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert "µs from" in page.inner_text("#lanes .tip")
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.inner_text("#details h2").startswith("%")
