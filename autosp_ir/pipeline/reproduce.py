"""Reproducers: one file that replays the failure of a pass in a fresh process.

    autosp-ir-reproducer 1
    {"pass": "ulysses", "pipeline": "canonicalize,…", "mesh": {"sp": 4}, …}
    program:
    autosp-ir 1
    …

The program is the one that the failing pass was given, so the passes in front of it are not run again. IR text holds
no tensors: a replay draws those that were bound, by type, from the seed.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from autosp_ir.errors import AutoSPError, ParseError
from autosp_ir.ir.graph import Graph
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.registry import format_pipeline

REPRODUCER_VERSION = 1
VARIABLE = "AUTOSP_IR_REPRODUCER"
"""Environment variable: a folder for the reproducers of every failing pass."""

_MAGIC = "autosp-ir-reproducer"
_SEPARATOR = "program:"


@dataclass(frozen=True)
class Reproducer:
    """What a reproducer says besides the program.

    Args:
        pass_name: The pass that failed.
        pass_text: It with its options, as in a pipeline.
        defined_in: The file that defines it.
        pipeline: The whole pipeline that was run.
        mesh: Axis sizes.
        strict: Whether the pipeline was run with `strict=True`.
        verify: Whether programs were verified.
        timeout: Seconds that a pass was given.
        seed: Of the tensors that a replay draws.
        error: Class name of the error.
        reason: The error's reason.
        message: The whole error text.
        tensors: Parameters, buffers and constants that were bound; drawn at random in a replay.
        objects: Names of bound objects, which are missing in a replay.
        versions: Of autosp_ir, torch and Python.
    """

    pass_name: str
    pass_text: str
    defined_in: str
    pipeline: str
    mesh: dict[str, int]
    strict: bool
    verify: bool
    timeout: float | None
    seed: int
    error: str
    reason: str
    message: str
    tensors: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def describe_failure(
    error: AutoSPError,
    pass_: Pass,
    passes: Sequence[Pass],
    program: Program,
    mesh: Mapping[str, int],
    *,
    strict: bool,
    verify: bool,
    timeout: float | None = None,
    seed: int = 0,
) -> Reproducer:
    """Gather what a replay needs to know about a failure.

    Args:
        error: What was raised.
        pass_: The pass that failed.
        passes: The pipeline that it was run in.
        program: What the pass was given.
        mesh: Axis sizes.
        strict: As given to `PassManager.run`.
        verify: As given to `PassManager`.
        timeout: As given to `PassManager`.
        seed: Of the tensors that a replay draws.
    """
    return Reproducer(
        pass_name=pass_.name,
        pass_text=_text([pass_]),
        defined_in=_file_of(pass_),
        pipeline=_text(passes),
        mesh=dict(mesh),
        strict=strict,
        verify=verify,
        timeout=timeout,
        seed=seed,
        error=type(error).__name__,
        reason=error.reason,
        message=str(error),
        tensors=sorted(program.tensors),
        objects=sorted(name for name, item in program.attrs.items() if not isinstance(item, Graph)),
        versions={"autosp_ir": _own_version(), "torch": torch.__version__, "python": sys.version.split()[0]},
    )


def write_reproducer(target: Path, header: Reproducer, program: Program) -> Path:
    """Write a reproducer.

    Args:
        target: A file; or a folder, made when it has no suffix and is missing, where the file is named after the pass.
        header: From `describe_failure`.
        program: What the pass was given.

    Returns:
        The file.

    Raises:
        UnsupportedError: The program has no text form.
        OSError: The file cannot be written.
    """
    text = f"{_MAGIC} {REPRODUCER_VERSION}\n{json.dumps(asdict(header), indent=2)}\n{_SEPARATOR}\n{program}"
    path = target
    if target.is_dir() or not target.suffix:
        target.mkdir(parents=True, exist_ok=True)
        taken = sum(1 for _ in target.glob(f"{header.pass_name}-*.repro"))
        path = target / f"{header.pass_name}-{os.getpid()}-{taken + 1}.repro"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read_reproducer(path: str | Path) -> tuple[Reproducer, str]:
    """Read a reproducer.

    Returns:
        Its header and the program's text.

    Raises:
        ParseError: The file is no reproducer, is cut off, or was written in a newer format.
        AutoSPError: The file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AutoSPError(f"{path} cannot be read: {error}", hint="give the path of a reproducer") from error
    first, _, rest = text.partition("\n")
    magic = re.fullmatch(rf"{_MAGIC} (\d+)\s*", first)
    if magic is None:
        raise _malformed(f"expected `{_MAGIC} {REPRODUCER_VERSION}` on the first line", 1)
    if int(magic.group(1)) > REPRODUCER_VERSION:
        raise ParseError(
            f"the reproducer has format version {magic.group(1)}, this reader knows up to {REPRODUCER_VERSION}",
            line=1,
            column=len(_MAGIC) + 2,
            hint="upgrade autosp_ir, or replay it with the version that wrote it",
        )
    head, separator, program = rest.partition(f"\n{_SEPARATOR}\n")
    if not separator:
        raise _malformed(f"there is no line `{_SEPARATOR}`, so the program is missing", 2)
    try:
        return TypeAdapter(Reproducer).validate_json(head), program
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise _malformed(f"the header is malformed: {where + ': ' if where else ''}{fault['msg']}", 2) from error


def _own_version() -> str:
    """The package's version; the package itself is above this room and cannot be imported here."""
    return str(getattr(sys.modules.get("autosp_ir"), "__version__", "unknown"))


def _malformed(reason: str, line: int) -> ParseError:
    return ParseError(reason, line=line, column=1, hint="let the failing pass write the file again")


def _text(passes: Sequence[Pass]) -> str:
    try:
        return format_pipeline(passes)
    except AutoSPError:
        return ",".join(map(str, passes))


def _file_of(pass_: Pass) -> str:
    defined = getattr(type(pass_), "function", type(pass_))
    try:
        return inspect.getsourcefile(defined) or ""
    except TypeError:
        module = sys.modules.get(type(pass_).__module__)
        return getattr(module, "__file__", None) or ""


__all__ = ["REPRODUCER_VERSION", "VARIABLE", "Reproducer", "describe_failure", "read_reproducer", "write_reproducer"]
