"""Functions that run on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import autosp_ir as air
from autosp_ir.emit.parallelize import Backend
from tests.emit.steps import gradients, largest_error, loss_of
from tests.rivals.forms import FORMS


def form_errors(rank: int, world: int, names: Sequence[str], backend: Backend) -> list[float]:
    """For each form, the largest relative error of its loss and gradients against the dense model on this rank."""
    torch.set_num_threads(1)
    errors = []
    for name in names:
        torch.manual_seed(0)
        model, batch = FORMS[name]()
        dense = loss_of(model(**batch))
        dense.backward()
        expected = gradients(model)
        model.zero_grad()
        loss = loss_of(air.parallelize(model, batch, backend=backend)(**batch))
        loss.backward()
        difference = float((loss - dense).detach().abs() / dense.detach().abs())
        errors.append(max(difference, largest_error(gradients(model), expected)))
    return errors
