"""Compile times: the table, and verification timed apart from the passes."""

from __future__ import annotations

from typing import Any

from rich.console import Console

import autosp_ir as air
from benchmarks.compile_parts import TimedVerify, peak_mib
from benchmarks.compile_time import table_of
from tests.models import build


def test_the_table_has_a_column_per_number_of_layers_and_shows_failures() -> None:
    seconds = {"capture": 1.25, "total": 2.0}
    rows: list[dict[str, Any]] = [
        {"layers": 2, "seconds": seconds, "peak_mib": 1234.5, "nodes": {"captured": 10, "lowered": 20}},
        {"layers": 64, "error": "ended at its limit of 9 s"},
    ]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table_of(rows, "title"))
    text = captured.get()
    assert "2 layers" in text and "64 layers" in text
    assert "1.25" in text and "1,234" in text and "ended at its limit of 9 s" in text


def test_verification_is_timed_by_pass() -> None:
    model, batch = build("llama-gqa")
    verify = TimedVerify()
    program = air.capture(model, batch)
    air.PassManager("canonicalize,pad-tokens", verify=False, instruments=[verify]).run(program, mesh={"sp": 2})
    assert set(verify.seconds) == {"input", "canonicalize", "pad-tokens"}
    assert verify.seconds["input"] > 0


def test_peak_memory_is_read() -> None:
    assert peak_mib() > 10
