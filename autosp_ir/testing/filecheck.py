"""Partial expectations of a program's text, in the syntax of LLVM's FileCheck.

    filecheck(result.program, '''
        CHECK:      autosp.all_to_all
        CHECK-NEXT: autosp.all_to_all
        CHECK-NOT:  autosp.all_gather
    ''')

A golden file pins the whole program; this pins only what a pass promises. Needs the package `filecheck`.
"""

from __future__ import annotations

import io
import re

from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.program import Program
from autosp_ir.testing.compare import EquivalenceError
from autosp_ir.testing.golden import portable

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def filecheck(program: Program | str, checks: str) -> None:
    """Match a program's text, without its comments, against FileCheck directives.

    Args:
        program: A program, or text.
        checks: Lines with `CHECK:`, `CHECK-NEXT:`, `CHECK-SAME:`, `CHECK-DAG:`, `CHECK-NOT:`, `CHECK-COUNT-n:`,
            `CHECK-LABEL:`; `{{regex}}` and `[[name:regex]]` inside them, as in
            https://llvm.org/docs/CommandGuide/FileCheck.html.

    Raises:
        EquivalenceError: The text does not match, or `checks` holds no directive or a malformed one.
        UnsupportedError: The package `filecheck` is not installed.
    """
    try:
        from filecheck.finput import FInput
        from filecheck.matcher import Matcher
        from filecheck.options import Options
        from filecheck.parser import Parser, pattern_for_opts
    except ImportError as error:
        raise UnsupportedError(
            "FileCheck expectations need the package filecheck", hint="pip install 'autosp-ir[testing]'"
        ) from error
    text = portable(str(program))
    options = Options(match_filename="checks", input_file="program")
    parser = Parser(options, io.StringIO(checks), *pattern_for_opts(options))
    matcher = Matcher(options, FInput("program", text), parser)
    matcher.stderr = io.StringIO()
    try:
        failed = matcher.run() != 0
    except re.error as error:
        raise EquivalenceError(
            f"a check holds a malformed regular expression: {error}", hint="correct what stands between {{ and }}"
        ) from error
    if failed:
        said = _ESCAPES.sub("", matcher.stderr.getvalue()).strip()
        raise EquivalenceError(
            f"the program does not match its checks: {said}\n\n{text}",
            hint="CHECK lines match in order; print the program to see what is there",
        )


__all__ = ["filecheck"]
