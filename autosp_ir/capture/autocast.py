"""The state of `torch.autocast`: around a capture, inside a model's own regions, and around a call of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autosp_ir.errors import RuntimeMismatchError


@dataclass(frozen=True)
class Autocast:
    """A state of autocast.

    Attributes:
        dtypes: Device type and dtype wherever autocast is on; empty when it is off.
        cached: Whether a parameter that is read twice is cast once, as torch does by default.
    """

    dtypes: tuple[tuple[str, torch.dtype], ...] = ()
    cached: bool = True

    @staticmethod
    def ambient(tensors: Iterable[Tensor]) -> Autocast:
        """The state around the caller, for the devices of some tensors."""
        devices = sorted({t.device.type for t in tensors})
        active = [d for d in devices if torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d)]
        dtypes = tuple((d, torch.get_autocast_dtype(d)) for d in active)
        return Autocast(dtypes, not dtypes or torch.is_autocast_cache_enabled())

    def region(self, device: str, dtype: torch.dtype | None, enabled: bool) -> Autocast:
        """The state inside a `torch.autocast` region that is entered in this state.

        Export switches the cache of casts off, so that what a region says of it is not known; it keeps the caller's.
        """
        states = {d: t for d, t in self.dtypes if d != device}
        if enabled:
            states[device] = dtype or torch.get_autocast_dtype(device)
        return Autocast(tuple(sorted(states.items())), self.cached)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run a model in this state, as its caller would."""
        with contextlib.ExitStack() as stack:
            for device, dtype in self.dtypes:
                stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=self.cached))
            yield

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Check the state around a call.

        Raises:
            RuntimeMismatchError: It is another one.
        """
        found = Autocast.ambient(tensors)
        if found != self:
            raise RuntimeMismatchError(
                f"the step is called under {found} but was captured under {self}",
                hint="call it under the autocast that it was captured under, or capture again; parallelize() without "
                "dynamic=False captures each by itself",
            )

    def __str__(self) -> str:
        cache = "" if self.cached else ", cache_enabled=False"
        return " and ".join(f"torch.autocast({d!r}, {t}{cache})" for d, t in self.dtypes) or "no autocast"


__all__ = ["Autocast"]
