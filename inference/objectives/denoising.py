r"""The bound of a chain of T steps by one edge of it a row.

The bound of a diffusion chain is a sum over its T + 1 edges, whose divergences are Gaussian and known in closed form.
One edge, drawn at random for each row and scaled by how rarely it is drawn, estimates it without bias at the cost of
one call of the network. A pair offers its edges by an argument ``step`` (rows,), from 1 to T + 1, of both halves.

References: Ho, Jain and Abbeel 2020 (https://arxiv.org/abs/2006.11239), the simple loss; Nichol and Dhariwal 2021
(https://arxiv.org/abs/2102.09672), the hybrid loss and importance sampling of steps; Kingma, Salimans, Poole and Ho
2021 (https://arxiv.org/abs/2107.00630), steps spread evenly over the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from pyro.infer.util import torch_item
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import check_not_negative
from inference.core.contracts import Objective
from inference.draws.kl import kl_by_site
from inference.objectives.game import takes


class Denoising(Trace_ELBO, Objective):
    r"""Minus the bound of a chain, or its simple loss, at a random edge of each row.

    .. math::

        L = \sum_n \frac{1}{\pi(t_n)} \, \mathrm{KL}_{t_n}(x_n), \quad t_n \sim \pi, \qquad
        L_\mathrm{simple} = \sum_n \lVert f_\theta(x_{t_n}, t_n) - \mathrm{target} \rVert^2, \quad
        t_n \sim \mathrm{Uniform}(1, \dots, T)

    Steps are spread evenly over the rows of a batch: each row's is uniform, and together they leave no gap.

    Args:
        steps: T of the pair.
        simple: The sum of squares of the pair's site ``residual``, without the weights of the bound.
        bound: Weight of the bound: 1, or 0 beside the simple loss, where Nichol and Dhariwal 2021 give it 0.001 for a
            learned variance (and let it move the variance alone; here it moves all).
        importance: Draw steps by the root of the mean square of what they were found to cost.

    Raises:
        ValueError: The pair takes no ``step``, or an argument is out of its range.

    Example:
        A chain of two steps over standard normal rows, whose noise is predicted by a multiple of the noised row:

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
    """The guide is a noise without parameters: there is no posterior to show."""
    probe: Mapping[str, Any] = {"step": 1}
    """The whole chain may be too long to run on all rows."""

    def __init__(
        self, steps: int, *, simple: bool = False, bound: float | None = None, importance: bool = False
    ) -> None:
        if not isinstance(steps, int) or steps < 2:
            raise ValueError(f"steps: expected an integer of at least 2, got {steps!r}")
        bound = (0.0 if simple else 1.0) if bound is None else bound
        check_not_negative(bound=bound)
        if not (simple or bound):
            raise ValueError("bound: expected a positive weight where there is no simple loss, got 0")
        if importance and simple:
            raise ValueError("importance: expected the bound, got simple, whose steps are uniform")
        super().__init__()
        self.steps, self.simple, self.weight, self.importance = steps, simple, bound, importance
        self.cost, self.seen = torch.ones(steps + 2), torch.zeros(steps + 2)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss of random edges, without gradients."""
        with torch.no_grad():
            return float(torch_item(self._loss(model, guide, args, kwargs)[0]))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of random edges; its gradients are added to those of the parameters."""
        loss, step, cost = self._loss(model, guide, args, kwargs)
        if loss.requires_grad:
            loss.backward()
        if self.importance:
            self._take(step, cost)
        return torch_item(loss)

    def _loss(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not takes(model, "step"):
            raise ValueError("model: Denoising expected an argument step of model and guide, got none")
        like = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim())
        step, weight = self.draw(len(like), like.device)
        traces = next(self._get_traces(model, guide, args, {**kwargs, "step": step}))
        loss, cost = torch.zeros(()), torch.zeros(())
        if self.simple:
            residual: Any = traces[0].nodes["residual"]
            loss = (torch.as_tensor(residual["scale"]) * residual["value"].square().sum(-1)).sum()
        if self.weight:
            cost, scale = edges(*traces)
            loss = loss + self.weight * (scale * weight * cost).sum()
        return loss, step, cost.detach()

    def check(self, bound: BoundPair) -> None:
        """Raise a ValueError unless the pair has the number of steps of this objective."""
        super().check(bound)
        steps = getattr(bound.pair, "steps", self.steps)
        if steps != self.steps:
            raise ValueError(f"steps: expected {steps}, those of the pair, got {self.steps}")

    def draw(self, rows: int, device: Any = None) -> tuple[Tensor, Tensor]:
        """Steps of rows (N,), and their weights beside T + 1: one for uniform steps."""
        # In double precision: a share that is rounded otherwise in a compiled program must not draw another step.
        even = torch.arange(rows, device=device, dtype=torch.float64) / rows
        at = (torch.rand((), device=device, dtype=torch.float64) + even) % 1
        if self.simple:
            # Of T edges; the prior's, which nothing moves, is left out.
            weight = torch.full((rows,), self.steps / (self.steps + 1), device=device)
            return (at * self.steps).long().clamp(max=self.steps - 1) + 1, weight
        count = self.steps + 1
        if not self.importance:
            return (at * count).long().clamp(max=count - 1) + 1, torch.ones(rows, device=device)
        share = self.cost[1:].to(at).sqrt()
        # One step in a hundred is drawn evenly: none is forgotten.
        share = 0.99 * share / share.sum() + 0.01 / count
        chosen = torch.searchsorted(share.cumsum(0), at).clamp(max=count - 1)
        return chosen + 1, (1 / (count * share[chosen])).to(self.cost.dtype)

    def _take(self, step: Tensor, each: Tensor) -> None:
        """Take what steps cost into the moving mean of their squares: the mean of the first ten, then a tenth each."""
        self.cost, self.seen = self.cost.to(each), self.seen.to(each)
        with torch.no_grad():
            hits = torch.zeros_like(self.seen).index_add(0, step, torch.ones_like(each))
            found = torch.zeros_like(self.cost).index_add(0, step, each.square()) / hits.clamp(min=1)
            rate = torch.where(hits > 0, 1 / (self.seen + 1).clamp(max=10), 0.0)
            self.cost.lerp_(found, rate)
            self.seen.add_((hits > 0).to(self.seen))

    def advise(self, bound: Any, losses: Any) -> tuple[str, ...]:
        """What the losses of a fit say: whether they still fall."""
        size = len(losses) // 5
        if size < 20:
            return ()
        before, after = losses[-2 * size : -size], losses[-size:]
        error = ((before.var() + after.var()) / size) ** 0.5
        if before.mean() - after.mean() <= 4 * error:
            return ()
        share = 100 * (before.mean() - after.mean()) / abs(before.mean())
        return (f"The loss still falls: by {share:.1f}% over the last fifth of the steps; take more of them.",)


def edges(model_trace: Any, guide_trace: Any) -> tuple[Tensor, Tensor]:
    """Minus the bound of each row (N,), neither scaled nor weighted, and its scale."""
    found = kl_by_site(model_trace, guide_trace)
    total, scale = torch.zeros(()), torch.ones(())
    for name, each in found.items():
        batch = guide_trace.nodes[name]["fn"].batch_shape
        total = total + (each.flatten(len(batch)).sum(-1) if each.dim() > len(batch) else each)
    for site in model_trace.nodes.values():
        if site["type"] == "sample" and site["is_observed"] and not site["infer"].get("_deterministic"):
            score = site["fn"].log_prob(site["value"])
            total = total - (score if site["mask"] is None else torch.where(site["mask"], score, 0.0))
            scale = torch.as_tensor(site["scale"])
    return total, scale
