"""The ranks that run a step with this one: they begin it together, and learn of each other's failures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch.distributed as dist

from autosp_ir.emit.agreement import Told, check_agreement, encoded, refusal
from autosp_ir.emit.binding import MeshBinding
from autosp_ir.emit.peers import Line
from autosp_ir.emit.watch import watch
from autosp_ir.errors import AutoSPError, RankFailureError

STALL_TIMEOUT = 20.0
"""Seconds that a rank may do nothing while others wait for it."""


class Team:
    """The groups of a binding.

    Args:
        groups: Axis name to process group; none for a program on one rank, and a team of one does nothing.
        patience: Seconds that a rank may do nothing at all while others wait for it.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup], patience: float = STALL_TIMEOUT) -> None:
        # torch's fake backend stands for ranks that are not there.
        self._groups = {a: g for a, g in groups.items() if dist.get_backend(g) != "fake"}
        self._patience = patience
        if self._groups:
            self._lines()

    @classmethod
    def of(cls, binding: MeshBinding, patience: float = STALL_TIMEOUT) -> Team:
        """The team of a binding's groups."""
        return cls(binding.groups, patience)

    @property
    def several(self) -> bool:
        """Whether there is anyone to agree with."""
        return bool(self._groups)

    def _lines(self) -> dict[str, Line]:
        return {axis: watch(self._patience).line(group) for axis, group in self._groups.items()}

    def agree(self, told: Told) -> None:
        """Begin a step together.

        Args:
            told: What must be the same on all ranks.

        Raises:
            RuntimeMismatchError: On every rank, when something differs or a rank refuses its batch.
            RankFailureError: A rank failed, fell silent or stalled before it came.
        """
        for axis, line in self._lines().items():
            check_agreement(axis, watch(self._patience).exchange(line, encoded(told)))

    def next_number(self) -> str:
        """The number that a program has which begins its first step now: how many have done so before, by axis."""
        return ", ".join(str(line.programs + 1) for line in self._lines().values())

    def count_program(self) -> None:
        """A program has begun its first step: all ranks agreed to."""
        for line in self._lines().values():
            line.programs += 1

    def tell(self, told: str) -> list[str]:
        """Exchange a text with all ranks of the first group; the texts in rank order, this one's alone if none."""
        for line in self._lines().values():
            return watch(self._patience).exchange(line, told, begins=False)
        return [told]

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Get ready for a step; a rank that cannot tells the others, which would wait for it."""
        try:
            yield
        except Exception as error:
            if self._groups and not isinstance(error, RankFailureError):
                with contextlib.suppress(AutoSPError):
                    self.agree(refusal(error))
            raise

    @contextlib.contextmanager
    def running(self, part: str) -> Iterator[None]:
        """Run a part of a step, "forward" or "backward"; what fails in it is told to all ranks.

        Raises:
            RankFailureError: Another rank is the cause of a failure.
            Exception: This rank is.
        """
        if not self._groups:
            yield
            return
        with watch(self._patience).inside(list(self._lines().values()), part):
            yield

    @property
    def ranks(self) -> list[int]:
        """The global ranks of the first group; this rank alone if there is none."""
        for line in self._lines().values():
            return list(line.ranks)
        return [0]


__all__ = ["STALL_TIMEOUT", "Team"]
