r"""A factorial code: an autoencoder whose binary-like units cannot be predicted from one another.

.. math::

    z_n = \sigma(f(x_n)) \in (0, 1)^K, \qquad x_n \mid z_n \sim \mathrm{N}(g(z_n), I), \qquad
    z_{nk} \mid z_{n,-k} \sim \mathrm{N}(P_k(z_{n,-k}), I)

The last is the predictors', in the guide: ``inference.objectives.Predictability`` lets them learn, and the encoder
evade them.

Reference: Schmidhuber 1992, "Learning Factorial Codes by Predictability Minimization".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.models.checks import count_of
from ppl_models.models.linear_factors import Autoencoder
from ppl_models.models.parts.information import pairwise_information
from ppl_models.models.parts.networks import mlp


class Predictors(nn.Module):
    """For each of K units a network of the others: (..., K) to (..., K), in one product of matrices a layer.

    Args:
        units: K, at least 2.
        hidden: Widths of the hidden layers of each.
    """

    def __init__(self, units: int, hidden: Sequence[int] = (32,)) -> None:
        super().__init__()
        widths = (units, *hidden, 1)
        self.weights = nn.ParameterList(torch.randn(units, b, a) / a**0.5 for a, b in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(units, b) for b in widths[1:])
        self.others: Tensor
        self.register_buffer("others", 1 - torch.eye(units))

    def forward(self, z: Tensor) -> Tensor:
        """What each unit is expected to be, given all others."""
        out: Tensor = z[..., None, :] * self.others
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            out = (weight @ (out.tanh() if depth else out)[..., None])[..., 0] + bias
        return out[..., 0]


class FactorialCode(Autoencoder):
    """An autoencoder with predictors of its units.

    Args:
        units: Number of units K, at least 2, or their names.
        hidden: Widths of the hidden layers of encoder and decoder, where these are not given.
        predictors: Widths of the hidden layers of each predictor.

    The rest, and the sites, are those of :class:`Autoencoder`; the code lies between zero and one.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        units: int | Sequence[str],
        *,
        hidden: Sequence[int] = (64,),
        predictors: Sequence[int] = (32,),
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        wide, narrow = count_of(features), count_of(units)
        if narrow < 2:
            raise ValueError(f"units: expected at least 2, which predict each other, got {narrow}")
        inward = mlp(wide, *hidden, narrow) if encoder is None else encoder
        super().__init__(
            features,
            units,
            encoder=nn.Sequential(inward, nn.Sigmoid()),
            decoder=mlp(narrow, *hidden, wide) if decoder is None else decoder,
        )
        self.predictors = Predictors(narrow, predictors)

    def guide(
        self,
        x: Tensor,
        *,
        predict: bool = False,
    ) -> None:
        """The code of each row; if asked, each unit of it as the others predict it."""
        with self.rows(x):
            z = pyro.sample("z", self.posterior(x))
            if predict:
                pyro.sample("predicted", dist.Normal(self.predictors(z), 1.0).to_event(1), obs=z)


def mutual_information(code: Tensor, bins: int = 10) -> Tensor:
    """Mutual information of each pair of units of a code (N, K) in [0, 1], in bits: (K, K), entropies on the diagonal.

    Units are read in bins of equal width. Rows' own frequencies are taken for probabilities: for independent units of b
    bins each that are in use about (b - 1)^2 / (2 N log 2) bits come out.
    """
    return pairwise_information((code * bins).long().clamp(0, bins - 1), bins) / math.log(2)
