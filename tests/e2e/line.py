"""The whole line, from a model and a batch to a lowered program, and its comparison with the dense model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autosp_ir.capture.program import capture
from autosp_ir.ir.program import Program
from autosp_ir.pipeline import DEFAULT_PIPELINE, PassManager
from autosp_ir.testing import DenseReference, Equivalence

torch.set_num_threads(1)


def partitioned(program: Program, ranks: int, pipeline: str = DEFAULT_PIPELINE) -> Program:
    """The program of one rank, lowered."""
    return PassManager(pipeline).run(program, mesh={"sp": ranks}).program


def check_line(
    model: nn.Module,
    batch: Any,
    ranks: int,
    pipeline: str = DEFAULT_PIPELINE,
    rtol: float = 1e-10,
    **settings: Any,
) -> Equivalence:
    """Capture, partition, lower, and compare with the dense model.

    Args:
        model: The model.
        batch: The batch.
        ranks: Size of the sequence axis.
        pipeline: Passes to run.
        rtol: Largest error allowed.
        settings: Of `capture`: `outputs`, `loss_fn`, `seq_dims`.
    """
    reference = DenseReference.of(model, batch, **settings)
    return reference.check(partitioned(reference.program, ranks, pipeline), rtol)


def check_dynamic(model: nn.Module, example: Any, batch: Any, ranks: int, **settings: Any) -> Equivalence:
    """As `check_line`, with a program captured for any length on another batch."""
    program = partitioned(capture(model, example, dynamic=True, **settings), ranks)
    return DenseReference.of(model, batch, **settings).check(program)
