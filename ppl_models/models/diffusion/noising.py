r"""The forward process of a diffusion chain: Gaussian noise added step by step, and its exact posterior given the rows.

.. math::

    q(x_t \mid x_0) = \mathrm{N}(\sqrt{\bar\alpha_t}\, x_0, (1 - \bar\alpha_t) I), \qquad
    q(x_{t-1} \mid x_t, x_0) = \mathrm{N}(\tilde\mu_t(x_t, x_0), \tilde\beta_t I)

Reference: Ho, Jain and Abbeel 2020 (https://arxiv.org/abs/2006.11239), equations 4, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from ppl_models.models.checks import check_entries
from ppl_models.models.diffusion.schedules import at_steps, log_snr_of
from ppl_models.models.pair import Pair


class Noising(Pair):
    r"""The forward process, which has no parameters.

    In its methods t is an integer, or a tensor (...,) that gives results (..., 1).

    Args:
        features: Number of features D, or their names.
        alpha_bar: :math:`\bar\alpha` (T,), decreasing.
    """

    def __init__(self, features: int | Sequence[str], alpha_bar: Tensor) -> None:
        super().__init__()
        self.features = self.name_dimension("features", features)
        self.steps = len(alpha_bar)
        # The log ratio keeps the digits of alpha_bar near 0 and near 1.
        self.register_buffer("log_snr", log_snr_of(alpha_bar))
        self.register_buffer("origin", torch.zeros(self.features))

    def prior(self) -> dist.TorchDistribution:
        """p(x_T): N(0, I), an event (D,)."""
        return dist.Normal(self.origin, 1.0).to_event(1)

    def alpha_bar(self, t: int | Tensor) -> Tensor:
        r""":math:`\bar\alpha_t`: the fraction of the variance of x_t that is due to the data."""
        return self._log_snr_at(t).sigmoid().to(self.origin)

    def noise_variance(self, t: int | Tensor) -> Tensor:
        r""":math:`1 - \bar\alpha_t`."""
        return (-self._log_snr_at(t)).sigmoid().to(self.origin)

    def alpha(self, t: int | Tensor) -> Tensor:
        r""":math:`\alpha_t = \bar\alpha_t / \bar\alpha_{t-1}`."""
        return self.alpha_bar(t) / self.alpha_bar(t - 1)

    def beta(self, t: int | Tensor) -> Tensor:
        r""":math:`\beta_t = 1 - \alpha_t`, the variance that step t adds."""
        return self.added_variance(t - 1, t)

    def added_variance(self, s: int | Tensor, t: int | Tensor) -> Tensor:
        r""":math:`1 - \bar\alpha_t / \bar\alpha_s`, the variance that steps s + 1 to t add.

        Computed from logarithms: a difference of values of :math:`\bar\alpha` would lose digits.
        """
        late, early = (nn.functional.logsigmoid(self._log_snr_at(v)) for v in (t, s))
        return -torch.expm1(late - early).to(self.origin)

    def noised(self, x0: Tensor, t: int | Tensor) -> dist.TorchDistribution:
        """q(x_t | x_0) of scaled rows (..., D)."""
        return normal_event(self.alpha_bar(t).sqrt() * x0, self.noise_variance(t).sqrt())

    def posterior(self, x_t: Tensor, x0: Tensor, t: int | Tensor) -> dist.TorchDistribution:
        """q(x_{t-1} | x_t, x_0) of scaled rows (..., D); at step 1, where it is a point, with step 2's variance."""
        return normal_event(self.posterior_mean(x_t, x0, t), self.variance_bounds(t)[0].sqrt())

    def posterior_mean(self, x_t: Tensor, x0: Tensor, t: int | Tensor) -> Tensor:
        r""":math:`\tilde\mu_t(x_t, x_0)`, the mean of :meth:`posterior` (..., D)."""
        weighted = self.alpha_bar(t - 1).sqrt() * self.beta(t) * x0
        return (weighted + self.alpha(t).sqrt() * self.noise_variance(t - 1) * x_t) / self.noise_variance(t)

    def variance_bounds(self, t: int | Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\tilde\beta_t` and :math:`\beta_t`, between which the variance of a reverse step lies.

        At step 1, where the first is zero, it is that of step 2.
        """
        inner = max(t, 2) if isinstance(t, int) else t.clamp(min=2)
        return self.beta(inner) * self.noise_variance(inner - 1) / self.noise_variance(inner), self.beta(t)

    def _log_snr_at(self, t: int | Tensor) -> Tensor:
        if isinstance(t, Tensor):
            if not am_i_wrapped():
                check_entries("t", t, ~((t >= 0) & (t <= self.steps)), f"steps 0 to {self.steps}")
            return at_steps(self.log_snr, t)[..., None]
        if not 0 <= t <= self.steps:
            raise ValueError(f"t: expected steps 0 to {self.steps}, got {t!r}")
        return self.log_snr[t]


def normal_event(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    """Independent normals with one event dimension (D,)."""
    return dist.Normal(loc, scale.expand(loc.shape), validate_args=False).to_event(1)


def draw(distribution: Any, random: torch.Generator) -> Tensor:
    """A draw from a normal by a generator on the CPU: a seed gives the same draw on every device."""
    return distribution.mean + distribution.stddev * noise_like(distribution.mean, random)


def noise_like(x: Tensor, random: torch.Generator) -> Tensor:
    """Standard normal noise of the shape, type and device of x, by a generator on the CPU."""
    return torch.randn(x.shape, generator=random).to(x)
