"""Finding passes by name: those registered in this process and those of installed packages.

A package lists its passes under the entry point group `autosp_ir.passes`. They are imported when first asked for; one
that fails to import takes no other down, and is reported when it is the one asked for.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol, TypeVar, overload

from pydantic import BaseModel, create_model

from autosp_ir.errors import PassError, PipelineError
from autosp_ir.ir.program import Program, Stage
from autosp_ir.pipeline.base import Pass, PassContext, StageLike
from autosp_ir.pipeline.options import read_options, render_pass
from autosp_ir.pipeline.rule_pass import RulePass
from autosp_ir.pipeline.spec import closest, excerpt, parse_spec
from autosp_ir.rewrite.rules import Rule

ENTRY_POINT_GROUP = "autosp_ir.passes"

PassClass = TypeVar("PassClass", bound=type[Pass])


class Registry:
    """Passes by name.

    Args:
        discover: Lists the entry points of installed packages.
    """

    def __init__(self, discover: Callable[[], Sequence[EntryPoint]] = lambda: ()) -> None:
        self._discover = discover
        self._passes: dict[str, type[Pass]] = {}
        self._entries: dict[str, list[EntryPoint]] | None = None
        self._failures: dict[str, str] = {}
        self._warned: set[str] = set()

    def add(self, pass_class: type[Pass]) -> None:
        """Register a pass under its name.

        Raises:
            PipelineError: Another pass has that name.
        """
        name = pass_class.name
        known = self._passes.get(name)
        if known is not None and known is not pass_class and not _same_notebook_cell(known, pass_class):
            raise PipelineError(
                f"two passes are called {name!r}: {_where(known)} and {_where(pass_class)}",
                hint="rename one of them; a module imported under two names also does this",
            )
        self._passes[name] = pass_class

    def names(self) -> list[str]:
        """Every name that can be asked for, including passes that will fail to import."""
        return sorted({*self._passes, *self._entry_points()})

    def get(self, name: str) -> type[Pass]:
        """The pass called `name`.

        Raises:
            PipelineError: There is none (with a suggestion), it fails to import, or two packages offer it.
        """
        if name in self._entry_points():
            self._load(name)
        if name in self._failures:
            raise PipelineError(
                f"the pass {name!r} cannot be loaded: {self._failures[name]}",
                hint="repair or uninstall the package that offers it; the other passes are not affected",
            )
        if name not in self._passes:
            raise PipelineError(f"no pass is called {name!r}", hint=closest(name, self.names()))
        return self._passes[name]

    def loaded(self) -> dict[str, type[Pass]]:
        """Every pass that can be loaded, by name; a warning names each that cannot, once.

        Raises:
            PipelineError: Two passes have one name.
        """
        for name in self._entry_points():
            self._load(name)
        for name in sorted(self._failures.keys() - self._warned):
            self._warned.add(name)
            warnings.warn(f"the pass {name!r} cannot be loaded: {self._failures[name]}", RuntimeWarning, stacklevel=3)
        return {name: self._passes[name] for name in sorted(self._passes) if name not in self._failures}

    def failures(self) -> dict[str, str]:
        """Why each pass of an installed package cannot be loaded, by name."""
        for name in self._entry_points():
            self._load(name)
        return dict(sorted(self._failures.items()))

    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        if self._entries is None:
            self._entries = {}
            for entry in self._discover():
                offered = self._entries.setdefault(entry.name, [])
                # An editable install may list one entry twice.
                if all(entry.value != other.value for other in offered):
                    offered.append(entry)
        return self._entries

    def _load(self, name: str) -> None:
        offered = self._entry_points()[name]
        if len(offered) > 1:
            raise PipelineError(
                f"two packages offer a pass called {name!r}: {' and '.join(e.value for e in offered)}",
                hint="uninstall one of them",
            )
        if name in self._failures:
            return
        try:
            found = offered[0].load()
        except Exception as error:  # a third party's import may fail in any way
            self._failures[name] = f"{offered[0].value}: {type(error).__name__}: {error}"
            return
        if not (isinstance(found, type) and issubclass(found, Pass)):
            self._failures[name] = f"{offered[0].value} is {found!r}, not a subclass of autosp_ir.Pass"
        elif found.name != name:
            self._failures[name] = f"{offered[0].value} calls itself {found.name!r}, not {name!r}"
        else:
            self.add(found)


def _same_notebook_cell(known: type[Pass], new: type[Pass]) -> bool:
    """Whether `new` is `known` defined again, as when a notebook cell is run twice."""
    return known.__module__ == new.__module__ == "__main__" and known.__qualname__ == new.__qualname__


def _where(pass_class: type[Pass]) -> str:
    return f"{pass_class.__module__}.{pass_class.__qualname__}"


REGISTRY = Registry(lambda: tuple(entry_points(group=ENTRY_POINT_GROUP)))


def registered_passes() -> dict[str, type[Pass]]:
    """Every pass that can be loaded, by name.

    Raises:
        PipelineError: Two passes have one name.
    """
    return REGISTRY.loaded()


def failed_passes() -> dict[str, str]:
    """Why each pass of an installed package cannot be loaded, by name."""
    return REGISTRY.failures()


def get_pass(name: str) -> type[Pass]:
    """The pass called `name`.

    Raises:
        PipelineError: There is none (with a suggestion), or it cannot be loaded (with the reason).
    """
    return REGISTRY.get(name)


def parse_pipeline(text: str, registry: Registry = REGISTRY) -> list[Pass]:
    """Build passes from pipeline text such as `canonicalize,ulysses{fuse=qkv}`.

    Raises:
        ParseError: The text is malformed; it names line and column.
        PipelineError: A pass or option is unknown, or a value does not fit; it shows where.
    """
    passes = []
    for element in parse_spec(text):
        try:
            pass_class = registry.get(element.name)
        except PipelineError as error:
            where = excerpt(text, element.position)
            raise PipelineError(f"{error.reason} at {where}", hint=error.hint) from error.__cause__
        options = read_options(pass_class.name, pass_class.Options, element.options, text, element.position)
        passes.append(pass_class(options))
    return passes


def format_pipeline(passes: Sequence[Pass]) -> str:
    """Pipeline text that `parse_pipeline` reads back to equal passes.

    Raises:
        PipelineError: An option's value cannot be written as text.
    """
    return ",".join(render_pass(p.name, p.options, strict=True) for p in passes)


class FunctionPass(Pass):
    """A pass made from a function; its keyword-only parameters are the options."""

    function: ClassVar[Callable[..., Any]]

    def run(self, program: Program, ctx: PassContext) -> None:
        """Call the function."""
        fields = {name: getattr(self.options, name) for name in type(self.options).model_fields}
        returned = type(self).function(program, ctx, **fields)
        if returned is not None:
            raise PassError(
                f"the pass function returned {type(returned).__name__}",
                hint="rewrite the program in place and return nothing",
            )


class PassDecorator(Protocol):
    """What `register_pass("my-pass")` returns: classes stay as they are, functions become passes."""

    @overload
    def __call__(self, defined: PassClass, /) -> PassClass: ...
    @overload
    def __call__(self, defined: Callable[..., None], /) -> type[FunctionPass]: ...


@overload
def register_pass(name: PassClass, /) -> PassClass: ...
@overload
def register_pass(
    name: str | None = None,
    /,
    *,
    stage: StageLike | Sequence[StageLike] | None = None,
    produces: StageLike | None = None,
    requires: AbstractSet[str] | None = None,
    provides: AbstractSet[str] | None = None,
    removes: AbstractSet[str] | None = None,
    conflicts: AbstractSet[str] | None = None,
    registry: Registry = REGISTRY,
) -> PassDecorator: ...
@overload
def register_pass(
    name: str,
    /,
    *,
    rules: Sequence[Rule],
    stage: StageLike | Sequence[StageLike] | None = None,
    requires: AbstractSet[str] | None = None,
    provides: AbstractSet[str] | None = None,
    removes: AbstractSet[str] | None = None,
    conflicts: AbstractSet[str] | None = None,
    registry: Registry = REGISTRY,
) -> type[RulePass]: ...
def register_pass(
    name: Any = None, /, *, rules: Sequence[Rule] | None = None, registry: Registry = REGISTRY, **attributes: Any
) -> Any:
    """Register a pass: `@register_pass("my-pass", stage="forward")` on a function, or on a `Pass` subclass.

    A function takes `(program, ctx)`, and options as keyword-only parameters with annotations and defaults; it
    becomes a `Pass` subclass, so `PassManager([my_pass(option=1)])` and `"my-pass{option=1}"` both work. With
    `rules=[…]` nothing is decorated: `tidy = register_pass("tidy", stage="joint", rules=[…])` is the pass.

    Args:
        name: Name in kebab-case; a class may set its own.
        rules: Rewriting rules that the pass consists of.
        registry: Where to register.
        **attributes: `stage`, `produces`, `requires`, `provides`, `removes`, `conflicts`, as in `Pass`.

    Raises:
        PipelineError: The name is taken, or the definition is not usable.
    """
    if isinstance(name, type):
        registry.add(_as_pass(name, {}))
        return name
    given = {k: v for k, v in {"name": name, **attributes}.items() if v is not None}
    if rules is not None:
        body = {**given, "rules": tuple(rules), "__doc__": f"Rules: {', '.join(rule.name for rule in rules)}."}
        made = type(str(name), (RulePass,), {**body, "__module__": sys._getframe(1).f_globals["__name__"]})
        registry.add(made)
        return made

    def decorate(defined: Any) -> type[Pass]:
        decorated = _as_pass(defined, given)
        registry.add(decorated)
        return decorated

    return decorate


def _as_pass(defined: Any, given: dict[str, Any]) -> type[Pass]:
    if isinstance(defined, type):
        if not issubclass(defined, Pass):
            raise PipelineError(f"{defined.__name__} is no Pass", hint="derive it from air.Pass")
        for key, value in given.items():
            setattr(defined, key, value)
        defined.__init_subclass__()
        if not hasattr(defined, "name"):
            raise PipelineError(f"{defined.__name__} has no name", hint='set name = "my-pass" in the class')
        return defined
    body = {
        "name": defined.__name__.replace("_", "-"),
        "stage": Stage.FORWARD,
        **given,
        "function": staticmethod(defined),
        "Options": _options_of(defined),
        "__doc__": defined.__doc__,
        "__module__": defined.__module__,
        "__qualname__": defined.__qualname__,
    }
    return type(defined.__name__, (FunctionPass,), body)


def _options_of(function: Callable[..., Any]) -> type[BaseModel]:
    """A pydantic model of the keyword-only parameters."""
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[parameter.name] = (_annotation(function, parameter), default)
    made: type[BaseModel] = create_model("Options", __base__=Pass.Options, **fields)
    return made


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The annotation of one parameter: the others may name what is imported for type checkers only."""
    if parameter.annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    try:
        return eval(parameter.annotation, getattr(function, "__globals__", {}))
    except NameError as error:
        raise PipelineError(
            f"the annotation of option {parameter.name!r} of {function.__name__} cannot be read: {error}",
            hint="import the names it uses at module level, outside TYPE_CHECKING",
        ) from error
