"""Testing passes without a GPU: `check_pass` for one pass, `assert_equivalent` for a whole pipeline.

`autosp_ir.testing.strategies` holds hypothesis strategies for layouts, types and programs.
"""

from autosp_ir.testing.check import assert_same_numbers, check_pass, count_operations
from autosp_ir.testing.compare import EquivalenceError, Report
from autosp_ir.testing.equivalence import DenseReference, Equivalence, assert_equivalent, compare_to_dense
from autosp_ir.testing.filecheck import filecheck
from autosp_ir.testing.promote import promote, promote_batch

__all__ = [
    "DenseReference",
    "Equivalence",
    "EquivalenceError",
    "Report",
    "assert_equivalent",
    "assert_same_numbers",
    "check_pass",
    "compare_to_dense",
    "count_operations",
    "filecheck",
    "promote",
    "promote_batch",
]
