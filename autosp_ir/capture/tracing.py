"""Running `torch.export` so that nothing is dropped in silence, and saying in the user's terms what went wrong.

Export keeps the operators of a forward pass but not custom backward functions and tensor hooks: a model that relies
on them would train with wrong gradients. They are refused while tracing.
"""

from __future__ import annotations

import contextlib
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from autosp_ir.errors import AutoSPError, CaptureError, UnsupportedError

capture_lock = threading.RLock()
"""Held while a model is traced: tracing replaces process-wide hooks and configuration for its duration."""

_HERE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_STDLIB = sysconfig.get_paths()["stdlib"]
_DATA_DEPENDENT = ("data-dependent", "data dependent", "GuardOnDataDependent")
_BANNED = "unsafe to autocast"
_CONSTRAINT = ("onstraints violated", "not within the range", "specialized", "specialised", "ConstraintViolation")


@contextlib.contextmanager
def refuse_lost_gradients() -> Iterator[None]:
    """Refuse custom backward functions and tensor hooks in this thread, for the duration.

    Raises:
        UnsupportedError: From inside the traced model, naming the function or hook.
    """
    function = torch.autograd.Function
    original_apply: Any = function.__dict__["apply"]
    original_hook: Any = torch.Tensor.register_hook
    here = threading.get_ident()

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        # torch's own operator registrations make such functions too; those are traced below this level.
        if cls.__module__.startswith("torch._") or threading.get_ident() != here:
            call_original: Callable[..., Any] = original_apply.__get__(None, cls)
            return call_original(*args, **kwargs)
        raise UnsupportedError(
            f"the model calls the autograd function {cls.__module__}.{cls.__qualname__}; its backward would be lost "
            f"in the captured graph{_at(traceback.extract_stack())}",
            hint=_function_hint(cls),
        )

    def register_hook(tensor: torch.Tensor, hook: Any) -> Any:
        if threading.get_ident() != here:
            return original_hook(tensor, hook)
        raise UnsupportedError(
            f"the model registers a gradient hook on a tensor in its forward; it would be lost in the captured "
            f"graph{_at(traceback.extract_stack())}",
            hint="remove the hook, or register it on a parameter outside the forward",
        )

    setattr(function, "apply", classmethod(apply))  # noqa: B010 - assignment to a method, which mypy rejects
    setattr(torch.Tensor, "register_hook", register_hook)  # noqa: B010
    try:
        yield
    finally:
        setattr(function, "apply", original_apply)  # noqa: B010
        setattr(torch.Tensor, "register_hook", original_hook)  # noqa: B010


def _function_hint(cls: type) -> str:
    if cls.__module__ == "torch.utils.checkpoint":
        return "checkpoint with use_reentrant=False (transformers: gradient_checkpointing_kwargs), or switch it off"
    if cls.__name__ == "BackwardHookFunction":
        return "remove the module's full backward hooks before capturing"
    return "register it with torch.library (custom_op and register_autograd), which keeps its backward"


@contextlib.contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Turn whatever tracing raises into a `CaptureError` that shows the user's line.

    Args:
        what: The model's class, for the message.

    Raises:
        CaptureError: Always in place of a foreign exception; errors of autosp_ir pass through.
    """
    try:
        yield
    except Exception as error:
        own = _own_cause(error)
        if own is not None:
            raise own from None
        raise _explain(error, what) from error


def _own_cause(error: BaseException | None) -> AutoSPError | None:
    while error is not None:
        if isinstance(error, AutoSPError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _explain(error: Exception, what: str) -> CaptureError:
    where = _at(traceback.extract_tb(error.__traceback__)) or _from_message(str(error))
    text = f"{type(error).__name__}: {error}"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if any(mark in text for mark in _DATA_DEPENDENT):
        return CaptureError(
            f"{what} takes a decision that depends on values of its tensors, which one graph cannot express "
            f"({first}){where}",
            hint="use torch.where, torch.cond or a mask instead of Python control flow or .item() on tensor values",
        )
    if any(mark in text for mark in _CONSTRAINT):
        return CaptureError(
            f"{what} cannot be captured with a symbolic sequence length: its code fixes or restricts the length\n"
            f"{_indented(str(error))}{where}",
            hint="capture with dynamic=False (a new length is then captured again), or remove what fixes the length",
        )
    if _BANNED in text:
        return CaptureError(
            f"{what} calls an operator that torch refuses under autocast ({first}){where}",
            hint="use binary_cross_entropy_with_logits, or a nested region torch.autocast(device, enabled=False)",
        )
    return CaptureError(
        f"{what} cannot be captured as one graph: {type(error).__name__}: {first}{where}",
        hint="check that the model runs eagerly on this batch; then replace what leaves tensor code "
        "(.data, .numpy(), .item(), other libraries) by torch operators",
    )


def _indented(text: str, lines: int = 12) -> str:
    return "\n".join("    " + line for line in text.strip().splitlines()[:lines])


def _at(frames: traceback.StackSummary) -> str:
    """The innermost frame of the model's own code."""
    for frame in reversed(frames):
        if not frame.filename.startswith((_HERE, _TORCH, "<")) and not _is_stdlib(frame.filename):
            return f"\nat {frame.filename}:{frame.lineno} in {frame.name}: {frame.line or ''}".rstrip()
    return ""


def _is_stdlib(filename: str) -> bool:
    return filename.startswith(_STDLIB) and "site-packages" not in filename


def _from_message(text: str) -> str:
    """Export quotes the user's frame in some messages."""
    for line in text.splitlines():
        if line.strip().startswith('File "'):
            return f"\nat {line.strip()}"
    return ""


__all__ = ["capture_lock", "named_errors", "refuse_lost_gradients"]
