r"""Adversarial training: the discriminator is the guide :math:`q(y \mid x)` of where a row comes from.

A generative adversarial pair draws y, ``real``: one where a row is of the data, zero where the model generates it. Its
guide says which of the two it was. y is summed out exactly: every step sees both halves. What makes it adversarial is
that guide and model have a loss each,

.. math::

    L_\phi = -\mathrm{E}_{p(x, y)}[\log q_\phi(y \mid x)], \qquad
    L_\theta = -\mathrm{E}_{p_\theta(x, y)}[\log q_\phi(1 - y \mid x)],

variational EM with two objectives in place of one. :math:`L_\theta` is the non-saturating loss; the others replace
:math:`\log q` by functions of the log odds :math:`a(x) = \log q(1 \mid x) / q(0 \mid x)`.

References: Goodfellow et al. 2014 (https://arxiv.org/abs/1406.2661); Hu, Yang, Salakhutdinov and Xing 2018, "On
Unifying Deep Generative Models" (https://arxiv.org/abs/1706.00550); Mao et al. 2017 (least squares); Lim and Ye 2017
(hinge); Arjovsky et al. 2017 and Gulrajani et al. 2017 (Wasserstein, gradient penalty); Mescheder et al. 2018 (R1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.elbo import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.nn.functional import relu, softplus

from inference.core.bound import BoundPair
from inference.core.checks import check_not_negative
from inference.core.handlers import StopGradient
from inference.diagnostics.two_sample import MODE_SHARE, coverage
from inference.objectives.game import Game, Players, by_name, takes

SITE = "real"
"""The site y: whether a row is of the data."""


WINDOWS, WON, CIRCLE = 10, 0.1, 0.5
"""Parts of the second half of a fit whose mean losses are compared; shares of the loss of a draw below which the guide
has won, and by which its loss swings when the players circle."""


JUDGED = 2000
"""Rows of either kind by which left-out modes are looked for."""


@dataclass(frozen=True)
class Kind:
    """Losses of one row by its log odds a: the guide's on real and generated rows, the model's on generated ones.

    The model's loss on real rows, which those parameters of it see that stand in the guide, is that on generated ones
    with the sign of a changed.
    """

    real: Callable[[Tensor], Tensor]
    generated: Callable[[Tensor], Tensor]
    model: Callable[[Tensor], Tensor]


KINDS: dict[str, Kind] = {
    "non_saturating": Kind(lambda a: softplus(-a), softplus, lambda a: softplus(-a)),
    "minimax": Kind(lambda a: softplus(-a), softplus, lambda a: -softplus(a)),
    "least_squares": Kind(lambda a: (a - 1).square(), lambda a: (a + 1).square(), lambda a: a.square()),
    "hinge": Kind(lambda a: relu(1 - a), lambda a: relu(1 + a), lambda a: -a),
    "wasserstein": Kind(lambda a: -a, lambda a: a, lambda a: -a),
}
"""Least squares have the labels -1, 1 and 0 of Mao et al. 2017, which descend Pearson's chi squared."""


EVEN = {"non_saturating": 2 * math.log(2), "minimax": 2 * math.log(2), "least_squares": 2.0, "hinge": 2.0}
"""The guide's loss a row where nothing tells real from generated rows; none is known where the odds have no scale."""


class Adversarial(Game):
    r"""Adversarial training of a pair whose guide tells its model's rows from the data.

    The model draws ``real``, Bernoulli, in a plate, and names what it hands to the guide by ``pyro.deterministic`` (or
    observes it, if nothing is deterministic): data where it is one, generated where it is zero. What it observes beside
    that in the generated half, a cycle back to the data, say, it makes likely. The guide samples ``real`` too; it takes
    the generated rows under the names of its arguments, or through its argument ``observations``, and latent sites that
    it shares with the model (a code, an encoder's factors) are those of the model in the generated half and its own in
    the real half. If both take an argument ``real``, they are told which half it is and need not compute the other.

    Which player a parameter belongs to is found, not named: the guide's are those that :math:`\log q(y \mid \cdot)`
    reaches when all other sites are held, all others are the model's, wherever they stand. The gradients of a player
    that rests are None.

    Losses are sums over the rows, scaled as the plate says, as those of an ELBO.

    Args:
        kind: A key of ``KINDS``: ``non_saturating``, ``minimax``, ``least_squares``, ``hinge`` or ``wasserstein``.
        penalty: Weight of :math:`(\lVert \nabla_x a \rVert - 1)^2` at rows between real and generated ones (WGAN-GP).
        r1: Weight of :math:`\tfrac12 \lVert \nabla_x a \rVert^2` at real rows (R1).
        information: Latent sites of the model whose posterior in the guide both players make likely: the code of an
            InfoGAN.
        information_weight: Weight of their :math:`-\log q(c \mid x)`.
        importance: Weigh generated rows by :math:`q(1 \mid x) / q(0 \mid x)`, normalised over the batch, in the model's
            loss (importance-weighted GAN).
        bound: An ELBO, or a factory of one, of the same pair run without ``real``, which the model descends as well.
        activated: Take generated rows into the bound too, as data, each weighted by :math:`q(1 \mid x)`
            (adversary-activated VAE of Hu et al. 2018).
        weight: Weight of the model's adversarial loss beside the bound.
        turns: Steps of the guide, and of the model, in turn; None: both move at every step.

    Raises:
        ValueError: An argument is out of its range, or the pair lacks what is said above.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.optim import Adam
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("rows", len(x)):
        ...         real = pyro.sample("real", dist.Bernoulli(0.5))
        ...         z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        ...         pyro.deterministic("x", torch.where(real == 1, x, loc + z))
        >>> def guide(x):
        ...     slope, level = pyro.param("slope", torch.tensor(0.0)), pyro.param("level", torch.tensor(0.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("real", dist.Bernoulli(logits=slope * x + level))
        >>> pyro.set_rng_seed(0)
        >>> svi = pyro.infer.SVI(model, guide, Adam({"lr": 0.02, "betas": (0.5, 0.99)}), Adversarial(r1=0.1))
        >>> x = 3 + torch.randn(500)
        >>> losses = [svi.step(x) for _ in range(1000)]
        >>> print(f"{pyro.param('loc').item():.0f}")
        3
    """

    def __init__(
        self,
        kind: str = "non_saturating",
        *,
        penalty: float = 0.0,
        r1: float = 0.0,
        information: Sequence[str] = (),
        information_weight: float = 1.0,
        importance: bool = False,
        bound: ELBO | Callable[[], ELBO] | None = None,
        activated: bool = False,
        weight: float = 1.0,
        turns: tuple[int, int] | None = None,
    ) -> None:
        if activated and bound is None:
            raise ValueError("activated: expected a bound, into which generated rows are taken, got none")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        check_not_negative(penalty=penalty, r1=r1, information_weight=information_weight)
        if isinstance(information, str):
            raise ValueError(f"information: expected names of sites, such as ({information!r},), got {information!r}")
        super().__init__(bound, weight, turns)
        self.kind, self.penalty, self.r1, self.importance, self.activated = kind, penalty, r1, importance, activated
        self.information, self.information_weight = tuple(information), information_weight

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        half = self._half(model, guide, by_name(model, args, kwargs), False)
        return half.drawn, half.trace

    def advise(self, bound: BoundPair, losses: np.ndarray) -> tuple[str, ...]:
        """What is wrong with a fit: a player that has won, players that circle, modes that are left out.

        Args:
            bound: The pair and its data, its parameters those of the fit.
            losses: Those of guide and model at each step (steps, 2).
        """
        guide = losses.reshape(-1, 2)[:, 0]
        return (*self._judge_players(guide / max(bound.rows, 1)), *self._judge_modes(bound))

    def _judge_players(self, guide: np.ndarray) -> Iterator[str]:
        even = EVEN.get(self.kind)
        if even is None or len(guide) < 2 * WINDOWS or self.r1 or self.penalty:
            return
        means = np.array([part.mean() for part in np.array_split(guide[len(guide) // 2 :], WINDOWS)])
        if means[-1] < WON * even:
            yield (
                f"The guide has won: its loss is {means[-1]:.3g} a row, where {even:.3g} is a draw, and the model "
                "learns little from it; give Adversarial a penalty or r1, or the guide a lower learning rate."
            )
        elif np.ptp(means) > CIRCLE * even:
            yield (
                f"The players circle: the guide's loss went between {means.min():.3g} and {means.max():.3g} a row over "
                "the second half of the steps; lower the learning rate, let it fall, or give Adversarial r1."
            )

    def _judge_modes(self, bound: BoundPair) -> Iterator[str]:
        few = torch.randperm(bound.rows)[:JUDGED] if bound.takes_rows else None
        named = bound.arguments(few)
        real, made = (self._half(bound.model, bound.guide, named, r, still=True).handed for r in (True, False))
        name = next(iter(real))
        rows, others = (v[:JUDGED].flatten(1) for v in (real[name], made[name]))
        if len(rows) < 10 or not others.isfinite().all():
            return
        # Balls of a hundredth of the rows: a mode that holds more is seen, and not how it looks from within.
        found = coverage(rows, others, k=max(5, len(rows) // 100))
        if found.value < MODE_SHARE:
            yield (
                f"Generated rows come near {found.value:.0%} of the data only (coverage {found}): modes "
                "are left out, or the rows are poor; try a pack of several rows, a penalty or r1, or more steps."
            )

    def guide_score(self, model: Any, guide: Any, named: Any, *, still: bool) -> Tensor:
        """The log odds of all rows; free, those of real ones, for the model's parameters always reach the others."""
        halves = (False, True) if still else (True,)
        return sum((self._half(model, guide, named, real, still=still).odds.sum() for real in halves), torch.zeros(()))

    def losses(self, model: Any, guide: Any, named: Any, moving: tuple[bool, bool], players: Players) -> list[Tensor]:
        """Losses of the guide and of the model; that of one who rests is 0."""
        kind, encodes = KINDS[self.kind], players.encodes
        made = self._half(model, guide, named, False, frozen=not moving[1])
        real = self._half(model, guide, named, True) if moving[0] or encodes else None
        of_guide = of_model = told = made.odds.new_zeros(())
        for site in self.information:
            told = told - self.information_weight * made.density(site)
        if moving[0] and real is not None:
            of_guide = real.total(kind.real(real.odds)) + made.total(kind.generated(made.odds)) + told
            if self.r1:
                of_guide = of_guide + 0.5 * self.r1 * real.scaled(self._slope(guide, named, real.handed))
            if self.penalty:
                norm = (self._slope(guide, named, _between(real.handed, made.handed)) + 1e-12).sqrt()
                of_guide = of_guide + self.penalty * real.scaled((norm - 1).square())
        if moving[1]:
            weights = made.odds.detach().flatten().softmax(0).reshape(made.odds.shape) * made.odds.numel()
            lost = kind.model(made.odds) * (weights if self.importance else 1.0)
            of_model = self.weight * made.total(lost) + told - made.observed()
            if encodes and real is not None:
                of_model = of_model + self.weight * real.total(kind.model(-real.odds))
        return [of_guide, of_model]

    def more_grads(self, model: Any, guide: Any, named: Any) -> Any:
        """Of an activated bound, that of generated rows."""
        if not self.activated:
            return 0.0
        made = self._half(model, guide, named, False, still=True)
        rows = {n: v for n, v in made.handed.items() if n in named}
        shares = made.odds.detach().sigmoid()
        shares = shares.repeat_interleave(len(next(iter(rows.values()))) // len(shares))
        halves = (poutine.scale(half, scale=shares) for half in (model, guide))
        return self.bound.loss_and_grads(*halves, **{**named, **rows})  # type: ignore[union-attr]

    def _half(
        self, model: Any, guide: Any, named: Any, real: bool, *, frozen: bool = False, still: bool = False
    ) -> Half:
        """One half of the batch, as the guide sees it.

        Args:
            frozen: Whether the model's part has no gradient.
            still: Whether all that the guide reads is held: the log odds depend on the discriminator alone.
        """
        held = StopGradient() if still else nullcontext()
        with torch.no_grad() if frozen or still else nullcontext(), held:
            drawn: Any = poutine.trace(ObserveReal(real)(model)).get_trace(**_told(model, named, real))
        seen_by_name = {n: s for n, s in drawn.nodes.items() if _is_handed(s) and n != SITE}
        told = {n: s for n, s in seen_by_name.items() if s["infer"].get("_deterministic")}
        handed = {n: s["value"] for n, s in (told or seen_by_name).items()}
        if not handed:
            raise ValueError("model: expected what the guide is to see as a deterministic or observed site, got none")
        if still:
            handed = {n: v.detach() for n, v in handed.items()}
        replayed = poutine.replay(ObserveReal(real)(guide), trace=drawn)
        with StopGradient() if still else nullcontext():
            seen: Any = poutine.trace(replayed).get_trace(**self._shown(guide, named, handed, real))
        if SITE not in seen.nodes or SITE not in drawn.nodes:
            where = "guide" if SITE in drawn.nodes else "model"
            raise ValueError(f"{where}: Adversarial expected a site {SITE}, got {', '.join(_sites(seen)) or 'none'}")
        read = [n for n in _sites(seen) if not seen.nodes[n]["is_observed"] and n not in self.information]
        latent = {n: seen.nodes[n]["value"] for n in read}
        return Half(drawn, seen, log_odds(seen.nodes[SITE]["fn"]), {**handed, **latent})

    def _shown(self, guide: Any, named: Any, handed: Mapping[str, Tensor], real: bool) -> dict[str, Any]:
        """The guide's arguments, with what the model hands over."""
        if handed.keys() <= named.keys():
            return _told(guide, {**named, **handed}, real)
        if not takes(guide, "observations"):
            raise ValueError(
                f"guide: expected {', '.join(handed)} among its named arguments, or an argument observations"
            )
        return _told(guide, {**named, "observations": handed}, real)

    def _slope(self, guide: Any, named: Any, handed: Mapping[str, Tensor]) -> Tensor:
        r""":math:`\lVert \nabla a \rVert^2` at what is handed to the guide, for each row or pack."""
        given = {n: v.detach().requires_grad_() for n, v in handed.items() if v.is_floating_point()}
        fixed = poutine.condition(ObserveReal(True)(guide), data={**handed, **given})
        own = {n: v for n, v in {**handed, **given}.items() if n in named or takes(guide, "observations")}
        trace: Any = poutine.trace(fixed).get_trace(**self._shown(guide, named, own, True))
        odds = log_odds(trace.nodes[SITE]["fn"])
        slopes = torch.autograd.grad(odds.sum(), list(given.values()), create_graph=True, allow_unused=True)
        rows = odds.shape[-1]
        return sum((g.reshape(rows, -1).square().sum(1) for g in slopes if g is not None), odds.new_zeros(rows))


@dataclass(frozen=True)
class Half:
    """Traces of model and guide on one half, the guide's log odds there, and all that it read."""

    drawn: Any
    trace: Any
    odds: Tensor
    handed: dict[str, Tensor]

    def total(self, losses: Tensor) -> Tensor:
        """Sum over the rows, scaled and masked as the plates say."""
        site = self.trace.nodes[SITE]
        return scale_and_mask(losses, site["scale"], site["mask"]).sum()

    def scaled(self, values: Tensor) -> Tensor:
        """Sum of one number a row, or a pack of them, scaled as the plate says."""
        return scale_and_mask(values, self.trace.nodes[SITE]["scale"], None).sum()

    def observed(self) -> Tensor:
        """Log density of what the model observes beside what it hands over."""
        found = self.odds.new_zeros(())
        for name, site in self.drawn.nodes.items():
            if _is_handed(site) and not site["infer"].get("_deterministic") and name not in (SITE, *self.handed):
                log_prob = site["fn"].log_prob(site["value"])
                found = found + scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
        return found

    def density(self, name: str) -> Tensor:
        """Log density of a latent site."""
        if name not in self.trace.nodes:
            raise ValueError(f"information: expected a site of the guide, got {name!r}")
        site = self.trace.nodes[name]
        return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"]).sum()


class ObserveReal(Messenger):
    """The site ``real``, known for all rows."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.real = real

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == SITE:
            shape = (*msg["fn"].batch_shape, *msg["fn"].event_shape)
            msg["value"] = torch.full(shape, float(self.real)).to(_like(msg["fn"]))
            msg["is_observed"] = True


def log_odds(distribution: Any) -> Tensor:
    """Log odds of a one against a zero."""
    own = getattr(distribution, "logits", None)
    if own is not None:
        return own
    one = torch.ones(distribution.batch_shape)
    return distribution.log_prob(one) - distribution.log_prob(0 * one)


def _like(distribution: Any) -> Tensor:
    return distribution.logits if hasattr(distribution, "logits") else torch.zeros(())


def _between(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A point between each row of one and of the other, the same share of the way for all that belongs to a row."""
    rows = len(next(iter(one.values())))
    share = torch.rand(rows).to(next(iter(one.values())))
    return {
        n: v.lerp(other[n], share.reshape(-1, *(1,) * (v.dim() - 1))).detach() if v.is_floating_point() else v
        for n, v in one.items()
        if n in other
    }


def _is_handed(site: Any) -> bool:
    return site["type"] == "sample" and site["is_observed"] and not site_is_subsample(site)


def _sites(trace: Any) -> list[str]:
    return [n for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]


def _told(function: Any, named: Mapping[str, Any], real: bool) -> dict[str, Any]:
    return {**named, SITE: real} if takes(function, SITE) else dict(named)
