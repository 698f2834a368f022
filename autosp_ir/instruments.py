"""Instruments: hooks around passes that watch a run and never change the program."""

from autosp_ir.pipeline.instrument import Instrument, PrintIR, Rules, Statistics, Timing, Verify
from autosp_ir.viz.diff import Diff
from autosp_ir.viz.recorder import Recorder

__all__ = ["Diff", "Instrument", "PrintIR", "Recorder", "Rules", "Statistics", "Timing", "Verify"]
