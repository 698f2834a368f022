"""`remat`: choose what the forward saves for the backward, and write the choice into the program.

Forward values that the backward needs and that are not saved are computed again, by copies of phase `recompute` in
front of their first reader. Afterwards the values that cross from forward to later phases are the saved set.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from autosp_ir.analysis.cost import device, link
from autosp_ir.emit.split import crossing_values
from autosp_ir.errors import PassError
from autosp_ir.ir.graph import Phase, Value
from autosp_ir.ir.program import OutputKind, Program
from autosp_ir.ir.types import ScalarType, TensorType
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_passes._remat.budget import Portfolio, parse_size
from autosp_passes._remat.candidates import rule_saved
from autosp_passes._remat.materialise import Materialiser
from autosp_passes._remat.model import StepModel
from autosp_passes._remat.rules import Rerun, Semantics, may_recompute, view_root


class Remat(Pass):
    """Decide the saved set of a joint program: `remat{policy=budget peak=40GiB}`.

    Random operations are never computed again, attention and collectives only where `rerun` names them; a dropout mask
    may be, from the state that was drawn for it, and gives the same. A view is taken again from its base, which shares
    its storage; views of parameters and inputs cost nothing. What reads a buffer that the forward updates is saved.
    What `tile` made for one chunk of tokens is always computed again: keeping it for every chunk would keep the whole.
    """

    name = "remat"
    stage = "joint"
    requires = frozenset({"differentiated"})
    provides = frozenset({"rematerialised"})
    conflicts = frozenset({"rematerialised"})

    class Options(Pass.Options):
        """Options of `remat`."""

        policy: Literal["save-all", "autosp-sac", "min-cut", "budget"] = "min-cut"
        """`save-all` saves what autograd would; `min-cut` follows torch's partitioner: the fewest bytes that cheap
        operations can rebuild the rest from; `autosp-sac` also computes matrix products again; `budget` adds the least
        time that keeps within `peak` or `fraction`."""
        aggressive: bool = False
        """For `min-cut`: compute again whatever is no matrix product, attention or collective, reductions and long
        chains of pointwise operations included; torch's `aggressive_recomputation`."""
        peak: str | int | None = None
        """For `budget`: what the step may hold beside parameters and inputs, such as 40GiB, or a number of bytes."""
        fraction: float | None = Field(None, gt=0, le=1)
        """For `budget`: the same, as a part of what `save-all` holds."""
        rerun: tuple[Rerun, ...] = ()
        """For `budget`: costly operations that may run again, `attention`, `collectives` or both."""
        device: str = "h100"
        """For `budget`, what prices compute: h100, h200, a100 or cpu."""
        link: str = "nvlink4"
        """For `budget`, what prices collectives: nvlink4, nvlink3, pcie5, pcie or network-400g."""
        seconds: float = Field(4.0, gt=0)
        """For `budget`, how long to search."""

        @field_validator("peak")
        @classmethod
        def _is_size(cls, value: str | int | None) -> str | int | None:
            if value is not None and parse_size(value) <= 0:
                raise ValueError("the peak must be more than nothing")
            return value

        @model_validator(mode="after")
        def _go_together(self) -> Remat.Options:
            limits = (self.peak is not None) + (self.fraction is not None)
            if self.policy == "budget" and limits != 1:
                raise ValueError("policy=budget needs either peak or fraction")
            if self.policy != "budget" and (limits or self.rerun):
                raise ValueError(f"peak, fraction and rerun belong to policy=budget, not to policy={self.policy}")
            if self.aggressive and self.policy != "min-cut":
                raise ValueError(f"aggressive belongs to policy=min-cut, not to policy={self.policy}")
            return self

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place.

        Raises:
            PassError: The program has no backward yet, torch's partitioner fails, or no choice keeps within the budget;
                the message names the least possible peak.
            UnsupportedError: The cost model does not have the device or link.
        """
        if not any(o.kind is OutputKind.GRADIENT for o in program.signature.outputs):
            ctx.remark("missed", None, "the program has no gradient, so nothing is saved")
            return
        semantics = Semantics(program, self.options.rerun, replay=self.options.policy != "save-all")
        by_budget = self.options.policy == "budget"
        chosen = (
            self._within_budget(program, ctx, semantics)
            if by_budget
            else rule_saved(program, semantics, self.options.policy, self.options.aggressive)
        )
        rewriter = ctx.rewriter(program)
        Materialiser(program, rewriter, chosen, semantics).run()
        rewriter.dead_code()
        _report(program, ctx)

    def _within_budget(self, program: Program, ctx: PassContext, semantics: Semantics) -> set[Value]:
        options = self.options
        on, over = device(options.device), link(options.link)
        _refuse_symbols(program)
        model = StepModel(program, semantics, on, over)
        portfolio = Portfolio(program, model, semantics)
        whole = portfolio.rules["save-all"].peak
        peak = parse_size(options.peak) if options.peak is not None else (options.fraction or 1.0) * whole
        choice = portfolio.choose(peak, options.seconds)
        ctx.count("peak_bytes", choice.outcome.peak)
        ctx.count("budget_bytes", int(peak))
        ctx.count("recompute_microseconds", round(choice.outcome.extra * 1e6))
        ctx.remark(
            "applied",
            None,
            f"{choice.name}: {choice.outcome.peak / 2**20:,.1f} MiB of {peak / 2**20:,.1f} MiB, "
            f"{choice.outcome.extra * 1e3:,.3f} ms of recomputation on {on.name}",
        )
        return {model.nodes[i].result for i in choice.outcome.saved}


def _refuse_symbols(program: Program) -> None:
    for node in program.graph.nodes:
        for value in node.results:
            kind = value.type
            symbolic = isinstance(kind, TensorType) and not all(isinstance(d, int) for d in kind.shape)
            if symbolic or (isinstance(kind, ScalarType) and kind.kind == "int" and not isinstance(kind.expr, int)):
                raise PassError(
                    "memory cannot be budgeted for a length that is a symbol",
                    node=node,
                    pass_name=Remat.name,
                    hint="capture with dynamic=False, one program for each length, or use remat{policy=min-cut}",
                )


def _report(program: Program, ctx: PassContext) -> None:
    saved = crossing_values(program)
    ctx.count("saved_values", len(saved))
    ctx.count("recomputed_nodes", sum(n.phase is Phase.RECOMPUTE for n in program.graph.nodes))
    sizes = [v.type.numel * v.type.dtype.itemsize for v in saved if isinstance(v.type, TensorType)]
    if all(isinstance(s, int) for s in sizes):
        ctx.count("saved_bytes", sum(int(s) for s in sizes))


__all__ = ["Remat", "may_recompute", "view_root"]
