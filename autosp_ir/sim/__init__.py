"""Running every rank of a program in one process."""

from autosp_ir.sim.lockstep import Simulation, simulate
from autosp_ir.sim.scheduler import CommRecord

__all__ = ["CommRecord", "Simulation", "simulate"]
