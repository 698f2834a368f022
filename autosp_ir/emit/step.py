"""One emitted program: flat tensors in, named outputs out, gradients through autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autosp_ir._torch_compat import backward_is_retained, clear_saved_tensors, exact_autocast
from autosp_ir.comm.host_memory import on_host
from autosp_ir.emit.binding import MeshBinding, bind_axes
from autosp_ir.emit.boxed import StepGraphs, aten_graphs
from autosp_ir.emit.finite import Bad, FiniteCheck, search
from autosp_ir.emit.fx_export import executable
from autosp_ir.emit.split import SplitJoint, split_joint
from autosp_ir.emit.team import Team
from autosp_ir.errors import RuntimeMismatchError, UnsupportedError
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature, Stage

Compiler = Callable[[SplitJoint], StepGraphs]
"""Turns the halves of a step into boxed callables."""


class EmittedStep:
    """Runs a program on this rank.

    Args:
        program: A forward program (run under autograd), or a joint or lowered one (split into two graphs).
        binding: The process groups of the program's axes.
        compiler: Makes the two graphs of a joint program callable; None runs their operations one by one.
        team: The ranks that run it, told what fails; None tells nobody.
        check_finite: Check outputs and gradients, and name the rank and operation of one that is not finite.
    """

    def __init__(
        self,
        program: Program,
        binding: MeshBinding,
        compiler: Compiler | None = None,
        team: Team | None = None,
        check_finite: bool = False,
    ) -> None:
        self._team = team or Team({})
        self.signature: Signature = program.signature
        self._written = {s.target for s in self.signature.outputs if s.kind is OutputKind.BUFFER_MUTATION}
        self.constants = {
            s.target: program.tensors[s.target] for s in program.signature.inputs if s.kind is InputKind.CONSTANT
        }
        bound = bind_axes(program, binding)
        finite = FiniteCheck(self._team) if check_finite else None
        self._runner = (
            _ForwardRunner(bound, finite)
            if bound.stage is Stage.FORWARD
            else _JointRunner(bound, compiler, self._team, finite)
        )

    def __call__(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Run one step's forward.

        Args:
            tensors: Parameters and buffers by canonical name.
            inputs: User inputs by name.

        Returns:
            The program's outputs by name. Buffers that the model mutates are written.
        """
        flat = self._flat(tensors, inputs)
        # The program says every dtype: the caller's autocast, if any, is part of it.
        with exact_autocast():
            with self._team.running("forward"):
                results = self._runner.run(flat)
            self._runner.check(flat, results)
        outputs: dict[str, Any] = {}
        for spec, value in results:
            if spec.kind is OutputKind.BUFFER_MUTATION:
                with torch.no_grad():
                    tensors[spec.target].copy_(value)
            elif spec.kind is OutputKind.USER_OUTPUT:
                outputs[spec.target] = value
        return outputs

    def _flat(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        sources: dict[InputKind, Mapping[str, Tensor]] = {
            InputKind.PARAMETER: tensors,
            InputKind.BUFFER: tensors,
            InputKind.CONSTANT: self.constants,
            InputKind.USER_INPUT: inputs,
        }
        flat = []
        for spec in self.signature.inputs:
            if spec.kind is InputKind.TANGENT:
                continue
            tensor = sources[spec.kind].get(spec.target)
            if tensor is None:
                raise RuntimeMismatchError(
                    f"the program's {spec.kind} {spec.target!r} was not given",
                    hint="call the step with the arguments of the captured batch, on the captured model",
                )
            # The backward reads a buffer as it was, and the step writes it before.
            written = spec.kind is InputKind.BUFFER and spec.target in self._written
            flat.append(tensor.clone() if written else tensor)
        return flat


class _ForwardRunner:
    """A forward program under autograd."""

    def __init__(self, program: Program, finite: FiniteCheck | None) -> None:
        self._outputs = program.signature.outputs
        self._graph = executable(program)
        self._program, self._finite = program, finite

    def run(self, flat: Sequence[Tensor]) -> list[tuple[Any, Any]]:
        return list(zip(self._outputs, self._graph(*flat), strict=True))

    def check(self, flat: Sequence[Tensor], results: Sequence[tuple[Any, Any]]) -> None:
        if self._finite is not None:
            self._finite.check("forward", _named(results), lambda bad: search(self._program, flat, bad)[0])


class _JointRunner:
    """A joint program as one autograd node."""

    def __init__(self, program: Program, compiler: Compiler | None, team: Team, finite: FiniteCheck | None) -> None:
        inputs = [s for s in program.signature.inputs if s.kind is not InputKind.TANGENT]
        self._function = _SplitFunction(split_joint(program), inputs, compiler or aten_graphs, team, finite)

    def run(self, flat: Sequence[Tensor]) -> list[tuple[Any, Any]]:
        function = self._function
        if torch.is_grad_enabled() and function.differentiable:
            apply: Callable[..., tuple[Any, ...]] = _TrainingStep.apply
            values = apply(function, *flat)
        else:
            values, _ = function.forward(flat)
        return list(zip(function.outputs, values, strict=True))

    def check(self, flat: Sequence[Tensor], results: Sequence[tuple[Any, Any]]) -> None:
        self._function.check_outputs(flat, results)


class _SplitFunction:
    """The two graphs of a step and how values travel between them."""

    def __init__(
        self,
        split: SplitJoint,
        inputs: Sequence[InputSpec],
        compiler: Compiler,
        team: Team,
        finite: FiniteCheck | None,
    ) -> None:
        self._team, self._finite = team, finite
        self._split = split if finite is not None else None
        self.outputs = [s for s in split.forward.signature.outputs if s.kind is not OutputKind.SAVED]
        self._kept = [s.kind is not OutputKind.SAVED for s in split.forward.signature.outputs]
        self._order = [(s.kind, s.target) for s in inputs]
        self._forward, self._backward, self.overwrites = compiler(split)
        self._forward_inputs = self._positions(split.forward)
        self.saved_names = [s.name for s in split.forward.signature.outputs if s.kind is OutputKind.SAVED]
        self.host_names = {n for n in self.saved_names if on_host(split.forward.graph.value(n).producer)}
        self._backward_inputs = list(split.backward.signature.inputs) if split.backward is not None else []
        self._gradients = self._gradient_positions(split.backward)
        self._tangents = {s.target for s in self._backward_inputs if s.kind is InputKind.TANGENT}

    @property
    def differentiable(self) -> bool:
        """Whether there is anything to differentiate."""
        return self._backward is not None and bool(self._gradients)

    @property
    def checked(self) -> bool:
        """Whether outputs and gradients are checked to be finite."""
        return self._finite is not None

    def takes_gradient_of(self, output: OutputSpec) -> bool:
        """Whether the backward reads a gradient of this output: not of a detached one, nor of a buffer's new value."""
        return output.kind is OutputKind.USER_OUTPUT and output.target in self._tangents

    def _positions(self, program: Program) -> list[int]:
        index = {key: i for i, key in enumerate(self._order)}
        return [index[(s.kind, s.target)] for s in program.signature.inputs]

    def kept_inputs(self) -> list[int]:
        """Positions of the step's inputs that the backward reads, or all of them if a cause may have to be found.

        The others may be written before it runs.
        """
        if self.checked:
            return list(range(len(self._order)))
        index = {key: i for i, key in enumerate(self._order)}
        kinds = (InputKind.TANGENT, InputKind.SAVED)
        return sorted(index[(s.kind, s.target)] for s in self._backward_inputs if s.kind not in kinds)

    def _gradient_positions(self, backward: Program | None) -> dict[int, int]:
        """Position among the step's inputs -> position among the backward's outputs."""
        if backward is None:
            return {}
        trainable = {
            target: i
            for i, (kind, target) in enumerate(self._order)
            if kind in (InputKind.PARAMETER, InputKind.USER_INPUT)
        }
        gradients = [s for s in backward.signature.outputs if s.kind is OutputKind.GRADIENT]
        return {trainable[s.target]: i for i, s in enumerate(gradients)}

    def forward(self, flat: Sequence[Tensor]) -> tuple[tuple[Any, ...], list[Any]]:
        """Outputs, and what the backward wants of the forward."""
        with torch.no_grad():
            results = self._forward([flat[i] for i in self._forward_inputs])
        kept = tuple(r for r, k in zip(results, self._kept, strict=True) if k)
        return kept, [r for r, k in zip(results, self._kept, strict=True) if not k]

    def backward_arguments(
        self, flat: Mapping[int, Any], saved: Sequence[Any], tangents: Mapping[str, Any]
    ) -> list[Any]:
        """What the backward reads, in its order."""
        by_name = dict(zip(self.saved_names, saved, strict=True))
        index = {key: i for i, key in enumerate(self._order)}
        args = []
        for spec in self._backward_inputs:
            if spec.kind is InputKind.TANGENT:
                args.append(tangents[spec.target])
            elif spec.kind is InputKind.SAVED:
                args.append(by_name[spec.target])
            else:
                args.append(flat[index[(spec.kind, spec.target)]])
        return args

    def gradients(self, arguments: list[Any]) -> list[Any]:
        """Gradients of the step's inputs, None where there is none; `arguments` is emptied."""
        if self._backward is None:
            return [None] * len(self._order)
        with self._team.running("backward"), exact_autocast():
            results = self._backward(arguments)
        return [results[self._gradients[i]] if i in self._gradients else None for i in range(len(self._order))]

    def check_outputs(self, flat: Sequence[Any], results: Sequence[tuple[Any, Any]]) -> None:
        """Check the forward's outputs, if that was asked for."""
        if self._finite is None or self._split is None:
            return
        forward = self._split.forward
        given = [flat[i] for i in self._forward_inputs]
        self._finite.check("forward", _named(results), lambda bad: search(forward, given, bad)[0])

    def check_gradients(self, flat: Mapping[int, Any], tangents: Mapping[str, Any], gradients: Sequence[Any]) -> None:
        """Check the gradients, if that was asked for; what the forward saved is made anew to find a cause."""
        if self._finite is None or self._split is None or self._split.backward is None:
            return
        forward, backward = self._split.forward, self._split.backward

        def again(bad: Bad) -> str | None:
            found, results = search(forward, [flat[i] for i in self._forward_inputs], bad)
            saved = [r for r, kept in zip(results, self._kept, strict=True) if not kept]
            return search(backward, self.backward_arguments(flat, saved, tangents), bad)[0] or found

        named = [(f"the gradient of {t}", g) for (_, t), g in zip(self._order, gradients, strict=True)]
        with exact_autocast():
            self._finite.check("backward", named, again)


def _named(results: Sequence[tuple[Any, Any]]) -> list[tuple[str, Any]]:
    return [(f"output {spec.target}", v) for spec, v in results if spec.kind is OutputKind.USER_OUTPUT]


class _TrainingStep(torch.autograd.Function):
    """Autograd's view of a step: one node from parameters and inputs to outputs."""

    @staticmethod
    def forward(ctx: Any, function: _SplitFunction, *flat: Tensor) -> Any:
        values, saved = function.forward(flat)
        ctx.function = function
        # Autograd's hooks may read what they are given, and a copy to host memory is complete for the device alone.
        named = zip(function.saved_names, saved, strict=True)
        ctx.is_tensor = [isinstance(s, Tensor) and n not in function.host_names for n, s in named]
        tensors = [s for s, t in zip(saved, ctx.is_tensor, strict=True) if t]
        ctx.others = [None if t else s for s, t in zip(saved, ctx.is_tensor, strict=True)]
        ctx.inputs = function.kept_inputs()
        ctx.save_for_backward(*(flat[i] for i in ctx.inputs), *tensors)
        values = tuple(_fresh(v, flat) for v in values)
        specs = zip(function.outputs, values, strict=True)
        ctx.mark_non_differentiable(
            *[v for s, v in specs if isinstance(v, Tensor) and not function.takes_gradient_of(s)]
        )
        ctx.dtypes = [(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else None for v in values]
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        # Autograd runs the backward with gradients enabled when its results are to be differentiated again.
        again = torch.is_grad_enabled()
        with torch.no_grad():
            gradients = _TrainingStep._gradients(ctx, grads)
        if not again:
            return (None, *gradients)
        anchor = torch.zeros((), requires_grad=True)
        there = [g for g in gradients if g is not None]
        apply: Any = _NoSecondGradient.apply
        guarded = iter(apply(anchor, *there))
        return (None, *(None if g is None else next(guarded) for g in gradients))

    @staticmethod
    def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> list[Any]:
        function: _SplitFunction = ctx.function
        tangents = {
            spec.target: _tangent(grad, described)
            for spec, grad, described in zip(function.outputs, grads, ctx.dtypes, strict=True)
            if described is not None and function.takes_gradient_of(spec)
        }
        flat = dict(zip(ctx.inputs, ctx.saved_tensors, strict=False)) if function.checked else {}
        gradients = function.gradients(_take_arguments(ctx, tangents))
        if function.checked:
            function.check_gradients(flat, tangents, gradients)
        return gradients


class _NoSecondGradient(torch.autograd.Function):
    """The gradients of a step, with an error in the place of their own gradient.

    The step hands autograd no graph behind its gradients. Without this they would look like constants: a penalty on
    them, or a product with a Hessian, would be wrong without a word.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        del ctx, anchor
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        del ctx, grads
        raise UnsupportedError(
            "an emitted step has first derivatives only, and its gradients are being differentiated",
            hint='for penalties on gradients and the like use the model itself, or backend="eager", which leaves the '
            "backward to autograd",
        )


def _take_arguments(ctx: Any, tangents: Mapping[str, Tensor]) -> list[Any]:
    """The backward's arguments, held by nothing but the list: each saved tensor dies at its last use."""
    held = ctx.saved_tensors
    clear_saved_tensors(ctx)
    inputs = dict(zip(ctx.inputs, held, strict=False))
    tensors = iter(held[len(inputs) :])
    saved = [next(tensors) if t else s for t, s in zip(ctx.is_tensor, ctx.others, strict=True)]
    function: _SplitFunction = ctx.function
    if backward_is_retained():
        overwritten = [n in function.overwrites for n in function.saved_names]
        saved = [s.clone() if o else s for s, o in zip(saved, overwritten, strict=True)]
    else:
        ctx.others = []
    return function.backward_arguments(inputs, saved, tangents)


def _fresh(value: Any, inputs: Sequence[Tensor]) -> Any:
    """A custom function may not return one of its inputs."""
    return value.clone() if isinstance(value, Tensor) and any(value is i for i in inputs) else value


def _tangent(grad: Tensor | None, described: tuple[torch.Size, torch.dtype, torch.device]) -> Tensor:
    shape, dtype, device = described
    if grad is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    # The backward was traced for contiguous tangents.
    return grad.contiguous()
