r"""Adversarial training: the discriminator is the guide :math:`q(y \mid x)` of whether a row is real.

The model of a generative adversarial pair draws y, the site ``real``: x is a row of the data if y = 1, and generated
if y = 0. The guide is the discriminator. y is summed out exactly, as every step runs both halves. Guide and model have
a loss each,

.. math::

    L_\phi = -\mathrm{E}_{p(x, y)}[\log q_\phi(y \mid x)], \qquad
    L_\theta = -\mathrm{E}_{p_\theta(x, y)}[\log q_\phi(1 - y \mid x)],

so training is variational EM with two objectives in place of one. :math:`L_\theta` is the non-saturating loss; the
other kinds replace :math:`\log q` by functions of the log odds :math:`a(x) = \log q(1 \mid x) / q(0 \mid x)`.

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
from inference.core.minibatch import some_rows
from inference.diagnostics.two_sample import MIN_COVERAGE, coverage
from inference.objectives.game import Game, Players, by_name, takes

REAL_SITE = "real"
"""Name of the site y: whether a row is real."""


LOSS_WINDOWS = 10
"""Windows of the second half of a fit whose mean losses are compared."""


WON_FRACTION, CYCLING_FRACTION = 0.1, 0.5
"""Fractions of the guide's loss at equilibrium: below the first the guide has won; a range of the windows' mean losses
above the second means that the players cycle."""


MODE_CHECK_ROWS = 2000
"""Real rows, and generated rows, used to look for missing modes."""


@dataclass(frozen=True)
class Kind:
    """Loss per row as a function of the log odds a.

    The model's loss on real rows, which concerns only those of its parameters that the guide uses (an encoder), is its
    loss on generated rows at -a.

    Attributes:
        real: The guide's loss on real rows.
        generated: The guide's loss on generated rows.
        model: The model's loss on generated rows.
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
"""Losses by name. Least squares has the labels -1, 1, 0 of Mao et al. 2017, which minimise Pearson's chi squared."""


EQUILIBRIUM_LOSS = {"non_saturating": 2 * math.log(2), "minimax": 2 * math.log(2), "least_squares": 2.0, "hinge": 2.0}
"""The guide's loss per row where real and generated rows cannot be told apart (Wasserstein odds have no scale)."""


class Adversarial(Game):
    r"""Adversarial training of a pair whose guide is a discriminator.

    The model samples the Bernoulli site ``real`` in a plate. It names what the guide receives, data where ``real`` is
    one and generated rows where it is zero, by ``pyro.deterministic``, or observes it if no site is deterministic.
    Other observed sites of the generated half (for instance a cycle back to the data) add their log density to the
    model's loss. The guide samples ``real`` as well. It receives generated rows under the names of its arguments, or
    through its argument ``observations``. Latent sites that both have (a code, an encoder's factors) are drawn by the
    model in the generated half and by the guide in the real half. If model and guide take an argument ``real``, it
    tells them which half is run, so that they need not compute the other.

    The guide's parameters are those that :math:`\log q(y \mid \cdot)` depends on when all other sites are held fixed;
    all other parameters are the model's, in whichever half they are used. The gradients of a resting player are None.

    Losses are sums over rows, scaled by the plate, like those of an ELBO.

    Args:
        kind: A key of ``KINDS``: ``non_saturating``, ``minimax``, ``least_squares``, ``hinge`` or ``wasserstein``.
        penalty: Weight of :math:`(\lVert \nabla_x a \rVert - 1)^2` at points between real and generated rows (WGAN-GP).
        r1: Weight of :math:`\tfrac12 \lVert \nabla_x a \rVert^2` at real rows (R1).
        information: Latent sites c of the model for which both players minimise :math:`-\log q(c \mid x)` in the
            guide (the code of an InfoGAN).
        information_weight: Weight of that term.
        importance: Whether to weight generated rows in the model's loss by :math:`q(1 \mid x) / q(0 \mid x)`,
            normalised over the batch (importance-weighted GAN).
        bound: An ELBO, or a factory of one, of the same pair run without ``real``, which the model minimises as well.
        activated: Whether generated rows enter the bound as data, each weighted by :math:`q(1 \mid x)`
            (adversary-activated VAE of Hu et al. 2018).
        weight: Weight of the model's adversarial loss relative to the bound.
        turns: Consecutive steps of the guide and of the model. Default: both move at every step.

    Raises:
        ValueError: An argument is out of range, or the pair does not have the structure described above.

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
            raise ValueError("activated: expected a bound that generated rows enter, got none")
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
        return half.model_trace, half.guide_trace

    def advise(self, bound: BoundPair, losses: np.ndarray) -> tuple[str, ...]:
        """Advice about a fit: a guide that has won, players that cycle, missing modes.

        Args:
            bound: The pair and its data, with the fitted parameters.
            losses: Losses of guide and model at each step, (steps, 2).
        """
        guide = losses.reshape(-1, 2)[:, 0]
        return (*self._check_players(guide / max(bound.rows, 1)), *self._check_modes(bound))

    def _check_players(self, guide: np.ndarray) -> Iterator[str]:
        equilibrium = EQUILIBRIUM_LOSS.get(self.kind)
        if equilibrium is None or len(guide) < 2 * LOSS_WINDOWS or self.r1 or self.penalty:
            return
        means = np.array([part.mean() for part in np.array_split(guide[len(guide) // 2 :], LOSS_WINDOWS)])
        if means[-1] < WON_FRACTION * equilibrium:
            yield (
                f"The guide has won: its loss is {means[-1]:.3g} per row ({equilibrium:.3g} at equilibrium), so the "
                "model learns little from it; give Adversarial a penalty or r1, or the guide a lower learning rate."
            )
        elif np.ptp(means) > CYCLING_FRACTION * equilibrium:
            yield (
                f"The players cycle: the guide's loss varied between {means.min():.3g} and {means.max():.3g} per row "
                "over the second half of the steps; lower or decay the learning rate, or give Adversarial r1."
            )

    def _check_modes(self, bound: BoundPair) -> Iterator[str]:
        indices = some_rows(bound.rows, MODE_CHECK_ROWS).to(bound.device) if bound.takes_rows else None
        named = bound.arguments(indices)
        real, generated = (self._half(bound.model, bound.guide, named, r, detach=True).shown for r in (True, False))
        name = next(iter(real))
        rows, others = (v[:MODE_CHECK_ROWS].flatten(1) for v in (real[name], generated[name]))
        if len(rows) < 10 or not others.isfinite().all():
            return
        # Balls that hold a hundredth of the rows show missing modes of at least that size.
        estimate = coverage(rows, others, k=max(5, len(rows) // 100))
        if estimate.value < MIN_COVERAGE:
            yield (
                f"Generated rows are near only {estimate.value:.0%} of the data (coverage {estimate}): modes are "
                "missing, or the rows are poor; try packs of several rows, a penalty or r1, or more steps."
            )

    def guide_score(self, model: Any, guide: Any, named: Any, *, detach: bool) -> Tensor:
        """Sum of the log odds: of all rows if detached, else of real rows (the model always reaches generated ones)."""
        halves = (False, True) if detach else (True,)
        odds = (self._half(model, guide, named, real, detach=detach).odds for real in halves)
        return sum((o.sum() for o in odds), torch.zeros(()))

    def losses(self, model: Any, guide: Any, named: Any, moving: tuple[bool, bool], players: Players) -> list[Tensor]:
        """Losses of the guide and of the model; the loss of a resting player is 0."""
        kind, encodes = KINDS[self.kind], players.encodes
        generated = self._half(model, guide, named, False, frozen=not moving[1])
        real = self._half(model, guide, named, True) if moving[0] or encodes else None
        guide_loss = model_loss = information = generated.odds.new_zeros(())
        for site in self.information:
            information = information - self.information_weight * generated.log_density(site)
        if moving[0] and real is not None:
            guide_loss = real.total(kind.real(real.odds)) + generated.total(kind.generated(generated.odds))
            guide_loss = guide_loss + information
            if self.r1:
                guide_loss = guide_loss + 0.5 * self.r1 * real.scaled(self._square_slope(guide, named, real.shown))
            if self.penalty:
                points = _interpolate(real.shown, generated.shown, real.odds.shape[-1])
                norm = (self._square_slope(guide, named, points) + 1e-12).sqrt()
                guide_loss = guide_loss + self.penalty * real.scaled((norm - 1).square())
        if moving[1]:
            odds = generated.odds
            weights = odds.detach().flatten().softmax(0).reshape(odds.shape) * odds.numel()
            rows = kind.model(odds) * (weights if self.importance else 1.0)
            model_loss = self.weight * generated.total(rows) + information - generated.observed()
            if encodes and real is not None:
                model_loss = model_loss + self.weight * real.total(kind.model(-real.odds))
        return [guide_loss, model_loss]

    def more_grads(self, model: Any, guide: Any, named: Any) -> Any:
        """The bound of generated rows, if activated; its gradients are added to those of the parameters."""
        if not self.activated:
            return 0.0
        generated = self._half(model, guide, named, False, detach=True)
        rows = {n: v for n, v in generated.shown.items() if n in named}
        weights = generated.odds.detach().sigmoid()
        weights = weights.repeat_interleave(len(next(iter(rows.values()))) // len(weights))
        halves = (poutine.scale(half, scale=weights) for half in (model, guide))
        return self.bound.loss_and_grads(*halves, **{**named, **rows})  # type: ignore[union-attr]

    def _half(
        self, model: Any, guide: Any, named: Any, real: bool, *, frozen: bool = False, detach: bool = False
    ) -> Half:
        """Run model and guide on one half of the batch.

        Args:
            frozen: Whether the model runs without gradients.
            detach: Whether all that the guide reads is detached, so that the log odds depend on its parameters alone.
        """
        stop = StopGradient() if detach else nullcontext()
        with torch.no_grad() if frozen or detach else nullcontext(), stop:
            model_trace: Any = poutine.trace(ObserveReal(real)(model)).get_trace(**_tell_half(model, named, real))
        observed = {n: s for n, s in model_trace.nodes.items() if _is_observed(s) and n != REAL_SITE}
        deterministic = {n: s for n, s in observed.items() if s["infer"].get("_deterministic")}
        shown = {n: s["value"] for n, s in (deterministic or observed).items()}
        if not shown:
            raise ValueError("model: expected a deterministic or observed site for the guide to see, got none")
        if detach:
            shown = {n: v.detach() for n, v in shown.items()}
        replayed = poutine.replay(ObserveReal(real)(guide), trace=model_trace)
        with StopGradient() if detach else nullcontext():
            guide_trace: Any = poutine.trace(replayed).get_trace(**self._guide_arguments(guide, named, shown, real))
        if REAL_SITE not in guide_trace.nodes or REAL_SITE not in model_trace.nodes:
            where, got = "guide" if REAL_SITE in model_trace.nodes else "model", ", ".join(_sites(guide_trace))
            raise ValueError(f"{where}: Adversarial expected a site {REAL_SITE}, got {got or 'none'}")
        sites = [n for n in _sites(guide_trace) if not guide_trace.nodes[n]["is_observed"]]
        latent = {n: guide_trace.nodes[n]["value"] for n in sites if n not in self.information}
        return Half(model_trace, guide_trace, log_odds(guide_trace.nodes[REAL_SITE]["fn"]), {**shown, **latent})

    def _guide_arguments(self, guide: Any, named: Any, shown: Mapping[str, Tensor], real: bool) -> dict[str, Any]:
        """The guide's arguments, with the model's values in place of the data."""
        if shown.keys() <= named.keys():
            return _tell_half(guide, {**named, **shown}, real)
        if not takes(guide, "observations"):
            names = ", ".join(shown)
            raise ValueError(f"guide: expected arguments named {names}, or an argument observations, got neither")
        return _tell_half(guide, {**named, "observations": shown}, real)

    def _square_slope(self, guide: Any, named: Any, shown: Mapping[str, Tensor]) -> Tensor:
        r""":math:`\lVert \nabla a \rVert^2` at values that the guide is shown, per row or pack."""
        leaves = {n: v.detach().requires_grad_() for n, v in shown.items() if v.is_floating_point()}
        values = {**shown, **leaves}
        fixed = poutine.condition(ObserveReal(True)(guide), data=values)
        arguments = {n: v for n, v in values.items() if n in named or takes(guide, "observations")}
        trace: Any = poutine.trace(fixed).get_trace(**self._guide_arguments(guide, named, arguments, True))
        odds = log_odds(trace.nodes[REAL_SITE]["fn"])
        slopes = torch.autograd.grad(odds.sum(), list(leaves.values()), create_graph=True, allow_unused=True)
        rows = odds.shape[-1]
        return sum((g.reshape(rows, -1).square().sum(1) for g in slopes if g is not None), odds.new_zeros(rows))


@dataclass(frozen=True)
class Half:
    """One half of the batch.

    Attributes:
        model_trace: Trace of the model.
        guide_trace: Trace of the guide.
        odds: The guide's log odds.
        shown: Values that the guide read, by site.
    """

    model_trace: Any
    guide_trace: Any
    odds: Tensor
    shown: dict[str, Tensor]

    def total(self, losses: Tensor) -> Tensor:
        """Sum over rows, scaled and masked as the plates say."""
        site = self.guide_trace.nodes[REAL_SITE]
        return scale_and_mask(losses, site["scale"], site["mask"]).sum()

    def scaled(self, values: Tensor) -> Tensor:
        """Sum of one value per row or pack, scaled as the plate says."""
        return scale_and_mask(values, self.guide_trace.nodes[REAL_SITE]["scale"], None).sum()

    def observed(self) -> Tensor:
        """Log density of the model's observed sites that the guide is not shown."""
        total = self.odds.new_zeros(())
        for name, site in self.model_trace.nodes.items():
            if _is_observed(site) and not site["infer"].get("_deterministic") and name not in (REAL_SITE, *self.shown):
                total = total + _log_density(site)
        return total

    def log_density(self, name: str) -> Tensor:
        """Log density of a latent site of the guide."""
        if name not in self.guide_trace.nodes:
            raise ValueError(f"information: expected a site of the guide, got {name!r}")
        return _log_density(self.guide_trace.nodes[name])


class ObserveReal(Messenger):
    """Observe the site ``real`` with one value for all rows."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.real = real

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == REAL_SITE:
            shape = (*msg["fn"].batch_shape, *msg["fn"].event_shape)
            msg["value"] = torch.full(shape, float(self.real)).to(_like(msg["fn"]))
            msg["is_observed"] = True


def log_odds(distribution: Any) -> Tensor:
    """Log odds of one against zero under a Bernoulli distribution."""
    logits = getattr(distribution, "logits", None)
    if logits is not None:
        return logits
    one = torch.ones(distribution.batch_shape)
    return distribution.log_prob(one) - distribution.log_prob(0 * one)


def _like(distribution: Any) -> Tensor:
    return distribution.logits if hasattr(distribution, "logits") else torch.zeros(())


def _log_density(site: Any) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"]).sum()


def _interpolate(one: Mapping[str, Tensor], other: Mapping[str, Tensor], packs: int) -> dict[str, Tensor]:
    """Random points between the rows of one and of the other, with one fraction per pack of rows for all sites."""
    first = next(iter(one.values()))
    size = max(len(first) // packs, 1)
    fraction = torch.rand(len(first) // size).to(first).repeat_interleave(size)
    return {
        n: v.lerp(other[n], fraction.reshape(-1, *(1,) * (v.dim() - 1))).detach() if v.is_floating_point() else v
        for n, v in one.items()
        if n in other
    }


def _is_observed(site: Any) -> bool:
    return site["type"] == "sample" and site["is_observed"] and not site_is_subsample(site)


def _sites(trace: Any) -> list[str]:
    return [n for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]


def _tell_half(function: Any, named: Mapping[str, Any], real: bool) -> dict[str, Any]:
    return {**named, REAL_SITE: real} if takes(function, REAL_SITE) else dict(named)
