"""What a capture remembers of the model and its batch; shared by passes and by the emitted module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from autosp_ir.capture.autocast import Autocast
from autosp_ir.capture.batch import CallPlan, UserInput
from autosp_ir.capture.facts import check_facts
from autosp_ir.capture.outputs import Structure, rebuild
from autosp_ir.errors import RuntimeMismatchError
from autosp_ir.ir.program import InputSpec, OutputSpec


@dataclass
class CaptureInfo:
    """How a program was captured, and how to call it like the model.

    Attributes:
        model: The captured model, by reference.
        plan: Maps calls of the model to flat tensors and back.
        inputs: The tensors of the batch, in placeholder order.
        seq_dims: Input name to its sequence dimension.
        output_structure: How the kept outputs make up the model's output type.
        output_names: The kept outputs, in order.
        training: Whether the model was in training mode.
        autocast: The autocast around the capture; its casts are in the program.
        dynamic: Whether the sequence length is symbolic.
        seq_range: Smallest and largest sequence length that a dynamic capture admits (None: no limit).
        loss_fn: The loss outside the model, if any.
        example_facts: What is known of the values of the example's tensors (`"arange"`, `"ones"`).
    """

    model: nn.Module
    plan: CallPlan
    inputs: list[UserInput]
    seq_dims: dict[str, int]
    output_structure: Structure
    output_names: list[str]
    training: bool
    dynamic: bool
    autocast: Autocast = field(default_factory=Autocast)
    seq_range: tuple[int, int | None] = (1, None)
    loss_fn: Callable[..., Tensor] | None = None
    example_facts: dict[str, str] = field(default_factory=dict)

    @property
    def signature(self) -> inspect.Signature:
        """The signature of the model's forward."""
        return self.plan.signature

    @property
    def input_names(self) -> list[str]:
        """Names of the user inputs, in placeholder order."""
        return [i.name for i in self.inputs]

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments that are not tensors; later batches must repeat them."""
        return self.plan.constants

    @property
    def length(self) -> int:
        """The example's sequence length."""
        first = next(i for i in self.inputs if i.seq_dim is not None)
        return first.shape[first.seq_dim or 0]

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a later call, in placeholder order; shapes are not checked.

        Raises:
            RuntimeMismatchError: Other arguments than the example's, or a constant with another value.
        """
        return self.plan.flatten(args, kwargs)

    def check(self, tensors: Sequence[Tensor], facts: Mapping[str, str] | None = None) -> None:
        """Check a later batch against the captured one.

        Args:
            tensors: From `flatten`.
            facts: `program.info["batch_facts"]`; None checks no values.

        Raises:
            RuntimeMismatchError: Another dtype or shape, or a fact that does not hold.
        """
        for given, expected in zip(tensors, self.inputs, strict=True):
            if given.dtype != expected.dtype:
                raise RuntimeMismatchError(
                    f"input {expected.name!r} is {given.dtype} but was {expected.dtype} when captured",
                    hint=f"cast it to {expected.dtype}, or capture again",
                )
            self._check_shape(given, expected)
        self._check_lengths(tensors)
        check_facts(facts or {}, dict(zip(self.input_names, tensors, strict=True)))

    def _check_shape(self, given: Tensor, expected: UserInput) -> None:
        free = expected.seq_dim if self.dynamic else None
        same_rank = given.ndim == len(expected.shape)
        if same_rank and all(d == free or given.shape[d] == expected.shape[d] for d in range(given.ndim)):
            return
        wanted = ["any" if d == free else extent for d, extent in enumerate(expected.shape)]
        raise RuntimeMismatchError(
            f"input {expected.name!r} has shape {list(given.shape)} but the program was captured for {wanted}",
            hint="capture again for this shape, or with dynamic=True for any sequence length",
        )

    def _check_lengths(self, tensors: Sequence[Tensor]) -> None:
        lengths = {
            spec.name: int(given.shape[spec.seq_dim])
            for given, spec in zip(tensors, self.inputs, strict=True)
            if spec.seq_dim is not None
        }
        low, high = self.seq_range
        if len(set(lengths.values())) > 1:
            raise RuntimeMismatchError(f"inputs have different sequence lengths: {lengths}", hint="pad them to one")
        if self.dynamic and any(n < low or (high is not None and n > high) for n in lengths.values()):
            raise RuntimeMismatchError(
                f"sequence length {lengths} is outside {low}…{high}, which the captured program admits",
                hint="capture again with this length",
            )

    def rebuild(self, outputs: Mapping[str, Any]) -> Any:
        """The model's output type around the kept outputs, given by name."""
        return rebuild(self.output_structure, outputs)


@dataclass
class Captured:
    """A traced model: a flat ATen graph with the meaning of its inputs and outputs.

    Attributes:
        graph_module: Parameters, buffers and constants are placeholders; one flat tuple is returned.
        input_specs: One entry per placeholder.
        output_specs: One entry per element of the output tuple.
        tensors: Parameters, buffers and constants by name, by reference.
        fake_mode: The mode that owns the fake tensors and symbols in the graph's metadata.
        info: How to call it like the model.
    """

    graph_module: fx.GraphModule
    input_specs: list[InputSpec]
    output_specs: list[OutputSpec]
    tensors: dict[str, Tensor]
    fake_mode: Any
    info: CaptureInfo


__all__ = ["CaptureInfo", "Captured"]
