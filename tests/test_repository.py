"""Rules of the repository that no linter knows."""

import ast
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from statistics import median

import pytest

import autosp_passes

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "autosp_ir").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
PYTHON = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]

PRIVATE_TORCH_HOME = ROOT / "autosp_ir" / "_torch_compat.py"


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def line_count(path: Path) -> int:
    return len(path.read_text().splitlines())


def is_private(dotted: str) -> bool:
    """True for a dotted torch name with a private component; operator namespaces under torch.ops are not private."""
    parts = dotted.split(".")
    if parts[0] != "torch" or parts[:2] == ["torch", "ops"]:
        return False
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """Yields (local name, absolute dotted name, line) for every absolute import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}", node.lineno


def attribute_chain(node: ast.expr) -> list[str]:
    """`a.b.c` as ["a", "b", "c"]; empty when the root is not a plain name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def private_torch_uses(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    imports = list(imported_names(tree))
    found = {(line, dotted) for _, dotted, line in imports if is_private(dotted)}
    aliases = {local: dotted for local, dotted, _ in imports if local != dotted.split(".")[0]}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in attributes}
    for node in attributes:
        if id(node) not in inner and (chain := attribute_chain(node)):
            dotted = ".".join([aliases.get(chain[0], chain[0]), *chain[1:]])
            if is_private(dotted):
                found.add((node.lineno, dotted))
    return [f"{relative(path)}:{line}: {dotted}" for line, dotted in sorted(found)]


def test_no_file_is_over_600_lines() -> None:
    long = [f"{relative(path)}: {count}" for path in PYTHON if (count := line_count(path)) > 600]
    assert not long, "split these:\n" + "\n".join(long)


def test_the_median_source_file_has_at_most_200_lines() -> None:
    assert median(line_count(path) for path in SOURCES) <= 200


def test_private_torch_is_touched_in_one_module_only() -> None:
    uses = [use for path in SOURCES if path != PRIVATE_TORCH_HOME for use in private_torch_uses(path)]
    assert not uses, "move these behind autosp_ir/_torch_compat.py:\n" + "\n".join(uses)


def test_built_in_passes_use_no_private_name_of_the_core() -> None:
    uses = [
        f"{relative(path)}:{line}: {dotted}"
        for path in sorted((ROOT / "passes").rglob("*.py"))
        for _, dotted, line in imported_names(ast.parse(path.read_text()))
        if dotted.startswith("autosp_ir.") and any(part.startswith("_") for part in dotted.split("."))
    ]
    assert not uses, "the public API lacks these:\n" + "\n".join(uses)


@pytest.mark.parametrize("entry", entry_points(group="autosp_ir.passes"), ids=lambda entry: entry.name)
def test_an_entry_point_carries_the_name_of_its_pass(entry: EntryPoint) -> None:
    assert entry.load().name == entry.name


def test_every_module_of_built_in_passes_is_an_entry_point() -> None:
    modules = {path.stem for path in (ROOT / "passes" / "autosp_passes").glob("[!_]*.py")}
    assert modules <= {entry.module.removeprefix("autosp_passes.") for entry in entry_points(group="autosp_ir.passes")}


def test_the_package_exports_every_built_in_pass() -> None:
    entries = [e for e in entry_points(group="autosp_ir.passes") if e.module.startswith("autosp_passes.")]
    assert {entry.load().__name__ for entry in entries} == set(autosp_passes.__all__)
