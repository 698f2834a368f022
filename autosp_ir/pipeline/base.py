"""What a pass is: a small named class whose options are its fields, and the context it runs in."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from autosp_ir.errors import PassError, PipelineError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program, Stage
from autosp_ir.pipeline.analysis import AnalysisCache, AnalysisLike
from autosp_ir.pipeline.options import make_options, render_pass
from autosp_ir.rewrite.events import Listener
from autosp_ir.rewrite.limit import RewriteLimit
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_ir.rewrite.statistics import RewriteStatistics, RuleStatistics

T = TypeVar("T")
StageLike = Stage | Literal["forward", "joint", "lowered"]
RemarkKind = Literal["applied", "missed"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_logger = logging.getLogger("autosp_ir.pipeline")
_REMARK_LEVEL = {"applied": logging.DEBUG, "missed": logging.INFO}


class Pass(ABC):
    """A named rewrite of a program, in place.

    A subclass sets the class attributes, nests `class Options(Pass.Options)` when it has options, and writes `run`.
    Options are given as keyword arguments: `Ulysses(fuse="qkv")`.

    Attributes:
        name: Its name in pipelines, in kebab-case.
        stage: The stage, or stages, of the programs it accepts.
        produces: The stage it leaves a program in; None when it does not change it.
        requires: Facts that the program must have when it runs.
        provides: Facts that hold after it ran; the manager adds them to the program.
        removes: Facts that no longer hold after it ran; the manager takes them from the program.
        conflicts: Facts that the program must not have when it runs.
        options: The validated options.
    """

    name: ClassVar[str]
    stage: ClassVar[StageLike | Sequence[StageLike]] = Stage.FORWARD
    produces: ClassVar[StageLike | None] = None
    requires: ClassVar[AbstractSet[str]] = frozenset()
    provides: ClassVar[AbstractSet[str]] = frozenset()
    removes: ClassVar[AbstractSet[str]] = frozenset()
    conflicts: ClassVar[AbstractSet[str]] = frozenset()

    class Options(BaseModel):
        """Options: a subclass nests its own `class Options(Pass.Options)`. Unknown names are refused.

        The string under an option is its description, in messages, in the catalogue and in the JSON Schema.
        """

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    options: Any

    def __init__(self, options: BaseModel | None = None, /, **fields: Any) -> None:
        if not hasattr(type(self), "name"):
            raise PipelineError(f"{type(self).__name__} has no name", hint='set name = "my-pass" in the class')
        if options is not None and (fields or not isinstance(options, self.Options)):
            raise PipelineError(
                f"{type(self).__name__} takes an instance of its own Options, or options by keyword",
                hint=f"write {type(self).__name__}(option=value)",
            )
        self.options = options if options is not None else make_options(self.name, self.Options, fields)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_definition(cls)

    @abstractmethod
    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place.

        Args:
            program: A program of the pass's own; the caller's is never touched.
            ctx: Mesh, analyses, remarks, statistics and rewriters.
        """

    @classmethod
    def stages(cls) -> tuple[Stage, ...]:
        """The stages it accepts."""
        return _stages(cls.stage)

    @classmethod
    def stage_after(cls, stage: Stage) -> Stage:
        """The stage of a program of `stage` after this pass."""
        return Stage(cls.produces) if cls.produces is not None else stage

    def __str__(self) -> str:
        return render_pass(self.name, self.options)

    def __repr__(self) -> str:
        given = ", ".join(f"{k}={getattr(self.options, k)!r}" for k in type(self.options).model_fields)
        return f"{type(self).__name__}({given})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pass):
            return NotImplemented
        return type(self) is type(other) and self.options.model_dump() == other.options.model_dump()

    def __hash__(self) -> int:
        return hash((type(self), str(self)))


def _stages(stage: StageLike | Sequence[StageLike]) -> tuple[Stage, ...]:
    return (Stage(stage),) if isinstance(stage, str) else tuple(Stage(s) for s in stage)


def check_definition(cls: type[Pass]) -> None:
    """Check a pass class where it is written, not where it first runs.

    Raises:
        PipelineError: Its name, stage or facts are not usable.
    """
    name = getattr(cls, "name", None)
    if name is not None and not _NAME.fullmatch(name):
        raise PipelineError(f"{name!r} is no pass name", hint="use kebab-case, such as 'my-pass'")
    try:
        _stages(cls.stage)
        cls.stage_after(Stage.FORWARD)
    except ValueError as error:
        raise PipelineError(
            f"{cls.__name__} names a stage that does not exist: {error}",
            hint=f"the stages are {', '.join(Stage)}",
        ) from error
    for attribute in ("requires", "provides", "removes", "conflicts"):
        facts = getattr(cls, attribute)
        if isinstance(facts, str) or not all(isinstance(f, str) for f in facts):
            raise PipelineError(
                f"{cls.__name__}.{attribute} must be a set of strings, not {facts!r}",
                hint=f'write {attribute} = frozenset({{"my-fact"}})',
            )
    if not (isinstance(cls.Options, type) and issubclass(cls.Options, BaseModel)):
        raise PipelineError(f"{cls.__name__}.Options is no pydantic model", hint="write class Options(Pass.Options): …")


@dataclass(frozen=True)
class Remark:
    """What a pass did at a node, or why it left it alone.

    Args:
        kind: "applied" or "missed".
        pass_name: The pass.
        message: What was done, or why not.
        node: Name of the node, if the remark is about one.
        source: The model's source line that the node comes from.
    """

    kind: RemarkKind
    pass_name: str
    message: str
    node: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        place = f" %{self.node}" if self.node else ""
        source = f"  # {self.source}" if self.source else ""
        return f"[{self.pass_name}] {self.kind}{place}: {self.message}{source}"


@dataclass
class PassContext:
    """What the manager lends a pass while it runs.

    Args:
        mesh: Axis sizes to write the program for; empty for one device.
        strict: Refuse instead of falling back to replicated work.
        program: The program being rewritten.
        pass_name: The pass that is running.
        listeners: Called with a `RewriteEvent` after each rewrite.
        limit: Says which sites may be rewritten; None allows all.
    """

    mesh: dict[str, int] = field(default_factory=dict)
    strict: bool = False
    program: Program | None = None
    pass_name: str = ""
    listeners: Sequence[Listener] = ()
    limit: RewriteLimit | None = None
    remarks: list[Remark] = field(default_factory=list)
    statistics: dict[str, int] = field(default_factory=dict)
    analyses: AnalysisCache = field(default_factory=AnalysisCache)
    rules: dict[str, RuleStatistics] = field(default_factory=dict)
    _rewriters: list[Rewriter] = field(default_factory=list)

    def rewriter(self, program: Program) -> Rewriter:
        """A rewriter that signs with the running pass's name and reports to the listeners."""
        # What earlier rewriters did is reported first, so that events come in the order of what they tell.
        for earlier in self._rewriters:
            earlier.finish()
        made = Rewriter(program, self.pass_name or None, self.listeners, self.limit)
        self._rewriters.append(made)
        return made

    def sequence_axis(self, axis: str | None = None) -> tuple[str, int]:
        """The mesh axis that cuts the tokens, and the number of ranks on it.

        Args:
            axis: Its name; None takes the one that token-partition used.

        Raises:
            PassError: The mesh has no such axis.
        """
        info = self.program.info if self.program is not None else {}
        name = axis or str(info.get("sp_axis", "sp"))
        if name not in self.mesh:
            raise PassError(
                f"the mesh {dict(self.mesh)} has no axis {name!r}",
                hint=f"run the pipeline with mesh={{{name!r}: number_of_ranks}}, or give the pass another axis=",
                pass_name=self.pass_name or None,
            )
        return name, self.mesh[name]

    def remark(self, kind: RemarkKind, node: Node | Value | None, message: str) -> None:
        """Say what was done ("applied"), or what was left alone and why ("missed").

        Args:
            kind: "applied" or "missed".
            node: What the remark is about; None for the whole program.
            message: One sentence.

        Raises:
            PassError: `kind` is neither.
        """
        if kind not in _REMARK_LEVEL:
            raise PassError(f"{kind!r} is no kind of remark", hint='use "applied" or "missed"')
        about = node.producer if isinstance(node, Value) else node
        remark = Remark(
            kind,
            self.pass_name,
            message,
            about.name if about is not None else None,
            about.origin.source if about is not None else None,
        )
        self.remarks.append(remark)
        _logger.log(_REMARK_LEVEL[kind], "%s", remark)

    def count(self, key: str, n: int = 1) -> None:
        """Add `n` to a statistic of the running pass."""
        self.statistics[key] = self.statistics.get(key, 0) + n

    def count_rules(self, statistics: RewriteStatistics) -> None:
        """Add what rules did: hits to the statistics of the running pass, all of it to its record in the trace."""
        for name, done in statistics.rules.items():
            self.rules.setdefault(name, RuleStatistics()).add(done)
            if done.hits:
                self.count(name, done.hits)

    def analysis(self, kind: AnalysisLike[T], program: Program | None = None) -> T:
        """The result of an analysis, computed again only when the program changed.

        Args:
            kind: An `Analysis` subclass, or a function from a program to a result.
            program: The program; the one being rewritten when None.

        Raises:
            PassError: There is no program to analyse.
        """
        subject = program if program is not None else self.program
        if subject is None:
            raise PassError("no program to analyse", hint="pass program=, or run the pass through a PassManager")
        return self.analyses.get(kind, subject)

    def finish_pass(self) -> None:
        """Close the rewrites of the pass that ran."""
        for rewriter in self._rewriters:
            rewriter.finish()
        self._rewriters.clear()


__all__ = ["Pass", "PassContext", "Remark", "StageLike"]
