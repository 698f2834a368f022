"""From a batch, bound tensors and tangents to the concrete input of every placeholder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from autosp_ir._torch_compat import is_fake
from autosp_ir.capture.facts import check_facts
from autosp_ir.capture.info import CaptureInfo
from autosp_ir.errors import RuntimeMismatchError, SimulationError
from autosp_ir.ir.program import InputKind, InputSpec, Program
from autosp_ir.ir.types import Dim, ScalarType, TensorType, Type

Batch = Mapping[str, Any] | tuple[Any, ...] | Tensor | None


class InputBinder:
    """Binds the placeholders of one program.

    Args:
        program: The program to run.
        batch: The batch as the model was captured with: keyword arguments, or positional arguments as a tuple.
        tensors: Parameters, buffers and constants that override the bound ones, by canonical name.
        tangents: Gradients of outputs by output name; ones where absent.
    """

    def __init__(
        self,
        program: Program,
        batch: Batch,
        tensors: Mapping[str, Tensor] | None = None,
        tangents: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._program = program
        self._tensors = {**program.tensors, **(tensors or {})}
        self._tangents = dict(tangents or {})
        self._batch = named_batch(program, batch)
        self._symbols: dict[sympy.Symbol, int] = {}

    def bind(self) -> dict[str, Any]:
        """The concrete value of every placeholder, by placeholder name.

        Raises:
            SimulationError: An entry is missing, unbound, or of another shape, dtype or kind.
        """
        specs = {spec.name: spec for spec in self._program.signature.inputs}
        bound: dict[str, Any] = {}
        deferred: list[InputSpec] = []
        for node in self._program.graph.inputs:
            spec = specs.get(node.name)
            if spec is None:
                raise SimulationError(
                    f"placeholder %{node.name} has no entry in the program's signature",
                    node=node,
                    hint="give every placeholder an InputSpec; program.verify() checks it",
                )
            if spec.kind is InputKind.TANGENT or isinstance(node.result.type, ScalarType):
                # Their extents may be expressions over symbols that other inputs bind.
                deferred.append(spec)
            else:
                bound[node.name] = self._bind(spec, node.result.type)
        for spec in deferred:
            bound[spec.name] = self._bind(spec, self._program.graph.value(spec.name).type)
        return bound

    def _bind(self, spec: InputSpec, kind: Type) -> Any:
        if isinstance(kind, ScalarType):
            return self._scalar(spec, kind)
        if not isinstance(kind, TensorType):
            return self._entry(spec)
        found = self._tangent(spec, kind) if spec.kind is InputKind.TANGENT else self._entry(spec)
        self._check(spec, kind, found)
        return found.detach()

    def _entry(self, spec: InputSpec) -> Any:
        if spec.kind is InputKind.USER_INPUT:
            if spec.target not in self._batch:
                raise SimulationError(
                    f"the batch has no {spec.target!r}",
                    hint=f"pass it: the program reads {self._user_inputs()} and the batch has {sorted(self._batch)}",
                )
            return self._batch[spec.target]
        if spec.target not in self._tensors:
            raise SimulationError(
                f"{spec.kind} {spec.target!r} is not bound to a tensor",
                hint="call program.bind(module), or pass simulate(…, tensors={name: tensor})",
            )
        return self._tensors[spec.target]

    def _user_inputs(self) -> list[str]:
        return sorted(s.target for s in self._program.signature.inputs if s.kind is InputKind.USER_INPUT)

    def _tangent(self, spec: InputSpec, kind: TensorType) -> Tensor:
        given = self._tangents.get(spec.target)
        if given is not None:
            return given
        return torch.ones([self._extent(d) for d in kind.shape], dtype=kind.dtype, device=kind.device)

    def _scalar(self, spec: InputSpec, kind: ScalarType) -> Any:
        if spec.kind is InputKind.USER_INPUT and spec.target in self._batch:
            return self._batch[spec.target]
        if kind.expr is None:
            return self._entry(spec)
        return self._extent(kind.expr)

    def _extent(self, extent: Dim) -> int:
        if isinstance(extent, int):
            return extent
        value = extent.subs(self._symbols)
        if not value.is_Integer:
            raise SimulationError(
                f"the extent {extent} is not determined by the batch",
                hint="give the program an input whose shape contains every symbol",
            )
        return int(value)

    def _check(self, spec: InputSpec, kind: TensorType, found: Any) -> None:
        what = f"{spec.kind} {spec.target!r}"
        if not isinstance(found, Tensor):
            raise SimulationError(
                f"{what} is a {type(found).__name__}, but the program wants a tensor",
                hint="pass the same kinds of values that the model was captured with",
            )
        if found.is_meta or is_fake(found):
            raise SimulationError(
                f"{what} is bound to a tensor without data",
                hint="a simulation needs real values: program.bind(real_module), or simulate(…, tensors=…)",
            )
        same_shape = len(kind.shape) == found.ndim and all(
            self._matches(want, have) for want, have in zip(kind.shape, found.shape, strict=True)
        )
        if not same_shape or found.dtype != kind.dtype:
            raise SimulationError(
                f"{what} is {found.dtype}{list(found.shape)}, but the program wants {kind.dtype}"
                f"[{', '.join(str(d) for d in kind.shape)}]",
                hint="pass a batch like the captured one, or capture the model again with this batch",
            )

    def _matches(self, want: Dim, have: int) -> bool:
        """Whether an extent fits; a symbol met for the first time takes the extent it finds."""
        if isinstance(want, sympy.Symbol) and want not in self._symbols:
            self._symbols[want] = have
        return have == (want if isinstance(want, int) else want.subs(self._symbols))


def named_batch(program: Program, batch: Batch) -> dict[str, Any]:
    """A batch as a map from user input name to value.

    Args:
        program: The program, for the names and order of its user inputs.
        batch: Keyword arguments, positional arguments, or None for a program without user inputs.

    Raises:
        SimulationError: More or other entries than the program has inputs.
    """
    names = [s.target for s in program.signature.inputs if s.kind is InputKind.USER_INPUT]
    if batch is None:
        return {}
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(program.capture, CaptureInfo):
        return _captured_batch(program, program.capture, batch)
    if isinstance(batch, Mapping):
        unknown = sorted(set(batch) - set(names))
        if unknown:
            raise SimulationError(
                f"the batch has {unknown}, which the program does not read",
                hint=f"leave them out; the program reads {sorted(names)}",
            )
        return dict(batch)
    if len(batch) != len(names):
        raise SimulationError(
            f"the batch has {len(batch)} positional entries, the program reads {len(names)}",
            hint=f"pass one value for each of {names}, in this order, or a dict",
        )
    return dict(zip(names, batch, strict=True))


def _captured_batch(
    program: Program, capture: CaptureInfo, batch: Mapping[str, Any] | tuple[Any, ...]
) -> dict[str, Any]:
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {})
    try:
        named = dict(zip(capture.input_names, capture.flatten(args, kwargs), strict=True))
        check_facts(program.info.get("batch_facts", {}), named)
    except RuntimeMismatchError as error:
        raise SimulationError(error.reason, hint=error.hint) from error
    return named
