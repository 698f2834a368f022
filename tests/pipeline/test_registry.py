"""The registry: functions and classes by name, plug-ins that fail alone, names that are unique."""

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from autosp_ir.errors import PassError, PipelineError
from autosp_ir.ir.program import Program, Stage
from autosp_ir.pipeline import Pass, PassContext, PassManager, get_pass, register_pass, registered_passes
from autosp_ir.pipeline.registry import ENTRY_POINT_GROUP, Registry, parse_pipeline
from tests.pipeline.toys import FoldRelu, small_program


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, ENTRY_POINT_GROUP)


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes importable modules of made-up packages."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return write


GOOD = """
from autosp_ir.pipeline import Pass
class Good(Pass):
    name = "good"
    def run(self, program, ctx): pass
"""


def test_a_function_becomes_a_pass_with_options() -> None:
    registry = Registry()

    @register_pass("keep-some", stage="forward", provides={"kept"}, registry=registry)
    def keep_some(program: Program, ctx: PassContext, *, limit: int = 3, names: "tuple[str, ...]" = ()) -> None:
        """Keeps some."""
        ctx.count("limit", limit)
        ctx.count("names", len(names))

    assert registry.get("keep-some") is keep_some
    assert keep_some.__doc__ == "Keeps some."
    (written,) = parse_pipeline("keep-some{limit=5 names=a,b}", registry)
    assert written == keep_some(limit=5, names=("a", "b"))
    result = PassManager([written, keep_some()]).run(small_program())
    assert result.statistics == {"keep-some": {"limit": 8, "names": 2}}
    assert result.program.facts == {"kept"}
    assert set(keep_some.Options.model_json_schema()["properties"]) == {"limit", "names"}


def test_the_name_defaults_to_the_functions() -> None:
    registry = Registry()

    @register_pass(registry=registry)
    def drop_views(program: Program, ctx: PassContext) -> None:
        pass

    assert registry.get("drop-views") is drop_views
    assert drop_views.stages() == (Stage.FORWARD,)


def test_a_function_that_returns_something_is_an_error() -> None:
    registry = Registry()

    @register_pass(registry=registry)
    def functional(program: Program, ctx: PassContext) -> Any:
        return program

    with pytest.raises(PassError, match="returned Program"):
        PassManager([functional]).run(small_program())


def test_options_with_unreadable_annotations_are_refused_where_they_are_written() -> None:
    def broken(program: Program, ctx: PassContext, *, limit: int = 3) -> None:
        pass

    broken.__annotations__["limit"] = "Missing"

    with pytest.raises(PipelineError, match="annotation of option 'limit'"):
        register_pass(registry=Registry())(broken)


def test_a_class_registers_with_the_decorator() -> None:
    registry = Registry()

    @register_pass("renamed", stage=("forward", "joint"), registry=registry)
    class Renamed(FoldRelu):
        """Another name."""

    assert registry.get("renamed") is Renamed
    assert Renamed.stages() == (Stage.FORWARD, Stage.JOINT)


def test_two_passes_of_one_name_raise() -> None:
    registry = Registry()
    registry.add(FoldRelu)
    registry.add(FoldRelu)
    other = type("Other", (FoldRelu,), {})
    with pytest.raises(PipelineError, match=r"two passes are called 'fold-relu': .*FoldRelu and .*Other"):
        registry.add(other)


def test_a_notebook_cell_may_run_twice() -> None:
    registry = Registry()
    first, second = (type("Cell", (FoldRelu,), {"name": "cell", "__module__": "__main__"}) for _ in range(2))
    registry.add(first)
    registry.add(second)
    assert registry.get("cell") is second


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": "Not_Kebab"}, "is no pass name"),
        ({"name": "x", "stage": "backward"}, "a stage that does not exist"),
        ({"name": "x", "produces": "after"}, "a stage that does not exist"),
        ({"name": "x", "requires": "canonical"}, "must be a set of strings"),
        ({"name": "x", "Options": int}, "no pydantic model"),
    ],
)
def test_unusable_definitions_are_refused_where_they_are_written(attributes: dict[str, object], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        type("Bad", (FoldRelu,), attributes)


def test_a_plugin_that_fails_takes_no_other_down(plugins: Callable[[str, str], None]) -> None:
    plugins("good_plugin", GOOD)
    plugins("bad_plugin", "import a_module_that_is_not_installed")
    entries = [
        entry("bad", "bad_plugin:Bad"),
        entry("good", "good_plugin:Good"),
        entry("plain", "good_plugin:Pass.__name__"),
        entry("misnamed", "good_plugin:Good"),
    ]
    registry = Registry(lambda: entries)
    assert list(registry.loaded()) == ["good"]
    assert set(registry.failures()) == {"bad", "plain", "misnamed"}
    with pytest.raises(PipelineError, match=r"'bad' cannot be loaded: bad_plugin:Bad: ModuleNotFoundError"):
        registry.get("bad")
    with pytest.raises(PipelineError, match="not a subclass"):
        registry.get("plain")
    with pytest.raises(PipelineError, match="calls itself 'good'"):
        registry.get("misnamed")
    assert [p.name for p in parse_pipeline("good", registry)] == ["good"]
    with pytest.raises(PipelineError, match="did you mean 'good'"):
        registry.get("goood")


def test_a_name_imports_only_its_own_package(plugins: Callable[[str, str], None]) -> None:
    plugins("good_plugin", GOOD)
    plugins("unwanted_plugin", GOOD.replace("good", "unwanted"))
    registry = Registry(lambda: [entry("good", "good_plugin:Good"), entry("unwanted", "unwanted_plugin:Good")])
    registry.get("good")
    assert "unwanted_plugin" not in sys.modules


def test_two_packages_that_offer_one_name_raise(plugins: Callable[[str, str], None]) -> None:
    plugins("good_plugin", GOOD)
    plugins("same_plugin", GOOD)
    twice = Registry(lambda: [entry("good", "good_plugin:Good"), entry("good", "good_plugin:Good")])
    assert twice.get("good").name == "good"
    clash = Registry(lambda: [entry("good", "good_plugin:Good"), entry("good", "same_plugin:Good")])
    with pytest.raises(PipelineError, match="two packages offer a pass called 'good'"):
        clash.get("good")


def test_a_module_imported_under_two_names_raises(plugins: Callable[[str, str], None]) -> None:
    plugins("good_plugin", GOOD)
    registry = Registry(lambda: [entry("good", "good_plugin:Good")])
    registry.add(type("Good", (Pass,), {"name": "good", "run": FoldRelu.run}))
    with pytest.raises(PipelineError, match="two passes are called 'good'"):
        registry.get("good")


def test_the_public_registry_suggests_and_lists() -> None:
    with pytest.raises(PipelineError, match="no pass is called"):
        get_pass("no-such-pass-at-all")
    assert all(issubclass(p, Pass) for p in registered_passes().values())
