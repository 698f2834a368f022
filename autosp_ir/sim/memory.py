"""Counting the live bytes of one simulated rank by storage: a view costs nothing while its base is alive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class InFlight:
    """The result of a started collective: it may be read by its wait alone; `operand` must live until then."""

    tensor: Tensor
    operand: Tensor | None


class MemoryMeter:
    """Live bytes of one rank; inputs belong to the caller and are not counted, nor is what is in host memory."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._live = 0
        self._holders: dict[int, int] = {}
        self._ignored: set[int] = set()

    def ignore(self, value: Any) -> None:
        """Never count the storages of `value`."""
        self._ignored.update(key for key, _ in _storages(value))

    def hold(self, value: Any, beside: int = 0) -> None:
        """Count a value that has just been computed, and bytes that computing it took beside it."""
        for key, size in _storages(value):
            if key in self._ignored:
                continue
            count = self._holders.get(key, 0)
            self._holders[key] = count + 1
            self._live += 0 if count else size
        self.peak_bytes = max(self.peak_bytes, self._live + beside)

    def release(self, value: Any) -> None:
        """Stop counting a value that nothing reads any more."""
        for key, size in _storages(value):
            if key in self._ignored:
                continue
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._live -= size


def _storages(value: Any) -> list[tuple[int, int]]:
    """Address and size of each storage with bytes in it; the address identifies a storage while it lives."""
    if isinstance(value, tuple | list):
        return [storage for item in value for storage in _storages(item)]
    if isinstance(value, InFlight):
        return [*_storages(value.tensor), *_storages(value.operand)]
    if not isinstance(value, Tensor) or not value.untyped_storage().nbytes():
        return []
    storage = value.untyped_storage()
    return [(storage.data_ptr(), storage.nbytes())]
