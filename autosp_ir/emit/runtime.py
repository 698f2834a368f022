"""What runs when a user calls an emitted module: check the batch, pick the program, run it, rebuild the output."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autosp_ir.capture.autocast import Autocast
from autosp_ir.capture.facts import facts_of
from autosp_ir.capture.info import CaptureInfo
from autosp_ir.emit.agreement import check_same_batch
from autosp_ir.emit.binding import MeshBinding
from autosp_ir.emit.step import EmittedStep
from autosp_ir.errors import RuntimeMismatchError
from autosp_ir.ir.program import InputKind, Program

_logger = logging.getLogger("autosp_ir.emit")
_CACHED_PROGRAMS = 16


class ProgramRunner:
    """One program, emitted, with the checks of its batch.

    Args:
        program: A captured program, ready to emit.
        step: The program, emitted.
        binding: The process groups of its axes.
    """

    def __init__(self, program: Program, step: EmittedStep, binding: MeshBinding) -> None:
        self.program = program
        self._step = step
        self._binding = binding
        self._agreed = False
        self._names = [s.target for s in program.signature.inputs if s.kind in (InputKind.PARAMETER, InputKind.BUFFER)]
        self._expected = {
            s.target: (program.graph.value(s.name).tensor_type.dtype, s.requires_grad)
            for s in program.signature.inputs
            if s.kind is InputKind.PARAMETER
        }

    def __call__(self, module: nn.Module, info: CaptureInfo, inputs: Mapping[str, Tensor]) -> Any:
        """Run one forward."""
        tensors = lookup(module, self._names)
        self._check_parameters(tensors)
        if not self._agreed:
            settings = {"torch.autocast": repr(info.autocast), "module.training": str(module.training)}
            for axis, group in self._binding.groups.items():
                check_same_batch(inputs, group, axis, settings)
            self._agreed = True
        return info.rebuild(self._step(tensors, inputs))

    def _check_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        for name, (dtype, trained) in self._expected.items():
            tensor = tensors[name]
            if isinstance(tensor, DTensor):
                raise RuntimeMismatchError(
                    f"parameter {name} is a shard of {list(tensor.placements)} over {tensor.device_mesh}, and the step "
                    "reads whole parameters; nothing gathers it, because the forward of its module does not run",
                    hint="call fully_shard on the step alone, not on its submodules",
                )
            if tensor.dtype != dtype:
                raise RuntimeMismatchError(
                    f"parameter {name} is {tensor.dtype} but was {dtype} when the model was captured",
                    hint="call parallelize() after converting the model",
                )
            if tensor.requires_grad and not trained:
                raise RuntimeMismatchError(
                    f"parameter {name} was frozen when the model was captured and asks for a gradient now",
                    hint="call parallelize() again after unfreezing",
                )


class FixedRuntime:
    """Runs one program; any other batch shape is refused."""

    def __init__(self, runner: ProgramRunner, info: CaptureInfo) -> None:
        self.runner = runner
        self._info = info

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Check the batch and run."""
        info = self._info
        tensors = info.flatten(args, kwargs)
        info.check(tensors, self.runner.program.info.get("batch_facts"))
        info.autocast.check(tensors)
        if module.training != info.training:
            raise RuntimeMismatchError(
                f"the program was captured with training={info.training}, and the module is now in the other mode",
                hint="use parallelize(), which captures each mode, or capture the model again in this mode",
            )
        return self.runner(module, info, dict(zip(info.input_names, tensors, strict=True)))


class RecapturingRuntime:
    """Keeps one program per batch shape, mode, autocast and set of trained parameters; captures new ones on demand.

    Args:
        build: From an example batch `(args, kwargs)` to a runner.
        recapture: Whether a batch of another shape may be captured; False refuses it.
    """

    def __init__(
        self, build: Callable[[tuple[Any, ...], dict[str, Any]], tuple[ProgramRunner, CaptureInfo]], recapture: bool
    ) -> None:
        self._build = build
        self._recapture = recapture
        self._entries: OrderedDict[Any, tuple[ProgramRunner, CaptureInfo]] = OrderedDict()
        self._first: CaptureInfo | None = None

    @property
    def programs(self) -> list[Program]:
        """The programs in use, least recently used first."""
        return [runner.program for runner, _ in self._entries.values()]

    def prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture an example batch without running it."""
        self._entry(module, args, kwargs)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find or make the program for this batch, and run it."""
        runner, info = self._entry(module, args, kwargs)
        tensors = info.flatten(args, kwargs)
        info.check(tensors, runner.program.info.get("batch_facts"))
        return runner(module, info, dict(zip(info.input_names, tensors, strict=True)))

    def _entry(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ProgramRunner, CaptureInfo]:
        key = self._key(module, args, kwargs)
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        if self._first is not None and not self._recapture:
            tensors = self._first.flatten(args, kwargs)
            self._first.check(tensors)
            self._first.autocast.check(tensors)
        made = self._build(args, kwargs)
        self._first = self._first or made[1]
        # How a batch is told from others is known once a first one was captured.
        self._entries[self._key(module, args, kwargs)] = made
        if len(self._entries) > _CACHED_PROGRAMS:
            self._entries.popitem(last=False)
            _logger.warning(
                "more than %d batch shapes were captured; pad batches to fewer lengths, or pass dynamic=True",
                _CACHED_PROGRAMS,
            )
        return made

    def _key(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._first is None:
            return None
        info = self._first
        try:
            tensors = info.flatten(args, kwargs)
        except RuntimeMismatchError:
            if not self._recapture:
                raise
            return _call_key(module, args, kwargs)
        named = dict(zip(info.input_names, tensors, strict=True))
        shapes: Any = tuple((n, tuple(t.shape), t.dtype, t.device) for n, t in named.items())
        if info.dynamic:
            shapes = tuple((n, t.ndim, t.dtype, t.device) for n, t in named.items())
        facts = tuple(sorted(facts_of(named).items())) if info.example_facts else ()
        return (shapes, facts, Autocast.ambient(tensors), *_module_key(module))


def _call_key(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    def described(value: Any) -> Any:
        return (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else repr(value)

    return (
        tuple(described(a) for a in args),
        tuple((k, described(v)) for k, v in sorted(kwargs.items())),
        Autocast.ambient(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)),
        *_module_key(module),
    )


def _module_key(module: nn.Module) -> tuple[Any, ...]:
    trained = tuple(p.requires_grad for p in module.parameters())
    return (module.training, trained, tuple(p.dtype for p in module.parameters()))


def lookup(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Parameters and buffers of a module by canonical name.

    Raises:
        RuntimeMismatchError: The module no longer has one of them.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        try:
            value = getattr(module.get_submodule(path), attribute)
        except AttributeError as error:
            raise RuntimeMismatchError(
                f"the model no longer has {name!r}", hint="call parallelize() again after changing the model"
            ) from error
        found[name] = value
    return found
