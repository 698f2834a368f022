"""Commands for authors of passes: `autosp-ir new-pass | passes`."""

from __future__ import annotations

import importlib.util
import json
import keyword
import re
import sys
import warnings
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from autosp_ir.errors import PipelineError
from autosp_ir.pipeline.catalogue import PassEntry, catalogue, catalogue_json, catalogue_markdown
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.pipeline.registry import REGISTRY

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TEMPLATES = files("autosp_ir") / "templates" / "new_pass"
_FILES = {
    "pyproject.toml": "pyproject.toml.tmpl",
    "README.md": "README.md.tmpl",
    "src/$package/__init__.py": "init.py.tmpl",
    "src/$package/passes.py": "passes.py.tmpl",
    "tests/test_$package.py": "test_pass.py.tmpl",
}


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(name="new-pass")(new_pass)
    app.command(name="passes")(passes)


def pass_manager(pipeline: str, **settings: Any) -> PassManager:
    """The passes of pipeline text, or of a `.toml` or `.json` file, with settings of `PassManager`."""
    if pipeline.endswith(".toml"):
        return PassManager.from_toml(pipeline, **settings)
    make = PassManager.from_json if pipeline.endswith(".json") else PassManager
    return make(pipeline, **settings)


def new_pass(
    name: Annotated[str, typer.Argument(help="Name of the pass in pipelines, in kebab-case.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to make; ./NAME by default.")] = None,
    as_json: Json = False,
) -> None:
    """Write an installable package with one pass and its test."""
    folder = scaffold(name, output if output is not None else Path(name))
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if as_json:
        sys.stdout.write(json.dumps({"name": name, "folder": str(folder), "files": written}, indent=2) + "\n")
        return
    sys.stdout.write("".join(f"{folder / path}\n" for path in written))
    sys.stdout.write(f"Next: pip install --editable '{folder}[test]' && pytest {folder}\n")


def scaffold(name: str, folder: Path) -> Path:
    """Write a package with one pass and its test.

    Args:
        name: Of the pass, in kebab-case; the package is called the same in snake case.
        folder: Where; it must not exist, or be empty.

    Returns:
        The folder.

    Raises:
        PipelineError: The name cannot be used or is taken, or the folder is not empty.
    """
    package = _package_of(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PipelineError(f"{folder} exists and is not an empty folder", hint="choose another one with --output")
    class_name = "".join(word.capitalize() for word in name.split("-"))
    words = {"name": name, "package": package, "class_name": class_name}
    for target, template in _FILES.items():
        path = folder / Template(target).substitute(words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template((_TEMPLATES / template).read_text(encoding="utf-8")).substitute(words))
    (folder / "src" / package / "py.typed").touch()
    return folder


def _package_of(name: str) -> str:
    if not _NAME.fullmatch(name):
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()
        kebab = re.sub(r"[^a-z0-9]+", "-", words).strip("-").lstrip("0123456789-")
        raise PipelineError(f"{name!r} is no pass name", hint=f"use kebab-case, such as {kebab or 'my-pass'!r}")
    if name in REGISTRY.names():
        raise PipelineError(f"a pass called {name!r} is installed already", hint="choose another name")
    package = name.replace("-", "_")
    if keyword.iskeyword(package) or importlib.util.find_spec(package) is not None:
        raise PipelineError(
            f"a Python package cannot be called {package!r}: the name is taken", hint=f"try '{name}-pass'"
        )
    return package


def passes(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the catalogue as Markdown.")] = False,
    package: Annotated[str | None, typer.Option(help="Only the passes of this Python package.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here, not to the screen.")] = None,
) -> None:
    """List every pass that is installed: what it does, where it may stand, and its options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each failure gets a line of its own below
        entries = catalogue(package=package)
    for name, reason in REGISTRY.failures().items():
        sys.stderr.write(f"autosp-ir: the pass {name!r} cannot be loaded: {reason}\n")
    if as_json or markdown or output is not None:
        text = catalogue_json(entries) if as_json else catalogue_markdown(entries)
        if output is None:
            sys.stdout.write(text)
        else:
            output.write_text(text)
        return
    Console().print(_table(entries))


def _table(entries: list[PassEntry]) -> Table:
    table = Table("pass", "stage", "requires", "provides", "options", "what it does")
    for entry in entries:
        options = ", ".join(option.name for option in entry.options)
        stage = ", ".join(entry.stages) + (f" → {entry.produces}" if entry.produces else "")
        table.add_row(entry.name, stage, ", ".join(entry.requires), ", ".join(entry.provides), options, entry.summary)
    return table
