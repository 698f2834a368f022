"""Parameters and buffers by name, call after call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autosp_ir.emit.lookup import Lookup, submodules
from autosp_ir.errors import RuntimeMismatchError


def _model() -> Any:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))


def test_finds_what_named_parameters_and_buffers_find() -> None:
    model = _model()
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    found = Lookup(list(expected))(model)
    assert list(found) == list(expected) and all(found[n] is expected[n] for n in expected)


def test_finds_what_the_model_itself_holds() -> None:
    model = nn.Linear(2, 3)
    assert Lookup(["weight", "bias"])(model) == {"weight": model.weight, "bias": model.bias}


def test_sees_what_was_replaced_since() -> None:
    model = _model()
    lookup = Lookup(["0.weight", "1.1.weight"])
    lookup(model)
    model[0].weight = nn.Parameter(torch.zeros(3, 2))
    model[1] = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    found = lookup(model)
    assert found["0.weight"] is model[0].weight and found["1.1.weight"] is model[1][1].weight


def test_sees_modules_that_changed_places() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    lookup = Lookup(["0.weight"])
    lookup(model)
    model[0], model[1] = model[1], model[0]
    assert lookup(model)["0.weight"] is model[0].weight


def _swap_names(model: Any) -> None:
    first, second = model["a"], model["b"]
    del model["a"], model["b"]
    model["b"], model["a"] = first, second


def _point_elsewhere(model: Any) -> None:
    model["c"] = model["b"]


@pytest.mark.parametrize("change", [_swap_names, _point_elsewhere])
def test_sees_names_that_moved_among_modules_that_did_not(change: Callable[[Any], None]) -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["c"] = model["a"]
    lookup = Lookup(["a.weight", "b.weight", "c.weight"])
    lookup(model)
    change(model)
    found = lookup(model)
    assert all(found[f"{name}.weight"] is model[name].weight for name in "abc")


def test_a_renamed_module_is_gone() -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(2, 2)})
    lookup = Lookup(["a.weight"])
    lookup(model)
    model["c"] = model.pop("a")
    with pytest.raises(RuntimeMismatchError, match="no longer has"):
        lookup(model)


@pytest.mark.parametrize("gone", ["parameter", "module"])
def test_names_what_is_gone(gone: str) -> None:
    model = _model()
    lookup = Lookup(["1.1.weight"])
    lookup(model)
    if gone == "parameter":
        del model[1][1].weight
    else:
        del model[1][1]
    with pytest.raises(RuntimeMismatchError, match=r"no longer has '1\.1\.weight'"):
        lookup(model)


def test_submodules_are_those_of_torch_each_once() -> None:
    model = _model()
    model.append(model[0])
    assert {id(m) for m in submodules(model)} == {id(m) for m in model.modules()}
    assert len(submodules(model)) == len(list(model.modules()))
