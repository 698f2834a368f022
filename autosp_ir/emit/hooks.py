"""Forward hooks of the model itself, which its call runs around the emitted forward.

The emitted module shares the model's hooks, and `nn.Module.__call__` runs them around whatever forward it has. A hook
in the captured graph as well would run twice.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

from torch import nn

from autosp_ir.errors import UnsupportedError

_KINDS = ("_forward_pre_hooks", "_forward_hooks")


def refuse_own_hooks(model: nn.Module) -> None:
    """Refuse a model whose own forward hooks would be captured; hooks of submodules are part of the graph.

    Raises:
        UnsupportedError: The model itself has a forward hook or a forward pre-hook.
    """
    hooks = [hook for kind in _KINDS for hook in getattr(model, kind).values()]
    if not hooks:
        return
    names = ", ".join(sorted({getattr(h, "__qualname__", type(h).__name__) for h in hooks}))
    raise UnsupportedError(
        f"{type(model).__name__} itself has forward hooks ({names}); captured, they would run twice in each step",
        hint="register them on the step that parallelize() returns, or on a submodule, and wrap the step in FSDP2, "
        "not the model",
    )


@contextlib.contextmanager
def own_hooks_aside(model: nn.Module) -> Iterator[None]:
    """Call the model without its own forward hooks, which run around the emitted step; FSDP2 is made of such."""
    kept = {kind: model.__dict__[kind] for kind in _KINDS}
    model.__dict__.update({kind: OrderedDict() for kind in _KINDS})
    try:
        yield
    finally:
        model.__dict__.update(kept)


__all__ = ["own_hooks_aside", "refuse_own_hooks"]
