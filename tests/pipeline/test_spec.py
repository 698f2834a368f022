"""Pipeline text: what it says, where it is wrong, and that printing and parsing are inverse."""

import enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from autosp_ir.errors import ParseError, PipelineError
from autosp_ir.ir.program import Program
from autosp_ir.pipeline import Pass, PassContext, PassManager, format_pipeline
from autosp_ir.pipeline.registry import Registry, parse_pipeline
from autosp_ir.pipeline.spec import parse_spec
from tests.pipeline.toys import Cut, FoldRelu


class Policy(enum.StrEnum):
    SAVE_ALL = "save-all"
    MIN_CUT = "min-cut"


class Wide(Pass):
    """One option of every kind."""

    name = "wide"

    class Options(Pass.Options):
        text: str = "qkv"
        flag: bool = False
        chunk_count: int = Field(2, ge=1, description="How many pieces.")
        peak: float = 0.5
        mode: Literal["one", "none", "3"] = "one"
        policy: Policy = Policy.SAVE_ALL
        limit: int | None = None
        label: str | None = None
        either: int | str | bool | None = None
        sizes: list[int] = Field(default_factory=list)
        names: tuple[str, ...] = ()
        maybe: list[str] | None = None
        mixed: list[int | float | str | bool | None] = Field(default_factory=list)
        kinds: frozenset[Policy] = frozenset()
        path: Path = Path()

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        pass


REGISTRY = Registry()
for pass_class in (FoldRelu, Cut, Wide):
    REGISTRY.add(pass_class)


def build(text: str) -> list[Pass]:
    return parse_pipeline(text, REGISTRY)


def test_names_options_and_lists() -> None:
    assert build("") == []
    assert build("fold-relu, cut{axis=dp mode=ragged}\n,fold-relu{}") == [
        FoldRelu(),
        Cut(axis="dp", mode="ragged"),
        FoldRelu(),
    ]
    (wide,) = build("wide{chunk-count=4 flag=true sizes=1,2,3 names=a peak=1e-3 limit=none text=7 mode=3}")
    expected = {
        "chunk_count": 4,
        "flag": True,
        "sizes": [1, 2, 3],
        "names": ("a",),
        "peak": 1e-3,
        "text": "7",
        "mode": "3",
    }
    assert wide == Wide(**expected)


def test_snake_case_options_are_read_and_kebab_case_is_printed() -> None:
    (wide,) = build("wide{chunk_count=4}")
    assert str(wide) == "wide{chunk-count=4}"


def test_defaults_are_not_printed() -> None:
    assert str(Wide(text="qkv", chunk_count=2)) == "wide"


def test_words_that_look_like_something_else_are_quoted() -> None:
    written = format_pipeline([Wide(text="a b", label="none", either="3", maybe=["x"], mixed=["true", True])])
    assert written == 'wide{text="a b" label="none" either="3" maybe=x mixed="true",true}'


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("fold-relu,,cut", 11, "expected a pass name, got ','"),
        ("fold-relu,", 11, "expected a pass name, got the end"),
        ("fold-relu cut", 11, "expected a comma"),
        ("cut{axis}", 9, "expected '=' after the option name 'axis'"),
        ("cut{axis=sp", 12, "a space before the next option, or '}'"),
        ("cut{axis=sp,mode=even}", 17, "a space before the next option"),
        ('cut{axis="sp}', 10, "a JSON string"),
        ("cut}", 4, "expected a comma"),
        ("9cut", 1, "expected a pass name"),
    ],
)
def test_malformed_text_says_where(text: str, column: int, message: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_spec(text)
    assert (caught.value.line, caught.value.column) == (1, column)
    assert message in str(caught.value)


def test_positions_count_lines() -> None:
    with pytest.raises(ParseError) as caught:
        parse_spec("fold-relu,\n  cut{axis}")
    assert (caught.value.line, caught.value.column) == (2, 11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold-relu,cutt", "no pass is called 'cutt' at line 1, column 11"),
        ("fold-relu,cutt", "did you mean 'cut'?"),
        ("fold_relu", "did you mean 'fold-relu'?"),
        ("cut{axes=sp}", "cut has no option 'axes' at line 1, column 5"),
        ("cut{axes=sp}", "did you mean 'axis'?"),
        ("fold-relu{x=1}", "takes no options"),
        ("cut{mode=odd}", "option 'mode' of cut: Input should be 'even' or 'ragged', got 'odd' at line 1, column 5"),
        ("wide{chunk-count=0}", "greater than or equal to 1"),
        ("wide{chunk-count=0}", "chunk-count: How many pieces."),
        ("wide{chunk-count=x}", "valid integer"),
        ("wide{sizes=1,x}", "valid integer"),
        ("wide{text=a text=b}", "given twice"),
        ("wide{chunk-count=1 chunk_count=2}", "given twice"),
    ],
)
def test_unknown_names_and_wrong_values_are_named(text: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        build(text)
    assert message in str(caught.value)


def test_constructor_arguments_are_checked_alike() -> None:
    with pytest.raises(PipelineError, match="did you mean 'axis'"):
        Cut(axes="sp")
    with pytest.raises(PipelineError, match="'even' or 'ragged'"):
        Cut(mode="odd")
    with pytest.raises(PipelineError, match="its own Options"):
        Cut(Wide().options)
    assert Cut(Cut.Options(axis="dp")) == Cut(axis="dp")


def test_required_options_are_asked_for() -> None:
    class Needy(Pass):
        """Needs a size."""

        name = "needy"

        class Options(Pass.Options):
            size: int

        def run(self, program: Program, ctx: PassContext) -> None:
            pass

    with pytest.raises(PipelineError, match="needy needs the option 'size'"):
        Needy()
    assert str(Needy(size=3)) == "needy{size=3}"


def test_a_value_that_text_cannot_say_is_refused_when_written_and_shown_otherwise() -> None:
    class Nested(Pass):
        """Has an option of a mapping."""

        name = "nested"

        class Options(Pass.Options):
            table: dict[str, int] = Field(default_factory=dict)

        def run(self, program: Program, ctx: PassContext) -> None:
            pass

    with pytest.raises(PipelineError, match="text cannot say"):
        format_pipeline([Nested(table={"a": 1})])
    assert "table={'a': 1}" in str(Nested(table={"a": 1}))


def test_a_manager_prints_its_pipeline() -> None:
    assert str(PassManager([FoldRelu, Cut(axis="dp")])) == "fold-relu,cut{axis=dp}"


TEXT = st.text(max_size=8) | st.sampled_from(["none", "true", "3", "1e5", "", "a,b", "{", '"', "a=b", "\n", "\\"])
SCALAR = st.integers() | st.booleans() | st.none() | TEXT
WIDE = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXT,
        "flag": st.booleans(),
        "chunk_count": st.integers(1, 10**9),
        "peak": st.floats(allow_nan=False),
        "mode": st.sampled_from(["one", "none", "3"]),
        "policy": st.sampled_from(Policy),
        "limit": st.none() | st.integers(),
        "label": st.none() | TEXT,
        "either": SCALAR,
        "sizes": st.lists(st.integers(), max_size=3),
        "names": st.lists(TEXT, max_size=3).map(tuple),
        "maybe": st.none() | st.lists(TEXT, max_size=2),
        "mixed": st.lists(SCALAR | st.floats(allow_nan=False), max_size=3),
        "kinds": st.frozensets(st.sampled_from(Policy)),
        "path": st.sampled_from([Path("a/b.ir"), Path("with space"), Path()]),
    },
)
PASSES = st.one_of(
    st.just(FoldRelu()),
    st.builds(Cut, axis=TEXT, mode=st.sampled_from(["even", "ragged"])),
    WIDE.map(lambda fields: Wide(**fields)),
)


@settings(deadline=None)
@given(st.lists(PASSES, max_size=3))
@example([Wide(mixed=[float("inf"), "inf", float("-inf"), "-inf"], peak=float("inf"), text="inf", either="inf")])
def test_printing_and_parsing_are_inverse(passes: list[Pass]) -> None:
    written = format_pipeline(passes)
    read = build(written)
    assert read == passes
    assert format_pipeline(read) == written
    for ours, theirs in zip(passes, read, strict=True):
        assert types_of(ours) == types_of(theirs)


@settings(deadline=None)
@given(st.text(alphabet='ab-_,={} "1\n', max_size=20))
def test_any_text_parses_or_is_a_named_error(text: str) -> None:
    try:
        build(text)
    except (ParseError, PipelineError) as error:
        assert error.hint


@pytest.mark.parametrize("text", ["a{\n", "a,\n", "\n\n,", "a\x0b{"])
def test_an_error_behind_the_last_line_is_shown_there(text: str) -> None:
    with pytest.raises(ParseError, match="line"):
        parse_spec(text)


def types_of(pass_: Pass) -> Any:
    dumped = pass_.options.model_dump()
    return {k: [type(i) for i in v] if isinstance(v, list | tuple) else type(v) for k, v in dumped.items()}
