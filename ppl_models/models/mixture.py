r"""Finite mixtures: each row comes from one of K components.

.. math::

    \pi \sim \mathrm{Dirichlet}(c), \qquad \theta_k \sim \text{prior}, \qquad
    z_n \sim \mathrm{Categorical}(\pi), \qquad x_n \mid z_n = k \sim p(x \mid \theta_k)

All methods sum the labels z out. The components are interchangeable, so the posterior has K! copies of each mode. A
Gaussian mixture keeps one of them: its components are ordered by the first entry of their means. ``maximise`` is the
M-step of ``inference.objectives.EM``.

Reference: Bishop 2006, Pattern Recognition and Machine Learning, chapter 9.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from ppl_models.models.checks import (
    check_binary,
    check_count,
    check_labels,
    check_matrix,
    check_number,
    check_one_of,
    check_positive,
    known_or_zero,
    random_source,
)
from ppl_models.models.pair import GuideFactory, Pair, checked, continuous
from ppl_models.models.parts.completion import Components, Correlated, Independent, View, complete, in_turn, restore
from ppl_models.models.parts.distributions import Gaussians, Occurrences, SortedNormals, occurrence_parameters
from ppl_models.models.parts.labels import one_hot, rows_by_label

COVARIANCES = ("full", "tied", "diagonal", "spherical")

START_ROWS = 2000
"""Number of rows (or ten per component, if that is more) from which k-means++ draws the initial centres."""

COUNT_OFFSET = 10 * torch.finfo(torch.float64).eps
"""Added to the count of each component, as scikit-learn does, so that an empty component has a mean."""


class Mixture(Pair):
    r"""Base class: weights, labels and rows.

    Args:
        features: Number of features D, or their names.
        components: Number of components K.
        concentration: Dirichlet concentration of the weights.
        prior: False switches all priors off, so that EM finds a maximum likelihood estimate.
        guide: From the model to a guide of its parameters: AutoNormal (the default), AutoDelta, ...

    Data: x (N, D); z (N,), integers, if the labels are known.

    Attributes:
        conjugate: Whether the M-step takes the prior into account.
        bounds: Smallest and largest number of x.
    """

    conjugate = False
    bounds = (-torch.finfo(torch.float64).max, torch.finfo(torch.float64).max)

    def __init__(
        self,
        features: int | Sequence[str],
        *,
        components: int,
        concentration: float = 1.0,
        prior: bool = True,
        guide: GuideFactory = AutoNormal,
    ) -> None:
        super().__init__()
        self.features = self.name_dimension("features", features)
        check_count("components", components)
        self.components = int(components)
        check_positive("concentration", concentration)
        self.prior = prior
        self.register_buffer("concentration", torch.full((self.components,), float(concentration)))
        self.dims = {"x": ("features",), "weights": ("components",)}
        self.guide = guide(continuous(self.model))

    @abstractmethod
    def draw_parameters(self) -> tuple[Tensor, ...]:
        """Sample the parameters of the components; return tables with one row per component (..., K, width)."""

    @abstractmethod
    def likelihood(self, *parameters: Tensor) -> dist.TorchDistribution:
        """p(x | z) of the rows, an event (D,), from the table rows (..., N, width) of their components."""

    @abstractmethod
    def maximise_parameters(self, responsibilities: Tensor, counts: Tensor, x: Tensor) -> dict[str, Tensor]:
        """The M-step of the component parameters, by site, from responsibilities (N, K) and their sums (K,)."""

    @abstractmethod
    def distributions(self, latents: Mapping[str, Tensor]) -> Components:
        """The rows of each component given posterior draws of the parameters by site."""

    def impute(
        self, x: Tensor, z: Tensor | None = None, *, latents: Mapping[str, Tensor], draws: int = 1, **_: Any
    ) -> Tensor:
        """Draw the missing entries (nan) of rows (N, D) given the known ones, exactly: (draws, N, D).

        Args:
            x: Rows.
            z: Components (N,), if they are known; else they are summed out.
            latents: Posterior draws of the parameters by site.
            draws: Number of draws per row.
        """
        check_count("draws", draws)
        self.check(known_or_zero(x), z)
        return complete(x, draws, latents["weights"].log(), self.distributions(latents), z)

    def restore(
        self, x: Tensor, z: Tensor | None = None, *, latents: Mapping[str, Tensor], **view: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation (N, D) of rows that are seen through noise (N, M), exactly, and zeros.

        Args:
            x: What is seen.
            z: Components (N,), if they are known; else they are summed out.
            latents: Posterior draws of the parameters by site.
            view: ``sd``, ``flips`` and ``matrix`` of a :class:`View`.
        """
        self.check(None, z)
        return restore(x, latents["weights"].log(), self.distributions(latents), View.of(view), z)

    def model(self, x: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Draw or score weights, components, labels and rows; return x."""
        with poutine.mask(mask=self.prior):
            weights = pyro.sample("weights", dist.Dirichlet(self.concentration))
            parameters = self.draw_parameters()
        with self.rows(x):
            z = pyro.sample("z", dist.Categorical(logits=weights.clamp_min(1e-30).log()), obs=z)
            return pyro.sample("x", self.likelihood(*(rows_by_label(p, z) for p in parameters)), obs=x)

    def maximise(self, responsibilities: Tensor, x: Tensor, **_: Any) -> dict[str, Tensor]:
        """The M-step: the parameters, by site, that maximise the objective for responsibilities (N, K)."""
        self._check_range(x)
        if responsibilities.shape != (len(x), self.components) or not responsibilities.sum().isfinite():
            check_matrix("responsibilities", responsibilities, self.components)
            raise ValueError(
                f"responsibilities: expected ({len(x)}, {self.components}), got {len(responsibilities)} rows"
            )
        responsibilities = responsibilities.to(x)
        counts = responsibilities.sum(0) + COUNT_OFFSET
        empty = (counts < 1e-3).nonzero().flatten().tolist()
        if empty:
            listed = ", ".join(map(str, empty[:5]))
            warnings.warn(f"components: {len(empty)} have no rows left ({listed}); use fewer components", stacklevel=2)
        extra = self.concentration.to(x) - 1 if self.prior else torch.zeros_like(counts)
        weights = (counts + extra).clamp_min(0)
        return self.arrange(
            {"weights": weights / weights.sum(), **self.maximise_parameters(responsibilities, counts, x)}
        )

    def _check_range(self, x: Any) -> None:
        """Check rows by their range alone, as EM does at every step; in detail if they are outside."""
        low, high = self.bounds
        if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == self.features and len(x):
            smallest, largest = x.aminmax()
            if low <= smallest and largest <= high:
                return
        self.check(x)

    def arrange(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bring the components into the order that the model requires."""
        return values

    @checked
    def start(self, x: Tensor, *, seed: int = 0) -> Tensor:
        """Initial responsibilities (N, K) for EM: each row belongs to the nearest of K centres of k-means++."""
        if len(x) < self.components:
            raise ValueError(f"x: expected at least as many rows as components ({self.components}), got {len(x)}")
        count = max(START_ROWS, 10 * self.components)
        subset = x[torch.randperm(len(x), generator=random_source(seed))[:count].to(x.device)]
        _, chosen = kmeans_plusplus(subset.detach().cpu().numpy(), self.components, random_state=int(seed) % 2**32)
        centres = subset[torch.as_tensor(chosen, device=x.device).long()]
        nearest = torch.cdist(x, centres).argmin(-1)
        return one_hot(nearest, self.components, x.dtype)

    def check(self, x: Any = None, z: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite matrix (rows, D) and z, if given, has a component for each row."""
        if x is not None:
            check_matrix("x", x, self.features)
        if z is not None:
            check_labels("z", z, len(z) if x is None else len(x), self.components, missing=False)


class GaussianMixture(Mixture):
    r"""Mixture of Gaussians.

    .. math::

        \mu_{kj} \sim \mathrm{N}(m, s^2) \text{ with } \mu_{11} < \dots < \mu_{K1}, \qquad
        \sigma_{kj} \sim \mathrm{LogNormal}(\log b, \tau^2), \qquad R_k \sim \mathrm{LKJ}(\eta), \qquad
        x_n \mid z_n = k \sim \mathrm{N}(\mu_k, \mathrm{diag}(\sigma_k) R_k \, \mathrm{diag}(\sigma_k))

    Args:
        covariance: ``full``, ``diagonal``, ``spherical`` (one scale per component) or ``tied`` (one full covariance for
            all components).
        mean: m, in units of x.
        mean_sd: s, in units of x.
        scale: b, the prior median of a standard deviation, in units of x.
        log_scale_sd: :math:`\tau`.
        correlation: :math:`\eta` of the LKJ prior.
        floor: Smallest standard deviation of a component in EM, in units of x, for full covariances along any
            direction. Without it a component that holds one row has infinite likelihood.

    The other arguments are those of :class:`Mixture`. Sites: weights (K,), means (K, D), scales (K, D) (spherical:
    (K, 1), tied: (D,)), correlations (K, D, D) (tied: (D, D)) as Cholesky factors, z, x.

    Example:
        >>> pair = GaussianMixture(1, components=2, covariance="diagonal", prior=False)
        >>> labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> best = pair.maximise(labels, torch.tensor([[2.0], [4.0], [0.0], [1.0]]))
        >>> best["weights"], best["means"].flatten()  # sorted by the mean
        (tensor([0.5000, 0.5000]), tensor([0.5000, 3.0000]))
    """

    def __init__(
        self,
        features: int | Sequence[str],
        *,
        components: int,
        covariance: str = "full",
        mean: float = 0.0,
        mean_sd: float = 2.0,
        scale: float = 0.5,
        log_scale_sd: float = 0.5,
        correlation: float = 2.0,
        floor: float = 1e-3,
        **shared: Any,
    ) -> None:
        check_one_of("covariance", covariance, COVARIANCES)
        check_number("mean", mean)
        positive = {"mean_sd": mean_sd, "scale": scale, "log_scale_sd": log_scale_sd, "correlation": correlation}
        for name, value in positive.items():
            check_positive(name, value)
        check_positive("floor", floor, zero=True)
        super().__init__(features, components=components, **shared)
        for name, value in {"mean": mean, **positive}.items():
            self.register_buffer(name, torch.tensor(float(value)))
        # With one feature there are no correlations.
        self.covariance, self.correlated = covariance, covariance in ("full", "tied") and self.features > 1
        self.floor = floor
        self.dims["means"] = ("components", "features")
        if covariance != "spherical":
            self.dims["scales"] = ("features",)

    def draw_parameters(self) -> tuple[Tensor, ...]:
        """Sample the parameters; return means (K, D), inverse scales (K, D) or whiteners (K, D * D), levels (K, 1)."""
        shape = self.components, self.features
        means = pyro.sample("means", SortedNormals(self.mean.expand(shape), self.mean_sd.expand(shape)))
        # Draws of a site outside of plates have a 1 in the place of the rows.
        means = means.squeeze(-3) if means.dim() > 2 else means
        with nullcontext() if self.covariance == "tied" else pyro.plate("components", self.components, dim=-1):
            width = 1 if self.covariance == "spherical" else self.features
            distribution = dist.LogNormal(self.scale.log(), self.log_scale_sd).expand([width]).to_event(1)
            scales = pyro.sample("scales", distribution)
            factors = None
            if self.correlated:
                factors = pyro.sample("correlations", dist.LKJCholesky(self.features, self.correlation))
        if factors is None:
            scales = _broadcast_rows(scales, shape)
            return means, scales.reciprocal(), _level(scales)
        roots = scales[..., None] * factors
        identity = torch.eye(self.features, dtype=roots.dtype, device=roots.device)
        whiteners = torch.linalg.solve_triangular(roots, identity.expand_as(roots), upper=False).flatten(-2)
        whole = self.components, self.features**2
        return means, _broadcast_rows(whiteners, whole), _broadcast_rows(_level(scales, factors), (self.components, 1))

    def likelihood(self, *parameters: Tensor) -> dist.TorchDistribution:
        means, inverse, level = parameters
        return Gaussians(means, inverse, level.squeeze(-1))

    def distributions(self, latents: Mapping[str, Tensor]) -> Components:
        means = latents["means"]
        # Draws of a site outside of plates, those of one table for all components too, may lack dimensions.
        scales = latents["scales"].reshape(len(means), -1, latents["scales"].shape[-1]).expand_as(means)
        if not self.correlated:
            return Independent(dist.Normal, means, scales)
        factors = latents["correlations"].reshape(len(means), -1, self.features, self.features)
        roots = scales[..., None] * factors
        return Correlated(means, roots @ roots.mT)

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
                f"scales: a component has collapsed; its standard deviation is set to the floor {self.floor}",
                stacklevel=2,
            )
        return variances.clamp_min(self.floor**2)

    def arrange(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        order = values["means"][:, 0].argsort()
        shared = ("scales", "correlations") if self.covariance == "tied" else ()
        return {n: v if n in shared else v[order] for n, v in values.items()}


class BernoulliMixture(Mixture):
    r"""Mixture of independent binary features, with a Beta prior.

    .. math::

        \theta_{kj} \sim \mathrm{Beta}(\alpha + 1, \alpha + 1), \qquad
        x_{nj} \mid z_n = k \sim \mathrm{Bernoulli}(\theta_{kj})

    Args:
        alpha: Additive smoothing: EM adds alpha zeros and alpha ones to each component.

    The other arguments are those of :class:`Mixture`. Sites: weights (K,), probs (K, D), z, x. The components have no
    order, so use EM or a guide rather than chains.
    """

    conjugate = True
    bounds = (0.0, 1.0)

    def __init__(self, features: int | Sequence[str], *, components: int, alpha: float = 0.1, **shared: Any) -> None:
        check_positive("alpha", alpha, zero=True)
        super().__init__(features, components=components, **shared)
        self.register_buffer("alpha", torch.full((self.features,), float(alpha)))
        self.dims |= {"probs": ("features",)}

    def draw_parameters(self) -> tuple[Tensor, Tensor]:
        with pyro.plate("components", self.components, dim=-1):
            probs = pyro.sample("probs", dist.Beta(self.alpha + 1, self.alpha + 1).to_event(1))
        return occurrence_parameters(probs)

    def likelihood(self, *parameters: Tensor) -> dist.TorchDistribution:
        logits, absent = parameters
        return Occurrences(logits, absent[..., 0])

    def distributions(self, latents: Mapping[str, Tensor]) -> Components:
        return Independent(dist.Bernoulli, latents["probs"])

    def columnwise(
        self, rows: int, *, latents: Mapping[str, Tensor], **_: Any
    ) -> Generator[tuple[int, Tensor], Tensor, None]:
        """One feature of rows after another: each with its log weights (rows, 2) given those sent before."""
        return in_turn(rows, latents["weights"].log(), latents["probs"])

    def maximise_parameters(self, responsibilities: Tensor, counts: Tensor, x: Tensor) -> dict[str, Tensor]:
        alpha = self.alpha.to(x) if self.prior else torch.zeros_like(x[0])
        return {"probs": (responsibilities.mT @ x + alpha) / (counts[:, None] + 2 * alpha)}

    def check(self, x: Any = None, z: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a binary matrix (rows, D) and z, if given, has a component for each row."""
        super().check(x, z)
        check_binary("x", x)


def _broadcast_rows(table: Tensor, shape: tuple[int, int]) -> Tensor:
    """Broadcast a table of one row or one column to a shape (K, width)."""
    return table.expand(torch.broadcast_shapes(table.shape, shape))


def _level(scales: Tensor, factors: Tensor | None = None) -> Tensor:
    r"""Half the logarithm of :math:`\det(2 \pi \Sigma)`: (..., 1)."""
    diagonal = scales if factors is None else scales * factors.diagonal(dim1=-2, dim2=-1)
    return (math.sqrt(2 * math.pi) * diagonal).log().sum(-1, keepdim=True)
