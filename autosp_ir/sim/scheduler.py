"""Steps all ranks from collective to collective and completes each one when its whole group has arrived."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autosp_ir.errors import DeadlockError, SimulationError
from autosp_ir.sim.interpreter import Steps, in_flight
from autosp_ir.sim.mesh import RankMesh
from autosp_ir.sim.requests import Request


@dataclass(frozen=True)
class CommRecord:
    """One collective of a run, as rank 0 issues it.

    Args:
        op: `all_to_all`, `all_gather`, `reduce_scatter`, `all_reduce`, `permute` or `broadcast`, before and after
            lowering.
        axis: The mesh axis.
        bytes: Payload that each rank hands to the collective: the size of its operand.
        phase: forward, backward or recompute.
        size: Number of ranks in the group.
        name: The value that holds the result.
    """

    op: str
    axis: str
    bytes: int
    phase: str
    size: int
    name: str

    @property
    def wire_bytes(self) -> int:
        """Bytes that leave each rank under the bandwidth-optimal algorithm."""
        others = self.size - 1
        if self.op == "all_gather":
            return self.bytes * others
        if self.op in ("permute", "broadcast"):
            return self.bytes if others else 0
        share = self.bytes * others // self.size
        return 2 * share if self.op == "all_reduce" else share


class Scheduler:
    """Runs one generator per rank in lockstep.

    Args:
        mesh: The ranks and their groups.
        ranks: One `RankInterpreter.run()` per rank, in rank order.
        seed: Every rank draws random numbers from its own generator, which starts at this seed.
        random: Whether any rank draws random numbers.
    """

    def __init__(self, mesh: RankMesh, ranks: Sequence[Steps], *, seed: int, random: bool) -> None:
        self._mesh = mesh
        self._ranks = ranks
        self._waiting: dict[int, Request] = {}
        self._outputs: dict[int, list[Any]] = {}
        self._states: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        self._seed = seed
        self._random = random
        self.comm: list[CommRecord] = []

    def run(self) -> list[list[Any]]:
        """Run every rank to its end; the flat outputs of each rank.

        Raises:
            DeadlockError: The ranks of a group issue different collectives, or some issue more than others.
            SimulationError: An operation failed.
        """
        with torch.random.fork_rng(devices=self._cuda, enabled=self._random):
            for rank in range(self._mesh.size):
                self._advance(rank, None)
            while self._waiting:
                self._complete(self._next_group())
        return [self._outputs[rank] for rank in range(self._mesh.size)]

    def _advance(self, rank: int, result: Any) -> None:
        with self._random_state(rank):
            try:
                self._waiting[rank] = self._ranks[rank].send(result)
            except StopIteration as end:
                self._waiting.pop(rank, None)
                self._outputs[rank] = end.value

    @contextlib.contextmanager
    def _random_state(self, rank: int) -> Iterator[None]:
        if not self._random:
            yield
            return
        if rank in self._states:
            cpu, cuda = self._states[rank]
            torch.set_rng_state(cpu)
            for device, state in zip(self._cuda, cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
        else:
            torch.manual_seed(self._seed)
        yield
        self._states[rank] = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self._cuda]

    def _next_group(self) -> tuple[int, ...]:
        """A group all of whose ranks have arrived at one and the same collective."""
        for rank, request in self._waiting.items():
            members = self._group(rank, request)
            arrived = [self._waiting[m] for m in members if m in self._waiting]
            if len(arrived) == len(members) and all(r.axis == request.axis for r in arrived):
                self._compare(members)
                return members
        raise self._deadlock()

    def _group(self, rank: int, request: Request) -> tuple[int, ...]:
        members = self._mesh.group(rank, request.axis)
        size = request.attributes.get("size", request.attributes.get("group_size", len(members)))
        if size != len(members):
            raise SimulationError(
                f"{request.op} was built for {size} rank(s) on axis {request.axis!r}, but the mesh "
                f"{dict(self._mesh.axes)} has {len(members)}",
                node=request.node,
                hint="simulate the program on the mesh that it was partitioned for",
            )
        return members

    def _compare(self, members: tuple[int, ...]) -> None:
        first = self._waiting[members[0]]
        for member in members[1:]:
            if self._waiting[member].identity != first.identity:
                raise DeadlockError(
                    f"the ranks of one group issue different collectives: {self._arrivals(members)}",
                    node=self._waiting[member].node,
                    hint="every rank of a group must issue the same collectives, with the same shapes and dtypes, "
                    "in the same order",
                )

    def _complete(self, members: tuple[int, ...]) -> None:
        requests = [self._waiting[member] for member in members]
        results = requests[0].evaluate([request.operand for request in requests])
        if members[0] == 0:
            first = requests[0]
            record = CommRecord(
                first.op, first.axis, first.payload, str(first.node.phase), len(members), first.node.name
            )
            self.comm.append(record)
        for member, request, result in zip(members, requests, results, strict=True):
            self._advance(member, in_flight(request, result))

    def _arrivals(self, members: Sequence[int]) -> str:
        return "; ".join(f"rank {m}: {self._waiting.get(m, 'has finished')}" for m in members)

    def _deadlock(self) -> DeadlockError:
        everyone = range(self._mesh.size)
        return DeadlockError(
            f"no collective can complete: {self._arrivals(everyone)}",
            node=next(iter(self._waiting.values())).node,
            hint="every rank of a group must issue the same collectives in the same order",
        )
