"""Replaying a reproducer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autosp_ir.errors import AutoSPError, PipelineError
from autosp_ir.ir.program import Program
from autosp_ir.ir.text import parse
from autosp_ir.ir.types import TensorType
from autosp_ir.pipeline.manager import PassManager, PassResult
from autosp_ir.pipeline.registry import parse_pipeline
from autosp_ir.pipeline.reproduce import Reproducer, read_reproducer

_ADDRESS = re.compile(r"0x[0-9a-f]+")


@dataclass(frozen=True)
class Replay:
    """What became of a reproducer.

    Args:
        expected: The failure that was written down.
        error: What the pass raised this time; None when it succeeded.
        result: What the pass made, when it succeeded.
    """

    expected: Reproducer
    error: AutoSPError | None
    result: PassResult | None = None

    @property
    def same(self) -> bool:
        """Whether it failed as written down: the same class of error in the same pass for the same reason."""
        if self.error is None:
            return False
        now = (type(self.error).__name__, self.error.pass_name, _plain(self.error.reason))
        return now == (self.expected.error, self.expected.pass_name, _plain(self.expected.reason))

    def __str__(self) -> str:
        then = f"{self.expected.error} in {self.expected.pass_name}: {self.expected.reason}"
        if self.error is None:
            return f"it no longer fails; it was {then}"
        if self.same:
            return f"it fails as written down: {type(self.error).__name__}\n{self.error}"
        return f"it fails differently; it was {then}\nnow it is {type(self.error).__name__}\n{self.error}"


def reproduce(path: str | Path) -> Replay:
    """Run the pass of a reproducer on its program.

    Args:
        path: What a failing pass wrote.

    Returns:
        Whether it failed, and how.

    Raises:
        ParseError: The file is no reproducer, or in a newer format.
        PipelineError: The pass is not registered here; the hint says where it was defined.
    """
    header, text = read_reproducer(path)
    program = _bound(parse(text), header)
    try:
        passes = parse_pipeline(header.pass_text)
    except PipelineError as error:
        raise PipelineError(
            error.reason,
            hint=f"import what defines {header.pass_name} first: --load {header.defined_in or 'FILE'}",
        ) from error
    manager = PassManager(passes, verify=header.verify, timeout=header.timeout, reproducer=False)
    torch.manual_seed(header.seed)
    try:
        return Replay(header, None, manager.run(program, mesh=header.mesh, strict=header.strict))
    except AutoSPError as error:
        return Replay(header, error)


def _plain(reason: str) -> str:
    return _ADDRESS.sub("0x", reason)


def _bound(program: Program, header: Reproducer) -> Program:
    """Bind tensors of the right types in place of those that IR text leaves out."""
    generator = torch.Generator().manual_seed(header.seed)
    for spec in program.signature.inputs:
        kind = program.graph.value(spec.name).type
        if spec.target not in header.tensors or not isinstance(kind, TensorType):
            continue
        if all(isinstance(extent, int) for extent in kind.shape):
            program.tensors[spec.target] = _drawn(kind, generator)
    return program


def _drawn(kind: TensorType, generator: torch.Generator) -> Tensor:
    shape = [int(extent) for extent in kind.shape]
    if kind.dtype.is_floating_point or kind.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(kind.dtype)


__all__ = ["Replay", "reproduce"]
