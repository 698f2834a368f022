"""Symbolic extents as text: one notation for printing and parsing, checked to round trip before it is printed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanFunction

from autosp_ir._torch_compat import symbolic_functions
from autosp_ir.errors import UnsupportedError

_SUM, _PRODUCT, _POWER, _ATOM = range(4)

ASSUMPTIONS: tuple[tuple[str, ...], ...] = (
    ("integer", "positive"),
    ("integer",),
    ("integer", "nonnegative"),
    ("real",),
    ("positive", "real"),
    ("nonnegative", "real"),
    (),
)
"""The sets of assumptions that torch's symbols carry; two symbols are equal only when theirs are."""


def format_expression(expr: Any) -> str:
    """Render an extent: `s0`, `2*s0 + 1`, `s0//4`, `Max(1, s0)`.

    Args:
        expr: A number, sympy expression or sympy condition.

    Raises:
        UnsupportedError: The notation cannot express it exactly.
    """
    return _checked(expr) if isinstance(expr, sympy.Basic) else repr(expr)


@functools.lru_cache(maxsize=4096)
def _checked(expr: sympy.Basic) -> str:
    from autosp_ir.ir.parser import parse_expression  # the parser builds on this module

    text, _ = _format(expr)
    symbols = {s.name: s for s in expr.free_symbols if isinstance(s, sympy.Symbol)}
    if len(symbols) != len(expr.free_symbols) or parse_expression(text, symbols) != expr:
        raise UnsupportedError(
            f"the symbolic extent {sympy.srepr(expr)} cannot be written as text exactly",
            hint="simplify the extent, or capture with a static length (dynamic=False)",
        )
    return text


def assumptions_of(symbol: sympy.Symbol) -> list[str]:
    """The assumptions a symbol was made with.

    Raises:
        UnsupportedError: They are none that torch's symbols carry.
    """
    for names in ASSUMPTIONS:
        if make_symbol(symbol.name, names) == symbol:
            return list(names)
    raise UnsupportedError(
        f"the symbol {symbol.name} carries assumptions that the text cannot express: {symbol.assumptions0}",
        hint="make symbols through torch's ShapeEnv",
    )


def make_symbol(name: str, assumptions: tuple[str, ...] | list[str]) -> sympy.Symbol:
    """A symbol with a name and a set of assumptions."""
    return sympy.Symbol(name, **dict.fromkeys(assumptions, True))


def function_by_name(name: str) -> Any | None:
    """The function or relation a call in an extent means: torch's own first, then sympy's; None when unknown."""
    found = symbolic_functions().get(name)
    if found is not None:
        return found
    found = getattr(sympy, name, None)
    known = (sympy.Function, Relational, BooleanFunction)
    return found if isinstance(found, type) and issubclass(found, known) else None


def floor_division(left: Any, right: Any) -> Any:
    """`left // right` as torch's symbolic shapes write it."""
    divide: Callable[[Any, Any], Any] = symbolic_functions()["FloorDiv"]
    return divide(left, right)


def _format(expr: sympy.Basic) -> tuple[str, int]:
    """The text and how tightly it binds."""
    if isinstance(expr, sympy.Symbol):
        return expr.name, _ATOM
    if isinstance(expr, sympy.Integer):
        return (str(expr), _ATOM) if expr >= 0 else (str(expr), _PRODUCT)
    if isinstance(expr, sympy.Rational):
        return f"{expr.p}/{expr.q}", _PRODUCT
    if isinstance(expr, sympy.Float):
        return repr(float(expr)), _PRODUCT
    if isinstance(expr, sympy.Add):
        return _sum(expr), _SUM
    if isinstance(expr, sympy.Mul):
        return _product(expr), _PRODUCT
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
        return f"{_tight(expr.base, _ATOM)}**{expr.exp}", _POWER
    if expr.func.__name__ == "FloorDiv":
        base, divisor = expr.args
        return f"{_tight(base, _PRODUCT)}//{_tight(divisor, _ATOM)}", _PRODUCT
    if expr in (sympy.true, sympy.false):
        return str(bool(expr)), _ATOM
    arguments = ", ".join(_format(a)[0] for a in expr.args)
    return f"{expr.func.__name__}({arguments})", _ATOM


def _tight(expr: sympy.Basic, level: int) -> str:
    text, binds = _format(expr)
    return text if binds >= level else f"({text})"


def _sum(expr: sympy.Add) -> str:
    # Positive terms first: "s0 - 1" reads better than "-1 + s0".
    terms = sorted(expr.args, key=lambda t: (t.is_number, t.could_extract_minus_sign(), str(t)))
    text = _tight(terms[0], _PRODUCT)
    for term in terms[1:]:
        negative = term.could_extract_minus_sign()
        text += f" - {_tight(-term, _PRODUCT)}" if negative else f" + {_tight(term, _PRODUCT)}"
    return text


def _product(expr: sympy.Mul) -> str:
    numerator, denominator = expr.as_numer_denom()
    if denominator != 1:
        return f"{_tight(numerator, _PRODUCT)}/{_tight(denominator, _ATOM)}"
    # A floor division inside a product needs its parentheses: a*(b//c) is not a*b//c.
    factors = [_tight(f, _POWER) if not f.is_number else str(f) for f in expr.args]
    return "*".join(factors)


__all__ = ["assumptions_of", "format_expression", "function_by_name", "make_symbol"]
