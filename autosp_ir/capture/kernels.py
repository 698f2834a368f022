"""What torch runs below autocast for a node of an exported graph, observed on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autosp_ir._torch_compat import TorchDispatchMode, exact_autocast, fake_mode_of, pytree_map, without_specializing
from autosp_ir.capture.autocast import Autocast

aten = torch.ops.aten


@dataclass
class Run:
    """What torch runs below autocast.

    Attributes:
        kernels: Operators with attributes and dtypes, in order, without casts and views.
        casts: The casts, as pairs of dtypes.
        results: Dtypes of the results.
        own: The first cast of each operand of the node.
        error: Why it does not run at all, as does a product of two dtypes without autocast.
    """

    kernels: list[str]
    casts: list[tuple[torch.dtype, torch.dtype]]
    results: str
    own: dict[fx.Node, torch.dtype]
    error: str | None = None

    def computes_like(self, other: Run) -> bool:
        """Whether both run the same kernels on the same dtypes, wherever the casts stand."""
        runs = self.error is None and other.error is None
        return runs and (self.kernels, self.results) == (other.kernels, other.results)


class _Observer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.casts: list[tuple[Tensor, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if func is aten._to_copy.default:
            self.casts.append((args[0], result.dtype))
        elif not is_view and func.namespace != "prim":
            self.kernels.append(_described((str(func), args, kwargs or {}, result)))
        return result


def _described(structure: Any) -> str:
    """Tensors by dtype and dimensions, everything else by value."""
    return repr(pytree_map(lambda leaf: (leaf.dtype, leaf.ndim) if isinstance(leaf, Tensor) else leaf, structure))


def observe(nodes: Sequence[fx.Node], state: Autocast) -> Run:
    """Run consecutive nodes on fake tensors in an autocast state."""
    outside = [n for node in nodes for n in node.all_input_nodes if n not in nodes]
    observer = _Observer()
    with _on_fakes(outside):
        # Fresh aliases, so that an operand is told apart by identity and in-place operators change nothing.
        values = {n: v.detach() if isinstance(v := n.meta["val"], Tensor) else v for n in outside}
        operands = {id(v): n for n, v in values.items()}
        try:
            with exact_autocast(dict(state.dtypes)), observer:
                for node in nodes:
                    values[node] = _run(node, values)
        except Exception as error:  # whatever torch says of operands it rejects
            return Run([], [], "", {}, f"fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    own: dict[fx.Node, torch.dtype] = {}
    for source, dtype in observer.casts:
        if id(source) in operands:
            own.setdefault(operands[id(source)], dtype)
    own = {n: own[n] for n in outside if n in own}
    casts = [(source.dtype, dtype) for source, dtype in observer.casts]
    return Run(observer.kernels, casts, _described(values[nodes[-1]]), own)


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    target: Any = node.target
    result = target(*args, **kwargs)
    node.meta.setdefault("val", result)
    return result


@contextlib.contextmanager
def _on_fakes(inputs: Sequence[fx.Node]) -> Iterator[None]:
    mode = fake_mode_of(*(n.meta["val"] for n in inputs))
    symbolic = mode is not None and mode.shape_env is not None
    quietly = without_specializing(mode.shape_env) if symbolic else contextlib.nullcontext()
    with mode or contextlib.nullcontext(), torch.no_grad(), quietly:
        yield


__all__ = ["Run", "observe"]
