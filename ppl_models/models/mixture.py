r"""Mixtures: rows that come from one of K components.

.. math::

    \pi \sim \mathrm{Dirichlet}(c), \qquad \theta_k \sim \text{prior}, \qquad
    z_n \sim \mathrm{Categorical}(\pi), \qquad x_n \mid z_n = k \sim p(x \mid \theta_k)

The labels z are summed out by every method. Components are interchangeable, so that a posterior has K! copies of every
mode; one is kept: a Gaussian mixture's components are ordered by the first entry of their means. ``maximise`` is the
M-step of ``inference.objectives.EM``.

Reference: Bishop 2006, Pattern Recognition and Machine Learning, chapter 9.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from ppl_models.models.checks import check_binary, check_labels, check_matrix
from ppl_models.models.pair import Pair, continuous
from ppl_models.models.parts.distributions import Gaussians, Occurrences, SortedNormals
from ppl_models.models.parts.labels import one_hot, rows_by_label

Guide = Callable[[Callable[..., Any]], Callable[..., Any]]


COVARIANCES = ("full", "tied", "diagonal", "spherical")


SEEN = 2000
"""Rows, or ten a component if these are more, among which a start is drawn."""


EMPTY = 10 * torch.finfo(torch.float64).eps
"""Rows that are added to every component, as scikit-learn adds them: an empty one has a mean."""


class Mixture(Pair):
    r"""What the mixtures share: weights, labels, rows.

    Args:
        features: Number of features D, or their names.
        components: Number of components K.
        concentration: Dirichlet concentration of the weights.
        prior: False switches all priors off: EM then finds a maximum of the likelihood.
        guide: From the model to a guide of its parameters: AutoNormal (the default), AutoDelta, ...

    Data: x (N, D); z (N,), integers, where the labels are known.

    A subclass draws the parameters of the components and gives the distribution of a row.
    """

    conjugate = False

    draw_parameters: Callable[[], tuple[Tensor, ...]]
    likelihood: Callable[..., dist.TorchDistribution]
    maximise_parameters: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]

    def __init__(
        self,
        features: int | Sequence[str],
        components: int,
        *,
        concentration: float = 1.0,
        prior: bool = True,
        guide: Guide = AutoNormal,
    ) -> None:
        super().__init__()
        self.features = self.name_dimension("features", features)
        self.components = self.name_dimension("components", components)
        if not concentration > 0:
            raise ValueError(f"concentration: expected a positive number, got {concentration}")
        self.prior = prior
        self.register_buffer("concentration", torch.full((self.components,), float(concentration)))
        self.dims = {"x": ("features",), "weights": ("components",)}
        self.guide = guide(continuous(self.model))

    def model(
        self,
        x: Tensor | None = None,
        z: Tensor | None = None,
    ) -> Tensor:
        """Draw or score weights, components, labels and rows; return x."""
        with poutine.mask(mask=self.prior):
            weights = pyro.sample("weights", dist.Dirichlet(self.concentration))
            parameters = self.draw_parameters()
        with self.rows(x):
            z = pyro.sample("z", dist.Categorical(logits=weights.clamp_min(1e-30).log()), obs=z)
            return pyro.sample("x", self.likelihood(*(rows_by_label(p, z) for p in parameters)), obs=x)

    def maximise(self, responsibilities: Tensor, x: Tensor, **_: Any) -> dict[str, Tensor]:
        """The M-step: the parameters that are best for responsibilities (N, K)."""
        responsibilities = responsibilities.to(x)
        counts = responsibilities.sum(0) + EMPTY
        dead = (counts < 1e-3).nonzero().flatten().tolist()
        if dead:
            named = ", ".join(map(str, dead[:5]))
            warnings.warn(f"components: {len(dead)} hold no rows any more ({named}); ask for fewer", stacklevel=2)
        extra = self.concentration.to(x) - 1 if self.prior else torch.zeros_like(counts)
        weights = (counts + extra).clamp_min(0)
        found = {"weights": weights / weights.sum(), **self.maximise_parameters(responsibilities, counts, x)}
        return self.arrange(found)

    def arrange(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The components in the order that the model asks for."""
        return found

    def start(self, x: Tensor, *, seed: int = 0) -> Tensor:
        """Responsibilities (N, K) to start EM from: each row goes to the nearest of K rows, drawn by k-means++."""
        if len(x) < self.components:
            raise ValueError(f"x: expected at least as many rows as components ({self.components}), got {len(x)}")
        few = max(SEEN, 10 * self.components)
        seen = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:few].to(x.device)]
        _, chosen = kmeans_plusplus(seen.detach().cpu().numpy(), self.components, random_state=seed)
        centres = seen[torch.as_tensor(chosen, device=x.device).long()]
        nearest = torch.cdist(x, centres).argmin(-1)
        return one_hot(nearest, self.components, x.dtype)

    def check(self, x: Any = None, z: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite (rows, D) and z, if given, has a component for each."""
        if x is not None:
            check_matrix("x", x, self.features)
        if z is not None:
            check_labels("z", z, len(z) if x is None else len(x), self.components, missing=False)


class GaussianMixture(Mixture):
    r"""Gaussian components.

    .. math::

        \mu_{kj} \sim \mathrm{N}(m, s^2) \text{ with } \mu_{11} < \dots < \mu_{K1}, \qquad
        \sigma_{kj} \sim \mathrm{LogNormal}(\log b, \tau^2), \qquad R_k \sim \mathrm{LKJ}(\eta), \qquad
        x_n \mid z_n = k \sim \mathrm{N}(\mu_k, \mathrm{diag}(\sigma_k) R_k \, \mathrm{diag}(\sigma_k))

    Args:
        covariance: ``full``; ``tied``, one for all components; ``diagonal``; ``spherical``, one scale a component.
        mean: m, in units of x.
        spread: s, in units of x.
        scale: b, in units of x.
        log_spread: :math:`\tau`.
        correlation: :math:`\eta` of the LKJ prior.
        floor: Least standard deviation that EM gives a component, in units of x, and for full covariances along any
            direction: without it a component on one row has an infinite likelihood.

    The rest are those of :class:`Mixture`. Sites: weights (K,), means (K, D), scales (K, D), or (K, 1) if spherical and
    (D,) if tied, correlations (K, D, D), or (D, D) if tied, as Cholesky factors, z, x.

    Example:
        >>> pair = GaussianMixture(1, 2, covariance="diagonal", prior=False)
        >>> labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> found = pair.maximise(labels, torch.tensor([[2.0], [4.0], [0.0], [1.0]]))
        >>> found["weights"], found["means"].flatten()  # sorted by the mean
        (tensor([0.5000, 0.5000]), tensor([0.5000, 3.0000]))
    """

    def __init__(
        self,
        features: int | Sequence[str],
        components: int,
        *,
        covariance: str = "full",
        mean: float = 0.0,
        spread: float = 2.0,
        scale: float = 0.5,
        log_spread: float = 0.5,
        correlation: float = 2.0,
        floor: float = 1e-3,
        **shared: Any,
    ) -> None:
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance: expected one of {', '.join(COVARIANCES)}, got {covariance!r}")
        positive = {"spread": spread, "scale": scale, "log_spread": log_spread, "correlation": correlation}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not floor >= 0:
            raise ValueError(f"floor: expected zero or a positive number, got {floor}")
        super().__init__(features, components, **shared)
        for name, value in {"mean": mean, **positive}.items():
            self.register_buffer(name, torch.tensor(float(value)))
        # One feature has no correlations.
        self.covariance, self.correlated = covariance, covariance in ("full", "tied") and self.features > 1
        self.floor = floor
        self.dims["means"] = ("components", "features")
        if covariance != "spherical":
            self.dims["scales"] = ("features",)

    def draw_parameters(self) -> tuple[Tensor, ...]:
        """Means (K, D); inverse scales (K, D), or whiteners (K, D * D); levels (K, 1)."""
        shape = self.components, self.features
        means = pyro.sample("means", SortedNormals(self.mean.expand(shape), self.spread.expand(shape)))
        # A site outside of plates that is drawn many times has a one in place of the rows.
        means = means.squeeze(-3) if means.dim() > 2 else means
        with nullcontext() if self.covariance == "tied" else pyro.plate("components", self.components, dim=-1):
            width = 1 if self.covariance == "spherical" else self.features
            distribution = dist.LogNormal(self.scale.log(), self.log_spread).expand([width]).to_event(1)
            scales = pyro.sample("scales", distribution)
            factors = None
            if self.correlated:
                factors = pyro.sample("correlations", dist.LKJCholesky(self.features, self.correlation))
        if factors is None:
            scales = _spread_over(scales, shape)
            return means, scales.reciprocal(), _level(scales)
        roots = scales[..., None] * factors
        identity = torch.eye(self.features, dtype=roots.dtype, device=roots.device)
        whiteners = torch.linalg.solve_triangular(roots, identity.expand_as(roots), upper=False).flatten(-2)
        whole = self.components, self.features**2
        return means, _spread_over(whiteners, whole), _spread_over(_level(scales, factors), (self.components, 1))

    def likelihood(self, means: Tensor, inverse: Tensor, level: Tensor) -> dist.TorchDistribution:
        return Gaussians(means, inverse, level.squeeze(-1))

    def maximise_parameters(self, responsibilities: Tensor, counts: Tensor, x: Tensor) -> dict[str, Tensor]:
        if self.prior:
            raise ValueError("prior: expected False for EM (the M-step maximises the likelihood alone), got True")
        means = responsibilities.mT @ x / counts[:, None]
        if not self.correlated:
            square = torch.stack([r @ (x - m) ** 2 for r, m in zip(responsibilities.mT, means, strict=True)])
            variances = square / counts[:, None]
            if self.covariance == "spherical":
                variances = variances.mean(-1, keepdim=True)
            if self.covariance == "tied":
                variances = (square.sum(0) / counts.sum())[None]
            return {"means": means, "scales": self._rows(self._bounded(variances).sqrt())}
        centred = x - means[:, None]
        scatter = (responsibilities.mT[..., None] * centred).mT @ centred
        if self.covariance == "tied":
            covariances = (scatter.sum(0) / counts.sum())[None]
        else:
            covariances = scatter / counts[:, None, None]
        values, vectors = torch.linalg.eigh(covariances)
        if bool((values < self.floor**2).any()):
            covariances = vectors * self._bounded(values)[..., None, :] @ vectors.mT
        scales = covariances.diagonal(dim1=-2, dim2=-1).sqrt()
        factors = torch.linalg.cholesky(covariances / (scales[..., None] * scales[..., None, :]))
        return {"means": means, "scales": self._rows(scales), "correlations": self._rows(factors)}

    def _rows(self, value: Tensor) -> Tensor:
        return value[0] if self.covariance == "tied" else value

    def _bounded(self, variances: Tensor) -> Tensor:
        if bool((variances < self.floor**2).any()):
            warnings.warn(
                f"scales: a component has collapsed; its standard deviation is held at the floor {self.floor}",
                stacklevel=2,
            )
        return variances.clamp_min(self.floor**2)

    def arrange(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        order = found["means"][:, 0].argsort()
        shared = ("scales", "correlations") if self.covariance == "tied" else ()
        return {n: v if n in shared else v[order] for n, v in found.items()}


class BernoulliMixture(Mixture):
    r"""Binary features, independent given the component, with a Beta prior.

    .. math::

        \theta_{kj} \sim \mathrm{Beta}(\alpha + 1, \alpha + 1), \qquad
        x_{nj} \mid z_n = k \sim \mathrm{Bernoulli}(\theta_{kj})

    Args:
        alpha: Additive smoothing: EM adds alpha zeros and alpha ones to each component.

    The rest are those of :class:`Mixture`. Sites: weights (K,), probs (K, D), z, x. The components have no order: use
    EM or one guide, not chains.
    """

    conjugate = True

    def __init__(self, features: int | Sequence[str], components: int, *, alpha: float = 0.1, **shared: Any) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha: expected zero or a positive number, got {alpha}")
        super().__init__(features, components, **shared)
        self.register_buffer("alpha", torch.full((self.features,), float(alpha)))
        self.dims |= {"probs": ("features",)}

    def draw_parameters(self) -> tuple[Tensor, Tensor]:
        with pyro.plate("components", self.components, dim=-1):
            probs = pyro.sample("probs", dist.Beta(self.alpha + 1, self.alpha + 1).to_event(1))
        probs = probs.clamp(1e-7, 1 - 1e-7)
        absent = (-probs).log1p()
        return probs.log() - absent, absent.sum(-1, keepdim=True)

    def likelihood(self, logits: Tensor, absent: Tensor) -> dist.TorchDistribution:
        return Occurrences(logits, absent[..., 0])

    def maximise_parameters(self, responsibilities: Tensor, counts: Tensor, x: Tensor) -> dict[str, Tensor]:
        alpha = self.alpha.to(x) if self.prior else torch.zeros_like(x[0])
        return {"probs": (responsibilities.mT @ x + alpha) / (counts[:, None] + 2 * alpha)}

    def check(self, x: Any = None, z: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a binary (rows, D) and z, if given, has a component for each."""
        super().check(x, z)
        check_binary("x", x)


def _spread_over(table: Tensor, shape: tuple[int, int]) -> Tensor:
    """A table of one row, or of one column, as one of K rows."""
    return table.expand(torch.broadcast_shapes(table.shape, shape))


def _level(scales: Tensor, factors: Tensor | None = None) -> Tensor:
    r"""Half the logarithm of :math:`\det(2 \pi \Sigma)`: (..., 1)."""
    diagonal = scales if factors is None else scales * factors.diagonal(dim1=-2, dim2=-1)
    return (math.sqrt(2 * math.pi) * diagonal).log().sum(-1, keepdim=True)
