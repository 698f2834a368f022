"""The order that torch's own `OverlapScheduler` gives a program, under our prices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import fx
from torch._inductor.fx_passes import overlap_scheduling
from torch.utils.flop_counter import flop_registry

import autosp_ir as air
from autosp_ir.emit.split import split_joint
from autosp_passes._schedule.problem import Problem

_OURS = ("attention", "attention_backward")


def torch_orders(program: air.Program, problems: list[Problem]) -> list[list[int]]:
    """Tasks of each half in the order of torch's scheduler, which sees forward and backward apart, as Inductor does.

    Args:
        program: A lowered program.
        problems: Its halves, forward first.
    """
    halves = split_joint(program)
    programs = [p for p in (halves.forward, halves.backward) if p is not None]
    return [_order(half, problem) for half, problem in zip(programs, problems, strict=True)]


def _order(half: air.Program, problem: Problem) -> list[int]:
    number = {node.name: task for task, node in enumerate(problem.nodes)}
    graph = half.to_graph_module()

    def milliseconds(node: fx.Node, _: int | None) -> float | None:
        task = number.get(node.name)
        return None if task is None else 1e3 * (problem.comm[task] or problem.compute[task])

    with _attention_counts(), _without_measurements():
        # 5 % more memory than before, as we allow ourselves below; the default is the least of that and 1 GiB.
        scheduled = overlap_scheduling.schedule_overlap_bucketing(
            graph,
            custom_runtime_estimation=milliseconds,
            pre_bucketing_fsdp_collectives=False,
            max_memory_increase_gb=None,
            max_memory_increase_ratio=0.05,
        )
    order = [number[n.name] for n in scheduled.graph.nodes if n.name in number]
    if sorted(order) != list(range(len(problem.nodes))):
        raise RuntimeError("torch's scheduler did not keep the operations it was given")
    return order


@contextmanager
def _attention_counts() -> Iterator[None]:
    """Make torch's scheduler take our attention for costed work: it asks whether there is a formula of its FLOPs."""
    packets = [getattr(torch.ops.autosp, name) for name in _OURS]
    added = [p for p in packets if p not in flop_registry]
    flop_registry.update({p: lambda *_, **__: 0 for p in added})
    try:
        yield
    finally:
        for packet in added:
            del flop_registry[packet]


@contextmanager
def _without_measurements() -> Iterator[None]:
    """Leave out what our prices replace: it asks a GPU for its bandwidth, and the ranks for their measurements."""
    scheduler = overlap_scheduling.OverlapScheduler
    align = "_align_compute_nodes_runtime_estimations_across_all_distributed_ranks"
    roofline = mock.patch.object(overlap_scheduling, "estimate_roofline_runtime_ms", lambda _: 0.0)
    with roofline, mock.patch.object(scheduler, align, lambda _: None):
        yield
