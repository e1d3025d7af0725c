"""Calibration: sample data, run it through the model layer by layer, and measure what each linear receives.

`samples` reads the data, `written` lets the model write it, `walk` streams it through the decoder under the model's own
forward, `sensitivity` asks the loss which outputs matter, `store` keeps finished layers for a build that was interrupted. All
of it in float32 and in a fixed order, so that the same data gives the same model to the bit.
"""

from gemma_opt.calibration.samples import Sample, draw_samples, random_samples, sources_identity
from gemma_opt.calibration.sensitivity import Sensitivity, measure_sensitivity
from gemma_opt.calibration.store import CalibrationData, Store
from gemma_opt.calibration.walk import Block, Moments, walk_layers
from gemma_opt.calibration.written import Author

__all__ = [
    "Author",
    "Block",
    "CalibrationData",
    "Moments",
    "Sample",
    "Sensitivity",
    "Store",
    "draw_samples",
    "measure_sensitivity",
    "random_samples",
    "sources_identity",
    "walk_layers",
]
