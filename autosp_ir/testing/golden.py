"""Golden files: programs as text under version control, compared structurally, rewritten on request."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from autosp_ir.ir.program import Program
from autosp_ir.ir.text import parse, structurally_equal
from autosp_ir.testing.compare import EquivalenceError

UPDATE_VARIABLE = "AUTOSP_UPDATE_GOLDEN"
"""Environment variable that lets golden files be rewritten; `pytest --update-golden` sets it."""


def updating() -> bool:
    """Whether golden files are being rewritten instead of compared."""
    return os.environ.get(UPDATE_VARIABLE, "") not in ("", "0")


def check_golden(program: Program, golden: Program | str | Path) -> None:
    """Compare a program with a golden one: operations, arguments, types, layouts, names, signature.

    Args:
        program: What a pass made.
        golden: A program, IR text, or a path of an `.ir` file, which `pytest --update-golden` writes.

    Raises:
        EquivalenceError: They differ; the message holds the first difference and a diff of the texts.
    """
    path = as_path(golden)
    if path is not None and updating():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(portable(str(program)), encoding="utf-8")
        return
    if path is not None and not path.exists():
        raise EquivalenceError(
            f"the golden file {path} does not exist", hint="run pytest --update-golden, then read what it wrote"
        )
    expected = read_program(golden)
    difference = structurally_equal(program, expected)
    if difference is None:
        return
    name = str(path) if path is not None else "the expected program"
    raise EquivalenceError(
        f"the program differs from {name}: {difference}\n\n{_diff(str(expected), str(program), name)}",
        hint="if the change is meant, run pytest --update-golden and review the diff",
    )


def check_round_trip(program: Program) -> None:
    """Check that the program's text reads back as the same program.

    Raises:
        EquivalenceError: It does not.
    """
    difference = structurally_equal(program, parse(str(program)))
    if difference is not None:
        raise EquivalenceError(
            f"the text of the program reads back as another program: {difference}",
            hint="this is a bug in the printer or the parser; the program is valid",
        )


def read_program(source: Program | str | Path) -> Program:
    """A program from itself, from IR text, or from an `.ir` file.

    Raises:
        ParseError: The text is malformed.
        EquivalenceError: The file does not exist.
    """
    if isinstance(source, Program):
        return source
    path = as_path(source)
    if path is None:
        return parse(str(source))
    if not path.exists():
        raise EquivalenceError(f"the program file {path} does not exist", hint="check the path")
    return parse(path.read_text(encoding="utf-8"))


def as_path(source: Program | str | Path) -> Path | None:
    """The path that a source means, None for programs and IR text."""
    if isinstance(source, Path):
        return source
    return Path(source) if isinstance(source, str) and "\n" not in source and source.strip() else None


def portable(text: str) -> str:
    """Program text without comments, which name source lines of whatever version of a library was installed."""
    return "".join(f"{line.partition('   # ')[0]}\n" for line in text.splitlines())


def _diff(expected: str, found: str, name: str) -> str:
    lines = difflib.unified_diff(
        portable(expected).splitlines(), portable(found).splitlines(), name, "what the pass made", lineterm="", n=2
    )
    return "\n".join(lines)


__all__ = ["UPDATE_VARIABLE", "as_path", "check_golden", "check_round_trip", "portable", "read_program", "updating"]
