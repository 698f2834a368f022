"""Programs as text that reads like typed Python.

    autosp-ir 1
    stage: forward
    mesh: {"sp": 4}

    program(
        %weight: f32[32, 32] = parameter "proj.weight" grad,
        %x: f32[2, s0//4, 32] {sp: S(1)} = input "x",
    ) -> (
        "out0": output "out0",
    ):
        %linear: f32[2, s0//4, 32] {sp: S(1)} = aten.linear(%x, %weight)   # llama.py:243 model.layers.0.self_attn
        return (%linear,)

Extents, layouts and devices belong to the type; a type on another device than the header's ends in `@cuda:0`.
"""

from __future__ import annotations

import json
import linecache
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from autosp_ir._torch_compat import symbol_facts
from autosp_ir.errors import AutoSPError, UnsupportedError
from autosp_ir.ir.expressions import assumptions_of, format_expression
from autosp_ir.ir.graph import Graph, Node, Origin, Phase
from autosp_ir.ir.literals import format_argument, format_keyword, format_op, op_name
from autosp_ir.ir.program import InputSpec, Program
from autosp_ir.ir.types import Layout, NoneType, Placement, ScalarType, Shard, TensorType, TupleType, Type

FORMAT_VERSION = 1
"""Raised when text of this version could be misread by an older reader."""

SHORT_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint64: "u64",
    torch.uint32: "u32",
    torch.uint16: "u16",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}

_INDENT = "    "
_CPU = torch.device("cpu")


@dataclass
class _Writer:
    """Renders nodes and types, and notes the symbols it meets.

    Args:
        device: The device that types need not mention.
        strict: Refuse what would not read back equal; otherwise show its repr, for error messages.
    """

    device: torch.device = _CPU
    strict: bool = True
    symbols: dict[str, sympy.Symbol] = field(default_factory=dict)

    def type(self, kind: Type) -> str:
        """A type as text."""
        if isinstance(kind, TensorType):
            shape = ", ".join(self.extent(d) for d in kind.shape)
            device = "" if kind.device == self.device else f"@{kind.device}"
            layout = f" {self.layout(kind.layout)}" if kind.layout else ""
            return f"{format_dtype(kind.dtype)}[{shape}]{device}{layout}"
        if isinstance(kind, ScalarType):
            return kind.kind if kind.expr is None else f"{kind.kind}({self.extent(kind.expr)})"
        if isinstance(kind, TupleType):
            comma = "," if len(kind.elements) == 1 else ""
            return f"({', '.join(self.type(e) for e in kind.elements)}{comma})"
        if isinstance(kind, NoneType):
            return "None"
        return f"object({json.dumps(kind.name)})"

    def extent(self, extent: Any) -> str:
        """An extent as text; its symbols are noted for the header."""
        for symbol in getattr(extent, "free_symbols", ()):
            known = self.symbols.setdefault(symbol.name, symbol)
            if self.strict and known != symbol:
                raise UnsupportedError(
                    f"two different symbols are called {symbol.name}",
                    hint="rename one of them; text tells symbols apart by name",
                )
        return format_expression(extent) if self.strict else str(extent)

    def layout(self, layout: Layout) -> str:
        """A layout as text: `{sp: S(1)}`."""
        return "{" + ", ".join(f"{axis}: {self.placement(p)}" for axis, p in layout.items()) + "}"

    def placement(self, placement: Placement) -> str:
        """A placement as text."""
        if isinstance(placement, Shard) and placement.outer != 1:
            return f"S({placement.dim}, {self.extent(placement.outer)})"
        return str(placement)

    def argument(self, item: Any) -> str:
        """An argument as text."""
        try:
            return format_argument(item)
        except UnsupportedError:
            if self.strict:
                raise
            return f"<{item!r}>"

    def call(self, node: Node) -> str:
        """The right-hand side of a node."""
        name = format_op(node.op) if self.strict else op_name(node.op)
        arguments = [self.argument(a) for a in node.args]
        arguments += [f"{format_keyword(k) if self.strict else k}={self.argument(v)}" for k, v in node.kwargs.items()]
        return f"{name}({', '.join(arguments)})"

    def returned(self, node: Node) -> str:
        """The `return` line of an output node."""
        if len(node.args) == 1 and not node.kwargs:
            returned = self.argument(node.args[0])
        else:
            returned = f"*{self.argument(node.args)}"
        return f"return {returned}{phase_suffix(node)}"

    def line(self, node: Node) -> str:
        """One node, without indentation or comment."""
        try:
            if node.op.kind == "output":
                return self.returned(node)
            # No blanks in front of an argument that stands on lines of its own.
            return f"%{node.name}: {self.type(node.result.type)} = {self.call(node)}".replace(", \n", ",\n")
        except UnsupportedError as error:
            raise UnsupportedError(error.reason, node=node, hint=error.hint) from error

    def parameter(self, node: Node, spec: InputSpec | None) -> str:
        """One placeholder of a header, without its comma."""
        meaning = f" = {spec.kind.value} {json.dumps(spec.target)}" if spec is not None else ""
        grad = " grad" if spec is not None and spec.requires_grad else ""
        default = f" default {self.argument(node.args)}" if node.args else ""
        return f"%{node.name}: {self.type(node.result.type)}{meaning}{grad}{default}{phase_suffix(node)}"


def format_dtype(dtype: torch.dtype) -> str:
    """`f32` for torch.float32; torch's own name for a dtype that has no short one."""
    return SHORT_DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def phase_suffix(node: Node) -> str:
    """` @backward` for a placeholder or output that is not of the forward phase."""
    return "" if node.phase is Phase.FORWARD else f" @{node.phase.value}"


def format_type(kind: Type) -> str:
    """A type as text, devices other than cpu mentioned.

    Raises:
        UnsupportedError: An extent cannot be written exactly.
    """
    return _Writer().type(kind)


def show_type(kind: Type, device: torch.device = _CPU) -> str:
    """A type for people to read: never refused, and `device` need not be mentioned."""
    return _Writer(device, strict=False).type(kind)


def show_argument(item: Any) -> str:
    """An argument for people to read; never refused."""
    return _Writer(strict=False).argument(item)


def format_origin(origin: Origin) -> str:
    """`llama.py:243 model.layers.0 [ulysses]`: file name and line, module path, passes; empty when unknown."""
    parts = [os.path.basename(origin.source)] if origin.source else []
    parts += [origin.module] if origin.module else []
    parts += [f"[{', '.join(origin.passes)}]"] if origin.passes else []
    return " ".join(parts)


def comment(node: Node) -> str:
    """The origin as a trailing comment, with the space in front of it."""
    origin = format_origin(node.origin)
    return f"   # {origin}" if origin else ""


def default_device(graph: Graph) -> torch.device:
    """The device of the first tensor, which the types of a text need not mention."""
    for node in graph.nodes:
        if node.results and isinstance(node.result.type, TensorType):
            return node.result.type.device
    return _CPU


def print_program(program: Program) -> str:
    """The program as text that `parse` reads back.

    Args:
        program: Any program, also one that does not verify.

    Returns:
        The text, ending in a newline. Tensors and objects bound to the program are not part of it.

    Raises:
        UnsupportedError: An attribute, extent or operation cannot be written so that it reads back equal.
    """
    writer = _Writer(default_device(program.graph))
    blocks = ["\n".join(_graph_lines("program", program, program.graph, writer))]
    for name, attribute in program.attrs.items():
        if isinstance(attribute, Graph):
            blocks.append("\n".join(_graph_lines(f"graph {json.dumps(name)}", None, attribute, writer)))
    header = "\n".join(_header(program, writer))
    return "\n\n".join([header, *blocks]) + "\n"


def _header(program: Program, writer: _Writer) -> Iterator[str]:
    yield f"autosp-ir {FORMAT_VERSION}"
    yield f"stage: {program.stage.value}"
    if program.mesh:
        yield f"mesh: {json.dumps(program.mesh)}"
    if program.facts:
        yield f"facts: {json.dumps(sorted(program.facts))}"
    if program.info:
        yield f"info: {_json_info(program.info)}"
    if writer.device != _CPU:
        yield f"device: {json.dumps(str(writer.device))}"
    if writer.symbols:
        yield f"symbols: {json.dumps(symbol_table(program, writer.symbols))}"


def _json_info(info: dict[str, Any]) -> str:
    try:
        return json.dumps(info)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(
            f"program.info cannot be written as JSON: {error}", hint="keep plain JSON data in program.info"
        ) from error


def symbol_table(program: Program, symbols: dict[str, sympy.Symbol]) -> dict[str, Any]:
    """What a reader needs to make the symbols again: assumptions, example value and range."""
    table = {}
    for name in sorted(symbols):
        hint, low, high = symbol_facts(program.fake_mode.shape_env, symbols[name])
        table[name] = {"assume": assumptions_of(symbols[name]), "hint": hint, "range": [low, high]}
    return table


def _graph_lines(title: str, program: Program | None, graph: Graph, writer: _Writer) -> Iterator[str]:
    """A graph; of a nested one (`program` None) no meaning of inputs and outputs is known."""
    specs = {s.name: s for s in program.signature.inputs} if program is not None else {}
    nodes = list(graph.nodes)
    leading = next((i for i, n in enumerate(nodes) if n.op.kind != "placeholder"), len(nodes))
    yield f"{title}("
    for node in nodes[:leading]:
        yield f"{_INDENT}{writer.parameter(node, specs.get(node.name))},{comment(node)}"
    outputs = program.signature.outputs if program is not None else []
    yield ") -> (" if outputs else "):"
    for output in outputs:
        yield f"{_INDENT}{json.dumps(output.name)}: {output.kind.value} {json.dumps(output.target)},"
    if outputs:
        yield "):"
    phase = Phase.FORWARD
    for node in nodes[leading:]:
        if node.op.kind != "output" and node.phase is not phase:
            phase = node.phase
            yield f"  {phase.value}:"
        yield f"{_INDENT}{writer.line(node)}{comment(node)}"


def describe_node(node: Node, context: int = 5) -> str:
    """A node among its neighbours, marked, with the model's source line; for error messages.

    Args:
        node: Any node, also an erased or unfinished one.
        context: Lines of IR on each side.

    Returns:
        Several lines without a final newline. Never raises for a malformed node.
    """
    writer = _Writer(default_device(node.graph), strict=False)
    before, after = _neighbours(node, context)
    lines = [f"    {_shown(writer, n)}" for n in before]
    lines.append(f"--> {_shown(writer, node)}")
    lines += [f"    {_shown(writer, n)}" for n in after]
    return "\n".join([*lines, *_source_lines(node.origin)])


def _shown(writer: _Writer, node: Node) -> str:
    try:
        return f"{writer.line(node)}{comment(node)}"
    except AutoSPError as error:  # a node without a result, while a graph is being built
        return f"{node!r}: {error.reason}"


def _neighbours(node: Node, context: int) -> tuple[list[Node], list[Node]]:
    before: list[Node] = []
    after: list[Node] = []
    if node.erased or node._next is node:
        return before, after
    cursor = node.prev
    while cursor is not None and len(before) < context:
        before.insert(0, cursor)
        cursor = cursor.prev
    cursor = node.next
    while cursor is not None and len(after) < context:
        after.append(cursor)
        cursor = cursor.next
    return before, after


def _source_lines(origin: Origin) -> Iterator[str]:
    if origin.source:
        where = f" in {origin.module}" if origin.module else ""
        yield f"model source: {origin.source}{where}"
        path, _, line = origin.source.rpartition(":")
        code = linecache.getline(path, int(line)).strip() if line.isdecimal() else ""
        if code:
            yield f"    {code}"
    elif origin.module:
        yield f"model module: {origin.module}"
    if origin.passes:
        yield f"made by passes: {' → '.join(origin.passes)}"


__all__ = [
    "FORMAT_VERSION",
    "describe_node",
    "format_dtype",
    "format_type",
    "print_program",
    "show_argument",
    "show_type",
]
