r"""Wake-sleep, and reweighted wake-sleep with weights that are normalised per row.

.. math::

    \text{wake, model: } & \sum_n \sum_i \tilde w_{ni} \log p(x_n, z_{ni}) \\
    \text{wake, guide: } & \sum_n \sum_i \tilde w_{ni} \log q(z_{ni} \mid x_n) \\
    \text{sleep, guide: } & \sum_n \log q(z_n' \mid x_n'), \qquad (x_n', z_n') \sim p

with :math:`z_{ni} \sim q(z \mid x_n)` and weights :math:`\tilde w_{ni} \propto p(x_n, z_{ni}) / q(z_{ni} \mid x_n)`
that sum to one over i. No phase needs a gradient through the draws, so the guide may be discrete.

Pyro's ``ReweightedWakeSleep`` has one weight per particle for all rows together, as models with global latent sites
need. With latent sites per row, nearly all of that weight falls on one particle.

References: Hinton, Dayan, Frey and Neal 1995; Bornschein and Bengio 2015, "Reweighted Wake-Sleep"
(https://arxiv.org/abs/1406.2751); Le, Kosiorek, Siddharth, Teh and Wood 2019, "Revisiting Reweighted Wake-Sleep"
(https://arxiv.org/abs/1805.10469).
"""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from inference.core.checks import check_chance
from inference.core.halves import own_sites
from inference.core.handlers import Uncondition
from inference.objectives.importance import Weighted, latent


class RWS(Weighted):
    r"""Reweighted wake-sleep; the reported loss is minus the importance-weighted bound with k particles.

    All latent sites must be in one plate of rows. In the sleep phase the model simulates as many rows as the batch has.
    They reach the guide under the names of its arguments, or through its argument ``observations``.

    Args:
        particles: Number of particles k per row.
        insomnia: Weight of the guide's wake phase, between 0 and 1; the sleep phase has the rest (as in Pyro).

    Raises:
        ValueError: An argument is out of range, a latent site is outside the plate of rows or missing in the model, or
            the guide takes neither the data by name nor ``observations``.

    Reference: Bornschein and Bengio 2015 (https://arxiv.org/abs/1406.2751).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        ...         pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope, level = pyro.param("slope", torch.tensor(0.0)), pyro.param("level", torch.tensor(0.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("z", dist.Bernoulli(logits=level + slope * x))
        >>> x = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0])
        >>> pyro.set_rng_seed(0)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), RWS(50))
        >>> losses = [svi.step(x) for _ in range(500)]
        >>> print(f"{pyro.param('slope').item():.0f}")  # the posterior's log odds are 2 x - 2 + log(3 / 7)
        2
    """

    def __init__(self, particles: int = 5, *, insomnia: float = 1.0) -> None:
        super().__init__(particles)
        check_chance("insomnia", insomnia)
        self.insomnia = insomnia

    def surrogate(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        """Minus the bound, and the sum of the losses of all phases."""
        scores = self.scores(model, guide, args, kwargs, detach=True)
        log_weights = (scores.joint - scores.density).detach()
        weights = scores.weight * log_weights.softmax(0)
        wake = -(weights * (scores.joint + self.insomnia * scores.density)).sum() - scores.outside
        sleep = (1 - self.insomnia) * self._sleep(model, guide, args, kwargs) if self.insomnia < 1 else 0.0
        return self.minus_bound(scores).detach(), wake + sleep

    def _sleep(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Tensor:
        """Minus the log density of the guide at rows and latents simulated by the model (its dreams)."""
        with torch.no_grad():
            dream: Any = poutine.trace(Uncondition()(model)).get_trace(*args, **kwargs)
        nodes = [(n, s) for n, s in dream.nodes.items() if s["type"] == "sample"]
        dreamed = {n: s["value"] for n, s in nodes if s["infer"].get("was_observed") and not isinstance(s["fn"], Unit)}
        kwargs |= dreamed if dreamed.keys() <= kwargs.keys() else {"observations": dreamed}
        try:
            trace: Any = poutine.trace(poutine.replay(own_sites(guide), trace=dream)).get_trace(*args, **kwargs)
        except TypeError as error:
            if "observations" not in str(error):
                raise
            names = ", ".join(dreamed)
            raise ValueError(
                f"guide: the sleep phase expected arguments named {names}, or an argument observations, got neither"
            ) from None
        for name in latent(trace):
            if name not in dream.nodes:
                raise ValueError(f"guide: {type(self).__name__} expected latent sites of the model, got {name}")
        return -trace.log_prob_sum()


class WakeSleep(RWS):
    """Wake-sleep: one particle, and the guide is trained in the sleep phase only; the reported loss is minus the ELBO.

    Reference: Hinton, Dayan, Frey and Neal 1995, "The wake-sleep algorithm for unsupervised neural networks".
    """

    def __init__(self) -> None:
        super().__init__(1, insomnia=0.0)
