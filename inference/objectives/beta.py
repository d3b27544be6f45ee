r"""The ELBO with a weighted, floored or annealed KL divergence: :math:`\beta`-VAE, free bits, KL annealing.

.. math::

    \sum_n \mathrm{E}_q[\log p(x_n \mid z_n)] - \beta_t \sum_j \max\Big(\lambda,
    \tfrac1N \sum_n \mathrm{KL}_j(q(z_n \mid x_n) \,\|\, p(z_n))\Big) N

where j runs over the dimensions of the latent sites and N is the number of rows.

References: Higgins et al. 2017, "beta-VAE"; Kingma et al. 2016, "Improved Variational Inference with Inverse
Autoregressive Flow" (https://arxiv.org/abs/1606.04934; free bits); Bowman et al. 2016 (KL annealing).
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.util import torch_item
from torch import Tensor

from inference.core.checks import check_count, check_not_negative
from inference.draws.kl import kl_by_site, masked_by


class BetaELBO(Trace_ELBO):
    r"""The ELBO with a weight on the KL divergence of the guide from the prior.

    The KL divergence is computed in closed form where the guide allows it (``inference.draws.kl``). The objective is a
    lower bound of the evidence only if beta is at least 1 and the warmup is over.

    Args:
        beta: Weight :math:`\beta` of the KL divergence.
        free_bits: Minimum :math:`\lambda` in nats per row: the KL divergence of each dimension of a latent site in a
            plate, averaged over the rows of the batch, counts as at least this much.
        warmup: Number of steps over which the weight rises from 0 to beta; the objective counts its own steps.
        settings: Further arguments of ``Trace_ELBO``, such as ``num_particles``.

    Raises:
        ValueError: An argument is negative, the guide's draws are not reparameterised, or the guide has latent sites
            that the model lacks.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(0.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("z", dist.Normal(slope * x, 0.5))
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> pyro.set_rng_seed(0)
        >>> objective = BetaELBO(beta=4.0, num_particles=10)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
        >>> losses = [svi.step(x) for _ in range(300)]
        >>> print(f"{pyro.param('slope').item():.1f}")  # the prior counts four times: x / (1 + 4)
        0.2
    """

    def __init__(self, beta: float = 1.0, *, free_bits: float = 0.0, warmup: int = 0, **settings: Any) -> None:
        check_not_negative(beta=beta, free_bits=free_bits)
        check_count("warmup", warmup, 0)
        super().__init__(**settings)
        self.beta, self.free_bits, self.warmup = beta, free_bits, warmup
        self.taken = torch.zeros(())

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the objective at the current weight, without gradients."""
        return float(torch_item(self._loss(model, guide, args, kwargs)))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Minus the objective; gradients are added to those of the parameters."""
        loss = self._loss(model, guide, args, kwargs)
        if loss.requires_grad:
            loss.backward()
        self.taken.add_(1)
        return torch_item(loss)

    def _loss(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Tensor:
        particles = [self._particle(*traces) for traces in self._get_traces(model, guide, args, kwargs)]
        return torch.stack(particles).sum() / self.num_particles

    def _particle(self, model_trace: Any, guide_trace: Any) -> Tensor:
        extra = [n for n, s in guide_trace.nodes.items() if s["type"] == "sample" and n not in model_trace.nodes]
        if extra:
            raise ValueError(f"guide: BetaELBO expected latent sites of the model, got {extra[0]}")
        observed = [s for s in model_trace.nodes.values() if s["type"] == "sample" and s["is_observed"]]
        log_likelihood = sum((s["log_prob_sum"] for s in observed), torch.zeros(()))
        cost = torch.zeros(())
        for name, kl in kl_by_site(model_trace, guide_trace, masked=False).items():
            site = guide_trace.nodes[name]
            if not site["fn"].has_rsample:
                kind = type(site["fn"]).__name__
                raise ValueError(f"guide: BetaELBO expected reparameterised draws of {name}, got {kind}")
            cost = cost + self._cost(kl, site, model_trace.nodes[name])
        weight = self.beta * (((self.taken + 1) / self.warmup).clamp(max=1) if self.warmup else 1.0)
        return weight * cost - log_likelihood

    def _cost(self, kl: Tensor, guide: Any, model: Any) -> Tensor:
        r"""KL divergence (\*plates, \*event) of a site, scaled and masked as in the model, floored in each dimension.

        Where the guide has another scale a or mask than the model's b, the ELBO holds :math:`E[a \log q - b \log p]`,
        which is :math:`b \mathrm{KL} + (a - b) E[\log q]`.
        """
        batch, scale = guide["fn"].batch_shape, torch.as_tensor(model["scale"])
        kl = masked_by(kl, model["mask"], batch)
        if batch and self.free_bits:
            weight = masked_by(scale.to(kl.dtype).expand(batch), model["mask"], batch)
            shares = weight.reshape(*batch, *[1] * (kl.dim() - len(batch)))
            total = weight.sum()
            mean = (shares * kl).flatten(0, len(batch) - 1).sum(0) / total.clamp_min(torch.finfo(kl.dtype).tiny)
            cost = total * mean.clamp_min(self.free_bits).sum()
        else:
            cost = (scale * (kl.flatten(len(batch)).sum(-1) if kl.dim() > len(batch) else kl)).sum()
        numbers = not any(isinstance(s["scale"], Tensor) for s in (guide, model))
        if numbers and guide["scale"] == model["scale"] and guide["mask"] is model["mask"]:
            return cost
        density = guide["fn"].log_prob(guide["value"])
        own, theirs = (scale_and_mask(density, s["scale"], s["mask"]).sum() for s in (guide, model))
        return cost + own - theirs
