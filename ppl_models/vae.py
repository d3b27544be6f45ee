r"""Variational autoencoders: a few hidden causes of every row, decoded and encoded by networks.

.. math:: z_n \sim \mathrm{N}(0, I_L), \qquad x_n \mid z_n \sim p(x \mid g(z_n)), \qquad
    q(z_n \mid x_n) = \mathrm{N}(f_\mu(x_n), \mathrm{diag}(f_\sigma(x_n))^2)

Reference: Kingma and Welling 2014, "Auto-Encoding Variational Bayes" (https://arxiv.org/abs/1312.6114).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor, nn

from ppl_models.linear_factors import FactorModel, check_network
from ppl_models.networks import mlp

LIKELIHOODS = ("bernoulli", "continuous_bernoulli", "gaussian")


class VAE(FactorModel):
    r"""A variational autoencoder.

    Args:
        features: Number of features D, or their names.
        factors: Number of factors L, or their names.
        likelihood: ``bernoulli``: x in [0, 1], a density only for zeros and ones; ``continuous_bernoulli``: x in
            [0, 1] (Loaiza-Ganem and Cunningham 2019); ``gaussian``: any x, with one noise variance that is learnt.
        hidden: Widths of the hidden layers of both networks, from x to z.
        encoder: From rows (..., D) to means and log standard deviations (..., 2 L) of the guide. Default: tanh layers.
        decoder: From factors (..., L) to logits, or means, of the rows (..., D). Default: tanh layers.

    Data: x (N, D). Sites: z (L,) and x (D,) of every row.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> pair = VAE(features=6, factors=2, hidden=(4,))
        >>> pair.model(size=3).shape, pair.encode(torch.zeros(3, 6)).shape, pair.decode(torch.zeros(2)).shape
        (torch.Size([3, 6]), torch.Size([3, 2]), torch.Size([6]))
    """

    def __init__(
        self,
        features: int | Sequence[str],
        factors: int | Sequence[str],
        *,
        likelihood: str = "bernoulli",
        hidden: Sequence[int] = (200, 200),
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood: expected one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")
        super().__init__(features, factors)
        widths = self.features, *hidden
        self.encoder = mlp(*widths, 2 * self.factors) if encoder is None else encoder
        self.decoder = mlp(self.factors, *reversed(widths)) if decoder is None else decoder
        check_network("encoder", self.encoder, self.features, 2 * self.factors)
        check_network("decoder", self.decoder, self.factors, self.features)
        self.kind = likelihood
        if likelihood == "gaussian":
            self.noise: Any = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) of factors (..., L), an event (D,)."""
        out = self.decoder(z)
        if self.kind == "gaussian":
            return dist.Normal(out, self.noise.sqrt()).to_event(1)
        if self.kind == "continuous_bernoulli":
            return dist.ContinuousBernoulli(logits=out).to_event(1)
        # Grey pixels are taken, as everybody takes them: the check of x has seen that they lie in [0, 1].
        return dist.Bernoulli(logits=out, validate_args=False).to_event(1)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) of rows (..., D), an event (L,)."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def encode(self, x: Tensor) -> Tensor:
        """Means of the factors (..., L) of rows (..., D)."""
        return self.encoder(x).chunk(2, -1)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Means of the rows (..., D) of factors (..., L)."""
        return self.likelihood(z).mean

    def divergences(self, x: Tensor) -> Tensor:
        r"""KL divergence of the guide from the prior, of every factor and row (N, L), in nats."""
        law = self.posterior(x).base_dist
        return 0.5 * (law.loc.square() + law.scale.square() - 1) - law.scale.log()

    def active(self, x: Tensor, *, least: float = 0.01) -> Tensor:
        r"""Active factors (L,): :math:`\mathrm{Var}_n(\mathrm{E}_q[z \mid x_n]) > 0.01` (Burda et al. 2016)."""
        return self.encode(x).var(0) > least

    def check(self, x: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite (rows, D), of pixels in [0, 1] unless the likelihood is Gaussian."""
        super().check(x)
        if x is not None and self.kind != "gaussian" and bool(((x < 0) | (x > 1)).any()):
            wrong = x[(x < 0) | (x > 1)][0].item()
            raise ValueError(f"x: expected pixels in [0, 1] for a {self.kind} likelihood, got {wrong:g}")
