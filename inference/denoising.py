r"""Rows that are seen through noise: their mean and standard deviation given what is seen.

A pair that knows them has ``restore`` (:class:`inference.core.contracts.Pair`). Otherwise model and guide alternate
(:mod:`inference.alternation`), for a model whose entries are binary or normal and independent given latent sites z in
the plate of rows, and a guide of new rows: z from :math:`q(z \mid x)` with a Metropolis correction, x from
:math:`p(x \mid z, v) \propto p(x \mid z) \, p(v \mid x)`. The guide starts at the noisy row. Moments are means over the
later half of all chains of those of :math:`p(x \mid z, v)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.alternation import Given, alternate, entries, said_of
from inference.core.bound import BoundPair
from inference.core.checks import check_chance, check_count, check_positive
from inference.core.given import by_name, names_in, to_tensor
from inference.core.halves import accepted_by, halves_of
from inference.core.handlers import exclusive, isolated
from inference.result import Result


@dataclass(frozen=True, eq=False)
class Denoised:
    """What rows are like that were seen through noise.

    Attributes:
        mean: Posterior mean of each entry, (rows, columns): the estimate with the least mean square error.
        sd: Posterior standard deviation of each entry, (rows, columns).
        error: Monte Carlo standard error of the mean, (rows, columns); 0 where it has a closed form.
        method: ``conditional``: by the pair itself; ``Metropolis within Gibbs``: by its model and guide.
        acceptance: Fraction of accepted proposals of each row, (rows,); None for ``conditional``.
        r_hat: Largest R-hat of an entry over the later half of the chains; nan for ``conditional``.
    """

    mean: Tensor
    sd: Tensor
    error: Tensor
    method: str = "conditional"
    acceptance: Tensor | None = None
    r_hat: float = math.nan

    def __str__(self) -> str:
        what = f"{len(self.mean)} rows of {self.mean[0].numel()} columns, mean sd {float(self.sd.mean()):.3g}"
        return said_of(what, self.method, self.acceptance, self.r_hat)


@exclusive
def denoise(
    result: Result,
    data: Any,
    *,
    sd: float | None = None,
    flips: float | None = None,
    draws: int = 16,
    steps: int = 200,
    seed: int = 0,
) -> Denoised:
    """Mean and standard deviation of rows given noisy ones, by a fitted pair.

    Exact for Gaussian and Bernoulli mixtures and naive Bayes, factor analysis and PPCA; the reverse chain from the step
    of that noise for a diffusion chain; model and guide in turn for VAEs and belief nets with a guide of new rows.

    Args:
        result: A Result of ``fit`` or ``sample``.
        data: Noisy rows, alone or by name with other data.
        sd: Standard deviation of Gaussian noise, in the units of x. For binary rows too.
        flips: Instead of it, the probability with which a binary entry is flipped. Salt and pepper that replaces a
            fraction c of binary pixels by a fair coin is ``flips=c / 2``.
        draws: Number of draws or chains of each row, where the moments have no closed form.
        steps: Transitions of each chain, where model and guide alternate.
        seed: Seed of all randomness.

    Returns:
        A Denoised with mean and sd.

    Raises:
        ValueError: Neither or both kinds of noise are given, or the pair has no such posterior.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from inference import fit
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z[:, None].expand(-1, 2), 0.5).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("z", dist.Normal(4 / 9 * x.sum(-1), 1 / 3))
        >>> result = fit((model, guide), torch.randn(20, 2), steps=0, progress=False)
        >>> found = denoise(result, torch.tensor([[3.0, 0.0]]), sd=1.0)
        >>> [round(v, 1) for v in found.mean[0].tolist()]  # 1.5 / 1.625 of z, and a fifth of the way to what is seen
        [1.3, 0.7]
    """
    _check_noise(sd, flips)
    return _restore(result, data, None, sd, flips, draws, steps, seed)


@exclusive
def super_resolve(
    result: Result, data: Any, matrix: Tensor, *, sd: float = 0.01, draws: int = 16, steps: int = 200, seed: int = 0
) -> Denoised:
    """Mean and standard deviation of continuous rows x given A x, such as block means of images, by a fitted pair.

    Args:
        result: A Result of ``fit`` or ``sample``.
        data: What is seen of each row, (rows, M), alone or by name with other data.
        matrix: A (M, D), such as ``ppl_models.inverse.pooling_matrix((28, 28), 4)``.
        sd: Standard deviation of Gaussian noise on A x, in the units of x.

    The other arguments, what is returned and what is raised are as for :func:`denoise`.
    """
    check_positive("sd", sd)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not len(matrix) or not bool(matrix.isfinite().all()):
        got = tuple(matrix.shape) if isinstance(matrix, Tensor) else repr(matrix)
        raise ValueError(f"matrix: expected finite numbers (M, columns of the rows), got {got}")
    return _restore(result, data, matrix, sd, None, draws, steps, seed)


def _check_noise(sd: float | None, flips: float | None) -> None:
    if (sd is None) == (flips is None):
        raise ValueError(f"sd: expected either it or flips, got {'neither' if sd is None else 'both'}")
    if sd is not None:
        check_positive("sd", sd)
    else:
        check_chance("flips", flips, ends=False)


def _restore(
    result: Result,
    data: Any,
    matrix: Tensor | None,
    sd: float | None,
    flips: float | None,
    draws: int,
    steps: int,
    seed: int,
) -> Denoised:
    check_count("draws", draws, 2)
    check_count("steps", steps, 2)
    if not result.bound.observes:
        raise ValueError(f"result: expected a model with a likelihood, got {result.bound.name}, which observes nothing")
    bound, seen, name = _bind(result.bound, data, matrix)
    if flips is not None and not bool(((seen == 0) | (seen == 1)).all()):
        raise ValueError(f"data: expected zeros and ones with flips, got {float(seen[(seen != 0) & (seen != 1)][0]):g}")
    matrix = None if matrix is None else matrix.to(seen)
    with isolated(seed), result.state():
        own = bound.asked.restore
        if own is not None:
            latents = {n: v.to(bound.device) for n, v in result.draws.items()}
            view = {"sd": sd, "flips": flips, "matrix": matrix}
            moments = own(**{**bound.data, name: seen}, **view, latents=latents, draws=draws)
            mean, spread, error = (v.double().cpu() for v in moments)
            return Denoised(mean, spread, error)
        found = alternate(bound, _Noisy(seen, bound.data[name], sd, flips, matrix), name, draws, steps)
    mean, square = found.means.mean(0), found.squares.mean(0)
    error = found.means.std(0) / math.sqrt(draws)
    spread = (square - mean**2).clamp_min(0).sqrt()
    return Denoised(mean, spread, error, "Metropolis within Gibbs", found.acceptance, found.r_hat)


def _bind(fitted: BoundPair, data: Any, matrix: Tensor | None) -> tuple[BoundPair, Tensor, str]:
    """The pair bound to rows near those that are seen, what is seen of them, and their name."""
    accepted, _ = accepted_by(halves_of(fitted.pair)[0])
    name = next(iter(accepted), "x")
    given = by_name(data, accepted)
    names_in(given).check(fitted.names)
    named = {n: to_tensor(v, n) for n, v in given.items()}
    seen, like = named.get(name), fitted.data[name]
    columns = like[0].numel() if matrix is None else len(matrix)
    if not isinstance(seen, Tensor) or seen.dim() != 2 or seen.shape[1] != columns or not len(seen):
        got = tuple(seen.shape) if isinstance(seen, Tensor) else ", ".join(named) or "none"
        raise ValueError(f"data: expected noisy rows of {name}, (rows, {columns}), got {got}")
    if not bool(seen.isfinite().all()):
        raise ValueError(f"data: expected finite numbers, got {float(seen[~seen.isfinite()][0])}; for nan use impute")
    seen = seen.to(like)
    if matrix is not None:
        if matrix.shape[1] != like[0].numel():
            raise ValueError(f"matrix: expected (M, {like[0].numel()}), got {tuple(matrix.shape)}")
        near = seen @ torch.linalg.pinv(matrix.to(like)).mT
    else:
        near = seen
    site = fitted.sites.get(name)
    if site is not None and site.discrete:
        near = (near > 0.5).to(like)
    return fitted.rebound({**named, name: near if fitted.asked.restore is None else torch.zeros_like(near)}), seen, name


class _Noisy:
    """Rows that are seen through noise."""

    def __init__(
        self, seen: Tensor, near: Tensor, sd: float | None, flips: float | None, matrix: Tensor | None
    ) -> None:
        self.seen, self.near, self.sd, self.flips, self.matrix = seen, near, sd, flips, matrix
        self.unknown = torch.ones_like(near, dtype=torch.bool)

    def start(self) -> Tensor:
        """Rows near those that are seen."""
        return self.near

    def given(self, fn: Any, count: int) -> Given:
        """The rows given their latent sites and what is seen."""
        base, seen = entries(fn), self.seen.repeat(count, 1)
        if isinstance(base, torch.distributions.Normal):
            return self._of_normal(base, seen)
        if isinstance(base, torch.distributions.Bernoulli) and self.matrix is None:
            return self._of_binary(base, seen)
        what = "normal entries" if self.matrix is not None else "binary or normal entries"
        raise ValueError(f"result: expected a pair with {what}, got {type(base).__name__}")

    def _of_normal(self, base: Any, seen: Tensor) -> Given:
        if self.sd is None:
            raise ValueError(f"flips: expected a pair of binary rows, got {self.flips:g} for continuous ones; give sd")
        loc, variance = (v.expand(seen.shape[:1] + self.near.shape[1:]) for v in (base.loc, base.scale**2))
        if self.matrix is None:
            rest = 1 / (1 / variance + self.sd**-2)
            mean = rest * (loc / variance + seen * self.sd**-2)
            return Given(mean + rest.sqrt() * torch.randn_like(mean), mean, rest)
        # Rows that share their variances share the gain.
        alike = variance[:1] if bool((variance == variance[:1]).all()) else variance
        across = alike[..., None] * self.matrix.mT
        covariance = self.matrix @ across + self.sd**2 * torch.eye(len(self.matrix)).to(across)
        gain = torch.cholesky_solve(across.mT, torch.linalg.cholesky(covariance)).mT
        # A draw of x and of what would be seen of it, moved by the gain towards what is seen (Matheron's rule).
        draw = loc + variance.sqrt() * torch.randn_like(loc)
        told = draw @ self.matrix.mT + self.sd * torch.randn_like(seen)
        pairs = ((loc, loc @ self.matrix.mT), (draw, told))
        mean, draw = (x + (gain @ (seen - v)[..., None])[..., 0] for x, v in pairs)
        return Given(draw, mean, (alike - (gain * across).sum(-1)).clamp_min(0).expand_as(mean))

    def _of_binary(self, base: Any, seen: Tensor) -> Given:
        if self.sd is not None:
            odds = (seen - 0.5) / self.sd**2
        else:
            odds = (2 * seen - 1) * torch.as_tensor(1 - float(self.flips or 0)).logit().to(seen)
        mean = (base.logits + odds).sigmoid()
        return Given(torch.bernoulli(mean), mean, mean * (1 - mean))
