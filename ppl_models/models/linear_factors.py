r"""Linear factor models: each row is a linear mixture of a few latent factors, plus noise.

.. math:: z_n \sim \mathrm{N}(0, I_L), \qquad x_n \mid z_n \sim \mathrm{N}(W z_n + \mu, \Psi)

Factor analysis has a diagonal :math:`\Psi`, probabilistic PCA has :math:`\Psi = \sigma^2 I`. Their guide is the exact
posterior of z, so the ELBO is the log evidence. The deterministic autoencoder has a flat prior of z and a Delta guide;
with linear networks it spans the subspace of PCA.

References: Tipping and Bishop 1999, "Probabilistic Principal Component Analysis"; Bourlard and Kamp 1988,
"Auto-association by multilayer perceptrons and singular value decomposition".
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor, nn

from ppl_models.models.checks import check_count, check_matrix, known_or_zero
from ppl_models.models.pair import Pair, checked
from ppl_models.models.parts import grids
from ppl_models.models.parts.completion import Correlated, View, complete, restore
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.networks import check_network


class FactorModel(Pair):
    """Base class: latent factors z of each row, with prior N(0, I).

    Args:
        features: Number of features D, or their names.
        factors: Number of factors L, or their names.

    Data: x (N, D). Sites: z (L,) and x (D,) of each row.
    """

    def __init__(self, features: int | Sequence[str], factors: int | Sequence[str]) -> None:
        super().__init__()
        self.features = self.name_dimension("features", features)
        self.factors = self.name_dimension("factors", factors)
        self.register_buffer("origin", torch.zeros(self.factors))
        self.dims = {"z": ("factors",), "x": ("features",)}

    @abstractmethod
    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) of factors (..., L), an event (D,)."""

    @abstractmethod
    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) of rows (..., D), an event (L,): the guide."""

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw or score factors and rows; return x."""
        with self.rows(x):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw or score the factors of each row."""
        with self.rows(x):
            pyro.sample("z", self.posterior(x))

    def prior(self) -> dist.TorchDistribution:
        """p(z): N(0, I), an event (L,)."""
        return dist.Normal(self.origin, 1.0).to_event(1)

    def check(self, x: Any = None, *, z: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite matrix (rows, D), and z, factors of rows, a finite (rows, L)."""
        if x is not None:
            check_matrix("x", x, self.features)
        if z is not None:
            check_matrix("z", z, self.factors)


class FactorAnalysis(FactorModel):
    r"""Factor analysis: one noise variance per feature.

    .. math:: p(x) = \mathrm{N}(\mu, W W^\top + \Psi), \qquad \Psi = \mathrm{diag}(\psi)

    Arguments and sites are those of :class:`FactorModel`, with at most as many factors as features. p(x) is invariant
    under rotations of the factors. The guide is exact and has no parameters of its own.

    Attributes:
        loadings: W (D, L), in units of x; initialised by independent draws of N(0, 1 / L).
        mean: :math:`\mu` (D,), in units of x; initialised at 0.
        noise: :math:`\psi` (D,), noise variances in squared units of x; initialised at 1.

    These are parameters, which can be set by assigning a tensor. Their initial values suit standardised data.
    """

    def __init__(self, features: int | Sequence[str], factors: int | Sequence[str]) -> None:
        super().__init__(features, factors)
        if self.factors > self.features:
            raise ValueError(f"factors: expected at most {self.features} (the features), got {self.factors}")
        self.loadings: Any = PyroParam(torch.randn(self.features, self.factors) / self.factors**0.5)
        self.mean: Any = PyroParam(torch.zeros(self.features))
        self.noise: Any = PyroParam(torch.ones(self.features), constraint=constraints.positive)

    @partial(checked, leading=True)
    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) of factors (..., L), an event (D,)."""
        return dist.Normal(z @ self.loadings.mT + self.mean, self.noise.sqrt()).to_event(1)

    @partial(checked, leading=True)
    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        r"""p(z | x) of rows (..., D): :math:`\mathrm{N}(M^{-1} W^\top \Psi^{-1} (x - \mu), M^{-1})`, an event (L,).

        The precision :math:`M = I + W^\top \Psi^{-1} W` is an L x L matrix, the same for all rows.
        """
        weighted = self.loadings.mT / self.noise
        precision = torch.eye(self.factors, dtype=weighted.dtype, device=weighted.device) + weighted @ self.loadings
        # Products of single precision are not symmetric to the last digit, and MultivariateNormal asks for that.
        precision = (precision + precision.mT) / 2
        gain = torch.cholesky_solve(weighted, torch.linalg.cholesky(precision))
        return dist.MultivariateNormal((x - self.mean) @ gain.mT, precision_matrix=precision)

    @partial(checked, leading=True)
    def log_evidence(self, x: Tensor) -> Tensor:
        r"""Exact log p(x) of rows (..., D), in nats: (...).

        By Bayes' rule :math:`p(x) = p(x \mid z) \, p(z) / p(z \mid x)` at any z, here at the posterior mean. This
        amounts to the matrix inversion and determinant lemmas, without a D x D matrix or differences of large numbers.
        """
        posterior = self.posterior(x)
        z = posterior.mean
        return self.likelihood(z).log_prob(x) + self.prior().log_prob(z) - posterior.log_prob(z)

    def impute(self, x: Tensor, draws: int = 1, **_: Any) -> Tensor:
        r"""Draw the missing entries (nan) of rows (N, D) given the known ones, exactly: (draws, N, D).

        Those are the conditionals of :math:`\mathrm{N}(\mu, W W^\top + \Psi)`.
        """
        check_count("draws", draws)
        self.check(known_or_zero(x))
        return complete(x, draws, torch.zeros(1, 1, dtype=x.dtype, device=x.device), self._gaussian())

    def restore(self, x: Tensor, **view: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation (N, D) of rows that are seen through noise (N, M), exactly, and zeros.

        Args:
            x: What is seen.
            view: ``sd`` and ``matrix`` of a :class:`View`.
        """
        seen = View.of(view)
        check_matrix("x", x, self.features if seen.matrix is None else len(seen.matrix))
        return restore(x, torch.zeros(1, 1, dtype=x.dtype, device=x.device), self._gaussian(), seen)

    def _gaussian(self) -> Correlated:
        r"""p(x), as the only component."""
        covariance = self.loadings @ self.loadings.mT + self.noise.expand(self.features).diag()
        return Correlated(self.mean[None, None], covariance[None, None])


class PPCA(FactorAnalysis):
    r"""Probabilistic PCA: the same noise variance for all features.

    .. math:: p(x) = \mathrm{N}(\mu, W W^\top + \sigma^2 I)

    Arguments, sites and parameters are those of :class:`FactorAnalysis`, except that ``noise`` is the scalar
    :math:`\sigma^2`.

    Example:
        >>> x = torch.tensor([[3.0, 3.0], [-3.0, -3.0], [1.0, -1.0], [-1.0, 1.0]])
        >>> pair = PPCA(features=2, factors=1).closed_form(x)
        >>> print(f"{pair.noise.item():.3f}")  # the variance along (1, -1); along (1, 1) it is 9
        1.000
        >>> (pair.loadings @ pair.loadings.mT).detach().round(decimals=3)  # 9 - 1, half of it in each feature
        tensor([[4., 4.],
                [4., 4.]])
    """

    def __init__(self, features: int | Sequence[str], factors: int | Sequence[str]) -> None:
        super().__init__(features, factors)
        self.noise = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    @checked
    def closed_form(self, x: Tensor) -> Self:
        r"""Set the parameters, in place, to the maximum likelihood estimate.

        With eigenvalues :math:`\lambda_1 \ge \dots \ge \lambda_D` and eigenvectors :math:`u_j` of the covariance of x,

        .. math::

            \sigma^2 = \frac{1}{D - L} \sum_{j > L} \lambda_j, \qquad
            W = [u_1 \sqrt{\lambda_1 - \sigma^2}, \dots, u_L \sqrt{\lambda_L - \sigma^2}]

        The covariance is divided by N. Scikit-learn's PCA divides by N - 1, in its score too: its covariance of x is
        this one times N / (N - 1).

        Args:
            x: Rows (N, D).

        Returns:
            The pair itself.

        Raises:
            ValueError: There are as many factors as features, or x varies in L directions only: :math:`\sigma^2` would
                be 0.
        """
        rest = self.features - self.factors
        if rest == 0:
            raise ValueError(f"factors: expected fewer than {self.features} (the features), got {self.factors}")
        values, vectors = torch.linalg.eigh(torch.cov(x.mT, correction=0))
        noise = values[:rest].mean()
        if not noise > self.features * torch.finfo(x.dtype).eps * values[-1]:
            raise ValueError(f"x: expected rows that vary in more than {self.factors} directions, got no other")
        loadings = vectors[:, rest:] * (values[rest:] - noise).clamp_min(0).sqrt()
        self.loadings = loadings.flip(-1).to(self.loadings)
        self.mean = x.mean(0).to(self.mean)
        self.noise = noise.to(self.noise)
        return self


class Autoencoder(FactorModel):
    r"""Deterministic autoencoder: the pair whose guide is a Delta at the output of the encoder.

    .. math::

        p(z_n) \propto 1, \qquad x_n \mid z_n \sim \mathrm{N}(g(z_n), I), \qquad
        q(z_n \mid x_n) = \delta(z_n - f(x_n))

    The ELBO is :math:`-\frac{1}{2} \sum_n \| x_n - g(f(x_n)) \|^2` plus a constant. The flat prior is a masked
    N(0, I): it adds nothing to the ELBO, and without data z is drawn from N(0, I).

    Args:
        encoder: f, from rows (..., D) to (..., L). Default: ``nn.Linear``.
        decoder: g, from codes (..., L) to (..., D). Default: ``nn.Linear``.

    The other arguments and the sites are those of :class:`FactorModel`.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        factors: int | Sequence[str],
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__(features, factors)
        # Two linear maps are no network.
        self.learning_rate = 0.02 if encoder is None and decoder is None else None
        self.encoder = nn.Linear(self.features, self.factors) if encoder is None else encoder
        self.decoder = nn.Linear(self.factors, self.features) if decoder is None else decoder
        check_network("encoder", self.encoder, self.features, self.factors)
        check_network("decoder", self.decoder, self.factors, self.features)

    def prior(self) -> dist.TorchDistribution:
        """A flat density, drawn from N(0, I); an event (L,)."""
        return super().prior().mask(False)

    @partial(checked, leading=True)
    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) of codes (..., L), an event (D,)."""
        return dist.Normal(self.decode(z), 1.0).to_event(1)

    @partial(checked, leading=True)
    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """A Delta at the codes of rows (..., D), an event (L,)."""
        return dist.Delta(self.encode(x), event_dim=1)

    @partial(checked, leading=True)
    def encode(self, x: Tensor) -> Tensor:
        """Codes (..., L) of rows (..., D)."""
        return self.encoder(x)

    @partial(checked, leading=True)
    def decode(self, z: Tensor) -> Tensor:
        """Rows (..., D) of codes (..., L)."""
        return self.decoder(z)

    @checked
    def pictures(self, x: Tensor, **_: Any) -> dict[str, Grid]:
        """Reconstructions of rows."""
        return {"reconstructions": grids.reconstructions(self, x)}
