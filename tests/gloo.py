"""Run a function on several gloo ranks, each in its own process.

    def body(rank: int, world: int, scale: float) -> Tensor: ...
    results = run_ranks(body, 2, 0.5)      # one result per rank, in rank order

The worker processes are started once per test process and reused, because importing torch takes seconds. Every call
gets a fresh process group, seed and default dtype. After an error or a timeout all workers are replaced.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import pickle
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.collector import calm_collector

_logger = logging.getLogger(__name__)
_MORE_ATTEMPTS = 2


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds the tracebacks of the ranks."""


class _NoGroupError(RuntimeError):
    """torch made no process group: on a loaded machine gloo sometimes closes a connection that it is just making."""


class _Worker:
    """One process that runs what it is sent until its pipe closes."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, remote = context.Pipe()
        self.process = context.Process(target=_serve, args=(remote,), daemon=True)
        self.process.start()
        remote.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


_workers: list[_Worker] = []


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(rank, world, *args)` on `world` gloo ranks and return the results in rank order.

    Args:
        function: Defined at the top level of an importable module; runs with the default process group initialized.
        world: How many ranks.
        args: Passed on by pickling, as are the results; tensors are copied.
        timeout: Seconds for the whole call, and for each collective in it.

    Raises:
        RankError: A rank raised, died, or did not finish in time.
    """
    results, failures = _run_once(function, world, args, timeout)
    for _ in range(_MORE_ATTEMPTS):
        if not any(_NoGroupError.__name__ in said for said in failures.values()):
            break
        _logger.warning("torch made no process group, so that nothing ran; trying again: %s", failures)
        results, failures = _run_once(function, world, args, timeout)
    if failures:
        raise RankError("\n".join(f"--- rank {rank} of {world}\n{failures[rank]}" for rank in sorted(failures)))
    return [results[rank] for rank in range(world)]


def _run_once(
    function: Callable[..., Any], world: int, args: tuple[Any, ...], timeout: float
) -> tuple[dict[int, Any], dict[int, str]]:
    while len(_workers) < world:
        _workers.append(_Worker())
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world):
            _workers[rank].pipe.send_bytes(pickle.dumps((folder, rank, world, timeout, function, args)))
        results, failures = _collect(world, time.monotonic() + timeout)
        if failures:
            stop_workers()
            hung = set(range(world)) - results.keys() - failures.keys()
            failures |= {rank: _stack_of(folder, rank) for rank in hung}
    return results, failures


def stop_workers() -> None:
    """End the worker processes; the next call starts new ones."""
    while _workers:
        _workers.pop().stop()


atexit.register(stop_workers)


def _collect(world: int, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting: dict[object, int] = {_workers[rank].pipe: rank for rank in range(world)}
    while waiting:
        ready = wait([_workers[rank].pipe for rank in waiting.values()], max(0.0, deadline - time.monotonic()))
        if not ready:
            # After a first failure the others only get a moment: they may be waiting for the failed rank.
            return results, failures or dict.fromkeys(waiting.values(), "did not finish in time")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pickle.loads(_workers[rank].pipe.recv_bytes())
            except (EOFError, OSError):
                _workers[rank].process.join()
                succeeded, value = False, f"the process died with exit code {_workers[rank].process.exitcode}"
            if succeeded:
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + 1.0)
    return results, failures


def _stack_of(folder: str, rank: int) -> str:
    path = Path(folder, f"stack-{rank}")
    stack = path.read_text() if path.exists() else ""
    return "did not finish" + (f"; it was at\n{stack}" if stack else " (another rank failed)")


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    calm_collector()
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        try:
            reply = pickle.dumps((True, _run(*pickle.loads(request))))
        except BaseException:
            reply = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(reply)


def _run(
    folder: str, rank: int, world: int, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.manual_seed(0)
    random.seed(0)
    torch.set_default_dtype(torch.float32)
    rendezvous, limit = f"file://{folder}/rendezvous", timedelta(seconds=timeout)
    try:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=limit)
    except RuntimeError as error:
        raise _NoGroupError(f"rank {rank} has no process group") from error
    with open(Path(folder, f"stack-{rank}"), "w") as stacks:
        faulthandler.dump_traceback_later(timeout * 0.9, file=stacks)
        try:
            return function(rank, world, *args)
        finally:
            faulthandler.cancel_dump_traceback_later()
            dist.destroy_process_group()
