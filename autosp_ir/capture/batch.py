"""How a batch maps to the flat tensors of a captured graph, and back to a call of the model.

A batch is whatever `forward` takes: keyword arguments, positional arguments, nested containers. Its tensors become
user inputs named after the parameters they are passed to (`input_ids`, `features.0`); everything else (flags,
numbers, None) is a constant of the captured program, which later batches must repeat.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autosp_ir._torch_compat import pytree_flatten_with_names, pytree_map
from autosp_ir.errors import CaptureError, RuntimeMismatchError

Batch = Mapping[str, Any] | Sequence[Any] | Tensor
"""One example batch: a mapping of keyword arguments, a tuple of positional ones, or the only argument."""


@dataclass(frozen=True)
class UserInput:
    """One tensor of the batch.

    Args:
        name: The parameter it is passed to, with a path for nested ones (`features.0`).
        shape: The example's shape.
        dtype: Required of every later batch.
        device: The example's device.
        requires_grad: Whether the example asked for its gradient.
        seq_dim: The dimension that holds the sequence, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False
    seq_dim: int | None = None


@dataclass
class CallPlan:
    """Turns calls of a model into flat named tensors, and flat tensors back into a call.

    Attributes:
        signature: The signature of the model's forward.
        arguments: The example's arguments by parameter name, tensors replaced by `Slot`s.
        names: Tensor names in the order of the flat tensors.
        constants: Values of the leaves that are not tensors, by name.
        as_mapping: Whether the example was a mapping (else a tuple of positional arguments).
    """

    signature: inspect.Signature
    arguments: dict[str, Any]
    names: list[str]
    constants: dict[str, Any] = field(default_factory=dict)
    as_mapping: bool = True

    def call(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """Call `function` as the example batch would, with other tensors."""
        args, kwargs = self._split(self.fill(tensors))
        return function(*args, **kwargs)

    def batch(self, tensors: Sequence[Tensor]) -> Any:
        """The batch in the form the user gave it, with other tensors."""
        filled = self.fill(tensors)
        if self.as_mapping:
            return filled
        star = self._star()
        return tuple(item for name, value in filled.items() for item in (value if name == star else (value,)))

    def fill(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments by parameter name, with `tensors` in place of the example's."""
        by_name = dict(zip(self.names, tensors, strict=True))
        return {name: _fill(value, by_name) for name, value in self.arguments.items()}

    def _star(self) -> str | None:
        return next((p.name for p in self.signature.parameters.values() if p.kind is p.VAR_POSITIONAL), None)

    def _split(self, filled: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        kwargs = dict(filled)
        star = self._star()
        for parameter in self.signature.parameters.values():
            if parameter.name not in kwargs:
                continue
            if parameter.kind is parameter.VAR_POSITIONAL:
                args.extend(kwargs.pop(parameter.name))
            elif parameter.kind is parameter.POSITIONAL_ONLY or (star in filled and parameter.kind is not _KEYWORD):
                args.append(kwargs.pop(parameter.name))
        return args, kwargs

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a later call, in the order of `names`.

        Raises:
            RuntimeMismatchError: The call has other arguments, or a constant has another value.
        """
        try:
            arguments = bind(self.signature, args, kwargs)
        except TypeError as error:
            raise RuntimeMismatchError(
                f"the batch does not fit the model's forward: {error}", hint="pass the arguments of the captured batch"
            ) from error
        tensors, constants = leaves(arguments)
        self._check_names(tensors)
        self._check_constants(constants)
        return [tensors[name] for name in self.names]

    def _check_names(self, tensors: Mapping[str, Tensor]) -> None:
        if set(tensors) == set(self.names):
            return
        missing, extra = sorted(set(self.names) - set(tensors)), sorted(set(tensors) - set(self.names))
        raise RuntimeMismatchError(
            f"the batch has other tensors than the captured one: missing {missing or 'none'}, new {extra or 'none'}",
            hint="pass the same arguments in every step, or capture the model again with this batch",
        )

    def _check_constants(self, constants: Mapping[str, Any]) -> None:
        for name in sorted({*constants, *self.constants}):
            before, now = self.constants.get(name), constants.get(name)
            if type(before) is type(now) and before == now:
                continue
            raise RuntimeMismatchError(
                f"argument {name!r} was {before!r} when the model was captured and is {now!r} now; values that are not "
                "tensors are part of the captured program",
                hint=f"pass {name} as a tensor, or capture the model again with this batch",
            )


@dataclass(frozen=True)
class Slot:
    """The place of a named tensor inside the arguments."""

    name: str


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _fill(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    return pytree_map(lambda leaf: tensors[leaf.name] if isinstance(leaf, Slot) else leaf, value)


def bind(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name; None for a parameter whose default is None is left out.

    Raises:
        TypeError: The arguments do not fit the signature.
    """
    bound = signature.bind(*args, **kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update({k: v for k, v in value.items() if v is not None})
        elif value is not None or parameter.default is not None:
            arguments[name] = value
    return arguments


def leaves(arguments: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the other leaves of `arguments`, by dotted name."""
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for parameter, value in arguments.items():
        for path, leaf in pytree_flatten_with_names(value):
            name = ".".join((parameter, *path))
            if isinstance(leaf, Tensor):
                tensors[name] = leaf
            else:
                constants[name] = leaf
    return tensors, constants


def plan_call(model: nn.Module, batch: Batch) -> tuple[CallPlan, list[Tensor]]:
    """Read an example batch.

    Args:
        model: The module that will be called.
        batch: A mapping of keyword arguments or a sequence of positional ones.

    Returns:
        The plan and the example's tensors in its order.

    Raises:
        CaptureError: The batch does not fit `forward`, or holds no tensor.
    """
    signature = inspect.signature(model.forward)
    args, kwargs = _as_call(batch)
    try:
        arguments = bind(signature, args, kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the batch does not fit {type(model).__name__}.forward{signature}: {error}",
            hint="give a dict of keyword arguments or a tuple of positional ones, as you would call the model",
        ) from error
    tensors, constants = leaves(arguments)
    if not tensors:
        raise CaptureError("the batch holds no tensor", hint="pass at least the token ids as a tensor")
    slotted = {name: _slotted(name, value) for name, value in arguments.items()}
    return CallPlan(signature, slotted, list(tensors), constants, isinstance(batch, Mapping)), list(tensors.values())


def _as_call(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise CaptureError(
        f"a batch is a dict of keyword arguments or a tuple of positional ones, not {type(batch).__name__}",
        hint='pass {"input_ids": ids, "labels": labels} or (ids, labels)',
    )


def _slotted(parameter: str, value: Any) -> Any:
    names = iter([".".join((parameter, *path)) for path, _ in pytree_flatten_with_names(value)])

    def slot(leaf: Any) -> Any:
        name = next(names)
        return Slot(name) if isinstance(leaf, Tensor) else leaf

    return pytree_map(slot, value)


__all__ = ["Batch", "CallPlan", "Slot", "UserInput", "bind", "leaves", "plan_call"]
