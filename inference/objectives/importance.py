r"""The importance-weighted bound of each row, and its doubly reparameterised gradient.

.. math::

    L_k = \sum_n \mathrm{E}\Big[\log \frac1k \sum_{i=1}^k w_{ni}\Big], \qquad
    w_{ni} = \frac{p(x_n, z_{ni})}{q(z_{ni} \mid x_n)}, \qquad z_{ni} \sim q(z \mid x_n)

Pyro's ``RenyiELBO(alpha=0)`` is the same bound on all rows at once. On a minibatch it raises each weight to the power
N / B, for the plate's scale is part of its log probabilities; here the scale stands outside of the logarithm.

References: Burda, Grosse and Salakhutdinov 2016 (https://arxiv.org/abs/1509.00519); Tucker, Lawson, Gu and Maddison
2019, "Doubly reparameterized gradient estimators for Monte Carlo objectives" (https://arxiv.org/abs/1810.04152).
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor


class IWAE(Trace_ELBO):
    r"""Importance-weighted bound with k particles a row.

    All latent sites lie in one plate of rows, and the guide's are reparameterised.

    Args:
        particles: k.
        doubly: Take the guide's gradient by the doubly reparameterised estimator (DReG), whose signal does not vanish
            as k grows: :math:`\sum_i \tilde w_i^2 \, \partial \log w_i / \partial z_i \, \partial z_i / \partial \phi`
            with :math:`\tilde w` the normalised weights.

    Raises:
        ValueError: A latent site lies outside of the plate of rows, or its draws are not reparameterised.

    Example:
        >>> import pyro.distributions as dist
        >>> from inference import fit
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(0.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("z", dist.Normal(slope * x, 0.7))
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> result = fit((model, guide), x, IWAE(5, doubly=True), steps=500, progress=False)
        >>> print(f"{result.params['slope']:.1f}")  # the posterior's mean is x / 2
        0.5
    """

    def __init__(self, particles: int = 5, *, doubly: bool = False) -> None:
        if particles < 1:
            raise ValueError(f"particles: expected at least 1, got {particles}")
        super().__init__(num_particles=particles, max_plate_nesting=1, vectorize_particles=True)
        self.doubly = doubly

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, without gradients."""
        guide_trace = self._draw(guide, args, kwargs)
        model_trace = self._replay(model, guide_trace, args, kwargs)
        scale = _scale(model_trace)
        return float(-scale * self._bound(_score(model_trace) - _score(guide_trace)))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Minus the bound; its gradients are added to those of the parameters."""
        guide_trace = self._draw(guide, args, kwargs)
        sites = _latent(guide_trace)
        _check(sites)
        drawn = {n: site["value"] for n, site in sites.items()}
        if self.doubly:
            for name, site in sites.items():
                site["value"] = drawn[name].detach().requires_grad_()
        model_trace = self._replay(model, guide_trace, args, kwargs)
        scale = _scale(model_trace)
        joint, density = _score(model_trace), _score(guide_trace)
        bound = self._bound(joint - density)
        loss = -scale * bound
        if self.doubly:
            weights = (joint - density).detach().softmax(0)
            leaves = [site["value"] for site in sites.values()]
            slopes = torch.autograd.grad((weights.square() * (joint - density)).sum(), leaves, retain_graph=True)
            # The model's parameters by the weights, those of the guide through its draws alone.
            moved = sum((s.detach() * z).sum() for s, z in zip(slopes, drawn.values(), strict=True))
            surrogate = -scale * ((weights * joint).sum() + moved)
        else:
            surrogate = loss
        if surrogate.requires_grad:
            surrogate.backward()
        return loss.detach().item()

    def _bound(self, log_weights: Tensor) -> Tensor:
        return (log_weights.logsumexp(0) - math.log(self.num_particles)).sum()

    def _draw(self, guide: Any, args: Any, kwargs: Any) -> Any:
        return poutine.trace(self._lift(guide)).get_trace(*args, **kwargs)

    def _replay(self, model: Any, guide_trace: Any, args: Any, kwargs: Any) -> Any:
        return poutine.trace(poutine.replay(self._lift(model), trace=guide_trace)).get_trace(*args, **kwargs)

    def _lift(self, function: Any) -> Any:
        """The function in a plate of particles on the left of its own, also for a single one."""
        return pyro.plate("particles", self.num_particles, dim=-2)(function)


def _latent(trace: Any) -> dict[str, Any]:
    nodes = trace.nodes.items()
    return {n: s for n, s in nodes if s["type"] == "sample" and not s["is_observed"] and not site_is_subsample(s)}


def _check(sites: dict[str, Any]) -> None:
    for name, site in sites.items():
        if not any(f.dim == -1 for f in site["cond_indep_stack"]):
            raise ValueError(f"guide: IWAE expected {name} in the plate of rows, got it outside; use Trace_ELBO")
        if not site["fn"].has_rsample:
            raise ValueError(f"guide: IWAE expected reparameterised draws of {name}, got {type(site['fn']).__name__}")


def _score(trace: Any) -> Tensor:
    """Log density of each particle and row, (k, rows), without the plate's scale."""
    total = torch.zeros(())
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            total = total + scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    return total


def _scale(trace: Any) -> Any:
    scales = [site["scale"] for site in trace.nodes.values() if site["type"] == "sample" and site["is_observed"]]
    return scales[0] if scales else 1.0
