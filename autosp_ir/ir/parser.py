"""IR text back to programs; the grammar is that of `printer`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from autosp_ir._torch_compat import declare_symbol
from autosp_ir.errors import ParseError
from autosp_ir.ir.expressions import ASSUMPTIONS, make_symbol
from autosp_ir.ir.graph import Graph, Origin, Phase
from autosp_ir.ir.lexer import Token
from autosp_ir.ir.ops import OpDef
from autosp_ir.ir.printer import FORMAT_VERSION
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature, Stage
from autosp_ir.ir.reader import Reader
from autosp_ir.ir.types import Type

_VERSION = re.compile(r"autosp-ir (\d+)\s*$")
_HEADER = re.compile(r"(\w+):\s*(.*?)\s*$")
_ORIGIN = re.compile(r"(?:(?P<source>\S[^\[\]]*?:\d+)(?:\s+|$))?(?P<module>[^\s\[\]]+)?\s*(?:\[(?P<passes>[^\]]+)\])?$")
_HEADER_KEYS = ("stage", "mesh", "facts", "info", "device", "symbols")


def parse(text: str) -> Program:
    """Read a program from its text.

    Args:
        text: What `print_program` wrote, or a person.

    Returns:
        An unbound program: `program.bind(module)` gives it tensors. It is not verified.

    Raises:
        ParseError: The text is malformed; carries line and column, and says what was expected.
    """
    header, body, line = _read_header(text)
    symbols = {name: make_symbol(name, facts["assume"]) for name, facts in header["symbols"].items()}
    parser = _Parser(body, line, symbols, torch.device(header["device"]))
    parser.expect("program")
    signature = Signature()
    graph = parser.graph(signature)
    program = Program(graph, signature, Stage(header["stage"]), header["mesh"])
    program.facts = set(header["facts"])
    program.info = header["info"]
    while parser.at("graph"):
        parser.take()
        name = parser.string("the name of the nested graph")
        program.attrs[name] = parser.graph(None)
    if parser.peek().kind != "end":
        raise parser.error(f"expected `graph` or the end of the text, found {parser.peek()}")
    declare_symbols(program, header["symbols"], symbols)
    return program


def declare_symbols(program: Program, table: Mapping[str, Any], symbols: Mapping[str, sympy.Symbol]) -> None:
    """Make the symbols of a header known to the program's fake mode."""
    for name, facts in table.items():
        declare_symbol(program.fake_mode.shape_env, symbols[name], facts["hint"], *facts["range"])


def parse_expression(text: str, symbols: Mapping[str, sympy.Symbol]) -> sympy.Basic:
    """Read one symbolic expression."""
    return Reader(text, symbols=symbols).expression()


def _read_header(text: str) -> tuple[dict[str, Any], str, int]:
    """The header's entries, the text behind it and the number of its first line."""
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), 0)
    _check_version(lines[first], first + 1)
    header: dict[str, Any] = {"mesh": {}, "facts": [], "info": {}, "device": "cpu", "symbols": {}}
    for number, line in enumerate(lines[first + 1 :], first + 2):
        if line.startswith("program"):
            if "stage" not in header:
                raise ParseError("the header has no `stage:` line", line=number, column=1)
            return header, "\n".join(lines[number - 1 :]), number
        if line.strip() and not line.lstrip().startswith("#"):
            key, value = _header_entry(line, number)
            header[key] = value
    raise ParseError("expected `program(` behind the header", line=len(lines), column=1)


def _check_version(line: str, number: int) -> None:
    match = _VERSION.match(line)
    if match is None:
        raise ParseError(
            f"expected `autosp-ir {FORMAT_VERSION}`, the format version, on the first line", line=number, column=1
        )
    if int(match.group(1)) > FORMAT_VERSION:
        raise ParseError(
            f"the text has format version {match.group(1)}, this reader knows up to {FORMAT_VERSION}",
            line=number,
            column=match.start(1) + 1,
            hint="upgrade autosp_ir, or print the program again with this version",
        )


def _header_entry(line: str, number: int) -> tuple[str, Any]:
    match = _HEADER.match(line)
    key = match.group(1) if match is not None else line.strip()
    if match is None or key not in _HEADER_KEYS:
        close = difflib.get_close_matches(key, _HEADER_KEYS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"header lines are {', '.join(_HEADER_KEYS)}"
        raise ParseError("expected a header line or `program(`", line=number, column=1, hint=hint)
    column, text = match.start(2) + 1, match.group(2)
    if key == "stage":
        return key, _stage(text, number, column)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ParseError(f"{key} is not valid JSON: {error.msg}", line=number, column=column + error.pos) from error
    _check_entry(key, value, number, column)
    return key, value


def _stage(text: str, number: int, column: int) -> str:
    if text not in list(Stage):
        close = difflib.get_close_matches(text, list(Stage), n=1)
        hint = f"did you mean {close[0]}?" if close else f"stages are {', '.join(Stage)}"
        raise ParseError(f"unknown stage {text!r}", line=number, column=column, hint=hint)
    return text


def _check_entry(key: str, value: Any, number: int, column: int) -> None:
    holds, expected = _HEADER_RULES[key]
    if not holds(value):
        raise ParseError(f"{key} must be {expected}", line=number, column=column)


def _is_mesh(value: Any) -> bool:
    return isinstance(value, dict) and all(type(size) is int and size > 0 for size in value.values())


def _is_device(value: Any) -> bool:
    try:
        return isinstance(value, str) and torch.device(value) is not None
    except RuntimeError:
        return False


def _are_symbols(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_symbol_entry(facts) for facts in value.values())


def _is_symbol_entry(facts: Any) -> bool:
    if not isinstance(facts, dict) or set(facts) != {"assume", "hint", "range"}:
        return False
    assumed, bounds = facts["assume"], facts["range"]
    numbers = [facts["hint"], *bounds] if isinstance(bounds, list) and len(bounds) == 2 else [""]
    known = isinstance(assumed, list) and sorted(map(str, assumed)) in [sorted(a) for a in ASSUMPTIONS]
    return known and all(n is None or type(n) is int for n in numbers)


_HEADER_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mesh": (_is_mesh, 'axis sizes by name, such as {"sp": 4}'),
    "facts": (lambda v: isinstance(v, list) and all(isinstance(fact, str) for fact in v), "a list of names"),
    "info": (lambda v: isinstance(v, dict), "a JSON object"),
    "device": (_is_device, 'a device in quotes, such as "cuda:0"'),
    "symbols": (
        _are_symbols,
        'entries such as {"s0": {"assume": ["integer", "positive"], "hint": 64, "range": [2, null]}}',
    ),
}


class _Parser(Reader):
    """Reads graphs."""

    def graph(self, signature: Signature | None) -> Graph:
        """Parameters, outputs and body; fills `signature` when given."""
        graph = Graph()
        self.values = {}
        self.expect("(")
        self.listed(")", lambda: self._parameter(graph, signature))
        if self.accept("->"):
            self.expect("(")
            outputs, _ = self.listed(")", self._output)
            if signature is not None:
                signature.outputs.extend(outputs)
        self.expect(":")
        self._line_end()
        phase = Phase.FORWARD
        while not self.at("return"):
            if self.peek().kind == "name":
                phase = self._phase_marker()
            else:
                self._node(graph, phase)
        self._return(graph)
        return graph

    def _line_end(self) -> None:
        if self.peek().kind not in ("newline", "end"):
            raise self.error(f"expected the end of the line, found {self.peek()}")
        self.take()

    def _origin(self) -> Origin:
        line = self.last.line
        self.peek(1 if self.at(",") else 0)  # reads past the comment that stands behind the line
        return parse_origin(self.lexer.comments.get(line, ""))

    def _definition(self) -> Token:
        token = self.expect_kind("value", "a value such as %x")
        if token.text[1:] in self.values:
            raise self.error(f"{token.text} is defined twice", token)
        self.expect(":")
        return token

    def _parameter(self, graph: Graph, signature: Signature | None) -> None:
        token = self._definition()
        kind = self.type()
        spec = self._meaning(token.text[1:]) if self.accept("=") else None
        if spec is not None and signature is not None:
            signature.inputs.append(spec)
        default = self._tuple() if self.accept("default") else ()
        self._create(graph, "placeholder", default, {}, token, kind, self._phase())

    def _create(
        self, graph: Graph, op: OpDef | str, args: Any, kwargs: Any, token: Token, kind: Type, phase: Phase
    ) -> None:
        name = token.text[1:]
        node = graph.create(op, args, kwargs, name=name, type=kind, phase=phase, origin=self._origin())
        self.values[name] = node.result

    def _tuple(self) -> tuple[Any, ...]:
        token = self.peek()
        items = self.argument()
        if not isinstance(items, tuple):
            raise self.error("expected a tuple", token)
        return items

    def _meaning(self, name: str) -> InputSpec:
        token = self.expect_kind("name", "what the input is: parameter, buffer, constant, input or tangent")
        if token.text not in list(InputKind):
            raise self.unknown("kind of input", token, list(InputKind), f"kinds are {', '.join(InputKind)}")
        target = self.string("the input's own name in quotes")
        return InputSpec(name, InputKind(token.text), target, self.accept("grad"))

    def _output(self) -> OutputSpec:
        name = self.string("the output's name in quotes")
        self.expect(":")
        token = self.expect_kind("name", "what the output is: output, gradient or mutation")
        if token.text not in list(OutputKind):
            raise self.unknown("kind of output", token, list(OutputKind), f"kinds are {', '.join(OutputKind)}")
        return OutputSpec(name, OutputKind(token.text), self.string("the output's target in quotes"))

    def _phase(self) -> Phase:
        if not self.accept("@"):
            return Phase.FORWARD
        token = self.expect_kind("name", "a phase")
        if token.text not in list(Phase):
            raise self.unknown("phase", token, list(Phase), f"phases are {', '.join(Phase)}")
        return Phase(token.text)

    def _phase_marker(self) -> Phase:
        if self.peek().text not in list(Phase):
            known, otherwise = [*Phase, "return"], "a line of the body is a node `%x: …`, `backward:` or `return …`"
            raise self.unknown("statement", self.peek(), known, otherwise)
        phase = Phase(self.take().text)
        self.expect(":")
        self._line_end()
        return phase

    def _node(self, graph: Graph, phase: Phase) -> None:
        token = self._definition()
        kind = self.type()
        self.expect("=")
        name = self.take()
        if name.kind not in ("name", "quoted"):
            raise self.error(f"expected the name of an operation, found {name}", name)
        op = self.op(name.text.strip("`"), name)
        if op.kind == "output":
            raise self.error("the output is written `return (…)`", name)
        self.expect("(")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        self.listed(")", lambda: self._call_argument(args, kwargs))
        self._create(graph, op, tuple(args), kwargs, token, kind, phase)
        self._line_end()

    def _call_argument(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        token = self.peek()
        if token.kind == "name" and self.at("=", 1):
            self.take()
            self.take()
            if token.text in kwargs:
                raise self.error(f"the argument {token.text} is given twice", token)
            kwargs[token.text] = self.argument()
            return
        if kwargs:
            raise self.error("a positional argument stands behind a keyword argument", token)
        args.append(self.argument())

    def _return(self, graph: Graph) -> None:
        self.expect("return")
        args = self._tuple() if self.accept("*") else (self.argument(),)
        phase = self._phase()
        graph.create("output", args, phase=phase, origin=self._origin())
        self._line_end()


def parse_origin(comment: str) -> Origin:
    """The origin that a comment states; an empty one for any other comment."""
    match = _ORIGIN.match(comment)
    if match is None:
        return Origin()
    passes = tuple(p.strip() for p in match["passes"].split(",")) if match["passes"] else ()
    return Origin(match["source"], match["module"], passes)


__all__ = ["declare_symbols", "parse", "parse_expression", "parse_origin"]
