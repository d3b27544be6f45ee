r"""Naive Bayes: features that are independent given the class.

.. math::

    \pi \sim \mathrm{Dirichlet}(c), \qquad \theta_{kj} \sim \text{conjugate prior}, \qquad
    y_n \sim \mathrm{Categorical}(\pi), \qquad x_{nj} \mid y_n \sim p(x \mid \theta_{y_n j})

Labels may be known, missing, or partly missing; missing labels are summed out. If all labels are known the posterior is
conjugate, and ``exact`` is that posterior as a guide.

Reference: Murphy 2022, Probabilistic Machine Learning: An Introduction, section 9.3 and chapter 4.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions.utils import probs_to_logits

from ppl_models.models.checks import (
    check_binary,
    check_count,
    check_entries,
    check_labels,
    check_matrix,
    check_number,
    check_positive,
    fractional,
    known_or_zero,
)
from ppl_models.models.pair import GuideFactory, Moments, Pair, checked, continuous
from ppl_models.models.parts.completion import Components, Independent, View, complete, in_turn, restore
from ppl_models.models.parts.distributions import (
    Counts,
    LabelledGaussians,
    Labels,
    Occurrences,
    occurrence_parameters,
)
from ppl_models.models.parts.labels import one_hot, rows_by_label


class NaiveBayes(Pair):
    r"""Base class: class weights, labels and rows.

    Args:
        features: Number of features D, or their names.
        classes: Number of classes K, or their names.
        concentration: Dirichlet concentration of the class weights.
        prior: False switches all priors off, so that the guide AutoDelta finds the maximum likelihood estimate.
        guide: From the model to a guide of its parameters: AutoNormal (the default), AutoDelta, ...

    Data: x (N, D); y (N,), integers, or floats with nan where the label is missing; without y all labels are missing.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        classes: int | Sequence[str] = 2,
        *,
        concentration: float = 1.0,
        prior: bool = True,
        guide: GuideFactory = AutoNormal,
    ) -> None:
        super().__init__()
        self.features = self.name_dimension("features", features)
        self.classes = self.name_dimension("classes", classes)
        check_positive("concentration", concentration)
        self.prior = prior
        self.register_buffer("concentration", torch.full((self.classes,), float(concentration)))
        self.dims = {"x": ("features",), "weights": ("classes",)}
        self.guide = guide(continuous(self.model))

    @abstractmethod
    def draw_parameters(self) -> tuple[Tensor, ...]:
        """Sample the class parameters, each (K, D), from their prior. Called within the plate of classes."""

    @abstractmethod
    def likelihood(self, *parameters: Tensor, labels: Tensor, x: Tensor | None) -> dist.TorchDistribution:
        """p(x | y) of the rows, an event (D,), from the class parameters and the labels (..., N)."""

    @abstractmethod
    def draw_posterior(self, rows: Tensor, total: Tensor, squares: Tensor) -> None:
        """Sample the class parameters from their conjugate posterior, given the result of :meth:`count`."""

    @abstractmethod
    def parameter_moments(self, rows: Tensor, total: Tensor, squares: Tensor) -> Moments:
        """Posterior mean and standard deviation of the class parameters, given the result of :meth:`count`."""

    def model(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Draw or score weights, class parameters, labels and rows; return x."""
        with poutine.mask(mask=self.prior):
            weights = pyro.sample("weights", dist.Dirichlet(self.concentration))
            with pyro.plate("classes", self.classes, dim=-1):
                parameters = self.draw_parameters()
        with self.rows(x):
            y = draw_labels(weights, y)
            return pyro.sample("x", self.likelihood(*parameters, labels=y, x=x), obs=x)

    def exact(self, x: Tensor, y: Tensor | None = None) -> None:
        """The conjugate posterior of all parameters as a guide. It has nothing to fit."""
        counts = self.count(x, y)
        pyro.sample("weights", dist.Dirichlet(self.concentration + counts[0]))
        with pyro.plate("classes", self.classes, dim=-1):
            self.draw_posterior(*counts)

    @checked
    def count(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Sufficient statistics of each class: rows (K,), sum (K, D) and sum of squared deviations (K, D)."""
        if y is None or (y.is_floating_point() and bool(y.isnan().any())):
            raise ValueError(
                "y: expected a label for every row (only then is the posterior conjugate), got missing ones"
            )
        member = one_hot(y, self.classes, x.dtype)
        rows = member.sum(0)
        total = member.mT @ x
        centred = x - member @ (total / rows.clamp_min(1)[:, None])
        return rows, total, member.mT @ centred**2

    @checked
    def moments(self, x: Tensor, y: Tensor | None = None) -> Moments:
        """Exact posterior mean and standard deviation of each site, if all labels are known."""
        counts = self.count(x, y)
        posterior = dist.Dirichlet(self.concentration + counts[0])
        return {"weights": (posterior.mean, posterior.stddev), **self.parameter_moments(*counts)}

    def components(self, latents: Mapping[str, Tensor]) -> Components:
        """The features of each class given posterior draws of the parameters by site."""
        raise ValueError(
            f"result: expected independent features to impute or denoise, got those of {type(self).__name__}"
        )

    def impute(
        self, x: Tensor, y: Tensor | None = None, *, latents: Mapping[str, Tensor], draws: int = 1, **_: Any
    ) -> Tensor:
        """Draw the missing features (nan) of rows (N, D) given the known ones, exactly: (draws, N, D).

        Args:
            x: Rows.
            y: Labels (N,); missing ones are summed out.
            latents: Posterior draws of the parameters by site.
            draws: Number of draws per row.
        """
        check_count("draws", draws)
        self.check(known_or_zero(x), y)
        return complete(x, draws, latents["weights"].log(), self.components(latents), y)

    def restore(
        self, x: Tensor, y: Tensor | None = None, *, latents: Mapping[str, Tensor], **view: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation (N, D) of rows that are seen through noise (N, M), exactly, and zeros.

        Args:
            x: What is seen.
            y: Labels (N,), if they are known; else they are summed out.
            latents: Posterior draws of the parameters by site.
            view: ``sd``, ``flips`` and ``matrix`` of a :class:`View`.
        """
        self.check(None, y)
        return restore(x, latents["weights"].log(), self.components(latents), View.of(view), y)

    def check(self, x: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite matrix (rows, D) and y has labels for its rows."""
        if x is not None:
            check_matrix("x", x, self.features)
        if y is not None:
            length = len(x) if x is not None else len(y)
            check_labels("y", y, length, self.classes, missing=True)


class GaussianNaiveBayes(NaiveBayes):
    r"""Gaussian features, with a Normal-Inverse-Gamma prior.

    .. math::

        \sigma^2_{kj} \sim \mathrm{InverseGamma}(a, b), \qquad
        \mu_{kj} \sim \mathrm{N}(m, \sigma^2_{kj} / \kappa), \qquad
        x_{nj} \mid y_n = k \sim \mathrm{N}(\mu_{kj}, \sigma^2_{kj})

    Args:
        mean: m, in units of x.
        strength: :math:`\kappa`, the weight of the prior mean in rows.
        shape: a of the inverse gamma.
        scale: b of the inverse gamma, in squared units of x.

    The other arguments are those of :class:`NaiveBayes`. Sites: weights (K,), variances (K, D), means (K, D), y, x.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        classes: int | Sequence[str] = 2,
        *,
        mean: float = 0.0,
        strength: float = 0.1,
        shape: float = 2.0,
        scale: float = 1.0,
        **shared: Any,
    ) -> None:
        check_number("mean", mean)
        super().__init__(features, classes, **shared)
        for name, value in {"mean": mean, "strength": strength, "shape": shape, "scale": scale}.items():
            if name != "mean":
                check_positive(name, value)
            self.register_buffer(name, torch.full((self.features,), float(value)))
        self.dims |= {"means": ("features",), "variances": ("features",)}

    def draw_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        variances = pyro.sample("variances", dist.InverseGamma(self.shape, self.scale).to_event(1))
        means = pyro.sample("means", dist.Normal(self.mean, (variances / self.strength).sqrt()).to_event(1))
        level = 0.5 * (2 * math.pi * variances).log().sum(-1)
        return means, variances.rsqrt(), level

    def likelihood(self, *parameters: Tensor, labels: Tensor, x: Tensor | None) -> dist.TorchDistribution:
        means, inverse_scale, level = parameters
        return LabelledGaussians(means, inverse_scale, level, labels)

    def components(self, latents: Mapping[str, Tensor]) -> Components:
        return Independent(dist.Normal, latents["means"], latents["variances"].sqrt())

    def _posterior(self, rows: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = rows[:, None]
        average = total / rows.clamp_min(1)
        strength = self.strength + rows
        mean = (self.strength * self.mean + total) / strength
        shift = self.strength * rows / strength * (average - self.mean) ** 2
        return mean, strength, self.shape + rows / 2, self.scale + (squares + shift) / 2

    def draw_posterior(self, rows: Tensor, total: Tensor, squares: Tensor) -> None:
        mean, strength, shape, scale = self._posterior(rows, total, squares)
        variances = pyro.sample("variances", dist.InverseGamma(shape, scale).to_event(1))
        pyro.sample("means", dist.Normal(mean, (variances / strength).sqrt()).to_event(1))

    def parameter_moments(self, rows: Tensor, total: Tensor, squares: Tensor) -> Moments:
        mean, strength, shape, scale = self._posterior(rows, total, squares)
        # The mean of an inverse gamma exists for a > 1, its variance for a > 2.
        variance = torch.where(shape > 1, scale / (shape - 1), torch.inf)
        return {
            "variances": (variance, torch.where(shape > 2, variance / (shape - 2).sqrt(), torch.inf)),
            "means": (mean, (variance / strength).sqrt()),
        }


class BernoulliNaiveBayes(NaiveBayes):
    r"""Binary features, with a Beta prior.

    .. math::

        \theta_{kj} \sim \mathrm{Beta}(\alpha + 1, \alpha + 1), \qquad
        x_{nj} \mid y_n = k \sim \mathrm{Bernoulli}(\theta_{kj})

    Args:
        alpha: Additive smoothing: the mode of the posterior is scikit-learn's BernoulliNB(alpha).

    The other arguments are those of :class:`NaiveBayes`. Sites: weights (K,), probs (K, D), y, x.

    Example:
        >>> pair = BernoulliNaiveBayes(features=2, classes=2)
        >>> mean, sd = pair.moments(x=torch.tensor([[1.0, 0.0], [1.0, 1.0]]), y=torch.tensor([0, 0]))["probs"]
        >>> mean  # of Beta(2 + 2, 2) and Beta(2 + 1, 2 + 1); the class without rows keeps the prior Beta(2, 2)
        tensor([[0.6667, 0.5000],
                [0.5000, 0.5000]])
    """

    def __init__(
        self, features: int | Sequence[str], classes: int | Sequence[str] = 2, *, alpha: float = 1.0, **shared: Any
    ) -> None:
        check_positive("alpha", alpha, zero=True)
        super().__init__(features, classes, **shared)
        self.register_buffer("alpha", torch.full((self.features,), float(alpha)))
        self.dims |= {"probs": ("features",)}

    def check(self, x: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a binary matrix (rows, D) and y has labels for its rows."""
        super().check(x, y)
        check_binary("x", x)

    def draw_parameters(self) -> tuple[Tensor, Tensor]:
        return occurrence_parameters(pyro.sample("probs", dist.Beta(self.alpha + 1, self.alpha + 1).to_event(1)))

    def likelihood(self, *parameters: Tensor, labels: Tensor, x: Tensor | None) -> dist.TorchDistribution:
        logits, absent = (rows_by_label(p, labels) for p in parameters)
        return Occurrences(logits, absent[..., 0])

    def components(self, latents: Mapping[str, Tensor]) -> Components:
        return Independent(dist.Bernoulli, latents["probs"])

    def columnwise(
        self, rows: int, *, latents: Mapping[str, Tensor], **_: Any
    ) -> Generator[tuple[int, Tensor], Tensor, None]:
        """One feature of rows after another: each with its log weights (rows, 2) given those sent before.

        The labels are summed out.
        """
        return in_turn(rows, latents["weights"].log(), latents["probs"])

    def _posterior(self, rows: Tensor, total: Tensor) -> dist.Beta:
        return dist.Beta(self.alpha + 1 + total, self.alpha + 1 + rows[:, None] - total)

    def draw_posterior(self, rows: Tensor, total: Tensor, squares: Tensor) -> None:
        pyro.sample("probs", self._posterior(rows, total).to_event(1))

    def parameter_moments(self, rows: Tensor, total: Tensor, squares: Tensor) -> Moments:
        posterior = self._posterior(rows, total)
        return {"probs": (posterior.mean, posterior.stddev)}


class MultinomialNaiveBayes(NaiveBayes):
    r"""Counts (a bag of words), with a Dirichlet prior.

    .. math::

        \theta_k \sim \mathrm{Dirichlet}(\alpha + 1), \qquad
        x_n \mid y_n = k \sim \mathrm{Multinomial}(L_n, \theta_k)

    The length :math:`L_n` of a row is not modelled: it is the sum of x, or ``length`` where rows are drawn.

    Args:
        alpha: Additive smoothing: the mode of the posterior is scikit-learn's MultinomialNB(alpha).
        length: Length of the rows drawn without data.

    The other arguments are those of :class:`NaiveBayes`. Sites: weights (K,), probs (K, D), y, x.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        classes: int | Sequence[str] = 2,
        *,
        alpha: float = 1.0,
        length: int = 100,
        **shared: Any,
    ) -> None:
        check_positive("alpha", alpha, zero=True)
        super().__init__(features, classes, **shared)
        self.register_buffer("alpha", torch.full((self.features,), float(alpha)))
        check_count("length", length)
        self.length = length
        self.dims |= {"probs": ("features",)}

    def check(self, x: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a matrix of counts (rows, D) and y has labels for its rows."""
        super().check(x, y)
        if x is not None:
            check_entries("x", x, (x < 0) | fractional(x), "counts (0, 1, 2, ...)")

    def draw_parameters(self) -> tuple[Tensor]:
        return (pyro.sample("probs", dist.Dirichlet(self.alpha + 1)),)

    def likelihood(self, *parameters: Tensor, labels: Tensor, x: Tensor | None) -> dist.TorchDistribution:
        probs = rows_by_label(parameters[0], labels)
        length = torch.as_tensor(self.length, dtype=probs.dtype) if x is None else x.sum(-1)
        return Counts(probs, length)

    def draw_posterior(self, rows: Tensor, total: Tensor, squares: Tensor) -> None:
        pyro.sample("probs", dist.Dirichlet(self.alpha + 1 + total))

    def parameter_moments(self, rows: Tensor, total: Tensor, squares: Tensor) -> Moments:
        posterior = dist.Dirichlet(self.alpha + 1 + total)
        return {"probs": (posterior.mean, posterior.stddev)}


def draw_labels(weights: Tensor, y: Tensor | None) -> Tensor:
    """Sample or observe labels. With float labels, those that are nan are latent."""
    # Logits, computed here once: from probabilities the plate would compute them once per row.
    prior = Labels(probs_to_logits(weights))
    if y is None or not y.is_floating_point():
        return pyro.sample("y", prior, obs=y)
    labels = pyro.sample("y", prior)
    agrees = y.isnan() | (labels == y)
    pyro.factor("given", torch.where(agrees, 0.0, -torch.inf).to(weights.dtype))
    return labels
