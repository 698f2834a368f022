"""What notebooks show: HTML of programs and results, and notebooks that were executed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import autosp_ir as air
from autosp_ir.ir.types import TensorType
from autosp_ir.rewrite import ProgramBuilder
from tests.viz.recorded import llama_program, llama_result

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SHOWN = ("capture_and_read", "partition_and_ulysses", "memory_and_communication")


def test_a_program_shows_its_modules_and_layouts() -> None:
    result = llama_result(1, "canonicalize,pad-tokens,token-partition,ulysses")
    page = result.program._repr_html_()
    assert "<code>model.layers.0.self_attn</code>" in page
    assert "{sp: S(1)}" in page
    assert "#2da44e" in page
    assert page.count("<details>") == page.count("</details>")


def test_a_result_shows_its_passes() -> None:
    page = llama_result()._repr_html_()
    assert all(name in page for name in ("token-partition", "ulysses", "lower-comm"))
    assert "<table>" in page


def test_names_are_escaped() -> None:
    b = ProgramBuilder()
    x = b.input("x", (2,))
    with b.source("<b>.py:1", "<script>"):
        y = b.aten.relu(x)
    b.output(y)
    page = b.build()._repr_html_()
    assert "<script>" not in page
    assert isinstance(y.type, TensorType)


def test_long_programs_are_cut() -> None:
    page = air.PassManager("canonicalize").run(llama_program(4)).program._repr_html_()
    assert len(page) < 300_000


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs_in_a_kernel(name: str) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(book, timeout=200, kernel_name="python3").execute()


@pytest.mark.parametrize("name", SHOWN)
def test_notebooks_are_committed_with_their_pictures(name: str) -> None:
    book = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    kinds = {k for c in book["cells"] for o in c.get("outputs", ()) for k in o.get("data", ())}
    assert kinds & {"text/html", "image/svg+xml", "image/png"}
    assert not any(o["output_type"] == "error" for c in book["cells"] for o in c.get("outputs", ()))
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 300_000
