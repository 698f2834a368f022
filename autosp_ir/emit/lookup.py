"""The tensors of a model by name, found again in every step: on the host's way there the device waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from autosp_ir.errors import RuntimeMismatchError

Edge = tuple[nn.Module, str, nn.Module]


class Lookup:
    """Finds parameters and buffers; their owners are looked for again when a submodule has another name or place.

    Args:
        names: Canonical names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._edges: list[Edge] | None = None
        self._owners: list[tuple[str, nn.Module, str]] = []

    def __call__(self, module: nn.Module) -> dict[str, Tensor]:
        """By name.

        Raises:
            RuntimeMismatchError: The module no longer has one of them.
        """
        edges = list(edges_of(module))
        if edges != self._edges:
            self._owners = [self._owner(module, name) for name in self._names]
            self._edges = edges
        found: dict[str, Tensor] = {}
        for name, owner, attribute in self._owners:
            value = getattr(owner, attribute, None)
            if value is None:
                raise _gone(name)
            found[name] = value
        return found

    @staticmethod
    def _owner(module: nn.Module, name: str) -> tuple[str, nn.Module, str]:
        path, _, attribute = name.rpartition(".")
        try:
            return name, module.get_submodule(path), attribute
        except AttributeError as error:
            raise _gone(name) from error


def edges_of(module: nn.Module) -> Iterator[Edge]:
    """Which module holds which under what name, in a fixed order; a module that is held twice is looked into once."""
    found = {id(module)}
    left = [module]
    while left:
        each = left.pop()
        for name, child in each._modules.items():
            if child is None:
                continue
            yield each, name, child
            if id(child) not in found:
                found.add(id(child))
                left.append(child)


def submodules(module: nn.Module) -> list[nn.Module]:
    """A module and those within it, each once and in a fixed order: `Module.modules` for many calls."""
    found = {id(module): module}
    for _, _, child in edges_of(module):
        found.setdefault(id(child), child)
    return list(found.values())


def tensors_of(modules: Iterable[nn.Module]) -> list[tuple[int, Tensor]]:
    """Every place where a module holds a parameter or buffer: the first place where that stands, and it.

    A program reads what is shared once, so that tensors which are tied or no longer tied make another program.
    """
    held = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    first: dict[int, int] = {}
    return [(first.setdefault(id(t), place), t) for place, t in enumerate(held)]


def _gone(name: str) -> RuntimeMismatchError:
    return RuntimeMismatchError(
        f"the model no longer has {name!r}", hint="call parallelize() again after changing the model"
    )


__all__ = ["Lookup", "submodules", "tensors_of"]
