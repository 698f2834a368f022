"""A case through the graph passes of DeepSpeed AutoSP, on one of several gloo ranks.

The passes run in a backend of `torch.compile`, as DeepSpeed's engine runs them. What it does around them is done here
by hand: gradients are averaged over the ranks. What the passes make runs eagerly, and where rematerialisation is
asked about, under AOTAutograd with the partitioner that AutoSP patches, without Inductor.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._functorch.compilers import nop
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

from benchmarks.correctness.cases import Batch, Case
from benchmarks.correctness.compare import Row, Step, dense_step, errors, gradients_of, loss_of

Backend = Callable[[Any, Any], Callable[..., Any]]


def prepare() -> None:
    """Import what every case needs.

    Raises:
        ImportError: DeepSpeed, or something that it needs, is not installed.
    """
    import deepspeed.compile.passes.sp_compile  # noqa: F401


def measure(case: Case) -> Row:
    """One case on this rank of an initialized gloo group; the row of every rank is the same.

    Raises:
        Exception: Whatever AutoSP or torch raise.
    """
    import deepspeed

    # Else it compiles a kernel for all-reduce in shared memory, which only inference uses.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("gloo")
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    torch._dynamo.config.capture_scalar_outputs = True
    return _MEASURES[case.measure](case)


def refuses(error: BaseException) -> bool:
    """Whether DeepSpeed's own code raised an error on purpose, rather than running into it."""
    error = getattr(error, "inner_exception", error)
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None or isinstance(error, AssertionError):
        return False
    # A check that it puts into the graph is raised by torch.
    if str(error).startswith("AutoSP "):
        return True
    module = str(step.tb_frame.f_globals.get("__name__", ""))
    statement = linecache.getline(step.tb_frame.f_code.co_filename, step.tb_lineno)
    return module.startswith("deepspeed.") and statement.strip().startswith("raise ")


class _Sent:
    """Counts all-to-alls and their payload while it is entered."""

    def __enter__(self) -> _Sent:
        import deepspeed.comm as comm

        self.calls = {"forward": 0, "backward": 0}
        self.bytes = 0
        self.phase = "forward"
        self.module, self.inner = comm, comm.all_to_all_single

        def counted(output: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls[self.phase] += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return self.inner(output, tensor, *args, **kwargs)

        comm.all_to_all_single = counted
        return self

    def __exit__(self, *_: object) -> None:
        self.module.all_to_all_single = self.inner


def _step(model: nn.Module, batch: Batch, backend: Backend, sent: _Sent) -> Step:
    from deepspeed.compile.passes.sp_compile import prepare_autosp_inputs

    own = {name: value.clone() for name, value in batch.items()}
    prepare_autosp_inputs(
        own["input_ids"], own["labels"], own.get("position_ids"), own.get("attention_mask"), seq_dim=1
    )
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    loss = loss_of(compiled(**own))
    sent.phase = "backward"
    torch.autograd.backward(loss)
    mean, gradients = loss.detach().clone(), gradients_of(model)
    for tensor in (mean, *gradients.values()):
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return Step(mean, gradients)


def _passes_alone(graph: Any, inputs: Any) -> Callable[..., Any]:
    from deepspeed.compile.passes.sp_compile import apply_autosp

    apply_autosp(graph, inputs, sp_size=dist.get_world_size(), dp_size=1)
    forward: Callable[..., Any] = graph.forward
    return forward


def _partitioned(partition: Callable[..., Any]) -> Backend:
    """The passes, then forward and backward as `partition` cuts them, after Inductor's decompositions."""

    def compile_graph(graph: Any, inputs: Any) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.decomposition import select_decomp_table

        _passes_alone(graph, inputs)
        compiler = aot_autograd(
            fw_compiler=nop, bw_compiler=nop, decompositions=select_decomp_table, partition_fn=partition
        )
        compiled: Callable[..., Any] = compiler(graph, inputs)
        return compiled

    return compile_graph


def _rematerialised() -> Backend:
    """Torch's partitioner as AutoSP patches it."""
    from deepspeed.compile.passes.long_context_checkpointing import register_long_context_checkpointing

    register_long_context_checkpointing()
    return _partitioned(partial(min_cut_rematerialization_partition, compiler="inductor"))


def _gradients(case: Case) -> Row:
    model, batch = case.build()
    with _Sent() as sent:
        found = _step(model, batch, _passes_alone, sent)
    row = errors(found, dense_step(model, batch))
    return {**row, "bytes": sent.bytes} if case.bytes else row


def _redrawn_masks(case: Case) -> Row:
    model, batch = case.build()
    steps = []
    for backend in (_partitioned(default_partition), _rematerialised()):
        torch._dynamo.reset()
        torch.manual_seed(dist.get_rank())
        with _Sent() as sent:
            steps.append(_step(model, batch, backend, sent))
    return errors(steps[1], steps[0])


def _repeated_collectives(case: Case) -> Row:
    model, batch = case.build()
    with _Sent() as sent:
        _step(model, batch, _rematerialised(), sent)
    return {"all_to_alls": sent.calls}


def _second_program(case: Case) -> Row:
    from deepspeed.compile.init_sp import init_autosp

    # What DeepSpeedEngine.compile does for each engine before it compiles.
    config = SimpleNamespace(_param_dict={"sequence_parallel_size": dist.get_world_size()})
    for _ in range(2):
        init_autosp(config)
    return _gradients(case)


_MEASURES: dict[str, Callable[[Case], Row]] = {
    "gradients": _gradients,
    "redrawn masks": _redrawn_masks,
    "repeated collectives": _repeated_collectives,
    "second program": _second_program,
}
