"""The tensors of a model by name, found again in every step: on the host's way there the device waits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from autosp_ir.errors import RuntimeMismatchError


class Lookup:
    """Finds parameters and buffers; their owners are looked for once per set of submodules.

    Args:
        names: Canonical names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._modules: list[nn.Module] = []
        self._owners: list[tuple[str, nn.Module, str]] = []

    def __call__(self, module: nn.Module) -> dict[str, Tensor]:
        """By name.

        Raises:
            RuntimeMismatchError: The module no longer has one of them.
        """
        modules = submodules(module)
        if modules != self._modules:
            self._owners = [self._owner(module, name) for name in self._names]
            self._modules = modules
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


def submodules(module: nn.Module) -> list[nn.Module]:
    """A module and those within it, each once and in a fixed order: `Module.modules` for many calls."""
    found: dict[int, nn.Module] = {}
    left = [module]
    while left:
        each = left.pop()
        if id(each) in found:
            continue
        found[id(each)] = each
        left += [m for m in each._modules.values() if m is not None]
    return list(found.values())


def _gone(name: str) -> RuntimeMismatchError:
    return RuntimeMismatchError(
        f"the model no longer has {name!r}", hint="call parallelize() again after changing the model"
    )


__all__ = ["Lookup", "submodules"]
