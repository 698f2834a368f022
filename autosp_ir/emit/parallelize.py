"""`emit` and `parallelize`: from a program, or from a model, to a module that runs on this rank."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autosp_ir._torch_compat import exact_autocast
from autosp_ir.analysis.hardware import this_device, this_link
from autosp_ir.capture.info import CaptureInfo
from autosp_ir.capture.program import capture
from autosp_ir.comm.layout import check_emittable
from autosp_ir.emit.binding import bind_mesh
from autosp_ir.emit.hooks import own_hooks_aside, refuse_own_hooks
from autosp_ir.emit.inductor import inductor_graphs
from autosp_ir.emit.module import make_module
from autosp_ir.emit.room import Room, room_found, within
from autosp_ir.emit.runtime import FixedRuntime, ProgramRunner, RecapturingRuntime
from autosp_ir.emit.step import EmittedStep
from autosp_ir.emit.team import STALL_TIMEOUT, Team
from autosp_ir.errors import PipelineError, RuntimeMismatchError, UnsupportedError
from autosp_ir.ir.program import Program, Stage
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.drawing import drawing
from autosp_ir.pipeline.manager import PassManager, PassResult
from autosp_ir.pipeline.registry import format_pipeline, get_pass, parse_pipeline
from autosp_ir.pipeline.spec import DEFAULT_PIPELINE

Backend = Literal["inductor", "aot_eager", "eager"]
GradSync = Literal["in_graph", "external"]
CheckBatch = Literal["shapes", "content"]
Rng = Literal["per_rank", "global"]

_FINISHING = ("differentiate", "remat", "grad-sync", "lower-comm")
_BACKENDS = ("inductor", "aot_eager", "eager")
_logger = logging.getLogger("autosp_ir.emit")


def emit(program: Program, mesh: DeviceMesh | None = None, backend: Backend = "aot_eager") -> nn.Module:
    """Emit a captured program as a module that shares the captured model's parameters.

    Args:
        program: A program from `capture`, rewritten by passes. A forward program is differentiated and lowered first,
            unless the backend is `eager`.
        mesh: A device mesh that has the program's axes; None when all ranks are its only axis.
        backend: `eager` runs a forward program under autograd; `aot_eager` runs the joint program's ATen graphs,
            `inductor` compiles them.

    Returns:
        The model with another forward: same signature and output type, same parameters.

    Raises:
        UnsupportedError: The program cannot run: attention is unresolved, it was not captured from a model, or the
            backend does not exist.
        RuntimeMismatchError: The running ranks do not match the program's mesh.
    """
    info = _capture_info(program)
    refuse_own_hooks(info.model)
    runner = make_runner(program, mesh, backend)
    return make_module(info.model, FixedRuntime(runner, info))


def _capture_info(program: Program) -> CaptureInfo:
    if isinstance(program.capture, CaptureInfo):
        return program.capture
    raise UnsupportedError(
        "the program was not captured from a model, so it has no forward to stand in for",
        hint="start from air.capture(model, batch), or run the program with air.simulate",
    )


def make_runner(
    program: Program,
    mesh: DeviceMesh | None,
    backend: Backend,
    stall_timeout: float = STALL_TIMEOUT,
    batch_content: bool = False,
    check_finite: bool = False,
) -> ProgramRunner:
    """Emit a program and bind it to the running process groups; see `emit` and `parallelize`."""
    _check_backend(backend)
    check_emittable(program)
    ready = program
    if backend != "eager" and program.stage is not Stage.LOWERED:
        ready = finish(program)
    binding = bind_mesh(ready, mesh)
    compiler = inductor_graphs if backend == "inductor" else None
    team = Team.of(binding, stall_timeout)
    with exact_autocast():
        return ProgramRunner(ready, EmittedStep(ready, binding, compiler, team, check_finite), team, batch_content)


def finish(program: Program) -> Program:
    """Run the passes that a program still needs to be emitted: differentiation, saved values, lowering."""
    wanted = [get_pass(name)() for name in _FINISHING]
    left = [p for p in wanted if not p.provides <= program.facts]
    return PassManager(left).run(program, mesh=program.mesh).program


def _check_backend(backend: str) -> None:
    if backend not in _BACKENDS:
        raise UnsupportedError(f"there is no backend {backend!r}", hint=f"choose one of {', '.join(_BACKENDS)}")


def parallelize(
    model: nn.Module,
    batch: Mapping[str, Any] | Sequence[Any],
    mesh: DeviceMesh | None = None,
    sp_axis: str = "sp",
    pipeline: str | Sequence[Pass] | None = None,
    backend: Backend = "inductor",
    seq_dims: Mapping[str, int] | None = None,
    outputs: Sequence[str] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    dynamic: bool | None = None,
    strict: bool = False,
    memory_budget: float | None = None,
    host_memory: float | None = None,
    grad_sync: GradSync = "in_graph",
    rng: Rng = "per_rank",
    check_batch: CheckBatch = "shapes",
    stall_timeout: float = STALL_TIMEOUT,
    check_finite: bool = False,
) -> nn.Module:
    """Spread one sequence of a model's training step over the ranks of a mesh axis.

    Args:
        model: Any module; its parameters stay where they are and are trained as before.
        batch: One full example batch: a dict of keyword arguments, or a tuple. Every rank of one `sp_axis` group
            passes the same full batch, here and in every step.
        mesh: Device mesh; None makes all running ranks one `sp_axis`. Its other axes are data axes.
        sp_axis: The mesh axis that shares one sequence.
        pipeline: Passes to run; `default_pipeline(sp_axis, grad_sync, backend)` when None, or a more frugal one where
            that does not fit a GPU.
        backend: `aot_eager`, `eager` or `inductor`.
        seq_dims: Token dimension of each input, such as `{"input_ids": 1}`; inferred when None.
        outputs: Names of outputs to keep; None keeps the loss if there is one, else everything.
        loss_fn: `loss_fn(outputs, batch)` for a loss outside the model.
        dynamic: None captures again for a new length, True captures the length as a symbol, False refuses others.
        strict: Refuse an operation that cannot keep its tokens sharded, instead of running it replicated.
        memory_budget: Bytes that a step may take on a rank, weights and gradients included; the states of an optimizer
            and the runtime's own memory come on top. The first pipeline of `autosp_ir.plan` whose predicted peak fits
            is taken. None takes what a GPU has free now, and the default pipeline without a GPU, with a `pipeline`,
            with `dynamic=True`, and for the backend `eager`.
        host_memory: Bytes of pinned host memory that a pipeline so chosen may use on a rank. None takes a half of what
            the host has free, shared by its ranks, and none without a GPU; 0 leaves it alone.
        grad_sync: `in_graph` returns the complete gradient on every rank; `external` leaves the sum to DDP or FSDP.
        rng: How dropout draws. `per_rank`: every rank draws for its own tokens, in no more memory than they take.
            `global`: every rank draws the dense model's masks and keeps its part. A `rng=` that the pipeline gives to
            `canonicalize` wins.
        check_batch: What the ranks compare of their batches before each step, beyond all of it before the first:
            `shapes` and dtypes, which costs nothing on the device, or `content`, which waits for the batch's bytes.
        stall_timeout: Seconds that a rank may do nothing at all while others wait for it, before they give up.
        check_finite: Check outputs and gradients in each step (not gradients with `eager`), which waits for the
            device; what is not finite is traced to its rank and operation.

    Returns:
        The model with another forward; `step(**batch).loss.backward()` gives the dense model's gradients.

    Raises:
        CaptureError: The model or batch cannot be captured.
        UnsupportedError: Something in the model cannot be rewritten soundly.
        RuntimeMismatchError: The running ranks do not match the mesh; from a step, the ranks' batches differ.
        RankFailureError: From a step: another rank died, stalled or failed.
        NonFiniteError: From a step, with `check_finite`.
    """
    _check_backend(backend)
    _check_budget(memory_budget, host_memory, pipeline, backend)
    refuse_own_hooks(model)
    size = _axis_size(mesh, sp_axis)
    manager = PassManager(drawing(_pipeline(pipeline, backend, sp_axis, grad_sync), rng))

    looks = pipeline is None and not dynamic and backend != "eager"

    def rewritten(program: Program) -> PassResult:
        found = room_found(model, mesh, sp_axis) if looks else None
        if memory_budget is None and found is None:
            return manager.run(program, mesh={sp_axis: size}, strict=strict)
        here = found or Room(0.0, 0.0)
        room = Room(memory_budget or here.device, here.host if host_memory is None else host_memory)
        fused, or_least = backend == "inductor", memory_budget is None
        return within(
            program, {sp_axis: size}, manager.passes, room, axis=sp_axis, fused=fused, strict=strict, or_least=or_least
        )

    def build(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ProgramRunner, CaptureInfo]:
        example: Any = kwargs if not args else (args if not kwargs else _as_mapping(model, args, kwargs))
        # The first capture met no hooks of the model's own: those of now were put around the step.
        with own_hooks_aside(model):
            program = capture(
                model,
                example,
                seq_dims=dict(seq_dims) if seq_dims is not None else None,
                outputs=list(outputs) if outputs is not None else None,
                loss_fn=loss_fn,
                dynamic=bool(dynamic),
            )
        result = rewritten(program)
        for remark in result.remarks:
            if remark.kind == "missed":
                _logger.warning("%s", remark)
        runner = make_runner(result.program, mesh, backend, stall_timeout, check_batch == "content", check_finite)
        return runner, _capture_info(result.program)

    runtime = RecapturingRuntime(build, recapture=dynamic is not False)
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (_positional(batch), {})
    runtime.prepare(model, args, kwargs)
    return make_module(model, runtime)


def _positional(batch: Any) -> tuple[Any, ...]:
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)


def _as_mapping(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _check_budget(memory_budget: float | None, host_memory: float | None, pipeline: object, backend: Backend) -> None:
    if host_memory is not None and not host_memory >= 0:
        raise PipelineError(
            f"a host_memory of {host_memory} bytes is none", hint="give bytes, such as 64 * 2**30, or 0"
        )
    if host_memory and pipeline is not None:
        raise PipelineError(
            "both a pipeline and host_memory were given, and the pipeline says what is offloaded",
            hint="leave host_memory out and write offload{host=…} into the pipeline",
        )
    if memory_budget is None:
        return
    if pipeline is not None:
        raise PipelineError(
            "both a pipeline and a memory_budget were given, and the budget chooses the pipeline",
            hint="leave one of them out; remat{policy=budget peak=…} keeps a pipeline within a peak",
        )
    if backend == "eager":
        raise PipelineError(
            'memory_budget needs the backward in the program, which backend="eager" leaves to autograd',
            hint='use backend="inductor" or "aot_eager"',
        )
    if not memory_budget > 0:
        raise PipelineError(f"a memory_budget of {memory_budget} bytes is none", hint="give bytes, such as 70 * 2**30")


def _axis_size(mesh: DeviceMesh | None, axis: str) -> int:
    if mesh is None:
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else _unstarted_world()
    names = mesh.mesh_dim_names or ()
    if axis not in names:
        raise RuntimeMismatchError(
            f"the device mesh has axes {list(names) or 'without names'}, none called {axis!r}",
            hint=f'make it with init_device_mesh(..., mesh_dim_names=(..., "{axis}")), or pass sp_axis=',
        )
    return int(mesh[axis].size())


def _unstarted_world() -> int:
    """One rank, unless a launcher started several and nobody called init_process_group."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 1
    raise RuntimeMismatchError(
        f"WORLD_SIZE is {world}, but torch.distributed is not initialized",
        hint="call torch.distributed.init_process_group() before parallelize()",
    )


def _pipeline(pipeline: str | Sequence[Pass] | None, backend: Backend, axis: str, grad_sync: GradSync) -> list[Pass]:
    chosen = pipeline if pipeline is not None else default_pipeline(axis, grad_sync, backend)
    passes = list(PassManager(chosen).passes)
    if backend != "eager":
        return passes
    if grad_sync == "external":
        raise PipelineError(
            'grad_sync="external" is a rewrite of the joint program, which backend="eager" does not build',
            hint='use backend="aot_eager"',
        )
    # Autograd differentiates what the eager backend runs, so the pipeline ends with the forward program.
    return [p for p in passes if p.stages() == (Stage.FORWARD,) and p.stage_after(Stage.FORWARD) is Stage.FORWARD]


def default_pipeline(axis: str = "sp", grad_sync: GradSync = "in_graph", backend: Backend = "aot_eager") -> str:
    """`DEFAULT_PIPELINE` for another axis name, gradient synchronisation or backend.

    For `inductor` the backward is traced decomposed: what Inductor fuses is then also what `remat` recomputes; small
    gradients share a reduction; and `overlap` comes last, for this machine's GPU, whose order the compiled code keeps.
    Over a slow link attention runs in groups of heads, if that hides more of the exchanges than it costs, and what is
    under way at once travels in groups of its own.
    """
    passes = parse_pipeline(DEFAULT_PIPELINE)
    device = this_device()
    link = this_link(device)
    for index, each in enumerate(passes):
        compiled = backend == "inductor"
        changed: dict[str, Any] = {"axis": axis, "mode": grad_sync, "decompose": compiled, "link": link}
        changed["bucket"] = "auto" if compiled else 0.0
        given = {k: v for k, v in changed.items() if k in type(each.options).model_fields}
        passes[index] = type(each)(**(each.options.model_dump() | given))
    if backend != "inductor":
        return format_pipeline(passes)
    slow = not link.startswith("nvlink")
    if slow:
        at = next(i for i, p in enumerate(passes) if p.name == "ulysses") + 1
        passes[at:at] = parse_pipeline(f"head-chunk{{chunks=overlap fuse=qkv device={device} link={link}}}")
    streams = " gradients=own exchanges=own" if slow else ""
    return format_pipeline([*passes, *parse_pipeline(f"overlap{{device={device} link={link} fused=true{streams}}}")])
