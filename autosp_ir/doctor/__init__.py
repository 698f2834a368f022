"""Whether a model's step is exact on a number of ranks, or refused and why: `diagnose`."""

from autosp_ir.doctor.examine import Progress, diagnose, steps_of
from autosp_ir.doctor.findings import Diagnosis, Failure, FamilyCount, Gather, RankFinding, Verdict
from autosp_ir.doctor.tables import tables

__all__ = [
    "Diagnosis",
    "Failure",
    "FamilyCount",
    "Gather",
    "Progress",
    "RankFinding",
    "Verdict",
    "diagnose",
    "steps_of",
    "tables",
]
