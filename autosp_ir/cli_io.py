"""What the commands share: programs in, programs and tables out."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from autosp_ir.errors import AutoSPError, CaptureError, PipelineError
from autosp_ir.ir.program import Program


def read_mesh(text: str) -> dict[str, int]:
    """Axis sizes from `dp=2,sp=4`.

    Raises:
        AutoSPError: The text is no mesh.
    """
    try:
        return {axis.strip(): int(size) for axis, _, size in (part.partition("=") for part in text.split(","))}
    except ValueError as error:
        raise AutoSPError(f"{text!r} is no mesh", hint="write axis=size pairs, such as --mesh dp=2,sp=4") from error


def read_source(text: str) -> Program:
    """The program in an IR file, or the one captured from `package.module:factory`.

    Raises:
        ParseError: The file is no IR text. CaptureError when the model cannot be captured.
    """
    from autosp_ir.ir.text import parse

    path = Path(text)
    return parse(path.read_text(encoding="utf-8")) if path.is_file() else captured(text, dynamic=False)


def captured(spec: str, dynamic: bool) -> Program:
    """Capture what a factory returns.

    Raises:
        CaptureError: There is no such factory, or its model cannot be captured.
    """
    from autosp_ir.capture.program import capture as capture_model

    model, batch = _factory(spec)()
    return capture_model(model, batch, dynamic=dynamic)


def load(source: str) -> None:
    """Import a module, or run a Python file as one, so that its passes are registered.

    Raises:
        PipelineError: It cannot be loaded.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        if not source.endswith(".py"):
            importlib.import_module(source)
            return
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        if spec is None or spec.loader is None:
            raise ImportError(f"{source} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except (ImportError, OSError, SyntaxError) as error:
        raise PipelineError(
            f"{source!r} cannot be loaded: {error}", hint="give a module, or a Python file that registers passes"
        ) from error


def write(program: Program, output: Path | None, as_json: bool) -> None:
    """Write a program to a file, or to the screen."""
    text = program.to_json() if as_json else str(program)
    if output is None:
        sys.stdout.write(text + "\n")
        return
    output.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(program.graph)} nodes written to {output}\n")


def _factory(spec: str) -> Any:
    module_name, colon, attribute = spec.partition(":")
    hint = "write package.module:factory, where factory() returns (model, batch)"
    if not colon:
        raise CaptureError(f"{spec!r} is neither an IR file nor a factory", hint=hint)
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise CaptureError(f"{spec!r} cannot be loaded: {error}", hint=hint) from error


__all__ = ["captured", "load", "read_mesh", "read_source", "write"]
