"""Distillation: a compressed or smaller Gemma 3 learns its teacher's next-token distributions.

`losses` is the pure mathematics, `batches` the data's order, `teacher` what the student learns from, `training` one phase of
the loop, `recovery` all phases of a recipe.
"""

from gemma_opt.distill.recovery import DistillData, Recovery

__all__ = ["DistillData", "Recovery"]
