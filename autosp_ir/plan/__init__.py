"""What a step will take before it runs: memory and time of pipelines, and the first that fits.

from autosp_ir.plan import plan
for prediction in plan(program, {"sp": 2}):
    print(prediction.name, prediction.peak_bytes / 2**30, prediction.seconds)
"""

from autosp_ir.plan.choose import fitting as fitting
from autosp_ir.plan.choose import plan as plan
from autosp_ir.plan.predict import Prediction as Prediction
from autosp_ir.plan.predict import predict as predict
from autosp_ir.plan.rungs import Rung as Rung
from autosp_ir.plan.rungs import rungs as rungs

__all__ = ["Prediction", "Rung", "fitting", "plan", "predict", "rungs"]
