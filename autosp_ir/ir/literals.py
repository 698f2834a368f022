"""Attributes of nodes as text, and their exact equality.

Every kind of attribute that FX arguments hold is written so that it reads back as the same object: `1`, `1.0` and
`True` stay apart, as do lists and tuples. What cannot be is refused by name.
"""

from __future__ import annotations

import enum
import json
import math
import re
import struct
import sys
from collections.abc import Callable
from typing import Any

import torch

from autosp_ir._torch_compat import is_operator
from autosp_ir.errors import AutoSPError, UnsupportedError
from autosp_ir.ir.graph import Value
from autosp_ir.ir.ops import OpDef, op_by_name, op_for_target

TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
"""Singletons that read back as attributes of torch."""

_DOTTED = re.compile(r"[^\W\d]\w*(\.\w+)*")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_CONTINUED = " " * 8


def format_argument(item: Any) -> str:
    """An argument as text: values as `%name`, attributes as literals.

    Raises:
        UnsupportedError: The attribute cannot be written so that it reads back equal.
    """
    if isinstance(item, Value):
        return f"%{item.name}"
    writer = _WRITERS.get(type(item))
    if writer is not None:
        return writer(item)
    if isinstance(item, list):
        return f"[{', '.join(format_argument(i) for i in item)}]"
    if type(item) is tuple or isinstance(item, torch.Size):
        return f"({', '.join(format_argument(i) for i in item)}{',' if len(item) == 1 else ''})"
    if isinstance(item, dict):
        return "{" + ", ".join(f"{format_argument(k)}: {format_argument(v)}" for k, v in item.items()) + "}"
    if isinstance(item, TORCH_CONSTANTS):
        return str(item)
    if is_operator(item):
        return f"op({json.dumps(op_for_target(item).name)})"
    path = object_path(item)
    if path is not None:
        return f"object({json.dumps(path)})"
    raise UnsupportedError(
        f"the attribute {item!r} of type {type(item).__name__} cannot be written as text",
        hint="pass plain numbers, strings, containers, dtypes, devices or importable objects as attributes",
    )


def _float(number: float) -> str:
    return repr(number)


def _string(text: str) -> str:
    """A text of several lines is written as one string for each, which read as one."""
    lines = text.splitlines(keepends=True)
    if len(lines) < 2:
        return json.dumps(text)
    return "".join(f"\n{_CONTINUED}{json.dumps(line)}" for line in lines)


def _slice(item: slice) -> str:
    return f"slice({format_argument(item.start)}, {format_argument(item.stop)}, {format_argument(item.step)})"


_WRITERS: dict[type, Callable[[Any], str]] = {
    bool: str,
    int: str,
    float: _float,
    complex: lambda z: f"complex({_float(z.real)}, {_float(z.imag)})",
    str: _string,
    type(None): str,
    type(...): lambda _: "...",
    slice: _slice,
    torch.device: lambda d: f"device({json.dumps(str(d))})",
}


def object_path(item: Any) -> str | None:
    """`module:qualified.name` under which an object (an enum member, a function) can be found again, or None."""
    if isinstance(item, enum.Enum) or isinstance(getattr(type(item), "__members__", None), dict):  # pybind11's enums
        # torch re-exports some of its compiled enums without their underscore.
        for name in (type(item).__qualname__, type(item).__qualname__.lstrip("_")):
            path = f"{type(item).__module__}:{name}.{item.name}"
            found = find_object(path)
            if type(found) is type(item) and found == item:
                return path
        return None
    module, qualified = getattr(item, "__module__", None), getattr(item, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualified, str):
        return None
    path = f"{module}:{qualified}"
    return path if find_object(path) is item else None


def find_object(path: str) -> Any:
    """The object of an `object_path`, or None. Only modules that are loaded are searched: text imports no code."""
    module, _, qualified = path.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    return found


def format_op(op: OpDef) -> str:
    """The operation's name, in backquotes when it is not a dotted name.

    Raises:
        UnsupportedError: The name does not lead back to this operation, as with two lambdas of one name.
    """
    try:
        resolved: OpDef | None = op_by_name(op.name)
    except AutoSPError:
        resolved = None
    if resolved is not op:
        raise UnsupportedError(
            f"the operation name {op.name!r} does not lead back to its target {op.target!r}",
            hint="register the target under its own name with air.register_op(air.OpDef(…))",
        )
    return op_name(op)


def op_name(op: OpDef) -> str:
    """The operation's name as the text writes it, unchecked."""
    return op.name if _DOTTED.fullmatch(op.name) else f"`{op.name}`"


def format_keyword(name: Any) -> str:
    """The name of a keyword argument.

    Raises:
        UnsupportedError: It is not an identifier.
    """
    if isinstance(name, str) and _IDENTIFIER.fullmatch(name):
        return name
    raise UnsupportedError(
        f"the keyword argument {name!r} is not an identifier", hint="pass the argument by position or in a dict"
    )


def same_attribute(a: Any, b: Any) -> bool:
    """Whether two attributes are the same to the bit and in type; NaN equals NaN, values compare by name."""
    if isinstance(a, Value) or isinstance(b, Value):
        return isinstance(a, Value) and isinstance(b, Value) and a.name == b.name
    if isinstance(a, list | tuple):
        alike = isinstance(b, list) == isinstance(a, list) and isinstance(b, list | tuple)
        return alike and len(a) == len(b) and all(same_attribute(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_attribute(v, b[k]) for k, v in a.items())
    if isinstance(a, slice):
        return isinstance(b, slice) and same_attribute((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same_attribute(a.real, b.real) and same_attribute(a.imag, b.imag)
    return a is b or bool(a == b)


__all__ = ["find_object", "format_argument", "format_keyword", "format_op", "op_name", "same_attribute"]
