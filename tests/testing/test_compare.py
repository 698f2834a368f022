from __future__ import annotations

import math

import pytest
import torch

from autosp_ir.errors import AutoSPError
from autosp_ir.testing.compare import (
    FLOOR,
    GRADIENT,
    EquivalenceError,
    Report,
    compare_named,
    deviation,
    gradient_floor,
)

ONE = torch.ones(3, dtype=torch.float64)


def test_the_error_is_relative_to_the_largest_magnitude() -> None:
    assert deviation("x", torch.tensor([4.0, 1.0]), torch.tensor([4.0, 2.0])).error == 0.25


def test_a_gradient_of_zero_is_measured_against_the_model() -> None:
    gradients = {"big": 1e3 * ONE, "key.bias": 0 * ONE}
    floor = gradient_floor(gradients.values())
    assert floor == pytest.approx(1e3 * FLOOR)
    noise = {"big": 1e3 * ONE, "key.bias": 1e-14 * ONE}
    errors = {d.what: d.error for d in compare_named(GRADIENT, noise, gradients, floor=floor)}
    assert errors["gradient of key.bias"] == pytest.approx(1e-17 / FLOOR)
    assert next(compare_named("output", {"o": ONE}, {"o": 0 * ONE})).error == math.inf


def test_an_absent_gradient_is_zero_but_an_absent_output_is_an_error() -> None:
    assert next(compare_named(GRADIENT, {}, {"w": 0 * ONE})).error == 0
    assert next(compare_named(GRADIENT, {}, {"w": ONE})).error == 1
    assert next(compare_named(GRADIENT, {"w": ONE}, {})).error == math.inf
    assert next(compare_named("output", {}, {"o": ONE})).error == math.inf
    assert next(compare_named("output", {"o": ONE}, {})).error == math.inf


@pytest.mark.parametrize("wrong", [torch.ones(4).double(), torch.ones(3), torch.tensor([1.0, math.nan, 1.0]).double()])
def test_other_shapes_dtypes_and_nan_never_pass(wrong: torch.Tensor) -> None:
    assert deviation("x", wrong, ONE).error == math.inf


def test_nan_and_infinities_agree_only_in_place() -> None:
    holes = torch.tensor([math.nan, math.inf, 1.0])
    assert deviation("x", holes.clone(), holes).error == 0
    assert deviation("x", torch.tensor([math.nan, -math.inf, 1.0]), holes).error == math.inf
    assert deviation("x", torch.tensor([math.inf, math.nan, 1.0]), holes).error == math.inf


def test_integers_are_compared_exactly() -> None:
    assert deviation("x", torch.tensor([1, 2]), torch.tensor([1, 2])).error == 0
    assert deviation("x", torch.tensor([1, 3]), torch.tensor([1, 2])).note == "1 elements differ"


def test_the_report_names_the_worst_first_and_fails() -> None:
    report = Report("a against b", 1e-3)
    report.deviations = [
        deviation("small", 1.01 * ONE, ONE),
        deviation("large", 2 * ONE, ONE),
        deviation("ok", ONE, ONE),
    ]
    text = str(report)
    assert text.index("large") < text.index("small") and "ok" not in text and "2 of 3" in text
    with pytest.raises(EquivalenceError, match="2 of 3 tensors") as failure:
        report.check()
    assert isinstance(failure.value, AssertionError) and isinstance(failure.value, AutoSPError)


def test_an_empty_comparison_does_not_pass() -> None:
    with pytest.raises(EquivalenceError, match="nothing to compare"):
        Report("a against b", 1.0).check()
