"""What the README, the guide and the notebooks show has to run."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import autosp_ir as air
from tests.models.transformers_zoo import llama

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def blocks_with_output(page: str) -> list[tuple[str, str]]:
    """Each block of Python and what the page says that it prints."""
    found = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", (ROOT / page).read_text(), flags=re.DOTALL)
    return [(code, shown) for code, shown in found]


def as_shown(printed: str, shown: str) -> bool:
    """Whether the output is the one shown; a line `…` stands for any lines."""
    lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
    pattern = re.escape(shown.strip("\n") + "\n").replace("…\\\n", r"(?:.*\n)*")
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines) or "\n") is not None


def execute(code: str, name: str, variables: dict[str, Any]) -> dict[str, Any]:
    variables["__name__"] = "__main__"  # as in a script or a notebook
    exec(compile(code, name, "exec"), variables)
    return variables


@pytest.fixture
def one_process_rendezvous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What torchrun tells a single process; the store is a file, so no port is taken."""
    start = dist.init_process_group

    def with_file_store(backend: str) -> None:
        start(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)

    monkeypatch.setattr(dist, "init_process_group", with_file_store)
    yield
    dist.destroy_process_group()


def test_the_trainers_example_trains(one_process_rendezvous: None) -> None:
    model, batch = llama()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    code = python_blocks("README.md")[0].replace("transformers.AutoModelForCausalLM.from_config(config)", "given_model")

    execute(code, "README.md", {"given_model": model, "batch": batch, "batches": [batch]})

    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_researchers_example_runs_and_its_pass_too(capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = llama()
    _, research, own_pass = python_blocks("README.md")

    variables = execute(research, "README.md", {"air": air, "model": model, "batch": batch})
    execute(own_pass, "README.md", variables)

    assert "autosp.all_to_all" in capsys.readouterr().out
    assert "count-views" in air.registered_passes()


def test_the_page_on_training_runs(one_process_rendezvous: None, tmp_path: Path) -> None:
    model, batch = llama(num_hidden_layers=1)
    fresh, _ = llama(num_hidden_layers=1)
    variables: dict[str, Any] = {
        "model": model,
        "fresh_model": fresh,
        "batch": batch,
        "folder": str(tmp_path / "saved"),
    }
    for code in python_blocks("docs/training.md"):
        execute(code, "docs/training.md", variables)


def test_the_guide_to_writing_a_pass_runs() -> None:
    model, batch = llama()
    program = air.capture(model, batch)
    variables: dict[str, Any] = {"program": program, "canonical": air.PassManager("canonicalize").run(program).program}
    for code in python_blocks("docs/writing_a_pass.md"):
        execute(code, "docs/writing_a_pass.md", variables)


def test_the_page_on_seeing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model, batch = llama(num_hidden_layers=1)
    variables: dict[str, Any] = {"program": air.capture(model, batch)}
    for code in python_blocks("docs/seeing.md"):
        execute(code, "docs/seeing.md", variables)
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "ulysses.svg", "run-events.json"}


def test_the_guide_to_finding_a_wrong_pass_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, batch = llama()
    variables: dict[str, Any] = {"program": air.capture(model, batch)}
    for code in python_blocks("docs/when_a_pass_is_wrong.md"):
        execute(code, "docs/when_a_pass_is_wrong.md", variables)
    assert list(tmp_path.glob("failures/*.repro"))


def test_the_tutorial_runs_and_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    page, variables = "docs/tutorial_ir_from_scratch.md", dict[str, Any]()
    blocks = blocks_with_output(page)
    assert sum(bool(shown) for _, shown in blocks) > len(blocks) / 2
    for code, shown in blocks:
        execute(code, page, variables)
        printed = capsys.readouterr().out
        assert as_shown(printed, shown), f"{code}\nprints\n{printed}\ninstead of\n{shown}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path) -> None:
    variables: dict[str, Any] = {}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            execute("".join(cell["source"]), f"{path.name}, cell {number}", variables)


def test_every_test_that_the_page_on_correctness_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/correctness.md").read_text())
    assert len(named) > 20
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert missing == []
