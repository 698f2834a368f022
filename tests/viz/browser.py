"""A report in headless Chromium, and how long its answers take."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Runs a call and waits until the browser has painted what it changed.
_PAINTED = """
async (call) => {
  const work = {
    step: (n) => report.step(n),
    pass: (s) => report.pass(s),
    search: (text) => report.search(text),
    scroll: (part) => { const p = document.getElementById("panes"); p.scrollTop = p.scrollHeight * part; },
  };
  const start = performance.now();
  work[call[0]](call[1]);
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - start;
}
"""


@contextmanager
def opened(path: Path, **page_options: Any) -> Iterator[tuple[Page, float]]:
    """The page and the seconds until its report was shown; errors of the page fail the caller."""
    from playwright.sync_api import sync_playwright

    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(**({"viewport": {"width": 1600, "height": 950}} | page_options))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
        start = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("body.ready", timeout=60_000)
        yield page, time.perf_counter() - start
        browser.close()
    if errors:
        raise AssertionError("\n".join(errors))


def milliseconds(page: Page, call: str, *arguments: object) -> float:
    """Median time from a call (`step`, `pass`, `search`, `scroll`) to the painted result."""
    return median(float(page.evaluate(_PAINTED, [call, argument])) for argument in arguments)


def speed_of(page: Page) -> dict[str, float]:
    """Milliseconds of what people do most, each the median of several."""
    steps = int(page.evaluate("report.recording.steps.length"))
    stages = int(page.evaluate("report.recording.stages.length"))
    some = sorted({max(1, steps * part // 12) for part in range(1, 12)})
    return {
        "slider step": milliseconds(page, "step", *(n for s in some for n in (s, s + 1))),
        "slider jump": milliseconds(page, "step", *some[::2], *some[1::2]),
        "whole pass": milliseconds(page, "pass", *range(1, stages)),
        "search": milliseconds(page, "search", "self_attn", "all_to_all", "%v12", "linear", "modeling"),
        "search, nothing found": milliseconds(page, "search", "no such thing", "nor this", "qqq"),
        "scroll": milliseconds(page, "scroll", 0.1, 0.5, 0.9, 0.3),
    }
