"""Reading the parts of IR text that stand inside a line: extents, types, layouts and attributes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch

from autosp_ir.errors import AutoSPError, ParseError
from autosp_ir.ir.expressions import floor_division, function_by_name
from autosp_ir.ir.graph import Phase, Value
from autosp_ir.ir.lexer import Lexer, Token
from autosp_ir.ir.literals import TORCH_CONSTANTS, find_object
from autosp_ir.ir.ops import OpDef, op_by_name
from autosp_ir.ir.printer import SHORT_DTYPES
from autosp_ir.ir.types import (
    INVARIANT,
    REPLICATE,
    Dim,
    Layout,
    NoneType,
    ObjectType,
    Partial,
    Placement,
    ScalarType,
    Shard,
    TensorType,
    TupleType,
    Type,
    dim_of,
)

_DTYPES = {short: dtype for dtype, short in SHORT_DTYPES.items()}
_CONSTANTS: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "inf": float("inf"),
    "nan": float("nan"),
}


class Reader:
    """A recursive-descent reader over tokens.

    Args:
        text: What to read.
        line: Number of its first line.
        symbols: Symbols by name.
        device: The device of types that mention none.

    Attributes:
        last: The token taken last.
        values: The values defined so far, by name.
    """

    def __init__(
        self,
        text: str,
        line: int = 1,
        symbols: Mapping[str, sympy.Symbol] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.lexer = Lexer(text, line)
        self._stream = self.lexer.tokens()
        self._ahead: list[Token] = []
        self.last = Token("end", "", line, 1)
        self.values: dict[str, Value] = {}
        self.symbols = dict(symbols or {})
        self.device = device or torch.device("cpu")

    def peek(self, offset: int = 0) -> Token:
        """The token `offset` places ahead, without taking it."""
        while len(self._ahead) <= offset:
            self._ahead.append(next(self._stream))
        return self._ahead[offset]

    def take(self) -> Token:
        """The next token."""
        self.last = self.peek()
        self._ahead.pop(0)
        return self.last

    def at(self, text: str, offset: int = 0) -> bool:
        """Whether a mark or name stands next."""
        token = self.peek(offset)
        return token.text == text and token.kind in ("mark", "name")

    def accept(self, text: str) -> bool:
        """Take a mark or name if it stands next."""
        if self.at(text):
            self.take()
            return True
        return False

    def expect(self, text: str) -> Token:
        """Take a mark or name that must stand next."""
        if not self.at(text):
            raise self.error(f"expected `{text}`, found {self.peek()}")
        return self.take()

    def expect_kind(self, kind: str, what: str) -> Token:
        """Take a token of a kind that must stand next."""
        if self.peek().kind != kind:
            raise self.error(f"expected {what}, found {self.peek()}")
        return self.take()

    def string(self, what: str) -> str:
        """A quoted string."""
        token = self.expect_kind("string", what)
        try:
            return str(json.loads(token.text))
        except ValueError as error:
            raise self.error(f"{token.text} is not a valid string", token) from error

    def error(self, reason: str, token: Token | None = None, hint: str | None = None) -> ParseError:
        """The error that refuses the text at a token, by default the next one."""
        at = token or self.peek()
        return ParseError(reason, line=at.line, column=at.column, hint=hint)

    def unknown(self, what: str, token: Token, known: Iterable[str], otherwise: str) -> ParseError:
        """The error that refuses a name, suggesting the closest known one."""
        close = difflib.get_close_matches(token.text.lstrip("%"), list(known), n=1)
        hint = f"did you mean {'%' if token.kind == 'value' else ''}{close[0]}?" if close else otherwise
        return self.error(f"unknown {what} {token}", token, hint)

    def listed(self, closing: str, item: Callable[[], Any]) -> tuple[list[Any], bool]:
        """Items separated by commas up to `closing`, and whether a comma stood behind the last one."""
        items: list[Any] = []
        while not self.at(closing):
            items.append(item())
            if not self.accept(","):
                if not self.at(closing):
                    raise self.error(f"expected `,` or `{closing}`, found {self.peek()}")
                self.take()
                return items, False
        self.take()
        return items, True

    # Extents

    def extent(self) -> Dim:
        """An extent: a number or a symbolic expression."""
        token = self.peek()
        expression = self.expression()
        if not isinstance(expression, sympy.Expr) or (expression.is_number and not expression.is_Integer):
            raise self.error(f"{expression} is no extent", token, "extents are integers or expressions over symbols")
        return dim_of(expression)

    def integer(self) -> int:
        """A plain integer."""
        token = self.peek()
        extent = self.extent()
        if not isinstance(extent, int):
            raise self.error("expected an integer", token)
        return extent

    def expression(self) -> sympy.Basic:
        """A symbolic expression."""
        result = self._product()
        while self.at("+") or self.at("-"):
            sign = 1 if self.take().text == "+" else -1
            result = result + sign * self._product()
        return result

    def _product(self) -> Any:
        result = self._signed()
        while self.at("*") or self.at("/") or self.at("//"):
            mark = self.take().text
            right = self._signed()
            if mark == "*":
                result = result * right
            elif mark == "/":
                result = result / right
            else:
                result = floor_division(result, right)
        return result

    def _signed(self) -> Any:
        if self.accept("-"):
            return -self._signed()
        base = self._atom()
        return base ** self._signed() if self.accept("**") else base

    def _atom(self) -> Any:
        token = self.take()
        if token.kind == "number":
            return sympy.Integer(int(token.text)) if token.text.isdecimal() else sympy.Float(float(token.text))
        if token.text == "(" and token.kind == "mark":
            inner = self.expression()
            self.expect(")")
            return inner
        if token.kind != "name":
            raise self.error(f"expected a number or a symbol, found {token}", token)
        if token.text in ("True", "False"):
            return sympy.true if token.text == "True" else sympy.false
        if self.at("("):
            function = function_by_name(token.text)
            if function is None:
                raise self.error(f"unknown function {token} in an extent", token)
            self.take()
            return function(*self.listed(")", self.expression)[0])
        if token.text not in self.symbols:
            raise self.unknown("symbol", token, self.symbols, "declare it in the `symbols:` line of the header")
        return self.symbols[token.text]

    # Types

    def type(self) -> Type:
        """A type: `f32[2, s0] {sp: S(1)}`, `int(s0)`, `(f32[2], i64[2])`, `None`, `object("GraphModule")`."""
        if self.accept("("):
            return TupleType(tuple(self.listed(")", self.type)[0]))
        token = self.expect_kind("name", "a type")
        if self.at("["):
            return self._tensor(token)
        if token.text == "None":
            return NoneType()
        if token.text in ("int", "float", "bool"):
            return ScalarType(token.text, self._scalar_expression())
        if token.text == "object":
            self.expect("(")
            name = self.string("the name of an object type")
            self.expect(")")
            return ObjectType(name)
        raise self.unknown("type", token, [*_DTYPES, "int", "float", "bool", "None", "object"], "a tensor is f32[2, 3]")

    def _scalar_expression(self) -> sympy.Basic | None:
        if not self.accept("("):
            return None
        expression = self.expression()
        self.expect(")")
        return expression

    def _tensor(self, token: Token) -> TensorType:
        dtype = _DTYPES.get(token.text) or getattr(torch, token.text, None)
        if not isinstance(dtype, torch.dtype):
            raise self.unknown("dtype", token, _DTYPES, "use torch's name of the dtype")
        self.expect("[")
        shape = tuple(self.listed("]", self.extent)[0])
        device = self.device
        if self.at("@") and self.peek(1).text not in list(Phase):
            self.take()
            device = self._device()
        return TensorType(shape, dtype, device, self.layout() if self.at("{") else Layout())

    def _device(self) -> torch.device:
        token = self.expect_kind("name", "a device")
        index = f":{self.integer()}" if self.accept(":") else ""
        return self._made_device(f"{token.text}{index}", token)

    def _made_device(self, text: str, token: Token) -> torch.device:
        try:
            return torch.device(text)
        except RuntimeError as error:
            raise self.error(f"{text!r} is no device", token, "devices are written cpu, cuda:0, …") from error

    def layout(self) -> Layout:
        """A layout: `{sp: S(1), tp: P}`."""
        self.expect("{")
        return Layout(dict(self.listed("}", self._axis_placement)[0]))

    def _axis_placement(self) -> tuple[str, Placement]:
        axis = self.expect_kind("name", "a mesh axis").text
        self.expect(":")
        return axis, self._placement()

    def _placement(self) -> Placement:
        token = self.expect_kind("name", "a placement: I, R, S(dim) or P")
        if token.text == "I":
            return INVARIANT
        if token.text == "R":
            return REPLICATE
        if token.text == "P":
            if not self.accept("("):
                return Partial()
            operation = self.expect_kind("name", "a reduction").text
            self.expect(")")
            return Partial(operation)
        if token.text != "S":
            raise self.unknown("placement", token, ["I", "R", "S", "P"], "placements are I, R, S(dim) and P")
        self.expect("(")
        dim = self.integer()
        outer = self.extent() if self.accept(",") else 1
        self.expect(")")
        return Shard(dim, outer)

    # Attributes

    def argument(self) -> Any:
        """An argument: a value defined before, or a literal."""
        token = self.take()
        if token.kind == "value":
            return self._value(token)
        if token.kind == "string":
            self._ahead.insert(0, token)
            text = self.string("a string")
            # As in Python, strings in a row are one: a text of several lines stands in several.
            while self.peek().kind == "string":
                text += self.string("a string")
            return text
        if token.kind == "number" or (token.text == "-" and token.kind == "mark"):
            return self._number(token)
        if token.text == "[":
            return self.listed("]", self.argument)[0]
        if token.text == "{":
            return dict(self.listed("}", self._pair)[0])
        if token.text == "...":
            return ...
        if token.text == "(" and token.kind == "mark":
            items, comma = self.listed(")", self.argument)
            if len(items) == 1 and not comma:
                raise self.error("a tuple of one item needs a comma behind it", token)
            return tuple(items)
        if token.kind == "name":
            return self._named(token)
        raise self.error(f"expected a value or a literal, found {token}", token)

    def _value(self, token: Token) -> Value:
        if token.text[1:] not in self.values:
            raise self.unknown("value", token, self.values, "values are defined before they are used")
        return self.values[token.text[1:]]

    def _number(self, token: Token) -> int | float:
        negative = token.text == "-"
        if negative:
            token = self.take()
        if token.text in ("inf", "nan"):
            number: int | float = float(token.text)
        elif token.kind != "number":
            raise self.error(f"expected a number, found {token}", token)
        else:
            number = int(token.text) if token.text.isdecimal() else float(token.text)
        return -number if negative else number

    def _pair(self) -> tuple[Any, Any]:
        token = self.peek()
        key = self.argument()
        try:
            hash(key)
        except TypeError as error:
            raise self.error("a list or dict cannot be the key of a dict", token) from error
        self.expect(":")
        return key, self.argument()

    def _named(self, token: Token) -> Any:
        if token.text in _CONSTANTS:
            return _CONSTANTS[token.text]
        if token.text.startswith("torch."):
            found = getattr(torch, token.text.removeprefix("torch."), None)
            if isinstance(found, TORCH_CONSTANTS):
                return found
            raise self.error(f"{token} is no dtype, layout or memory format of torch", token)
        maker = {
            "slice": self._slice,
            "complex": self._complex,
            "device": self._device_literal,
            "op": self._op_literal,
            "object": self._object_literal,
        }.get(token.text)
        if maker is None:
            raise self.error(f"expected a value or a literal, found {token}", token, "values are written %name")
        self.expect("(")
        return maker(token, self.listed(")", self.argument)[0])

    def _slice(self, token: Token, items: list[Any]) -> slice:
        if len(items) != 3:
            raise self.error("slice takes start, stop and step", token)
        return slice(*items)

    def _complex(self, token: Token, items: list[Any]) -> complex:
        if len(items) != 2 or not all(isinstance(i, float) for i in items):
            raise self.error("complex takes two floats", token)
        return complex(*items)

    def _text_of(self, token: Token, items: list[Any]) -> str:
        if len(items) != 1 or not isinstance(items[0], str):
            raise self.error(f"{token.text} takes one string", token)
        return items[0]

    def _device_literal(self, token: Token, items: list[Any]) -> torch.device:
        return self._made_device(self._text_of(token, items), token)

    def _op_literal(self, token: Token, items: list[Any]) -> Any:
        return self.op(self._text_of(token, items), token).target

    def _object_literal(self, token: Token, items: list[Any]) -> Any:
        path = self._text_of(token, items)
        found = find_object(path)
        if found is None:
            module = path.partition(":")[0]
            raise self.error(
                f"there is no object {path!r}", token, f"import {module} before parsing; text imports no code"
            )
        return found

    def op(self, name: str, token: Token) -> OpDef:
        """The operation of a name."""
        try:
            return op_by_name(name)
        except AutoSPError as error:
            raise self.error(error.reason, token, error.hint) from error


__all__ = ["Reader"]
