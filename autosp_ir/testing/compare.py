"""How far two runs are apart, and a report that says where.

The error of a gradient is `|a - b| / max(max|b|, floor × the model's largest gradient)`: some gradients are zero by
construction (a key bias shifts every score of a query alike), and rounding noise around zero is no error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autosp_ir.errors import AutoSPError

FLOOR = 1e-5
"""Part of the model's largest gradient below which a gradient counts as this large.

With the float64 bar of 1e-10 it leaves a gradient that is zero by construction four roundings of the largest gradient.
At 1e-6 the bar would be below one rounding, and such a gradient would pass on one processor and fail on another.
"""

_WORST_SHOWN = 10


class EquivalenceError(AutoSPError, AssertionError):
    """Two programs that must compute the same do not; the message is the report."""


@dataclass(frozen=True)
class Deviation:
    """One compared tensor.

    Args:
        what: "loss", "output logits on rank 1", "gradient of lm_head.weight".
        error: The relative error; infinite when the tensors cannot be compared.
        note: Why they cannot be compared, or where the error is largest.
    """

    what: str
    error: float
    note: str = ""

    def __str__(self) -> str:
        return f"{self.error:10.2e}  {self.what}{'  (' + self.note + ')' if self.note else ''}"


@dataclass
class Report:
    """The deviations of one comparison.

    Attributes:
        title: What was compared with what.
        rtol: The largest error that passes.
        deviations: One per loss, output and gradient.
    """

    title: str
    rtol: float
    deviations: list[Deviation] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest error; 0 when nothing was compared."""
        return max((d.error for d in self.deviations), default=0.0)

    @property
    def ok(self) -> bool:
        """Whether something was compared and every error is within `rtol`."""
        return bool(self.deviations) and self.worst <= self.rtol

    def failures(self) -> list[Deviation]:
        """What exceeds `rtol`, the worst first."""
        return sorted((d for d in self.deviations if not d.error <= self.rtol), key=lambda d: -d.error)

    def check(self) -> Report:
        """Return this report when it is ok.

        Raises:
            EquivalenceError: Something deviates, or nothing was compared.
        """
        if self.ok:
            return self
        raise EquivalenceError(
            str(self),
            hint="run the pipeline one pass at a time with program.verify(), or compare after each pass: the first "
            "program that deviates names the pass at fault",
        )

    def __str__(self) -> str:
        failed = self.failures()
        if not self.deviations:
            return f"{self.title}: nothing to compare (no output and no gradient)"
        if not failed:
            return f"{self.title}: {len(self.deviations)} tensors agree, largest error {self.worst:.2e}"
        lines = [f"{self.title}: {len(failed)} of {len(self.deviations)} tensors differ by more than {self.rtol:g}"]
        lines += [f"  {d}" for d in failed[:_WORST_SHOWN]]
        more = len(failed) - _WORST_SHOWN
        return "\n".join([*lines, *([f"  … and {more} more"] if more > 0 else [])])


def compare_named(
    kind: str, found: Mapping[str, Any], expected: Mapping[str, Any], *, floor: float = 0.0
) -> Iterator[Deviation]:
    """Compare tensors by name; a gradient that is absent on one side is zero, any other absence is an error.

    Args:
        kind: What they are: "output", "gradient of", "buffer".
        found: The tensors under test.
        expected: The reference.
        floor: Magnitude below which a reference tensor counts as this large.
    """
    for name in [*expected, *(n for n in found if n not in expected)]:
        a, b = found.get(name), expected.get(name)
        if kind == GRADIENT:
            a = torch.zeros_like(b) if a is None and isinstance(b, Tensor) else a
            b = torch.zeros_like(a) if b is None and isinstance(a, Tensor) else b
        yield deviation(f"{kind} {name}", a, b, floor)


GRADIENT = "gradient of"


def gradient_floor(gradients: Iterable[Any], floor: float = FLOOR) -> float:
    """The magnitude that counts as the smallest one, from a model's own gradients."""
    return floor * max((_magnitude(g) for g in gradients if isinstance(g, Tensor)), default=0.0)


def deviation(what: str, found: Any, expected: Any, floor: float = 0.0) -> Deviation:
    """The error of one tensor (or plain value) against its reference."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        same = found is not None and expected is not None and not isinstance(found, Tensor) and found == expected
        return Deviation(what, 0.0 if same else math.inf, "" if same else _absence(found, expected))
    if found.shape != expected.shape:
        return Deviation(what, math.inf, f"shape {list(found.shape)} instead of {list(expected.shape)}")
    if found.dtype != expected.dtype:
        return Deviation(what, math.inf, f"dtype {found.dtype} instead of {expected.dtype}")
    if not expected.numel():
        return Deviation(what, 0.0)
    if not expected.is_floating_point():
        wrong = int((found != expected).sum())
        return Deviation(what, math.inf if wrong else 0.0, f"{wrong} elements differ" if wrong else "")
    return _floating(what, found.detach().double(), expected.detach().double(), floor)


def _floating(what: str, found: Tensor, expected: Tensor, floor: float) -> Deviation:
    finite = torch.isfinite(expected)
    same_holes = torch.equal(finite, torch.isfinite(found)) and torch.equal(
        found[~finite].nan_to_num(nan=0.5), expected[~finite].nan_to_num(nan=0.5)
    )
    if not same_holes:
        return Deviation(what, math.inf, f"{_holes(found)} against {_holes(expected)} non-finite elements")
    gap = torch.where(finite, found - expected, 0.0).abs()
    largest = float(gap.max())
    if largest == 0.0:
        return Deviation(what, 0.0)
    scale = max(_magnitude(expected), floor)
    if scale == 0.0:
        return Deviation(what, math.inf, f"up to {_magnitude(found):.3g} instead of zero")
    return Deviation(what, largest / scale, f"{_place(gap)}: {_at(found, gap)} instead of {_at(expected, gap)}")


def _absence(found: Any, expected: Any) -> str:
    if found is None:
        return "it is absent"
    return "the reference has none" if expected is None else f"{_short(found)} instead of {_short(expected)}"


def _short(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _holes(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def _magnitude(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    return float(tensor.detach().abs().nan_to_num(0.0, 0.0, 0.0).max())


def _place(gap: Tensor) -> str:
    index = int(gap.argmax())
    return "at " + str([int(i) for i in torch.unravel_index(torch.tensor(index), gap.shape)]) if gap.ndim else "value"


def _at(tensor: Tensor, gap: Tensor) -> str:
    return f"{float(tensor.flatten()[int(gap.argmax())]):.6g}"


__all__ = [
    "FLOOR",
    "GRADIENT",
    "Deviation",
    "EquivalenceError",
    "Report",
    "compare_named",
    "deviation",
    "gradient_floor",
]
