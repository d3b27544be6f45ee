r"""Discriminative classifiers: Bayesian logistic regression and a small Bayesian neural network.

.. math:: w \sim \mathrm{N}(0, s^2), \qquad y_n \mid x_n \sim \mathrm{Categorical}(\mathrm{softmax}(f_w(x_n)))

The discriminative counterparts of naive Bayes: they model y given x, and x is an input, not a site.

Reference: Ng and Jordan 2002, "On Discriminative vs. Generative Classifiers".
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from ppl_models.models.checks import (
    check_count,
    check_guide,
    check_known_labels,
    check_labels,
    check_matrix,
    check_positive,
    count_of,
)
from ppl_models.models.pair import GuideFactory, Moments, Pair, checked
from ppl_models.models.parts.weighted import moments_of, weighted_draws


class Classifier(Pair):
    """Base class: labels of rows, given logits of the classes.

    Args:
        features: Number of features D, or their names.
        classes: Number of classes K, or their names.
        guide: From the model to a guide: AutoNormal (the default), AutoDelta, AutoMultivariateNormal, ...

    Data: x (N, D), y (N,) integers.
    """

    def __init__(
        self, features: int | Sequence[str], classes: int | Sequence[str] = 2, *, guide: GuideFactory = AutoNormal
    ) -> None:
        super().__init__()
        check_guide(guide)
        self.features = self.name_dimension("features", features)
        count_of("classes", classes, 2)
        self.classes = self.name_dimension("classes", classes)
        self.guide = guide(self.model)

    @abstractmethod
    def draw_logits(self, x: Tensor) -> Tensor:
        """Sample the weights; return the logits of the classes (..., N, K); for two classes log odds (..., N, 1)."""

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw or score weights and labels; return the labels."""
        logits = self.draw_logits(x)
        with self.rows(x):
            if self.classes > 2:
                return pyro.sample("y", dist.Categorical(logits=logits), obs=y)
            return pyro.sample("y", dist.Bernoulli(logits=logits[..., 0]), obs=None if y is None else y.to(x.dtype))

    def check(self, x: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite matrix (rows, D) and y has a label for each of its rows."""
        check_matrix("x", x, self.features)
        if y is not None:
            check_labels("y", y, len(x), self.classes, missing=False)


class LogisticRegression(Classifier):
    r"""Bayesian logistic regression, binary or multiclass.

    .. math::

        w \sim \mathrm{N}(0, s^2), \qquad b \sim \mathrm{N}(0, t^2), \qquad
        y_n \sim \mathrm{Categorical}(\mathrm{softmax}(W x_n + b))

    For two classes the softmax is the logistic function of one logit. As t grows, the posterior mode becomes the
    estimate of scikit-learn's LogisticRegression(C=s**2), which does not penalise the intercept.

    Args:
        scale: s, prior standard deviation of a weight, in 1 / units of x.
        intercept_scale: t, prior standard deviation of an intercept.

    The other arguments are those of :class:`Classifier`. Sites: weights (D,) or (K, D), intercept () or (K,), y.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        classes: int | Sequence[str] = 2,
        *,
        scale: float = 1.0,
        intercept_scale: float = 10.0,
        guide: GuideFactory = AutoNormal,
    ) -> None:
        check_positive("scale", scale)
        check_positive("intercept_scale", intercept_scale)
        super().__init__(features, classes, guide=guide)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("intercept_scale", torch.tensor(float(intercept_scale)))
        self.dims = {"weights": ("classes", "features")[self.classes == 2 :], "intercept": ("classes",)}

    def draw_logits(self, x: Tensor) -> Tensor:
        outputs = () if self.classes == 2 else (self.classes,)
        weights = draw_weights("weights", self.scale, (*outputs, self.features))
        intercept = draw_weights("intercept", self.intercept_scale, outputs)
        if self.classes == 2:
            weights, intercept = weights.unsqueeze(-2), intercept.unsqueeze(-1)
        return affine(x, weights, intercept)

    @checked
    def moments(self, x: Tensor, y: Tensor, *, draws: int = 200_000) -> Moments:
        """Posterior mean and standard deviation of each site by importance sampling.

        The proposal is a multivariate t around the mode. Neither a guide nor a chain has a part in it.

        Raises:
            ArithmeticError: The effective sample size is below 5,000: the posterior is too far from a t.
        """
        check_count("draws", draws, 5000)
        check_known_labels(x, y, self.classes)
        outputs = 1 if self.classes == 2 else self.classes
        inputs = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        scales = torch.cat([self.scale.expand(self.features), self.intercept_scale.expand(1)]).to(x.dtype)

        def density(theta: Tensor) -> Tensor:
            theta = theta.unflatten(-1, (outputs, -1))
            logits = inputs @ theta.mT
            logits = torch.cat([torch.zeros_like(logits), logits], -1) if outputs == 1 else logits
            fit = logits.log_softmax(-1).gather(-1, y.long().expand(logits.shape[:-1])[..., None]).sum((-1, -2))
            return fit - (theta**2 / (2 * scales**2)).sum((-1, -2))

        start = x.new_zeros(outputs * len(scales))
        mean, sd = moments_of(*weighted_draws(density, start, draws, block=2_000_000 // len(x)))
        mean, sd = mean.view(outputs, -1), sd.view(outputs, -1)
        take = (lambda v: v[0]) if self.classes == 2 else (lambda v: v)
        return {
            "weights": (take(mean)[..., :-1], take(sd)[..., :-1]),
            "intercept": (take(mean)[..., -1], take(sd)[..., -1]),
        }


class NeuralClassifier(Classifier):
    r"""A Bayesian neural network with one hidden layer of tanh units.

    .. math::

        f_w(x) = V \tanh(U x + a) + b, \qquad
        U, V \sim \mathrm{N}(0, s^2 / \text{inputs}), \qquad a, b \sim \mathrm{N}(0, s^2)

    Args:
        hidden: Number of hidden units H.
        scale: s, prior standard deviation of a unit's input.

    The other arguments are those of :class:`Classifier`. Sites: hidden_weights (H, D), hidden_bias (H,), output_weights
    (K, H), output_bias (K,), y, with 1 in place of K for two classes. The posterior has a mode for every permutation
    and sign of the hidden units: compare predictions, not weights.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        classes: int | Sequence[str] = 2,
        *,
        hidden: int = 10,
        scale: float = 1.0,
        guide: GuideFactory = AutoNormal,
    ) -> None:
        check_count("hidden", hidden)
        check_positive("scale", scale)
        super().__init__(features, classes, guide=guide)
        self.hidden = int(hidden)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.dims = {
            "hidden_weights": ("units", "features"),
            "hidden_bias": ("units",),
            "output_weights": ("outputs", "units"),
            "output_bias": ("outputs",),
        }

    def draw_logits(self, x: Tensor) -> Tensor:
        outputs = 1 if self.classes == 2 else self.classes
        u = draw_weights("hidden_weights", self.scale / math.sqrt(self.features), (self.hidden, self.features))
        a = draw_weights("hidden_bias", self.scale, (self.hidden,))
        v = draw_weights("output_weights", self.scale / math.sqrt(self.hidden), (outputs, self.hidden))
        b = draw_weights("output_bias", self.scale, (outputs,))
        return affine(affine(x, u, a).tanh(), v, b)


def draw_weights(name: str, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sample weights of N(0, scale^2), of one shape, as one event."""
    return pyro.sample(name, dist.Normal(torch.zeros_like(scale), scale).expand(shape).to_event(len(shape)))


def affine(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """x (..., N, inputs) times weights (..., outputs, inputs), plus bias (..., outputs): (..., N, outputs).

    Weights of S draws are (S, 1, outputs, inputs), with a 1 in the place of the rows.
    """
    if weights.dim() > 2:
        weights = weights.squeeze(-3)
    return x @ weights.mT + bias
