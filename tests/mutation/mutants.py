"""Small ways to break code that decides about layouts: found in the syntax tree, applied in the running process."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

from autosp_ir.ir.types import INVARIANT, PARTIAL

_REFUSALS = ("fail", "refuse", "require", "check", "_refuse", "_require", "_check", "_aligned")
_PLACEMENTS = {"PARTIAL": "WHOLE", "WHOLE": "PARTIAL", "INVARIANT": "PARTIAL", "REPLICATE": "INVARIANT"}
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_NAMES = {"WHOLE": INVARIANT, "PARTIAL": PARTIAL, "INVARIANT": INVARIANT}
_OUTCOMES = ("Outcome", "Placement", "Shard")
SEMANTIC = ("check removed", "call removed", "placement", "dimension", "outer factor", "answer")
"""Kinds that take a whole check or answer away; the others change part of a condition or of arithmetic."""


@dataclass(frozen=True)
class Mutant:
    """One change to one function.

    Args:
        module: Dotted name.
        function: Qualified name in it.
        kind: What is changed.
        text: The changed source line, shortened.
        count: Tells equal changes of one function apart.
        position: Among the changes of the function.
    """

    module: str
    function: str
    kind: str
    text: str
    count: int
    position: int

    def __str__(self) -> str:
        again = f" #{self.count}" if self.count else ""
        return f"{self.module}.{self.function}: {self.kind}: {self.text}{again}"


@dataclass
class _Change:
    kind: str
    text: str
    apply: Callable[[], None]


_Function = ast.FunctionDef


def mutants_of(module: str) -> list[Mutant]:
    """Every mutant of the functions and methods of a module."""
    found = []
    for name, function in _functions(_tree(module)):
        seen: Counter[tuple[str, str]] = Counter()
        for position, change in enumerate(_changes(function)):
            key = (change.kind, change.text)
            found.append(Mutant(module, name, change.kind, change.text, seen[key], position))
            seen[key] += 1
    return found


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """Break a function for the length of the context; whoever holds the function sees the change."""
    module = importlib.import_module(mutant.module)
    tree = _tree(mutant.module)
    function = dict(_functions(tree))[mutant.function]
    _changes(function)[mutant.position].apply()
    broken = _code(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), mutant.function)
    target = function_of(module, mutant.function)
    for name, placement in _NAMES.items():
        module.__dict__.setdefault(name, placement)
    before = target.__code__
    # What a cache has kept is the answer of the function as it was.
    forget = _cache_of(module, mutant.function)
    target.__code__ = broken
    forget()
    try:
        yield
    finally:
        target.__code__ = before
        forget()


def function_of(module: ModuleType, qualified: str) -> FunctionType:
    """The plain function behind decorators and properties."""
    found: Any = module
    for part in qualified.split("."):
        found = inspect.getattr_static(found, part)
    found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    plain = inspect.unwrap(found)
    if not isinstance(plain, FunctionType):
        raise TypeError(f"{qualified} is no plain function")
    return plain


def _cache_of(module: ModuleType, qualified: str) -> Callable[[], object]:
    """Clears what `functools.lru_cache` keeps of a function; does nothing for one without a cache."""
    found: Any = module
    for part in qualified.split("."):
        found = inspect.getattr_static(found, part)
    clear: Callable[[], object] = getattr(found, "cache_clear", lambda: None)
    return clear


def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(importlib.import_module(module)))


def _functions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, _Function]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not any(_called(d) == "overload" for d in node.decorator_list):
            yield f"{prefix}{node.name}", node


def _code(code: CodeType, qualified: str) -> CodeType:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_qualname == qualified:
                return constant
            if qualified.startswith(f"{constant.co_qualname}."):
                return _code(constant, qualified)
    raise LookupError(qualified)


def _changes(function: _Function) -> list[_Change]:
    return [change for statement in function.body for change in _within(statement, function, function.body)]


def _within(node: ast.AST, function: _Function, owner: Any) -> Iterator[_Change]:
    """Changes of a node that stands in a list of its parent, or in a field, and of what it holds."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.FunctionDef) or _is_docstring(node):
        if isinstance(node, ast.Raise) and isinstance(owner, list) and node.exc is not None:
            yield _change("check removed", node, _put(owner, node, ast.Pass()))
        return
    yield from _own(node, function, owner)
    if isinstance(node, ast.Call) and _called(node.func) == "fail":
        return
    for name, value in ast.iter_fields(node):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST) and name not in ("annotation", "returns"):
                yield from _within(item, function, value if isinstance(value, list) else (node, name))


def _own(node: ast.AST, function: _Function, owner: Any) -> Iterator[_Change]:
    if isinstance(node, ast.If) and _refuses(node.body):
        yield _change("check removed", node.test, _put((node, "test"), node.test, ast.Constant(False)))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        name = _called(node.value.func)
        if name.startswith(_REFUSALS) and name != "fail":
            yield _change("call removed", node, _put(owner, node, ast.Pass()))
    elif isinstance(node, ast.Return):
        yield from _answers(node, function)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in _PLACEMENTS:
        yield _change("placement", node, _put(owner, node, ast.Name(_PLACEMENTS[node.id], ast.Load())))
    elif isinstance(node, ast.Call):
        yield from _calls(node, owner)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        yield _change("comparison", node, _put(node.ops, node.ops[0], _COMPARISONS[type(node.ops[0])]()))
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield _change("and/or", node, _put((node, "op"), node.op, other))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _change("not", node, _put(owner, node, node.operand))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        turned = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        yield _change("plus/minus", node, _put((node, "op"), node.op, turned))


def _answers(node: ast.Return, function: _Function) -> Iterator[_Change]:
    """A rule that answers a placement says that the value is whole instead; one that refuses does not refuse."""
    returns = function.returns
    if node.value is None or not isinstance(returns, ast.Name) or returns.id not in _OUTCOMES:
        return
    if isinstance(node.value, ast.Name) and node.value.id in _PLACEMENTS:
        return
    kind = "check removed" if isinstance(node.value, ast.Call) and _called(node.value.func) == "fail" else "answer"
    yield _change(kind, node, _put((node, "value"), node.value, ast.Name("WHOLE", ast.Load())))


def _calls(node: ast.Call, owner: Any) -> Iterator[_Change]:
    name = _called(node.func)
    if name == "Shard" and node.args:
        moved = ast.BinOp(node.args[0], ast.Add(), ast.Constant(1))
        yield _change("dimension", node, _put(node.args, node.args[0], moved))
        if len(node.args) > 1:
            yield _change("outer factor", node, _put(node.args, node.args[1], ast.Constant(1)))
    elif name in ("any", "all") and isinstance(node.func, ast.Name):
        other = ast.Name("all" if name == "any" else "any", ast.Load())
        yield _change("any/all", node, _put((node, "func"), node.func, other))


def _change(kind: str, node: ast.AST, apply: Callable[[], None]) -> _Change:
    text = " ".join(ast.unparse(node).split())
    return _Change(kind, text[:100], apply)


def _put(owner: Any, old: ast.AST, new: ast.AST) -> Callable[[], None]:
    def apply() -> None:
        if isinstance(owner, list):
            owner[next(i for i, item in enumerate(owner) if item is old)] = new
        else:
            setattr(owner[0], owner[1], new)

    return apply


def _refuses(body: list[ast.stmt]) -> bool:
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _called(node.func) in ("fail", "refuse")):
                return True
    return False


def _called(node: ast.AST) -> str:
    if isinstance(node, ast.Call):
        return _called(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
