"""A process group whose other ranks are not there, to run one rank of several on one GPU.

The other ranks stand for this one's equals: an exchange brings from each what this rank keeps for itself, a gather as
many copies of it, and a reduction the sum of as many. So everything that one rank computes and holds is there and
finite, and communication costs no more than a copy within the device. Losses and gradients are not those of the real
ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import fake_pg


def start_alone(ranks: int) -> None:
    """Start the default process group as rank 0 of `ranks`, under the name of torch's backend for absent ranks.

    Args:
        ranks: How many there would be.
    """
    # In place of the groups of fake_pg, which leave results as they find them: not a number, where memory is new.
    dist.Backend.register_backend(dist.Backend.FAKE, _create, extended_api=True, devices=["cpu", "cuda"])
    dist.init_process_group("fake", rank=0, world_size=ranks, store=fake_pg.FakeStore())


def _create(common: Any, options: Any) -> Any:
    del options
    # The stubs of torch type the arguments that C++ calls with more narrowly than what it takes.
    sizes = {"_mine": common.group_rank, "_ranks": common.group_size}
    stand_in: Any = type("StandIn", (_Equals, dist.ProcessGroup), sizes)
    return stand_in(common.group_rank, common.group_size)


class _Equals:
    """The collectives of a process group, by the names that torch's C++ interface calls them by."""

    _mine: int
    _ranks: int

    def size(self) -> int:
        """How many ranks the group would have."""
        return self._ranks

    @property
    def group_name(self) -> str:
        """The name that torch knows the group by."""
        names: Any = dist.distributed_c10d._world.pg_names
        return str(names[self])

    def getBackendName(self) -> str:
        """As torch asks for it."""
        return "stand-in"

    def alltoall_base(self, output: Tensor, sent: Tensor, *_: Any, **__: Any) -> dist.Work:
        """Every other rank sends what this one keeps for itself; all blocks are of one size."""
        return self._allgather_base(output, sent.view(self._ranks, -1)[self._mine])

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:
        """A sum of equal terms; the largest or mean of them is any."""
        if opts is None or opts.reduceOp == dist.ReduceOp.SUM:
            for tensor in tensors:
                tensor.mul_(self._ranks)
        return _done(tensors)

    def _allgather_base(self, output: Tensor, sent: Tensor, *_: Any, **__: Any) -> dist.Work:
        output.view(self._ranks, -1).copy_(sent.reshape(1, -1).expand(self._ranks, -1))
        return _done(output)

    def _reduce_scatter_base(self, output: Tensor, sent: Tensor, *_: Any, **__: Any) -> dist.Work:
        torch.mul(sent.view(self._ranks, *output.shape)[self._mine], self._ranks, out=output)
        return _done(output)

    def barrier(self, *_: Any, **__: Any) -> dist.Work:
        """Nobody to wait for."""
        return _done(())

    # The same under the names that later versions of torch call them by.
    allreduce_coalesced = allreduce
    all_to_all_single = alltoall_base
    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base


def _done(result: Any) -> dist.Work:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    work: dist.Work = vars(torch._C._distributed_c10d)["_create_work_from_future"](future)
    return work


__all__ = ["start_alone"]
