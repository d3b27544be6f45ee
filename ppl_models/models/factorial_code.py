r"""Predictability minimisation: an autoencoder whose code units cannot be predicted from one another.

.. math::

    z_n = \sigma(f(x_n)) \in (0, 1)^K, \qquad x_n \mid z_n \sim \mathrm{N}(g(z_n), I), \qquad
    z_{nk} \mid z_{n,-k} \sim \mathrm{N}(P_k(z_{n,-k}), I)

The predictors :math:`P_k` are part of the guide. ``inference.objectives.Predictability`` trains them to predict, and
the encoder to be unpredictable.

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

from ppl_models.models.checks import check_count, check_matrix, check_widths, count_of
from ppl_models.models.linear_factors import Autoencoder
from ppl_models.models.parts.information import pairwise_information
from ppl_models.models.parts.networks import mlp


class Predictors(nn.Module):
    """Predictions (..., K) of each of K units from the others, by one network per unit, evaluated together.

    Args:
        units: K, at least 2.
        hidden: Widths of the hidden layers of each network.
    """

    def __init__(self, units: int, hidden: Sequence[int] = (32,)) -> None:
        super().__init__()
        widths = (units, *hidden, 1)
        self.weights = nn.ParameterList(torch.randn(units, b, a) / a**0.5 for a, b in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(units, b) for b in widths[1:])
        self.others: Tensor
        self.register_buffer("others", 1 - torch.eye(units))

    def forward(self, z: Tensor) -> Tensor:
        """The expected value of each unit given all others."""
        out: Tensor = z[..., None, :] * self.others
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            out = (weight @ (out.tanh() if depth else out)[..., None])[..., 0] + bias
        return out[..., 0]


class FactorialCode(Autoencoder):
    """An autoencoder with a code in (0, 1) and predictors of its units.

    Args:
        units: Number of units K, at least 2, or their names.
        hidden: Widths of the hidden layers of the default encoder and decoder.
        predictors: Widths of the hidden layers of each predictor.

    The other arguments, and the sites, are those of :class:`Autoencoder`.
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
        # At least two units, as they predict each other.
        wide, narrow = count_of("features", features), count_of("units", units, 2)
        check_widths("hidden", hidden, 0)
        check_widths("predictors", predictors, 0)
        encoder = mlp(wide, *hidden, narrow) if encoder is None else encoder
        super().__init__(
            features,
            units,
            encoder=nn.Sequential(encoder, nn.Sigmoid()),
            decoder=mlp(narrow, *hidden, wide) if decoder is None else decoder,
        )
        self.predictors = Predictors(narrow, predictors)

    def guide(self, x: Tensor, *, predict: bool = False) -> None:
        """Encode each row; with ``predict`` also score each unit of the code by its predictor."""
        with self.rows(x):
            z = pyro.sample("z", self.posterior(x))
            if predict:
                pyro.sample("predicted", dist.Normal(self.predictors(z), 1.0).to_event(1), obs=z)


def mutual_information(code: Tensor, bins: int = 10) -> Tensor:
    """Mutual information (K, K) in bits of each pair of units of a code (N, K) in [0, 1]; entropies on the diagonal.

    Units are discretised into bins of equal width. Probabilities are the frequencies of the rows, which biases the
    estimate upwards: independent units with b occupied bins have about (b - 1)^2 / (2 N log 2) bits.
    """
    check_matrix("code", code, code.shape[-1])
    check_count("bins", bins, 2)
    return pairwise_information((code * bins).long().clamp(0, bins - 1), bins) / math.log(2)
