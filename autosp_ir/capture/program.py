"""`capture`: a model and one batch as a forward-stage program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from autosp_ir.capture.batch import Batch
from autosp_ir.capture.export import LossFn, trace_module
from autosp_ir.capture.fx_import import import_fx
from autosp_ir.capture.info import Captured
from autosp_ir.ir.program import Program, Signature
from autosp_ir.rewrite.attention_masks import fold_attention_masks
from autosp_ir.rewrite.rewriter import Rewriter


def capture(
    model: nn.Module,
    batch: Batch,
    seq_dims: Mapping[str, int] | None = None,
    outputs: Sequence[str] | None = None,
    loss_fn: LossFn | None = None,
    dynamic: bool = False,
) -> Program:
    """Capture the forward of `model` on one example batch as a program.

    Args:
        model: With real or fake weights. It is not changed; the program shares its parameters and buffers.
        batch: Keyword arguments as a mapping, or positional ones as a tuple.
        seq_dims: Input name to the dimension that holds the sequence, such as `{"input_ids": 1}`; None infers it
            from well-known names and shapes.
        outputs: Names of outputs to keep; None keeps `loss` if the model returns one, else everything. Outputs
            without a name are `out0`, `out1`, …
        loss_fn: `loss_fn(outputs, batch)` for a loss outside the model; its result is the output `loss`.
        dynamic: Capture the sequence length as a symbol, so that one program serves every length.

    Returns:
        A forward-stage program for one device. `program.capture` says how to call it like the model.

    Raises:
        CaptureError: The model or the batch cannot be captured as one graph.
        UnsupportedError: The model does something that cannot be captured soundly, such as dropout.
    """
    program = program_of(trace_module(model, batch, seq_dims, outputs, loss_fn, dynamic))
    rewriter = Rewriter(program)
    fold_attention_masks(program, rewriter)
    rewriter.dead_code()
    return program


def program_of(captured: Captured) -> Program:
    """Import a traced model.

    Args:
        captured: From `trace_module`.

    Returns:
        The program, bound to the model's tensors.
    """
    imported = import_fx(captured.graph_module.graph, captured.graph_module)
    program = Program(imported.graph, Signature(captured.input_specs, captured.output_specs))
    program.attrs = imported.attrs
    program.tensors = dict(captured.tensors)
    program.fake_mode = captured.fake_mode
    program.capture = captured.info
    program.info = {
        "seq_dims": dict(captured.info.seq_dims),
        "training": captured.info.training,
        "example_facts": dict(captured.info.example_facts),
        "batch_facts": {},
    }
    return program


__all__ = ["capture", "program_of"]
