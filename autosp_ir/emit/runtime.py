"""What runs when a user calls an emitted module: check the batch, pick the program, run it, rebuild the output."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autosp_ir.capture.autocast import Autocast
from autosp_ir.capture.facts import facts_of
from autosp_ir.capture.info import CaptureInfo
from autosp_ir.comm.random_masks import generator_state
from autosp_ir.emit.agreement import GENERATOR, PARAMETER, PROGRAM, describe
from autosp_ir.emit.collectives import collectives_of
from autosp_ir.emit.draws import dropout_probabilities, shared_generators
from autosp_ir.emit.lookup import Lookup, submodules, tensors_of
from autosp_ir.emit.step import EmittedStep
from autosp_ir.emit.team import Team
from autosp_ir.errors import RuntimeMismatchError
from autosp_ir.ir.program import InputKind, Program

_logger = logging.getLogger("autosp_ir.emit")
_CACHED_PROGRAMS = 16
_WEIGHTS_LEFT_TO_OTHERS = 3


class ProgramRunner:
    """One program, emitted, with the checks of its batch.

    Args:
        program: A captured program, ready to emit.
        step: The program, emitted.
        team: The ranks that run it.
        batch_content: Compare the bytes of the ranks' batches in every step, not in the first alone.
    """

    def __init__(self, program: Program, step: EmittedStep, team: Team, batch_content: bool = False) -> None:
        self.program = program
        self.team = team
        self._step = step
        self._batch_content = batch_content
        self._agreed = False
        self._number: str | None = None
        self._collectives = collectives_of(program)
        self._shared = shared_generators(program)
        self._compared: set[int] = set()
        kinds = InputKind.PARAMETER, InputKind.BUFFER
        self._lookup = Lookup([s.target for s in program.signature.inputs if s.kind in kinds])
        self._expected = {
            s.target: (program.graph.value(s.name).tensor_type.dtype, s.requires_grad)
            for s in program.signature.inputs
            if s.kind is InputKind.PARAMETER
        }
        # Whoever completes the gradients may leave out ranks, which shows in the weights after an optimizer's step.
        self._compares = _WEIGHTS_LEFT_TO_OTHERS if program.info.get("grad_sync") == "external" else 1

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Parameters and buffers of a module, checked.

        Raises:
            RuntimeMismatchError: One is gone, or is not what the program was captured for.
        """
        tensors = self._lookup(module)
        self._check_parameters(tensors)
        return tensors

    def __call__(
        self, module: nn.Module, info: CaptureInfo, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> Any:
        """Run one forward, on `tensors` of the module."""
        content = self.team.several and (self._batch_content or not self._agreed)
        told = describe(inputs, content)
        settings = {
            "torch.autocast": repr(info.autocast),
            "module.training": str(module.training),
            "torch.is_grad_enabled": str(torch.is_grad_enabled()),
        }
        told |= {name: (value, None) for name, value in settings.items()}
        number = self._number or self.team.next_number()
        told[PROGRAM] = (f"number {number} of those run, collectives {self._collectives}", None)
        weights = {n: tensors[n] for n in self._expected}
        version = sum(w._version for w in weights.values())
        if len(self._compared) < self._compares and version not in self._compared and self.team.several:
            told |= describe(weights, True, PARAMETER)
        if self.team.several:
            # Every step: a rank that drew a number of its own in between would go wrong in silence.
            told |= describe({str(d): generator_state(d) for d in self._shared}, True, GENERATOR)
        self.team.agree(told)
        if self._number is None:
            self._number = number
            self.team.count_program()
        self._agreed = True
        self._compared.add(version)
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
        self._shared = _shared(info.model)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Check the batch and run."""
        info = self._info
        with self.runner.team.preparing():
            given = info.flatten(args, kwargs)
            info.check(given, self.runner.program.info.get("batch_facts"))
            info.autocast.check(given)
            if module.training != info.training:
                raise RuntimeMismatchError(
                    f"the program was captured with training={info.training}, and the module is now in the other mode",
                    hint="use parallelize(), which captures each mode, or capture the model again in this mode",
                )
            tensors = self.runner.tensors(module)
            if _shared(module) != self._shared:
                raise RuntimeMismatchError(
                    "tensors have been tied or untied since the program was emitted, and it reads shared ones once",
                    hint="use parallelize(), which captures again, or capture the model again",
                )
        return self.runner(module, info, dict(zip(info.input_names, given, strict=True)), tensors)


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
        self._team = Team({})

    @property
    def programs(self) -> list[Program]:
        """The programs in use, least recently used first."""
        return [runner.program for runner, _ in self._entries.values()]

    def prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture an example batch without running it."""
        self._entry(module, args, kwargs)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find or make the program for this batch, and run it."""
        with self._team.preparing():
            runner, info = self._entry(module, args, kwargs)
            given = info.flatten(args, kwargs)
            info.check(given, runner.program.info.get("batch_facts"))
            tensors = runner.tensors(module)
        return runner(module, info, dict(zip(info.input_names, given, strict=True)), tensors)

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
        self._first, self._team = self._first or made[1], made[0].team
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


def _shared(module: nn.Module) -> list[int]:
    return [first for first, _ in tensors_of(submodules(module))]


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
    modules = submodules(module)
    described = tuple((first, p.requires_grad, p.dtype) for first, p in tensors_of(modules))
    return (tuple(m.training for m in modules), dropout_probabilities(modules), described)
