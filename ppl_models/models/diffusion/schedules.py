r"""Noise schedules of a diffusion chain, :math:`\bar\alpha_t` by step, and the steps that a sampler takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from ppl_models.models.checks import check_count


def linear(steps: int) -> Tensor:
    r""":math:`\bar\alpha` (T,) of Ho et al. 2020: :math:`\beta_t` linear in t, from 0.0001 to 0.02 for 1,000 steps.

    For other T the two ends are scaled by 1000 / T.
    """
    scale = 1000 / steps
    beta = torch.linspace(1e-4 * scale, min(0.02 * scale, 0.999), steps, dtype=torch.float64)
    return (1 - beta.clamp(max=0.999)).cumprod(0)


def cosine(steps: int) -> Tensor:
    r""":math:`\bar\alpha` (T,) of Nichol and Dhariwal 2021: a squared cosine of t / T, with each beta at most 0.999."""
    time = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008
    alpha_bar = (time * math.pi / 2).cos().square()
    return (alpha_bar[1:] / alpha_bar[:-1]).clamp(min=0.001).cumprod(0)


def log_snr(steps: int, first: float = 12.0, last: float = -8.0) -> Tensor:
    r""":math:`\bar\alpha` (T,) whose log signal-to-noise ratio is linear in t, for data with detail at every scale.

    Args:
        first: :math:`\log \bar\alpha_1 / (1 - \bar\alpha_1)`; noise of step 1 has standard deviation exp(-first / 2)
            relative to the rows.
        last: The same at step T.
    """
    return torch.linspace(first, last, steps, dtype=torch.float64).sigmoid()


SCHEDULES = {"linear": linear, "cosine": cosine, "log_snr": log_snr}


def alpha_bar_of(schedule: str | Tensor, steps: int) -> Tensor:
    r""":math:`\bar\alpha` (T,) of a schedule given by name, or by its values, which are checked.

    Raises:
        ValueError: Unknown name, fewer than two steps, or values that do not decrease within (0, 1).
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, or alpha_bar (T,), got {schedule!r}")
        check_count("steps", steps, 2)
        return SCHEDULES[schedule](steps)
    if not isinstance(schedule, Tensor | Sequence):
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, or alpha_bar (T,), got {schedule!r}")
    alpha_bar = torch.as_tensor(schedule, dtype=torch.float64, device="cpu")
    if alpha_bar.dim() != 1 or len(alpha_bar) < 2:
        raise ValueError(f"schedule: expected alpha_bar (T,) of at least two steps, got {tuple(alpha_bar.shape)}")
    values = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar])
    wrong = (~(values[1:] < values[:-1]) | ~(values[1:] > 0)).nonzero()
    if len(wrong):
        t = int(wrong[0]) + 1
        raise ValueError(
            f"schedule: expected alpha_bar to decrease within (0, 1), got {values[t - 1]:.4g} and then {values[t]:.4g} "
            f"at step {t}"
        )
    return alpha_bar


def log_snr_of(alpha_bar: Tensor) -> Tensor:
    r""":math:`\log \bar\alpha_t / (1 - \bar\alpha_t)` (T + 1,), from step 0, where it is infinite."""
    return torch.cat([torch.full_like(alpha_bar[:1], torch.inf), alpha_bar.logit()])


def at_steps(table: Tensor, t: Tensor) -> Tensor:
    """Values (...,) of a table (T + 1,) at steps t (...,): interpolated linearly, and extrapolated below step 1."""
    if not t.is_floating_point():
        return table[t]
    low = t.detach().floor().clamp(1, len(table) - 2).long()
    return table[low] + (t - low) * (table[low + 1] - table[low])


def timesteps(start: int, steps: int) -> list[int]:
    """That many steps of the chain in descending order, evenly spaced from ``start`` to 1."""
    if not isinstance(steps, Integral) or not 1 <= steps <= start:
        raise ValueError(f"steps: expected 1 to {start} (those of the chain), got {steps!r}")
    return [round(start - k * (start - 1) / max(steps - 1, 1)) for k in range(steps)]
