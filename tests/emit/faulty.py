"""Ranks on which something goes wrong, each in a process of its own, forked from one that has captured the model."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import autosp_ir as air
from tests.models import build

FAULTY_STEP = 3
LIMIT = 30.0
"""Seconds within which every other rank has to end."""

_LONG = 600.0


class Case(NamedTuple):
    """What happens.

    Args:
        world: How many ranks.
        victim: The rank on which something goes wrong.
        fault: Name of a function below.
    """

    world: int
    victim: int
    fault: str


class Ending(NamedTuple):
    """How a rank ended: exit code, what it wrote, and seconds from the fault to its end."""

    code: int | None
    wrote: str
    seconds: float


def dies(part: str) -> None:
    if part == "before":
        os.kill(os.getpid(), signal.SIGKILL)


def dies_between(part: str) -> None:
    if part == "between":
        os.kill(os.getpid(), signal.SIGKILL)


def is_stopped(part: str) -> None:
    if part == "before":
        os.kill(os.getpid(), signal.SIGSTOP)


def sleeps(part: str) -> None:
    if part == "before":
        time.sleep(_LONG)


def sleeps_between(part: str) -> None:
    if part == "between":
        time.sleep(_LONG)


def raises(part: str) -> None:
    if part == "before":
        raise ValueError("the loader found no file")


def leaves(part: str) -> None:
    if part == "before":
        sys.exit(0)


@contextmanager
def no_memory() -> Iterator[None]:
    """The device is full from now on."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with mock.patch.object(fx.Interpreter, "run_node", side_effect=error):
        yield


def nothing(part: str) -> None:
    """Faults that are not a call between the parts of a step."""


FAULTS: dict[str, Callable[[str], None]] = {
    f.__name__: f for f in (dies, dies_between, is_stopped, sleeps, sleeps_between, raises, leaves)
}

MODEL, BATCH = build("llama-gqa", length=16, num_hidden_layers=1)
PROGRAM = air.PassManager(air.DEFAULT_PIPELINE).run(air.capture(MODEL, BATCH), mesh={"sp": 2}).program


def train(case: Case, rank: int, folder: Path) -> None:
    """Five steps, with the fault in one of them."""
    mesh = init_device_mesh("cpu", (case.world // 2, 2), mesh_dim_names=("dp", "sp"))
    module: nn.Module = PROGRAM.emit(mesh=mesh)
    if case.world > 2:
        # Its broadcast of buffers comes before the step, outside of what the step watches.
        module = DistributedDataParallel(module, process_group=mesh.get_group("dp"), broadcast_buffers=False)
    fault = FAULTS.get(case.fault, nothing)
    for step in range(1, 6):
        faulty = rank == case.victim and step == FAULTY_STEP
        if faulty:
            Path(folder, "fault").write_text(str(time.time()))
            fault("before")
        batch = BATCH
        if faulty and case.fault == "another_length":
            batch = {name: value[:, :12] for name, value in BATCH.items()}
        if faulty and case.fault == "no_memory_forward":
            with no_memory():
                loss = module(**batch)["loss"]
        loss = module(**batch)["loss"]
        if faulty:
            fault("between")
        if faulty and case.fault == "no_backward":
            continue
        if faulty and case.fault == "no_memory_backward":
            with no_memory():
                loss.backward()
        loss.backward()


def run_rank(case: Case, rank: int, port: int, folder: Path) -> None:
    """What a script does that torchrun starts, and what Python does with its errors."""
    with open(Path(folder, f"rank-{rank}"), "w") as written:
        os.dup2(written.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=case.world,
            timeout=timedelta(minutes=10),
        )
        train(case, rank, folder)
        dist.destroy_process_group()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Started:
    """The ranks of a case, running."""

    def __init__(self, case: Case, folder: Path) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.case, self.folder = case, folder
        port = free_port()
        self.ranks = [
            context.Process(target=run_rank, args=(case, rank, port, folder), daemon=True) for rank in range(case.world)
        ]
        for process in self.ranks:
            process.start()
        self.ends: dict[int, float] = {}

    def poll(self) -> bool:
        """Note which ranks have ended; True when all but the one that never will have."""
        for rank, process in enumerate(self.ranks):
            if rank not in self.ends and not process.is_alive():
                self.ends[rank] = time.time()
        return all(r in self.ends for r in range(self.case.world) if r != self.case.victim)

    def endings(self) -> list[Ending]:
        """How each rank ended; what still runs is killed."""
        fault = Path(self.folder, "fault")
        began = float(fault.read_text()) if fault.exists() else time.time()
        found = []
        for rank, process in enumerate(self.ranks):
            if rank not in self.ends:
                process.kill()
                process.join()
            wrote = Path(self.folder, f"rank-{rank}")
            text = wrote.read_text() if wrote.exists() else ""
            found.append(Ending(process.exitcode, text, self.ends.get(rank, time.time() + _LONG) - began))
        return found


def run_cases(cases: dict[str, Case], folder: Path, limit: float = 100.0) -> dict[str, list[Ending]]:
    """All cases side by side, since they mostly wait."""
    started = {}
    for name, case in cases.items():
        Path(folder, name).mkdir()
        started[name] = Started(case, Path(folder, name))
    deadline = time.monotonic() + limit
    left = list(started.values())
    while left and time.monotonic() < deadline:
        left = [one for one in left if not one.poll()]
        time.sleep(0.1)
    return {name: one.endings() for name, one in started.items()}
