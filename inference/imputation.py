r"""Missing entries of rows, drawn from their distribution given the known entries of the same row.

A pair that knows this distribution has ``impute`` (:class:`inference.core.contracts.Pair`). Otherwise model and guide
alternate, for a model whose entries are independent given latent sites z in the plate of rows, and a guide of new rows.
With the row as it is completed at present, z is drawn from :math:`q(z \mid x)` and accepted with probability

.. math:: \min\Big(1, \frac{p(x, z') \, q(z \mid x)}{p(x, z) \, q(z' \mid x)}\Big)

and the missing entries are drawn from :math:`p(x_m \mid z)`. This Metropolis-within-Gibbs chain (Mattei and Frellsen
2018) has :math:`p(x_m, z \mid x_o)` as its distribution whatever the guide; taking every proposal, as pseudo-Gibbs
sampling (Rezende, Mohamed and Wierstra 2014) does, has not.

References: Rezende, Mohamed and Wierstra 2014 (https://arxiv.org/abs/1401.4082); Mattei and Frellsen 2018, "Leveraging
the Exact Likelihood of Deep Latent Variable Models" (https://arxiv.org/abs/1802.04826).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.alternation import Given, alternate, said_of
from inference.core.bound import BoundPair
from inference.core.checks import check_count
from inference.core.given import by_name, names_in, to_tensor
from inference.core.halves import accepted_by, halves_of
from inference.core.handlers import exclusive, isolated
from inference.result import Result


@dataclass(frozen=True, eq=False)
class Imputation:
    """Draws of the missing entries of rows.

    Attributes:
        draws: Completed rows, (S, rows, columns); independent of one another.
        missing: Which entries are drawn, (rows, columns).
        method: ``conditional``: by the pair itself; ``Metropolis within Gibbs``: by its model and guide.
        acceptance: Fraction of accepted proposals of each row, (rows,); None for ``conditional``.
        r_hat: Largest R-hat of a missing entry over the later half of the chains; nan for ``conditional``.
    """

    draws: Tensor
    missing: Tensor
    method: str = "conditional"
    acceptance: Tensor | None = None
    r_hat: float = math.nan

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, (rows, columns); known ones are as they came."""
        return torch.where(self.missing, self.draws.double().mean(0), self.draws[0].double())

    @property
    def sd(self) -> Tensor:
        """Standard deviation of each entry given the known ones, (rows, columns); 0 for known ones."""
        if len(self.draws) < 2:
            return torch.where(self.missing, math.nan, 0.0).double()
        return torch.where(self.missing, self.draws.double().std(0), 0.0)

    @property
    def error(self) -> Tensor:
        """Monte Carlo standard error of the mean of each entry, (rows, columns)."""
        return self.sd / math.sqrt(len(self.draws))

    def __str__(self) -> str:
        what = f"{int(self.missing.sum())} of {self.missing.numel()} entries, {len(self.draws)} draws"
        return said_of(what, self.method, self.acceptance, self.r_hat)


@exclusive
def impute(
    result: Result, data: Any, draws: int = 100, *, name: str | None = None, steps: int = 200, seed: int = 0
) -> Imputation:
    """Draw the missing entries of rows given the known entries of the same row and the data of the fit.

    Args:
        result: A Result of ``fit`` or ``sample``.
        data: Rows in which nan marks what is missing, by name with other data, or alone.
        draws: Number of draws S of each row.
        name: Name of the data with missing entries. Default: the first argument of the model.
        steps: Transitions of each chain, where model and guide alternate: each draw is the end of a chain of its own.
        seed: Seed of all randomness.

    Returns:
        An Imputation with draws, mean and sd.

    Raises:
        ValueError: The pair does not know the conditional distribution, and its model and guide cannot alternate.

    Example:
        >>> import torch
        >>> from inference import fit
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z[:, None].expand(-1, 2), 0.5).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("z", dist.Normal(4 / 9 * x.sum(-1), 1 / 3))
        >>> import pyro, pyro.distributions as dist
        >>> result = fit((model, guide), torch.randn(20, 2), steps=0, progress=False)
        >>> found = impute(result, torch.tensor([[2.0, torch.nan]]), draws=4000)
        >>> print(f"{found.mean[0, 1]:.1f} {found.sd[0, 1]:.1f}")  # 2 / 1.25, and the root of 1.25 - 1 / 1.25
        1.6 0.7
    """
    check_count("draws", draws)
    check_count("steps", steps, 2)
    if not result.bound.observes:
        raise ValueError(f"result: expected a model with a likelihood, got {result.bound.name}, which observes nothing")
    bound, x, name = _bind(result.bound, data, name)
    with isolated(seed), result.state():
        own = bound.asked.impute
        if own is not None:
            latents = {n: v.to(bound.device) for n, v in result.draws.items()}
            rows = own(**{**bound.data, name: x}, draws=draws, latents=latents)
            return Imputation(rows.cpu(), x.isnan().cpu())
        found = alternate(bound, _Missing(x), name, draws, steps)
        return Imputation(found.draws, x.isnan().cpu(), "Metropolis within Gibbs", found.acceptance, found.r_hat)


def _bind(fitted: BoundPair, data: Any, name: str | None) -> tuple[BoundPair, Tensor, str]:
    """The pair bound to the rows with zeros for what is missing, the rows with nan, and their name."""
    accepted, _ = accepted_by(halves_of(fitted.pair)[0])
    first = next(iter(accepted), "x")
    given = by_name(data, accepted)
    names_in(given).check(fitted.names)
    named = {n: to_tensor(v, n) for n, v in given.items()}
    x, got = named.get(first if name is None else name), ", ".join(named) or "none"
    if not isinstance(x, Tensor):
        if name is None:
            raise ValueError(f"data: expected {first}, in which nan marks what is missing, got {got}")
        raise ValueError(f"name: expected the data in which nan marks what is missing ({got}), got {name!r}")
    name = first if name is None else name
    missing = x.isnan()
    bound = fitted.rebound({**named, name: x.masked_fill(missing, 0)})
    filled = bound.data[name]
    return bound, filled.masked_fill(missing.to(filled.device), math.nan) if missing.any() else filled, name


class _Missing:
    """Rows some entries of which are known."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.unknown = x, x.isnan()

    def start(self) -> None:
        """Chains start from the prior."""

    def given(self, fn: Any, count: int) -> Given:
        known = self.x.repeat(count, *[1] * (self.x.dim() - 1))
        draw = torch.where(known.isnan(), fn.sample().to(known), known)
        return Given(draw, draw, 0.0)
