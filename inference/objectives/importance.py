r"""The importance-weighted bound of each row, for reparameterised guides (IWAE) and for all guides (VIMCO).

.. math::

    L_k = \sum_n \mathrm{E}\Big[\log \frac1k \sum_{i=1}^k w_{ni}\Big], \qquad
    w_{ni} = \frac{p(x_n, z_{ni})}{q(z_{ni} \mid x_n)}, \qquad z_{ni} \sim q(z \mid x_n)

Pyro's ``RenyiELBO(alpha=0)`` is the same bound if all rows are used at every step. On a minibatch of B of N rows it
raises each weight to the power N / B, because the plate's scale is part of the log probabilities; here the scale
multiplies the logarithm.

References: Burda, Grosse and Salakhutdinov 2016, "Importance Weighted Autoencoders" (https://arxiv.org/abs/1509.00519);
Tucker, Lawson, Gu and Maddison 2019, "Doubly reparameterized gradient estimators for Monte Carlo objectives"
(https://arxiv.org/abs/1810.04152); Mnih and Rezende 2016, "Variational inference for Monte Carlo objectives"
(https://arxiv.org/abs/1602.06725).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from inference.core.handlers import StopGradient


class Weighted(Trace_ELBO):
    """Base class of objectives with k particles per row: the bound, and a surrogate whose gradient is used.

    All latent sites must be in one plate of rows.

    Args:
        particles: Number of particles k per row.
    """

    def __init__(self, particles: int) -> None:
        if not isinstance(particles, int) or particles < 1:
            raise ValueError(f"particles: expected an integer of at least 1, got {particles!r}")
        super().__init__(num_particles=particles, max_plate_nesting=1, vectorize_particles=True)

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, without gradients."""
        guide_trace = self.draw(guide, args, kwargs)
        model_trace = self.replay(model, guide_trace, args, kwargs)
        return float(-scale(model_trace) * self.bound(score(model_trace) - score(guide_trace)).sum())

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

    def draw(self, guide: Any, args: Any, kwargs: Any, *, detach: bool = False) -> Any:
        """Trace of the guide with all particles at once; with ``detach`` no gradient flows through its draws."""
        with StopGradient() if detach else nullcontext():
            trace = poutine.trace(self._lift(guide)).get_trace(*args, **kwargs)
        for name, site in latent(trace).items():
            if not any(f.dim == -1 for f in site["cond_indep_stack"]):
                kind = type(self).__name__
                raise ValueError(
                    f"guide: {kind} expected {name} in the plate of rows, got a global site; use Trace_ELBO"
                )
        return trace

    def replay(self, model: Any, guide_trace: Any, args: Any, kwargs: Any) -> Any:
        """Trace of the model at the guide's draws."""
        return poutine.trace(poutine.replay(self._lift(model), trace=guide_trace)).get_trace(*args, **kwargs)

    def _lift(self, function: Any) -> Any:
        """Wrap a model or guide in a plate of particles to the left of its plate of rows, even for one particle."""
        return pyro.plate("particles", self.num_particles, dim=-2)(function)


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
        draws = {n: site["value"] for n, site in sites.items()}
        if self.doubly:
            for name, site in sites.items():
                site["value"] = draws[name].detach().requires_grad_()
        model_trace = self.replay(model, guide_trace, args, kwargs)
        joint, density, rows = score(model_trace), score(guide_trace), scale(model_trace)
        loss = -rows * self.bound(joint - density).sum()
        if not self.doubly:
            return loss, loss
        weights = (joint - density).detach().softmax(0)
        leaves = [site["value"] for site in sites.values()]
        slopes = torch.autograd.grad((weights.square() * (joint - density)).sum(), leaves, retain_graph=True)
        # The model's parameters get weighted gradients; the guide's get gradients through its draws only.
        through_draws = sum((s.detach() * z).sum() for s, z in zip(slopes, draws.values(), strict=True))
        return loss, -rows * ((weights * joint).sum() + through_draws)


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
        super().__init__(particles)
        if particles < 2:
            raise ValueError(f"particles: VIMCO expected at least 2, got {particles}")

    def surrogate(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        """Minus the bound, and the scalar to differentiate."""
        guide_trace = self.draw(guide, args, kwargs, detach=True)
        model_trace = self.replay(model, guide_trace, args, kwargs)
        density, rows = score(guide_trace), scale(model_trace)
        log_weights = score(model_trace) - density
        bound = self.bound(log_weights)
        signal = bound.detach() - self._without(log_weights.detach())
        return -rows * bound.sum(), -rows * ((signal * density).sum() + bound.sum())

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


def score(trace: Any) -> Tensor:
    """Log density of each particle and row, (k, rows), without the scale of the plate."""
    total = torch.zeros(())
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            total = total + scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    return total


def scale(trace: Any) -> Any:
    """Scale of the plate of rows: N / B for a minibatch of B of N rows."""
    scales = [site["scale"] for site in trace.nodes.values() if site["type"] == "sample" and site["is_observed"]]
    return scales[0] if scales else 1.0
