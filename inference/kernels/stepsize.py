r"""Dual averaging of a step size (Nesterov 2009; Hoffman and Gelman 2014), with Stan's constants."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SHRINKAGE, OFFSET, DECAY = 0.05, 10.0, 0.75
"""Strength of the pull to the anchor, steps that count little at the start, and decay of the weight of a new step size
in the mean."""


class StepSize(NamedTuple):
    """The logarithm of a step size and the state of dual averaging, of one step size or of one per chain.

    Attributes:
        taken: Transitions so far.
        anchor: Log step size towards which dual averaging shrinks.
        error: Running mean of target less actual acceptance.
        log_step: Logarithm of the step size.
        log_step_mean: Running mean of ``log_step``, used after the warmup.
    """

    taken: Tensor
    anchor: Tensor
    error: Tensor
    log_step: Tensor
    log_step_mean: Tensor


def average(step: StepSize, missing: Tensor) -> StepSize:
    """The step size after a transition whose acceptance was so much below its target."""
    taken = step.taken + 1
    error = step.error + (missing - step.error) / (taken + OFFSET)
    log_step = step.anchor - taken.sqrt() / SHRINKAGE * error
    mean = step.log_step_mean + taken**-DECAY * (log_step - step.log_step_mean)
    return StepSize(taken, step.anchor, error, log_step, mean)
