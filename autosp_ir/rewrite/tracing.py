"""From pattern functions to patterns.

A pattern is an ordinary function, called once with symbolic operands; its parameters become variables:

```python
def double_transpose(op, x, a, b):
    return op.aten.transpose.int(op.aten.transpose.int(x, a, b), a, b)
```
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from autosp_ir.errors import RuleError
from autosp_ir.rewrite.operations import Operations
from autosp_ir.rewrite.pattern import Either, Operation, Pattern, Variable, operation, options_of


class Tracer(Operations):
    """What a pattern function gets as `op`: a call makes a pattern, as in `op.aten.relu(x)`."""

    def __init__(self) -> None:
        super().__init__(lambda name, args, kwargs: operation((name,), args, kwargs))

    def one_of(self, *names: str) -> Callable[..., Operation]:
        """Any of these operations, by IR name: `op.one_of("aten.view", "aten.reshape")(x, shape)`."""
        return lambda *args, **kwargs: operation(names, args, kwargs)


def trace(function: Callable[..., Any]) -> tuple[Operation | Either, ...]:
    """Call a pattern function with variables.

    Args:
        function: Its first parameter gets the `Tracer`, each other one without a default is a variable. The
            annotations `int`, `float`, `str`, `bool`, `list`, `Value` and other classes, and unions of them, restrict
            what a variable stands for.

    Returns:
        The roots: one, or several that a rule replaces together.

    Raises:
        RuleError: An operation is unknown or rejects its arguments, or the function does not return operations.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters:
        raise RuleError("a pattern function takes op and its variables", hint="write def pattern(op, x): …")
    made = {
        p.name: Variable(name=p.name, accepts=_accepted(function, p)) for p in parameters[1:] if p.default is p.empty
    }
    returned = function(Tracer(), **made)
    roots = returned if isinstance(returned, tuple) else (returned,)
    for root in roots:
        if not all(isinstance(option, Operation) for option in options_of(root)):
            raise RuleError(
                f"a pattern function returns operations, not {root!r}", hint="return op.aten.neg(x), for instance"
            )
    return roots


def _accepted(function: Callable[..., Any], parameter: inspect.Parameter) -> tuple[type, ...]:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, getattr(function, "__globals__", {}))
        except NameError as error:
            raise RuleError(
                f"the annotation of variable {parameter.name!r} cannot be read: {error}",
                hint="import the names it uses at module level, outside TYPE_CHECKING",
            ) from error
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    types = tuple(get_origin(m) or m for m in members if isinstance(get_origin(m) or m, type))
    anything = len(types) < len(members) or any(t in (parameter.empty, Any) or issubclass(t, Pattern) for t in types)
    return () if anything else types


__all__ = ["Tracer", "trace"]
