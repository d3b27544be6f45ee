r"""Predictability minimisation: the model makes its code unpredictable, unit by unit, for predictors in the guide.

.. math::

    L_\phi = -\sum_n \sum_k \log q_\phi(z_{nk} \mid z_{n,-k}), \qquad
    L_\theta = -\mathrm{ELBO} + w \sum_n \sum_k \log q_\phi(z_{nk} \mid z_{n,-k})

Each unit is predicted from all others. Units of a bounded range that nothing predicts are independent, and as variable
as they can be; that the code says all of the row is the bound's part.

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

SITE = "predicted"


class Predictability(Game):
    r"""Predictability minimisation of a pair whose guide also predicts its own latent units.

    Run with the argument ``predict=True`` the guide draws its latent sites and observes them once more at a site named
    ``predicted``, whose law has the predictors' parameters. Run without it is the guide of the bound.

    Args:
        bound: An ELBO, or a factory of one, that keeps the row in the code.
        weight: w.
        turns: Steps of the predictors, and of the model, in turn; None: both move at every step.

    Raises:
        ValueError: An argument is out of its range, or the guide has no site ``predicted``.
    """

    def __init__(
        self,
        bound: ELBO | Callable[[], ELBO],
        weight: float = 1.0,
        turns: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(bound, weight, turns)

    def guide_score(self, model: Any, guide: Any, named: Any, *, still: bool) -> Tensor:
        """Log density of the units, each given the others."""
        trace = self._predicted(guide, named, still=still)
        site = trace.nodes[SITE]
        return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"]).sum()

    def losses(self, model: Any, guide: Any, named: Any, moving: tuple[bool, bool], players: Players) -> list[Tensor]:
        """Losses of the predictors and of the model."""
        found = self.guide_score(model, guide, named, still=False)
        return [-found, self.weight * found]

    def _predicted(self, guide: Any, named: Any, *, still: bool = False) -> Any:
        if not takes(guide, "predict"):
            raise ValueError("guide: Predictability expected an argument predict, got none")
        with StopGradient() if still else nullcontext():
            trace: Any = poutine.trace(guide).get_trace(**{**named, "predict": True})
        if SITE not in trace.nodes or not trace.nodes[SITE]["is_observed"]:
            got = ", ".join(n for n, s in trace.nodes.items() if s["type"] == "sample") or "none"
            raise ValueError(f"guide: Predictability expected an observed site {SITE}, got {got}")
        return trace

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        seen = self._predicted(guide, by_name(model, args, kwargs))
        with torch.no_grad():
            return poutine.trace(poutine.replay(model, trace=seen)).get_trace(*args, **kwargs), seen
