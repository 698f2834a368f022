"""From a model and one batch to a flat ATen graph, through `torch.export`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.export import Dim, ExportedProgram

from autosp_ir._torch_compat import exact_autocast, fake_mode_of, is_fake
from autosp_ir.capture import huggingface
from autosp_ir.capture.autocast import Autocast
from autosp_ir.capture.batch import Batch, CallPlan, UserInput, plan_call
from autosp_ir.capture.casts import make_casts_explicit
from autosp_ir.capture.clean import clean
from autosp_ir.capture.facts import facts_of
from autosp_ir.capture.info import Captured, CaptureInfo
from autosp_ir.capture.outputs import (
    LOSS,
    Structure,
    choose_outputs,
    describe_output,
    keep,
    simplify,
    with_loss,
)
from autosp_ir.capture.regions import functionalize, inline_regions, mutates
from autosp_ir.capture.seq_dims import resolve_seq_dims
from autosp_ir.capture.tracing import capture_lock, named_errors, refuse_lost_gradients
from autosp_ir.errors import CaptureError

LossFn = Callable[[Any, Any], Tensor]
_SUGGESTED_RANGE = re.compile(r"S = Dim\('S'(?:, min=(\d+))?(?:, max=(\d+))?\)")
_EXCLUDED_LENGTH = re.compile(r"range (?P<low>\d+) <= S <= (?P<high>\d+) satisfy .* != (?P<length>\d+)")
_UNBACKED = ("u", "zu", "zf")
_RANGE_ATTEMPTS = 3
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "OptimizedModule")


@dataclass
class _Seen:
    """What the traced call returned; an object of its own, because export undoes changes to a module's attributes."""

    structure: Structure | None = None
    names: list[str] = field(default_factory=list)


class _Step(nn.Module):
    """What is exported: the model's call on flat tensors, returning the kept outputs alone."""

    def __init__(self, model: nn.Module, plan: CallPlan, outputs: Sequence[str] | None, loss_fn: LossFn | None) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.wanted = outputs
        self.loss_fn = loss_fn
        self.seen = _Seen()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        output = self.plan.call(self.model, tensors)
        structure, available = describe_output(output)
        if self.loss_fn is not None:
            structure, available = with_loss(structure), dict(available)
            available[LOSS] = self._outside_loss(output, tensors)
        names = choose_outputs(list(available), self.wanted)
        kept = keep(structure, names)
        self.seen.names = names
        self.seen.structure = simplify(kept) if kept is not None else None
        return tuple(available[name] for name in names)

    def _outside_loss(self, output: Any, tensors: Sequence[Tensor]) -> Tensor:
        loss = self.loss_fn(output, self.plan.batch(tensors)) if self.loss_fn is not None else None
        if isinstance(loss, Tensor) and loss.ndim == 0:
            return loss
        raise CaptureError(
            "loss_fn must return a tensor without dimensions, it returned "
            f"{type(loss).__name__}{list(getattr(loss, 'shape', []))}",
            hint="reduce the loss to one number, for example with .mean()",
        )


def trace_module(
    model: nn.Module,
    batch: Batch,
    seq_dims: Mapping[str, int] | None = None,
    outputs: Sequence[str] | None = None,
    loss_fn: LossFn | None = None,
    dynamic: bool = False,
) -> Captured:
    """Trace the forward of `model` (and its loss) on one example batch, under the caller's autocast.

    Args:
        model: With real or fake weights; it is not changed.
        batch: Keyword arguments as a mapping, or positional ones as a tuple.
        seq_dims: Input name to the dimension that holds the sequence; None infers it.
        outputs: Names of outputs to keep; None keeps `loss` if there is one, else everything.
        loss_fn: `loss_fn(outputs, batch)` for a loss outside the model; its result is the output `loss`.
        dynamic: Capture the sequence length as a symbol.

    Returns:
        The flat graph with the meaning of its inputs and outputs.

    Raises:
        CaptureError: The model or batch cannot be captured as one graph.
        UnsupportedError: The model does something that cannot be captured soundly (dropout, custom backward, …).
    """
    _refuse_wrappers(model)
    plan, tensors = plan_call(model, batch)
    by_name = dict(zip(plan.names, tensors, strict=True))
    dims = resolve_seq_dims(by_name, seq_dims)
    huggingface.check_arguments(model, plan.constants)
    inputs = [_user_input(name, by_name[name], dims.get(name)) for name in plan.names]
    step = _Step(model, plan, outputs, loss_fn)
    with capture_lock:
        program = _export(step, _example(model, tensors), _dynamic_shapes(inputs) if dynamic else None)
    graph = clean(program, model, [(n, by_name[n].requires_grad) for n in plan.names], step.seen.names)
    info = CaptureInfo(
        model=model,
        plan=plan,
        inputs=inputs,
        seq_dims=dims,
        output_structure=_structure(step),
        output_names=step.seen.names,
        training=model.training,
        autocast=Autocast.ambient(tensors),
        dynamic=dynamic,
        seq_range=_range(program),
        loss_fn=loss_fn,
        example_facts=facts_of(by_name),
    )
    fake_mode = fake_mode_of(*(n.meta["val"] for n in graph.module.graph.nodes if n.op == "placeholder"))
    return Captured(graph.module, graph.inputs, graph.outputs, graph.tensors, fake_mode, info)


def _refuse_wrappers(model: nn.Module) -> None:
    if type(model).__name__ in _WRAPPERS:
        raise CaptureError(
            f"the model is wrapped in {type(model).__name__}",
            hint="capture the model itself (model.module, or before torch.compile) and wrap the emitted step",
        )
    sharded = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise CaptureError(
            f"parameter {sharded} is already spread over ranks, by FSDP2 or as a DTensor",
            hint="capture the model before fully_shard, and call fully_shard on the emitted step",
        )


def _example(model: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Distinct copies of the batch's tensors: export merges a tensor that is passed twice.

    For a model with fake weights the copies live in the same fake mode.
    """
    mode = fake_mode_of(*(t for t in (*model.parameters(), *model.buffers()) if is_fake(t)))
    copies = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    if mode is None:
        return tuple(copies)
    return tuple(t if is_fake(t) else mode.from_tensor(t, static_shapes=True) for t in copies)


def _dynamic_shapes(info: Sequence[UserInput]) -> dict[str, Any]:
    """One symbol for the sequence dimension of every input."""
    example = min((i.shape[i.seq_dim] for i in info if i.seq_dim is not None), default=2)
    # Shifted losses read S - 1 tokens, and torch treats extents below 2 apart.
    length = Dim("S", min=min(4, example))
    return {"tensors": tuple({i.seq_dim: length} if i.seq_dim is not None else None for i in info)}


def _export(step: _Step, example: tuple[Tensor, ...], dynamic_shapes: dict[str, Any] | None) -> ExportedProgram:
    what = type(step.model).__name__
    with (
        named_errors(what),
        torch.enable_grad(),
        huggingface.captured_attention(step.model, step.plan.constants.get("use_cache")),
        refuse_lost_gradients(),
    ):
        program = _within_range(step, example, dynamic_shapes)
        inline_regions(program.graph_module, Autocast.ambient(example))
        make_casts_explicit(program.graph_module)
        with exact_autocast():
            return functionalize(program) if mutates(program.graph_module) else program


def _within_range(step: _Step, example: tuple[Tensor, ...], dynamic_shapes: dict[str, Any] | None) -> ExportedProgram:
    """Export; when the model's code admits only a range of lengths, again for that range."""
    for _ in range(_RANGE_ATTEMPTS):
        try:
            return torch.export.export(step, example, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:
            length = _narrowed(str(error))
            if dynamic_shapes is None or length is None:
                raise
            refined = tuple(None if s is None else dict.fromkeys(s, length) for s in dynamic_shapes["tensors"])
            dynamic_shapes = {"tensors": refined}
    return torch.export.export(step, example, dynamic_shapes=dynamic_shapes, strict=False)


def _narrowed(message: str) -> Dim | None:
    """The range of lengths that export says the model admits; None when it names none."""
    suggested = _SUGGESTED_RANGE.search(message)
    if suggested is not None:
        low, high = (int(bound) if bound else None for bound in suggested.groups())
        return Dim("S", min=low, max=high)
    # A table read up to its last row is a case of its own to export, which it reports as "!= rows".
    excluded = _EXCLUDED_LENGTH.search(message)
    if excluded is None or excluded["high"] != excluded["length"]:
        return None
    return Dim("S", min=int(excluded["low"]), max=int(excluded["high"]) - 1)


def _user_input(name: str, tensor: Tensor, seq_dim: int | None) -> UserInput:
    shape = tuple(int(extent) for extent in tensor.shape)
    return UserInput(name, shape, tensor.dtype, tensor.device, tensor.requires_grad, seq_dim)


def _structure(step: _Step) -> Structure:
    if step.seen.structure is None:
        raise CaptureError("the model returns no tensor", hint="return the loss or the logits from forward")
    return step.seen.structure


def _range(program: ExportedProgram) -> tuple[int, int | None]:
    """Smallest and largest value of the sequence symbol."""
    for symbol, bounds in program.range_constraints.items():
        # Numbers read from tensors are symbols too; their shapes are refused elsewhere, and their checks dropped.
        if str(symbol).startswith(_UNBACKED):
            continue
        upper = int(bounds.upper) if bounds.upper.is_Integer else None
        return int(bounds.lower), upper
    return 1, None


__all__ = ["LossFn", "trace_module"]
