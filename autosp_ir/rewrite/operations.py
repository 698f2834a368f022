"""Operations by their IR name, written as attributes: `op.aten.sum.dim_IntList(x, [1])`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Call: TypeAlias = "Callable[[str, tuple[Any, ...], dict[str, Any]], Any]"
"""What a call of an operation does, from its IR name, arguments and keyword arguments."""


class OpName:
    """Each attribute lengthens the operation's IR name; a call hands it on with the arguments."""

    def __init__(self, name: str, call: Call) -> None:
        self._name = name
        self._call = call

    def __getattr__(self, part: str) -> OpName:
        if part.startswith("__"):
            raise AttributeError(part)
        return OpName(f"{self._name}.{part}", self._call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the operation: a node and its value in a builder, an expression in a pattern."""
        return self._call(self._name, args, kwargs)


class Operations:
    """The root of all names: `op.aten`, `op.autosp`, `op.operator` and so on."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __getattr__(self, namespace: str) -> OpName:
        if namespace.startswith("_"):
            raise AttributeError(namespace)
        return OpName(namespace, self._call)


__all__ = ["Call", "OpName", "Operations"]
