r"""The noise of a diffusion chain: what its guide does to rows, step by step, and what undoes it when they are known.

.. math::

    q(x_t \mid x) = \mathrm{N}(\sqrt{\bar\alpha_t}\, x, (1 - \bar\alpha_t) I), \qquad
    q(x_{t-1} \mid x_t, x) = \mathrm{N}(\mu_t(x_t, x), \tilde\beta_t I)

Reference: Ho, Jain and Abbeel 2020 (https://arxiv.org/abs/2006.11239), equations 4, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.models.diffusion.schedules import interpolate, ratio_of
from ppl_models.models.pair import Pair


class Noising(Pair):
    r"""What noise leaves of rows, by step: the part of a chain that has no parameters.

    Args:
        features: Number of features D, or their names.
        signal: :math:`\bar\alpha` (T,), which falls.
    """

    def __init__(self, features: int | Sequence[str], signal: Tensor) -> None:
        super().__init__()
        self.features = self.name_dimension("features", features)
        self.steps = len(signal)
        # Ratios: what is left of small signals and of small noise keeps its digits.
        self.register_buffer("ratio", ratio_of(signal))
        self.register_buffer("origin", torch.zeros(self.features))

    def prior(self) -> dist.TorchDistribution:
        """p(x_T): N(0, I), an event (D,)."""
        return dist.Normal(self.origin, 1.0).to_event(1)

    def signal(self, t: int | Tensor) -> Tensor:
        r"""What is left of the data, :math:`\bar\alpha`, at steps t, an integer or (...,): a number, or (..., 1)."""
        return self._ratio(t).sigmoid().to(self.origin)

    def lost(self, t: int | Tensor) -> Tensor:
        r"""The rest, :math:`1 - \bar\alpha`."""
        return (-self._ratio(t)).sigmoid().to(self.origin)

    def _ratio(self, t: int | Tensor) -> Tensor:
        return self.ratio[t] if isinstance(t, int) else interpolate(self.ratio, t)[..., None]

    def noised(self, clean: Tensor, t: int | Tensor) -> dist.TorchDistribution:
        """q(x_t | x) of scaled rows (..., D)."""
        return normal_event(self.signal(t).sqrt() * clean, self.lost(t).sqrt())

    def posterior(self, noised: Tensor, clean: Tensor, t: int | Tensor) -> dist.TorchDistribution:
        """q(x_{t-1} | x_t, x) of noised and scaled rows (..., D); of step 1, where it is a point, with the spread of
        step 2."""
        return normal_event(self._between(noised, clean, t), self._bounds(t)[0].sqrt())

    def _between(self, noised: Tensor, clean: Tensor, t: int | Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x)."""
        before, keep, lost = self.signal(t - 1), self.signal(t) / self.signal(t - 1), self.lost(t)
        return (before.sqrt() * self._added(t) * clean + keep.sqrt() * self.lost(t - 1) * noised) / lost

    def _bounds(self, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """Variances of the guide's posterior, of step 2 for step 1 which has none, and of the forward step."""
        first = max(t, 2) if isinstance(t, int) else t.clamp(min=2)
        return self._added(first) * self.lost(first - 1) / self.lost(first), self._added(t)

    def _added(self, t: int | Tensor) -> Tensor:
        """Variance of the forward step."""
        return self._between_steps(t - 1, t)

    def _between_steps(self, first: int | Tensor, last: int | Tensor) -> Tensor:
        """What is lost of the signal from one step to another, by its logarithms: differences of shares lose digits."""
        now, before = (nn.functional.logsigmoid(self._ratio(t)) for t in (last, first))
        return -torch.expm1(now - before).to(self.origin)


def normal_event(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    """A normal of rows, an event (D,)."""
    return dist.Normal(loc, scale.expand(loc.shape), validate_args=False).to_event(1)
