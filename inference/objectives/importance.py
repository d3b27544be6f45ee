r"""The importance-weighted bound of each row, for reparameterised guides (IWAE) and for all guides (VIMCO).

.. math::

    L_k = \sum_n \mathrm{E}\Big[\log \frac1k \sum_{i=1}^k w_{ni}\Big], \qquad
    w_{ni} = \frac{p(x_n, z_{ni})}{q(z_{ni} \mid x_n)}, \qquad z_{ni} \sim q(z \mid x_n)

Pyro's ``RenyiELBO(alpha=0)`` is the same bound if all rows are used at every step. On a minibatch of B of N rows it
raises each weight to the power N / B, because the plate's scale is part of the log probabilities; here the scale
multiplies the logarithm. Sites outside of the plate of rows (a penalty, an observed total) are counted once.

References: Burda, Grosse and Salakhutdinov 2016, "Importance Weighted Autoencoders" (https://arxiv.org/abs/1509.00519);
Tucker, Lawson, Gu and Maddison 2019, "Doubly reparameterized gradient estimators for Monte Carlo objectives"
(https://arxiv.org/abs/1810.04152); Mnih and Rezende 2016, "Variational inference for Monte Carlo objectives"
(https://arxiv.org/abs/1602.06725).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from inference.core.checks import check_count
from inference.core.halves import own_sites
from inference.core.handlers import StopGradient
from inference.draws.engine import sample_names


@dataclass(frozen=True)
class Scores:
    r"""Log densities of the particles, and how the rows count.

    Attributes:
        joint: Log density of the model's sites in the plate of rows, (k, rows).
        density: Log density of the guide's sites there, (k, rows).
        weight: Weight of each row's bound: N / B for a minibatch of B of N rows, times a scale that all sites share.
        outside: Log density of the model's sites outside of the plate, as a scalar.
    """

    joint: Tensor
    density: Tensor
    weight: Any
    outside: Tensor


class Weighted(Trace_ELBO):
    """Base class of objectives with k particles per row: the bound, and a surrogate whose gradient is used.

    All latent sites must be in one plate of rows. Sites outside of it may not depend on them.

    Args:
        particles: Number of particles k per row.
    """

    def __init__(self, particles: int) -> None:
        check_count("particles", particles)
        super().__init__(num_particles=particles, max_plate_nesting=1, vectorize_particles=True)
        self._checked: set[tuple[Any, Any]] = set()

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, without gradients."""
        return float(self.minus_bound(self.scores(model, guide, args, kwargs)))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Minus the bound; gradients are added to those of the parameters."""
        loss, surrogate = self.surrogate(model, guide, args, kwargs)
        if surrogate.requires_grad:
            surrogate.backward()
        return loss.detach().item()

    @abstractmethod
    def surrogate(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        """Minus the bound, and the scalar to differentiate."""

    def bound(self, log_weights: Tensor) -> Tensor:
        """Logarithm of the mean weight of each row, (rows,), from log weights (k, rows)."""
        return log_weights.logsumexp(0) - math.log(self.num_particles)

    def minus_bound(self, scores: Scores) -> Tensor:
        """Minus the bound of all rows, as a scalar."""
        return -(scores.weight * self.bound(scores.joint - scores.density)).sum() - scores.outside

    def draw(self, guide: Any, args: Any, kwargs: Any, *, detach: bool = False) -> Any:
        """Trace of the guide with all particles at once; with ``detach`` no gradient flows through its draws."""
        with StopGradient() if detach else nullcontext():
            return poutine.trace(self._lift(guide)).get_trace(*args, **kwargs)

    def replay(self, function: Any, trace: Any, args: Any, kwargs: Any) -> Any:
        """Trace of the model, or of the guide again, at the draws of a trace of the guide."""
        return poutine.trace(poutine.replay(self._lift(function), trace=trace)).get_trace(*args, **kwargs)

    def scores(self, model: Any, guide: Any, args: Any, kwargs: Any, *, detach: bool = False) -> Scores:
        """Log densities of draws of the guide."""
        guide_trace = self.draw(guide, args, kwargs, detach=detach)
        return self.score(model, guide, guide_trace, self.replay(model, guide_trace, args, kwargs))

    def score(self, model: Any, guide: Any, guide_trace: Any, model_trace: Any) -> Scores:
        """Log densities of both traces: row by row in the plate of rows, and once outside of it."""
        kind, names = type(self).__name__, latent(guide_trace)
        check_sites(kind, model_trace, guide_trace)
        guides, alien = self._split(guide_trace, plate_of_rows("guide", kind, guide_trace, names))
        within, outside = self._split(model_trace, plate_of_rows("model", kind, model_trace, names))
        if alien:
            raise ValueError(f"guide: {kind} expected sites in the plate of rows, got {', '.join(alien)} outside of it")
        if outside and (model, guide) not in self._checked:
            self._check_outside(outside)
            self._checked.add((model, guide))
        weight, exponents = _weights([*within, *guides])
        densities = [_per_row(_log_density(s, e)) for (s, _), e in zip([*within, *guides], exponents, strict=True)]
        none = torch.zeros(self.num_particles, 1)
        parts = densities[: len(within)], densities[len(within) :]
        joint, density = (sum(part[1:], part[0]) if part else none for part in parts)
        once = sum((_log_density(s, s["scale"]).sum() for s in outside.values()), torch.zeros(()))
        return Scores(joint, density, weight, once / self.num_particles)

    @staticmethod
    def _split(trace: Any, plate: str | None) -> tuple[list[tuple[Any, Any]], dict[str, Any]]:
        """Sites in a plate, each with its frame there, and the others by name."""
        framed = {n: (s, _frame(s, plate)) for n, s in scored(trace).items()}
        return [(s, f) for s, f in framed.values() if f], {n: s for n, (s, f) in framed.items() if not f}

    def _check_outside(self, sites: Mapping[str, Any]) -> None:
        """Raise a ValueError if a site of the model outside of the plate of rows differs between the particles."""
        for name, site in sites.items():
            each = _log_density(site, 1.0).detach()
            apart = each.movedim(-2, 0).flatten(1).sum(1) if each.dim() > 1 else each.sum()[None]
            unplated = each.dim() and each.shape[-1] > 1 and not any(f.dim == -1 for f in site["cond_indep_stack"])
            if unplated or not torch.allclose(apart, apart[:1], equal_nan=True):
                raise ValueError(
                    f"model: {type(self).__name__} expected a site outside of the plate of rows not to depend on the "
                    f"latent sites in it, got {name}; use Trace_ELBO"
                )

    def _lift(self, function: Any) -> Any:
        """Wrap a model or guide in a plate of particles to the left of its plate of rows, even for one particle."""
        return pyro.plate("particles", self.num_particles, dim=-2)(own_sites(function))


class IWAE(Weighted):
    r"""Importance-weighted bound (IWAE) with k particles per row.

    All latent sites must be in one plate of rows, and the guide's draws reparameterised.

    Args:
        particles: Number of particles k per row.
        doubly: Whether to use the doubly reparameterised gradient (DReG) for the guide, whose signal does not vanish as
            k grows: :math:`\sum_i \tilde w_i^2 \, \partial \log w_i / \partial z_i \, \partial z_i / \partial \phi`
            with normalised weights :math:`\tilde w`.

    Raises:
        ValueError: A latent site is outside the plate of rows, or its draws are not reparameterised.

    References: Burda et al. 2016 (https://arxiv.org/abs/1509.00519); Tucker et al. 2019
    (https://arxiv.org/abs/1810.04152; DReG).

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(0.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("z", dist.Normal(slope * x, 0.7))
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> pyro.set_rng_seed(0)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), IWAE(5, doubly=True))
        >>> losses = [svi.step(x) for _ in range(500)]
        >>> print(f"{pyro.param('slope').item():.1f}")  # the posterior's mean is x / 2
        0.5
    """

    def __init__(self, particles: int = 5, *, doubly: bool = False) -> None:
        super().__init__(particles)
        self.doubly = doubly

    def surrogate(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        """Minus the bound, and the scalar to differentiate: minus the bound itself, or DReG's surrogate."""
        guide_trace = self.draw(guide, args, kwargs)
        sites = latent(guide_trace)
        for name, site in sites.items():
            if not site["fn"].has_rsample:
                kind = type(site["fn"]).__name__
                raise ValueError(f"guide: IWAE expected reparameterised draws of {name}, got {kind}; use VIMCO or RWS")
        if not self.doubly:
            loss = self.minus_bound(
                self.score(model, guide, guide_trace, self.replay(model, guide_trace, args, kwargs))
            )
            return loss, loss
        draws = {n: site["value"] for n, site in sites.items()}
        for name, site in sites.items():
            site["value"] = draws[name].detach().requires_grad_()
        leaves = [site["value"] for site in sites.values()]
        if len(scored(guide_trace)) > 1:
            # A site's density may depend on the draws of another: through these leaves, too.
            guide_trace = self.replay(guide, guide_trace, args, kwargs)
        scores = self.score(model, guide, guide_trace, self.replay(model, guide_trace, args, kwargs))
        log_weights = scores.joint - scores.density
        weights = log_weights.detach().softmax(0)
        slopes = torch.autograd.grad(
            (scores.weight * weights.square() * log_weights).sum(), leaves, retain_graph=True, allow_unused=True
        )
        # The model's parameters get weighted gradients; the guide's get gradients through its draws only.
        pairs = [(s, z) for s, z in zip(slopes, draws.values(), strict=True) if s is not None]
        through_draws = sum(((s.detach() * z).sum() for s, z in pairs), torch.zeros(()))
        wake = (scores.weight * weights * scores.joint).sum()
        return self.minus_bound(scores), -wake - through_draws - scores.outside


class VIMCO(Weighted):
    r"""Importance-weighted bound for discrete guides: score-function gradient with a baseline per particle.

    .. math::

        \nabla L_k = \mathrm{E}\Big[\sum_i \big(\hat L - \hat L_{-i}\big) \nabla \log q(z_i \mid x)
            + \sum_i \tilde w_i \nabla \log w_i\Big]

    where :math:`\tilde w` are the normalised weights and the baseline :math:`\hat L_{-i}` is the bound with the weight
    of particle i replaced by the geometric mean of the others.

    Args:
        particles: Number of particles k per row, at least 2.

    Raises:
        ValueError: A latent site is outside the plate of rows, or there are fewer than two particles.

    Reference: Mnih and Rezende 2016 (https://arxiv.org/abs/1602.06725).
    """

    def __init__(self, particles: int = 5) -> None:
        check_count("particles", particles, 2)
        super().__init__(particles)

    def surrogate(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        """Minus the bound, and the scalar to differentiate."""
        scores = self.scores(model, guide, args, kwargs, detach=True)
        log_weights = scores.joint - scores.density
        signal = self.bound(log_weights.detach()) - self._without(log_weights.detach())
        loss = self.minus_bound(scores)
        return loss, loss - (scores.weight * signal * scores.density).sum()

    def _without(self, log_weights: Tensor) -> Tensor:
        """The bound with one weight after the other replaced by the geometric mean of the rest, (k, rows)."""
        k = self.num_particles
        others = (log_weights.sum(0) - log_weights) / (k - 1)
        diagonal = torch.eye(k, dtype=torch.bool, device=log_weights.device)[:, :, None]
        replaced = torch.where(diagonal, others[None], log_weights[None])
        return replaced.logsumexp(1) - math.log(k)


def latent(trace: Any) -> dict[str, Any]:
    """Latent sites of a trace: neither observed nor the subsample of a plate."""
    nodes = trace.nodes.items()
    return {n: s for n, s in nodes if s["type"] == "sample" and not s["is_observed"] and not site_is_subsample(s)}


def scored(trace: Any) -> dict[str, Any]:
    """Sites of a trace that have a density: neither deterministic nor the subsample of a plate."""
    return {n: trace.nodes[n] for n in sample_names(trace)}


def check_sites(kind: str, model_trace: Any, guide_trace: Any) -> None:
    """Raise a ValueError unless model and guide have the same latent sites; auxiliary ones are the guide's own."""
    mine, theirs = latent(model_trace), latent(guide_trace)
    missing = sorted(mine.keys() - theirs.keys())
    if missing:
        raise ValueError(f"guide: {kind} expected all latent sites of the model, got none named {', '.join(missing)}")
    extra = sorted(n for n in theirs.keys() - mine.keys() if not (theirs[n]["infer"] or {}).get("is_auxiliary"))
    if extra:
        raise ValueError(f"guide: {kind} expected latent sites of the model, got {', '.join(extra)}")


def plate_of_rows(half: str, kind: str, trace: Any, names: Collection[str]) -> str | None:
    """Name of the plate that holds all latent sites of a trace; None where there are none.

    Raises:
        ValueError: A latent site is outside of it.
    """
    found: dict[str, str] = {}
    for name in names:
        if name not in trace.nodes:
            continue
        plate = next((f.name for f in trace.nodes[name]["cond_indep_stack"] if f.dim == -1), None)
        if plate is None:
            raise ValueError(f"{half}: {kind} expected {name} in the plate of rows, got a global site; use Trace_ELBO")
        found[plate] = name
    if len(found) > 1:
        said = ", ".join(f"{name} in {plate}" for plate, name in found.items())
        raise ValueError(f"{half}: {kind} expected all latent sites in one plate of rows, got {said}; use Trace_ELBO")
    return next(iter(found), None)


def _frame(site: Any, plate: str | None) -> Any:
    """The frame of a site in a plate; None outside of it."""
    return next((f for f in site["cond_indep_stack"] if f.name == plate), None)


def _log_density(site: Any, scale: Any) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), scale, site["mask"])


def _per_row(log_density: Tensor) -> Tensor:
    """Log density (k, rows) from that in further plates to the left, which are summed over."""
    return log_density.flatten(0, -3).sum(0) if log_density.dim() > 2 else log_density


def _weights(sites: list[tuple[Any, Any]]) -> tuple[Any, list[Any]]:
    """Weight of each row's bound, and by site the exponent of its density inside of the logarithm.

    A scale that all sites share multiplies the logarithm, as that of a minibatch does. Where sites have scales of
    their own, those are exponents.

    Args:
        sites: Sites in the plate of rows, each with its frame there.
    """
    if not sites:
        return 1.0, []
    share = [(f.full_size or f.size) / f.size for _, f in sites]
    scales = [s["scale"] for s, _ in sites]
    if not any(isinstance(s, Tensor) for s in scales):
        if all(s == scales[0] for s in scales):
            return scales[0], [1.0] * len(sites)
        return share[0], [s / n for s, n in zip(scales, share, strict=True)]
    tensors = [torch.as_tensor(s) for s in scales]
    same = torch.stack([s == tensors[0] for s in torch.broadcast_tensors(*tensors)]).all(0)
    return torch.where(same, tensors[0], share[0]), [
        torch.where(same, torch.ones_like(s), s / n) for s, n in zip(tensors, share, strict=True)
    ]
