"""The emitted module: the model itself with another forward.

The emitted object's class derives from the model's class and shares its `__dict__`. So its parameters are the model's
parameters, and whatever works on the model works on it: `state_dict`, `save_pretrained`, `train`, `to`, isinstance.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn


class StepRuntime(Protocol):
    """What runs a step."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one forward of `module` with a full batch."""
        ...


def make_module(model: nn.Module, runtime: StepRuntime) -> nn.Module:
    """A module that is `model` in everything but its forward.

    Args:
        model: The model whose parameters, buffers and attributes are shared, not copied.
        runtime: Runs the forward.

    Returns:
        A module of a subclass of the model's class, with the same forward signature.
    """
    base = type(model)
    inner: Callable[..., Any] = base.forward

    @functools.wraps(inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return runtime(self, args, kwargs)

    namespace = {
        "forward": forward,
        "autosp_runtime": runtime,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__repr__": lambda self: f"SequenceParallel({base.__repr__(self)})",
    }
    vars(forward)["__signature__"] = _with_self(model)
    # The class keeps the model's own name: transformers writes it into config.json.
    emitted_class = type(base.__name__, (base,), namespace)
    emitted: nn.Module = object.__new__(emitted_class)
    emitted.__dict__ = model.__dict__
    return emitted


def _with_self(model: nn.Module) -> inspect.Signature:
    signature = inspect.signature(model.forward)
    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return signature.replace(parameters=[receiver, *signature.parameters.values()])
