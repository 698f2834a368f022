"""The structure of a model's output: naming its tensors, choosing some, and rebuilding the type around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from autosp_ir.errors import CaptureError, UnsupportedError

LOSS = "loss"


@dataclass(frozen=True)
class Leaf:
    """A tensor of the output, by name."""

    name: str


@dataclass(frozen=True)
class Constant:
    """Part of an output that is not a tensor; returned as it was."""

    value: Any


@dataclass(frozen=True)
class Branch:
    """A container in the output.

    Args:
        type: The container's type, called to rebuild it.
        keys: Field names; None for lists and tuples.
        children: One structure per field; None where the field is not kept.
    """

    type: type
    keys: tuple[str, ...] | None
    children: tuple[Structure | None, ...]


Structure = Leaf | Constant | Branch
"""How an output is put together."""


def describe_output(value: Any) -> tuple[Structure, dict[str, Tensor]]:
    """Name every tensor of a model's output.

    Fields of mappings and dataclasses keep their names (`loss`, `hidden_states.0`); everything else is `out0`,
    `out1`, … in order.

    Returns:
        The structure and the tensors by name.

    Raises:
        UnsupportedError: A part of the output is neither a tensor, a number, a string nor a container of them.
    """
    tensors: dict[str, Tensor] = {}
    structure = _describe(value, "", tensors)
    return structure, tensors


def _describe(value: Any, path: str, tensors: dict[str, Tensor]) -> Structure:
    if isinstance(value, Tensor):
        name = path if path and not path.isdigit() else f"out{path or 0}"
        tensors[name] = value
        return Leaf(name)
    if value is None or isinstance(value, bool | int | float | str):
        return Constant(value)
    fields = _fields(value)
    if fields is not None:
        children = tuple(_describe(v, _join(path, k), tensors) for k, v in fields.items())
        return Branch(type(value), tuple(fields), children)
    if isinstance(value, tuple | list):
        children = tuple(_describe(v, _join(path, str(i)), tensors) for i, v in enumerate(value))
        return Branch(type(value), None, children)
    raise UnsupportedError(
        f"output {path or 'of the model'} is a {type(value).__name__}, which cannot be returned from a captured step",
        hint="return tensors, numbers, or dicts, tuples, lists and dataclasses of them "
        "(transformers: pass use_cache=False)",
    )


def _join(path: str, key: str) -> str:
    if not path:
        return key
    return f"out{path}.{key}" if path.isdigit() else f"{path}.{key}"


def _fields(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    names: tuple[str, ...] | None = getattr(value, "_fields", None)
    if names is not None and isinstance(value, tuple):
        return dict(zip(names, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return None


def choose_outputs(available: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The names to keep: `wanted`; else the loss alone if there is one; else everything.

    Raises:
        CaptureError: A wanted name does not exist, or nothing is left.
    """
    if wanted is None:
        return [LOSS] if LOSS in available else list(available)
    unknown = [name for name in wanted if name not in available]
    if unknown or not wanted:
        raise CaptureError(
            f"the model returns no output called {', '.join(unknown) or '(nothing was asked for)'}",
            hint=f"choose from {list(available)}",
        )
    return list(wanted)


def keep(structure: Structure, names: Sequence[str]) -> Structure | None:
    """The structure with every tensor that is not in `names` removed; None when nothing is left of it."""
    if isinstance(structure, Leaf):
        return structure if structure.name in names else None
    if isinstance(structure, Constant):
        return structure
    children = tuple(None if c is None else keep(c, names) for c in structure.children)
    if not any(isinstance(c, Leaf | Branch) for c in children):
        return None
    return replace(structure, children=children)


def with_loss(structure: Structure) -> Structure:
    """The output when the loss is computed outside the model: a mapping gains (or replaces) its `loss`.

    Any other output type becomes the loss alone when nothing else is kept, else a dict.
    """
    loss = Leaf(LOSS)
    if not isinstance(structure, Branch) or structure.keys is None or not issubclass(structure.type, Mapping):
        return Branch(dict, (LOSS, "output"), (loss, structure))
    fields = {LOSS: loss, **{k: c for k, c in zip(structure.keys, structure.children, strict=True) if k != LOSS}}
    return replace(structure, keys=tuple(fields), children=tuple(fields.values()))


def simplify(structure: Structure) -> Structure:
    """A plain dict that holds the outside loss alone becomes the loss itself."""
    if isinstance(structure, Branch) and structure.keys == (LOSS, "output") and structure.children[1] is None:
        loss = structure.children[0]
        return loss if loss is not None else structure
    return structure


def rebuild(structure: Structure, tensors: Mapping[str, Any]) -> Any:
    """Put kept tensors back into the output's own type; dropped elements of a tuple become None.

    Args:
        structure: From `describe_output` and `keep`.
        tensors: The kept outputs by name.
    """
    if isinstance(structure, Leaf):
        return tensors[structure.name]
    if isinstance(structure, Constant):
        return structure.value
    children = [None if c is None else rebuild(c, tensors) for c in structure.children]
    make: Any = structure.type
    if structure.keys is None:
        return make(children)
    if issubclass(structure.type, tuple):
        return make(*children)
    if not issubclass(structure.type, Mapping):
        return make(**dict(zip(structure.keys, children, strict=True)))
    kept = {k: v for k, v, c in zip(structure.keys, children, structure.children, strict=True) if c is not None}
    return make(**kept) if dataclasses.is_dataclass(structure.type) else make(kept)


__all__ = [
    "Branch",
    "Constant",
    "Leaf",
    "Structure",
    "choose_outputs",
    "describe_output",
    "keep",
    "rebuild",
    "simplify",
    "with_loss",
]
