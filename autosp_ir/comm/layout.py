"""Layout inference and the layout check: why a program that verifies computes the right loss and gradients.

Per mesh axis a value is Invariant, Replicate, Shard or Partial, and each operation's rule (`comm.rules`) says which
placement of its result follows from those of its operands. Two strengths:

- Forward programs are checked *strictly*: Invariant and Replicate differ, and an Invariant value that needs a
  gradient may only meet Invariant values. A forgotten or doubled `invariant_to_replicate` is an error here.
- Joint and lowered programs are checked *relaxed*: both mean "whole on every rank". Backward collectives are
  explicit there, and nothing is differentiated again. A whole value is stored as Invariant.

Lowered programs need no claims of their own kind. A functional collective names the logical axis in `group_name`,
its start carries the layout that its wait hands on, and each block layout is an ordinary one:

- `all_reduce`: Partial -> whole. `reduce_scatter_tensor`: Partial -> S(0). `all_gather_into_tensor`: any shard ->
  whole, ranks outermost in dimension 0.
- `all_to_all_single` with equal splits: its operand holds blocks [P, …], one per destination, and is cut behind
  them, `S(d)` with d > 0; its result holds blocks [P, …], one per source, in which the old rank has become the block
  index and the rank stands behind it. Where behind depends on which dimension was split before, which the operation
  does not know: **whoever creates the start node stores its layout**, `S(k)` with k the position, in [P, …], of what
  is left of the split dimension; the check admits any shard behind the blocks. Without a stored layout it is `S(1)`.
- The views, permutations, concatenations and copies around them are placed by their own rules. Several tensors in
  one collective must be joined along a dimension that is not cut, such as heads behind the block index.

Where several results are right (an expanded gradient, a view of dimensions of local length 1) a hint decides: the
stored layout when checking, otherwise the operand of the forward node with the same `meta["seq_nr"]`, otherwise a
placed value that an elementwise operation combines with the result. A hint only ever chooses among results that hold.
Without one the node is refused.
"""

from autosp_ir.comm.inference import GradientFlow, infer_layout, infer_layouts, place
from autosp_ir.comm.layout_check import check_emittable, check_layouts
from autosp_ir.comm.rules.attention import RESOLVED
from autosp_ir.comm.rules.base import Outcome, Rule, RuleContext, rule, whole

__all__ = [
    "RESOLVED",
    "GradientFlow",
    "Outcome",
    "Rule",
    "RuleContext",
    "check_emittable",
    "check_layouts",
    "infer_layout",
    "infer_layouts",
    "place",
    "rule",
    "whole",
]
