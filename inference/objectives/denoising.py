r"""The bound of a diffusion chain, estimated from one random edge per row.

The bound of a chain of T steps is a sum over its T + 1 edges of Gaussian KL divergences in closed form. One edge per
row, drawn at random and divided by its probability, gives an unbiased estimate for one call of the network. Model and
guide of the pair take an argument ``step`` (rows,), from 1 to T + 1, that selects the edge. So may any pair whose log
likelihood is a sum of so many terms, such as :class:`~ppl_models.EoNADE`: its features one after another.

References: Ho, Jain and Abbeel 2020 (https://arxiv.org/abs/2006.11239; the simple loss); Nichol and Dhariwal 2021
(https://arxiv.org/abs/2102.09672; the hybrid loss and importance sampling of steps); Kingma, Salimans, Poole and Ho
2021 (https://arxiv.org/abs/2107.00630; low-discrepancy sampling of steps).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.util import torch_item
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import check_count, check_not_negative
from inference.core.contracts import Objective
from inference.diagnostics.losses import still_falling
from inference.draws.kl import kl_by_site
from inference.objectives.game import takes


class Denoising(Trace_ELBO, Objective):
    r"""Minus the bound of a pair of many steps, or the simple loss of a diffusion chain, at one random step per row.

    .. math::

        L = \sum_n \frac{1}{\pi(t_n)} \, \mathrm{KL}_{t_n}(x_n), \quad t_n \sim \pi, \qquad
        L_\mathrm{simple} = \sum_n \lVert f_\theta(x_{t_n}, t_n) - \mathrm{target} \rVert^2, \quad
        t_n \sim \mathrm{Uniform}(1, \dots, T)

    The step of each row is uniform, and the steps of a batch are stratified.

    Args:
        steps: Number of steps T of the pair.
        simple: Whether to use the simple loss: the sum of squares of the pair's site ``residual``, unweighted.
        bound: Weight of the bound. Default: 1, or 0 with the simple loss; Nichol and Dhariwal 2021 use 0.001 with a
            learnt variance (and let the bound train the variance only; here it trains all parameters).
        importance: Whether to draw steps with probability proportional to the root mean square of their past cost.

    Raises:
        ValueError: An argument is out of range, or the pair takes no ``step``, or has another number of steps.

    Example:
        A chain of two steps over standard normal rows; the noise is predicted by a multiple of the noised row:

        >>> import pyro, pyro.distributions as dist
        >>> alpha_bar = torch.tensor([1.0, 0.36, 0.0])
        >>> def noised(x, step):
        ...     keep = alpha_bar[step][:, None]
        ...     return dist.Normal(keep.sqrt() * x, (1 - keep).sqrt()).to_event(1)
        >>> def model(x, step):
        ...     slope, q = pyro.param("slope", torch.tensor(0.0)), noised(x, step).base_dist
        ...     with pyro.plate("rows", len(x)):
        ...         x_t = pyro.sample("x_t", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         pyro.deterministic("residual", slope * x_t - (x_t - q.loc) / q.scale, event_dim=1)
        >>> def guide(x, step):
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("x_t", noised(x, step))
        >>> pyro.set_rng_seed(0)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Denoising(2, simple=True))
        >>> losses = [svi.step(torch.randn(100, 1)) for _ in range(500)]
        >>> print(f"{pyro.param('slope').item():.1f}")  # mean over the two steps of sqrt(1 - alpha_bar): 0.8 and 1
        0.9
    """

    has_posterior = False
    """The guide is the noising chain, which has no parameters, so there is no posterior to report."""
    probe: Mapping[str, Any] = {"step": 1}
    """The whole chain may be too long to run on all rows."""

    def __init__(
        self, steps: int, *, simple: bool = False, bound: float | None = None, importance: bool = False
    ) -> None:
        check_count("steps", steps, 2)
        bound = (0.0 if simple else 1.0) if bound is None else bound
        check_not_negative(bound=bound)
        if not (simple or bound):
            raise ValueError("bound: expected a positive weight where there is no simple loss, got 0")
        if importance and simple:
            raise ValueError("importance: expected the bound, got simple, which draws steps uniformly")
        super().__init__()
        self.steps, self.simple, self.weight, self.importance = steps, simple, bound, importance
        self.cost, self.seen = torch.ones(steps + 2), torch.zeros(steps + 2)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss at random edges, without gradients."""
        with torch.no_grad():
            return float(torch_item(self._loss(model, guide, args, kwargs)[0]))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss at random edges; gradients are added to those of the parameters."""
        loss, step, cost = self._loss(model, guide, args, kwargs)
        if loss.requires_grad:
            loss.backward()
        if self.importance:
            self._record(step, cost)
        return torch_item(loss)

    def _loss(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not takes(model, "step"):
            raise ValueError("model: Denoising expected an argument step of model and guide, got none")
        like = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim())
        step, weight = self.draw(len(like), like.device)
        traces = next(self._get_traces(model, guide, args, {**kwargs, "step": step}))
        loss, cost = torch.zeros(()), torch.zeros(())
        if self.simple:
            residual: Any = traces[0].nodes.get("residual")
            if residual is None:
                raise ValueError("simple: expected a model with the site residual, got one without: take the bound")
            loss = (torch.as_tensor(residual["scale"]) * residual["value"].square().sum(-1)).sum()
        if self.weight:
            cost, scale = edges(*traces)
            loss = loss + self.weight * (scale * weight * cost).sum()
        return loss, step, cost.detach()

    def check(self, bound: BoundPair) -> None:
        """Raise a ValueError unless the pair has the number of steps of this objective."""
        super().check(bound)
        if bound.asked.steps not in (None, self.steps):
            raise ValueError(f"steps: expected {bound.asked.steps}, those of the pair, got {self.steps}")

    def draw(self, rows: int, device: Any = None) -> tuple[Tensor, Tensor]:
        """Draw a step per row, (rows,), and its weight, 1 / ((T + 1) times its probability)."""
        # In double precision, so that rounding in a compiled program does not change the step.
        strata = torch.arange(rows, device=device, dtype=torch.float64) / rows
        uniform = (torch.rand((), device=device, dtype=torch.float64) + strata) % 1
        if self.simple:
            # The edge of the prior, which depends on no parameters, is left out.
            weight = torch.full((rows,), self.steps / (self.steps + 1), device=device)
            return (uniform * self.steps).long().clamp(max=self.steps - 1) + 1, weight
        count = self.steps + 1
        if not self.importance:
            return (uniform * count).long().clamp(max=count - 1) + 1, torch.ones(rows, device=device)
        probability = self.cost[1:].to(uniform).sqrt()
        # A mixture with the uniform distribution keeps every step possible.
        probability = 0.99 * probability / probability.sum() + 0.01 / count
        index = torch.searchsorted(probability.cumsum(0), uniform).clamp(max=count - 1)
        return index + 1, (1 / (count * probability[index])).to(self.cost.dtype)

    def _record(self, step: Tensor, cost: Tensor) -> None:
        """Update the running mean of the squared cost per step: the mean of the first ten, then at a rate of 0.1."""
        self.cost, self.seen = self.cost.to(cost), self.seen.to(cost)
        with torch.no_grad():
            hits = torch.zeros_like(self.seen).index_add(0, step, torch.ones_like(cost))
            mean_square = torch.zeros_like(self.cost).index_add(0, step, cost.square()) / hits.clamp(min=1)
            rate = torch.where(hits > 0, 1 / (self.seen + 1).clamp(max=10), 0.0)
            self.cost.lerp_(mean_square, rate)
            self.seen.add_((hits > 0).to(self.seen))

    def advise(self, bound: Any, losses: Any) -> tuple[str, ...]:
        """Advice about a fit whose loss still falls."""
        return still_falling(losses)


def edges(model_trace: Any, guide_trace: Any) -> tuple[Tensor, Tensor]:
    """Minus the bound of each row (N,) at its edge, unscaled and unweighted, and the plate's scale."""
    total, scale = torch.zeros(()), torch.ones(())
    for name, kl in kl_by_site(model_trace, guide_trace).items():
        batch = guide_trace.nodes[name]["fn"].batch_shape
        total = total + (kl.flatten(len(batch)).sum(-1) if kl.dim() > len(batch) else kl)
    for site in model_trace.nodes.values():
        if site["type"] == "sample" and site["is_observed"] and not site["infer"].get("_deterministic"):
            total = total - scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
            scale = torch.as_tensor(site["scale"])
    return total, scale
