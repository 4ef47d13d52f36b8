"""Can curvature be measured on this model, and what will it cost?  Every check a sentence, every fault with its cure.

A Hessian comes out wrong without a word when the model draws random numbers, mixes the samples of a batch, or holds an
`autograd.Function` whose backward is not a derivative, or cannot be differentiated itself.  So the checks are numeric:
they run the model on a few samples, look at what autograd makes of it, and name the module or Function at fault.

All of it happens on copies: the model, its mode, buffers, gradients and hooks, and the random state are untouched.
"""

from fpq_analysis.doctor.diagnosis import Diagnosis, diagnose, diagnose_checkpoint
from fpq_analysis.doctor.forecast import forecast_measurements
from fpq_analysis.doctor.model_under_test import COLUMNS, FAULT, NOTE, OK
from fpq_analysis.doctor.workers import advice, forecast_workers

__all__ = [
    "COLUMNS",
    "FAULT",
    "NOTE",
    "OK",
    "Diagnosis",
    "advice",
    "diagnose",
    "diagnose_checkpoint",
    "forecast_measurements",
    "forecast_workers",
]
