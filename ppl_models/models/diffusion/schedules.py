r"""Schedules of a diffusion chain: its signal :math:`\bar\alpha` by step, and which steps are taken."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_models.models.checks import check_count


def linear(steps: int) -> Tensor:
    r"""Signal (T,) of Ho et al. 2020: noise from 0.0001 to 0.02 a step for a thousand steps, more for fewer."""
    scale = 1000 / steps
    noise = torch.linspace(1e-4 * scale, min(0.02 * scale, 0.999), steps, dtype=torch.float64)
    return (1 - noise.clamp(max=0.999)).cumprod(0)


def cosine(steps: int) -> Tensor:
    r"""Signal (T,) of Nichol and Dhariwal 2021: :math:`\cos^2` of time, noise a step at most 0.999."""
    at = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008
    signal = (at * math.pi / 2).cos().square()
    return (signal[1:] / signal[:-1]).clamp(min=0.001).cumprod(0)


def log_snr(steps: int, first: float = 12.0, last: float = -8.0) -> Tensor:
    r"""Signal (T,) whose log ratio to the noise falls in equal steps, for data with detail at every scale.

    Args:
        first: :math:`\log \bar\alpha_1 / (1 - \bar\alpha_1)`: the finest detail has standard deviation exp(-first / 2).
        last: The same of :math:`\bar\alpha_T`.
    """
    return torch.linspace(first, last, steps, dtype=torch.float64).sigmoid()


SCHEDULES = {"linear": linear, "cosine": cosine, "log_snr": log_snr}


def signal_of(schedule: str | Tensor, steps: int) -> Tensor:
    """The signal (T,) of a schedule's name, or as it is given, checked."""
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, or the signal (T,), got {schedule!r}")
        check_count("steps", steps, 2)
        return SCHEDULES[schedule](steps)
    signal = torch.as_tensor(schedule, dtype=torch.float64, device="cpu")
    if signal.dim() != 1 or len(signal) < 2:
        raise ValueError(f"schedule: expected a signal (T,) of at least two steps, got {tuple(signal.shape)}")
    whole = torch.cat([torch.ones(1, dtype=torch.float64), signal])
    wrong = (~(whole[1:] < whole[:-1]) | ~(whole[1:] > 0)).nonzero()
    if len(wrong):
        t = int(wrong[0]) + 1
        raise ValueError(
            f"schedule: expected a signal that falls, within (0, 1), got {whole[t - 1]:.4g} and then {whole[t]:.4g} "
            f"at step {t}"
        )
    return signal


def ratio_of(signal: Tensor) -> Tensor:
    """Log ratio (T + 1,) of a signal (T,) to what is lost of it, from step 0, where nothing is."""
    return torch.cat([torch.full_like(signal[:1], torch.inf), signal.logit()])


def interpolate(ratio: Tensor, t: Tensor) -> Tensor:
    """A table (T + 1,) of steps at t (...,), linearly between two of them and beyond the first, which is 1."""
    if not t.is_floating_point():
        return ratio[t]
    low = t.detach().floor().clamp(1, len(ratio) - 2).long()
    return ratio[low] + (t - low) * (ratio[low + 1] - ratio[low])


def path(start: int, steps: int) -> list[int]:
    """So many steps of the chain from ``start`` downwards, spread evenly, the last of them 1 or near."""
    if not isinstance(steps, int) or not 1 <= steps <= start:
        raise ValueError(f"steps: expected 1 to {start} (those of the chain), got {steps!r}")
    return [round(start - k * (start - 1) / max(steps - 1, 1)) for k in range(steps)]
