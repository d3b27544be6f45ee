r"""Predictability minimisation: predictors learn each code unit from the others, and the model makes them fail.

.. math::

    L_\phi = -\sum_n \sum_k \log q_\phi(z_{nk} \mid z_{n,-k}), \qquad
    L_\theta = -\mathrm{ELBO} + w \sum_n \sum_k \log q_\phi(z_{nk} \mid z_{n,-k})

The predictors belong to the guide, and the bound keeps the information about x in the code. At the optimum the units
are independent and, if their range is bounded, as variable as possible.

Reference: Schmidhuber 1992, "Learning Factorial Codes by Predictability Minimization".
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.elbo import ELBO
from torch import Tensor

from inference.core.handlers import StopGradient
from inference.objectives.game import Game, Players, by_name, takes

PREDICTED_SITE = "predicted"


class Predictability(Game):
    r"""Predictability minimisation of a pair whose guide also predicts its own latent units.

    With the argument ``predict=True`` the guide draws its latent sites and observes them again at a site named
    ``predicted``, whose distribution is the predictors'. Without it the guide is that of the bound.

    Args:
        bound: An ELBO, or a factory of one, which keeps the information about x in the code.
        weight: Weight w of the predictors' log density in the model's loss.
        turns: Consecutive steps of the predictors and of the model. Default: both move at every step.

    Raises:
        ValueError: An argument is out of range, or the guide has no site ``predicted``.

    Reference: Schmidhuber 1992, "Learning Factorial Codes by Predictability Minimization".
    """

    def __init__(
        self,
        bound: ELBO | Callable[[], ELBO],
        weight: float = 1.0,
        turns: tuple[int, int] | None = None,
    ) -> None:
        if bound is None:
            raise TypeError("bound: expected an ELBO or a factory of one, got None")
        super().__init__(bound, weight, turns)

    def guide_score(self, model: Any, guide: Any, named: Any, *, detach: bool) -> Tensor:
        """Sum of the log densities of the units, each given the others."""
        trace = self._predicted(guide, named, detach=detach)
        site = trace.nodes[PREDICTED_SITE]
        return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"]).sum()

    def losses(self, model: Any, guide: Any, named: Any, moving: tuple[bool, bool], players: Players) -> list[Tensor]:
        """Losses of the predictors and of the model."""
        score = self.guide_score(model, guide, named, detach=False)
        return [-score, self.weight * score]

    def _predicted(self, guide: Any, named: Any, *, detach: bool = False) -> Any:
        if not takes(guide, "predict"):
            raise ValueError("guide: Predictability expected an argument predict, got none")
        with StopGradient() if detach else nullcontext():
            trace: Any = poutine.trace(guide).get_trace(**{**named, "predict": True})
        if PREDICTED_SITE not in trace.nodes or not trace.nodes[PREDICTED_SITE]["is_observed"]:
            got = ", ".join(n for n, s in trace.nodes.items() if s["type"] == "sample") or "none"
            raise ValueError(f"guide: Predictability expected an observed site {PREDICTED_SITE}, got {got}")
        return trace

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        guide_trace = self._predicted(guide, by_name(model, args, kwargs))
        with torch.no_grad():
            return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs), guide_trace
