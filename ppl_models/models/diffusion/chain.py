r"""The diffusion chain: a model that undoes, step by step, the noise that its guide adds.

.. math::

    q(x_t \mid x_{t-1}) = \mathrm{N}(\sqrt{\alpha_t}\, x_{t-1}, (1 - \alpha_t) I), \qquad
    p(x_T) = \mathrm{N}(0, I), \qquad p(x_{t-1} \mid x_t) = \mathrm{N}(\mu_\theta(x_t, t), \sigma_t^2 I)

The guide has no parameters. What is left of the data after t steps is its signal :math:`\bar\alpha_t = \alpha_1 \cdots
\alpha_t`, from 1 down to nearly 0. ``Trace_ELBO`` of the pair is the exact bound of the whole chain.

References: Sohl-Dickstein et al. 2015 (https://arxiv.org/abs/1503.03585); Ho, Jain and Abbeel 2020
(https://arxiv.org/abs/2006.11239); Nichol and Dhariwal 2021 (https://arxiv.org/abs/2102.09672), the cosine schedule and
learned variances; Salimans and Ho 2022 (https://arxiv.org/abs/2202.00512), velocities; Ho and Salimans 2022
(https://arxiv.org/abs/2207.12598), guidance without a classifier.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_models.models.checks import check_count, check_known_labels, check_labels, check_matrix, known_labels
from ppl_models.models.diffusion.denoisers import Denoiser
from ppl_models.models.diffusion.noising import Noising, normal_event
from ppl_models.models.diffusion.schedules import path, signal_of
from ppl_models.models.parts import grids
from ppl_models.models.parts.distributions import Pixels
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.networks import check_network, evaluation

PREDICTIONS = ("noise", "sample", "velocity")


VARIANCES = ("posterior", "forward", "learned")


LIKELIHOODS = ("gaussian", "pixels")


LN2 = math.log(2)


@dataclass(frozen=True)
class Bound:
    """The bound of each row, in nats, term by term: divergences are positive, the reconstruction a log density.

    Attributes:
        prior: Divergence of the last noised rows from the prior (N,).
        steps: Divergence of each step t = 2 to T (N, T - 1).
        reconstruction: Log density of the rows given those of step 1 (N,).
        dimensions: D.
    """

    prior: Tensor
    steps: Tensor
    reconstruction: Tensor
    dimensions: int

    @property
    def total(self) -> Tensor:
        """The bound of log p(x) of each row (N,)."""
        return self.reconstruction - self.prior - self.steps.sum(1)

    def each(self) -> dict[str, Tensor]:
        """Bits a dimension of each row (N,): of the prior, of all steps, of the reconstruction, and in total."""
        parts = {"prior": self.prior, "steps": self.steps.sum(1), "reconstruction": -self.reconstruction}
        return {n: v.double() / self.dimensions / LN2 for n, v in (*parts.items(), ("total", -self.total))}

    def bits(self) -> dict[str, float]:
        """The means of :meth:`each`."""
        return {n: float(v.mean()) for n, v in self.each().items()}


class DiffusionChain(Noising):
    r"""A chain of T steps, from noise to rows.

    Args:
        features: Number of features D, or their names.
        network: From rows (N, D), their steps (N,) and, with classes, labels (N,) to the prediction (N, D), or (N, 2 D)
            where the variance is learnt. Default: a :class:`Denoiser`. Rows come to it centred and scaled.
        steps: T.
        schedule: ``linear``, ``cosine``, ``log_snr``, or the signal :math:`\bar\alpha` (T,) itself, which falls.
        prediction: What the network predicts: the ``noise``, the clean ``sample``, or the ``velocity``
            :math:`\sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1 - \bar\alpha_t}\,x`.
        variance: :math:`\sigma_t^2`: that of the guide's ``posterior`` :math:`q(x_{t-1} \mid x_t, x)`, right if all
            rows were one; that of the ``forward`` step, right if they were N(0, I); or ``learned``, between the two. At
            step 1 the fixed ones are the forward one.
        likelihood: Of x given :math:`x_1`: ``gaussian``, or ``pixels`` in [0, 1] of so many ``levels``.
        levels: Levels of a pixel; the data hold multiples of 1 / (levels - 1).
        classes: Number of classes K of labels y that the network reads, or their names; None: it reads none.
        drop: Share of rows whose label is hidden from the network while it is trained by single steps, so that it can
            be guided without a classifier; a hidden label is K.
        hidden: Widths of the hidden layers of the default network.
        shift: What is taken off the rows (D,), or a number; pixels: 1/2.
        spread: What they are then divided by, so that they vary by about one; pixels: 1/2.

    Data: x (N, D), and y (N,) with classes. Sites: x_T, ..., x_1 and x, each (D,) of every row.

    With an argument ``step`` model and guide are one edge of the chain, of each row its own: t from 2 to T is that from
    x_t to x_{t-1}, 1 that from x_1 to x, and T + 1 the prior's. Sites are then ``x_step``, ``x_prev``, x, and
    ``residual``, the network's prediction less its target; all are scaled by T + 1, so that an edge drawn at random
    gives the bound of the chain on average.

    In evaluation mode predictions of clean pixels are kept within their range.

    Example:
        >>> pair = DiffusionChain(2, steps=20, hidden=(16,))
        >>> pair.generate(5, seed=0).shape, pair.generate(5, steps=4, seed=0).shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        features: int | Sequence[str],
        network: nn.Module | None = None,
        *,
        steps: int = 100,
        schedule: str | Tensor = "cosine",
        prediction: str = "velocity",
        variance: str = "posterior",
        likelihood: str = "gaussian",
        levels: int = 256,
        classes: int | Sequence[str] | None = None,
        drop: float = 0.1,
        hidden: Sequence[int] = (128, 128, 128),
        shift: float | Tensor | None = None,
        spread: float | Tensor | None = None,
    ) -> None:
        for name, value, known in (
            ("prediction", prediction, PREDICTIONS),
            ("variance", variance, VARIANCES),
            ("likelihood", likelihood, LIKELIHOODS),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        check_count("levels", levels, 2)
        if not 0 <= drop < 1:
            raise ValueError(f"drop: expected a share from 0 to below 1, got {drop!r}")
        super().__init__(features, signal_of(schedule, steps))
        self.classes = 0 if classes is None else self.name_dimension("classes", classes)
        self.prediction, self.variance, self.kind = prediction, variance, likelihood
        self.levels, self.drop = levels, drop
        middle = 0.5 if likelihood == "pixels" else 0.0
        for name, given, usual in (("shift", shift, middle), ("spread", spread, middle or 1.0)):
            numbers = torch.as_tensor(usual if given is None else given, dtype=torch.get_default_dtype())
            if numbers.shape not in ((), (self.features,)) or not bool(numbers.isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers, one or {self.features}, got {given!r}")
            self.register_buffer(name, numbers.expand(self.features).clone())
        if not bool((self.spread > 0).all()):
            raise ValueError(f"spread: expected positive numbers, got {self.spread.min().item():g}")
        width = self.features * (2 if variance == "learned" else 1)
        if network is None:
            network = Denoiser(self.features, width, self.steps, hidden=hidden, classes=self.classes)
        self.network = network
        one = torch.ones(1, dtype=torch.long)
        check_network("network", self.network, self.features, width, one, *([one] if self.classes else []))
        self.dims = {"x": ("features",), **{f"x_{t}": ("features",) for t in range(1, self.steps + 1)}}

    # ---------------------------------------------------------------------------------------- the two halves

    def model(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        step: int | Tensor | None = None,
    ) -> Tensor:
        """Draw or score the chain from noise to rows, or one edge of it; return x."""
        # Labels that the network does not read still say how many rows to draw.
        with self.rows(x, y):
            y = self._labels(y)
            if step is not None:
                return self._edge(x, y, step)
            z = pyro.sample(f"x_{self.steps}", self.prior())
            for t in range(self.steps, 1, -1):
                z = pyro.sample(f"x_{t - 1}", self.reverse(z, t, y))
            return pyro.sample("x", self.reconstruct(z, y), obs=x)

    def guide(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        step: int | Tensor | None = None,
    ) -> None:
        """Add noise, step by step; of one edge at once."""
        clean = self.scaled(x)
        with self.rows(x):
            if step is None:
                z = clean
                for t in range(1, self.steps + 1):
                    keep = self.signal(t) / self.signal(t - 1)
                    z = pyro.sample(f"x_{t}", normal_event(keep.sqrt() * z, self._added(t).sqrt()))
                return
            at = self._of_rows(step, x)
            inner = at.clamp(max=self.steps)
            with poutine.scale(scale=self.steps + 1.0):
                with _where(False):
                    noised = pyro.sample("x_step", self.noised(clean, inner))
                between = self.posterior(noised, clean, inner)
                last, prior = self.noised(clean, inner), (at > self.steps)[:, None]
                distribution = normal_event(
                    torch.where(prior, last.mean, between.mean), torch.where(prior, last.stddev, between.stddev)
                )
                with _where(at > 1):
                    pyro.sample("x_prev", distribution)

    def _edge(self, x: Tensor | None, y: Tensor | None, step: int | Tensor) -> Tensor:
        if x is None:
            raise ValueError("step: expected rows x, of which a single step is taken, got none")
        t = self._of_rows(step, x)
        inner = t.clamp(max=self.steps)
        if y is not None and self.training and self.drop:
            y = torch.where(torch.rand(len(y), device=y.device) < self.drop, self.classes, y)
        with poutine.scale(scale=self.steps + 1.0):
            with _where(False):
                noised = pyro.sample("x_step", self.prior())
            guess = self.guess(noised, inner, y)
            distribution, prior = self.step_distribution(noised, guess, inner), (t > self.steps)[:, None]
            with _where(t > 1):
                pyro.sample(
                    "x_prev",
                    normal_event(
                        torch.where(prior, 0.0, distribution.mean), torch.where(prior, 1.0, distribution.stddev)
                    ),
                )
            with _where(t == 1):
                pyro.sample("x", self._likelihood(distribution.mean, distribution.stddev), obs=x)
        # Outside of the scale: the simple loss has none.
        pyro.deterministic("residual", guess.out - self._target(noised, x, inner), event_dim=1)
        return x

    # ------------------------------------------------------------------------------------------ laws of one step

    def reverse(self, noised: Tensor, t: int | Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """p(x_{t-1} | x_t) of noised rows (..., D), from t = 2."""
        return self.step_distribution(noised, self.guess(noised, t, y), t)

    def reconstruct(self, noised: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """p(x | x_1) of noised rows (..., D)."""
        distribution = self.step_distribution(noised, self.guess(noised, 1, y), 1)
        return self._likelihood(distribution.mean, distribution.stddev)

    def guess(self, noised: Tensor, t: int | Tensor, y: Tensor | None = None, *, guidance: float = 0.0) -> Guess:
        r"""What the network makes of noised rows (..., D) at steps t, an integer or (...,).

        Args:
            guidance: w of :math:`(1 + w) f(x_t, y) - w f(x_t)`, with the label and with it hidden.
        """
        y = self._labels(y)
        at = torch.tensor(t, device=noised.device).expand(noised.shape[:-1]) if isinstance(t, int) else t
        out = self._run(noised, at, y)
        if guidance:
            hidden = self._run(noised, at, torch.full_like(known_labels(y), self.classes))
            out = (1 + guidance) * out - guidance * hidden
        wide: Tensor | None = None
        if self.variance == "learned":
            out, wide = out.chunk(2, -1)
        keep, lose = self.signal(at).sqrt(), self.lost(at).sqrt()
        if self.prediction == "noise":
            clean = (noised - lose * out) / keep
        elif self.prediction == "sample":
            clean = out
        else:
            clean = keep * noised - lose * out
        if self.kind == "pixels" and not self.training:
            clean = clean.clamp(self.scaled(torch.zeros_like(clean)), self.scaled(torch.ones_like(clean)))
        return Guess(out, clean, (noised - keep * clean) / lose, wide)

    def _run(self, noised: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        labels = () if y is None else (y.expand(noised.shape[:-1]),)
        return self.network(noised, t.expand(noised.shape[:-1]), *labels)

    def step_distribution(self, noised: Tensor, guess: Guess, t: int | Tensor) -> dist.TorchDistribution:
        """The chain's law of rows after step t, by what the network makes of them; of step 1, as it holds them."""
        least, most = self._bounds(t)
        if guess.wide is not None:
            share = guess.wide.sigmoid()
            scale = (0.5 * (share * most.log() + (1 - share) * least.log())).exp()
        elif self.variance == "forward":
            scale = most.sqrt()
        else:
            scale = torch.where(torch.as_tensor(t, device=most.device).reshape(least.shape) == 1, most, least).sqrt()
        return normal_event(self._between(noised, guess.clean, t), scale)

    def _likelihood(self, mean: Tensor, scale: Tensor) -> dist.TorchDistribution:
        loc, sd = self.shift + self.spread * mean, (self.spread * scale).expand(mean.shape)
        if self.kind == "gaussian":
            return normal_event(loc, sd)
        return Pixels(loc, sd, self.levels, validate_args=False).to_event(1)

    def _target(self, noised: Tensor, x: Tensor, t: Tensor) -> Tensor:
        clean, keep, lose = self.scaled(x), self.signal(t).sqrt(), self.lost(t).sqrt()
        noise = (noised - keep * clean) / lose
        if self.prediction == "velocity":
            return keep * noise - lose * clean
        return noise if self.prediction == "noise" else clean

    # ------------------------------------------------------------------------------------------------ in use

    def scaled(self, x: Tensor) -> Tensor:
        """Rows (..., D) as the chain holds them: centred and scaled."""
        return (x - self.shift) / self.spread

    def unscaled(self, clean: Tensor) -> Tensor:
        """Rows (..., D) of what the chain holds; pixels are kept in [0, 1]."""
        x = self.shift + self.spread * clean
        return x.clamp(0, 1) if self.kind == "pixels" else x

    @torch.no_grad()
    def bound(self, x: Tensor, y: Tensor | None = None, *, draws: int = 1, seed: int = 0) -> Bound:
        """The bound of log p(x) of each row, term by term, its divergences in closed form at draws of the guide."""
        self.check(x, y)
        check_count("draws", draws)
        clean, labels = self.scaled(x), self._labels(y)
        random = torch.Generator().manual_seed(seed)
        prior = kl_divergence(self.noised(clean, self.steps), self.prior())
        steps = torch.zeros(len(x), self.steps - 1).to(clean)
        reconstruction = torch.zeros(len(x)).to(clean)
        with evaluation(self):
            for _ in range(draws):
                for t in range(1, self.steps + 1):
                    distribution = self.noised(clean, t)
                    noised = distribution.mean + distribution.stddev * torch.randn(clean.shape, generator=random).to(
                        clean
                    )
                    if t == 1:
                        reconstruction += self.reconstruct(noised, labels).log_prob(x) / draws
                    else:
                        between = self.posterior(noised, clean, t)
                        steps[:, t - 2] += kl_divergence(between, self.reverse(noised, t, labels)) / draws
        return Bound(prior, steps, reconstruction, self.features)

    @torch.no_grad()
    def generate(
        self,
        count: int,
        *,
        steps: int | None = None,
        eta: float = 0.0,
        y: Tensor | None = None,
        guidance: float = 0.0,
        seed: int = 0,
    ) -> Tensor:
        r"""Rows (count, D) of the fitted chain, in evaluation mode.

        Args:
            steps: None: the model as it is, all T steps, and the mean of x of the last. Else S of the T, spread evenly,
                by the implicit sampler of Song et al. 2021 (DDIM).
            eta: Share of the noise of ``variance="posterior"`` that the implicit sampler adds: 0 is deterministic given
                x_T, 1 is that chain's own.
            y: Labels (count,); None: all classes in turn.
            guidance: w of :math:`(1 + w) f(x_t, y) - w f(x_t)`.
            seed: One seed gives the same on every device.

        Raises:
            ValueError: More steps than the chain has, or an argument out of its range.
        """
        check_count("count", count)
        if guidance and not (self.classes and self.drop):
            raise ValueError("guidance: expected a pair with classes that are dropped in part, got one without")
        if eta and steps is None:
            raise ValueError(f"eta: expected steps beside it, of the implicit sampler, got {eta!r} without")
        if y is not None and self.classes:
            check_labels("y", y, count, self.classes, missing=False)
        if y is None and self.classes:
            y = torch.arange(count, device=self.origin.device) % self.classes
        random = torch.Generator().manual_seed(seed)
        start = torch.randn(count, self.features, generator=random).to(self.origin)
        *_, clean = self.walk(start, random, steps=steps, eta=eta, y=y, guidance=guidance)
        return self.unscaled(clean)

    @torch.no_grad()
    def walk(
        self,
        z: Tensor,
        random: torch.Generator,
        *,
        steps: int | None = None,
        eta: float = 0.0,
        y: Tensor | None = None,
        guidance: float = 0.0,
        start: int | None = None,
    ) -> Iterator[Tensor]:
        """The rows (..., D) after each step from z at step ``start`` (None: T) down to the clean ones, as the chain
        holds them. Arguments are those of :meth:`generate`."""
        start = self.steps if start is None else start
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: expected a share from 0 to 1, got {eta!r}")
        times = path(start, start if steps is None else steps)
        y = self._labels(y)
        for now, then in zip(times, [*times[1:], 0], strict=True):
            with evaluation(self):
                guess = self.guess(z, now, y, guidance=guidance)
            if then == 0:
                z = guess.clean
            elif steps is None:
                distribution = self.step_distribution(z, guess, now)
                z = distribution.mean + distribution.stddev * torch.randn(z.shape, generator=random).to(z)
            else:
                z = self._implicit(guess, now, then, eta, random)
            yield z

    def _implicit(self, guess: Guess, now: int, then: int, eta: float, random: torch.Generator) -> Tensor:
        there, lost = self.signal(then), self.lost(then)
        added = eta**2 * lost / self.lost(now) * self._between_steps(then, now)
        z = there.sqrt() * guess.clean + (lost - added).clamp(min=0).sqrt() * guess.noise
        return z + added.sqrt() * torch.randn(z.shape, generator=random).to(z) if eta else z

    def pictures(self, x: Tensor, **_: Any) -> dict[str, Grid]:
        """Generated rows, the chain forward and back, and rows by the number of deterministic steps."""
        samples = grids.samples_by(self, "y", self.classes) if self.classes else grids.samples(self)
        return {"samples": samples, "chain": grids.chain(self, x), "steps": grids.by_steps(self)}

    # ------------------------------------------------------------------------------------------------ checks

    def check(self, x: Any = None, y: Any = None, step: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite (rows, D), of pixels of the stated levels where it holds pixels, and y
        has a class for every row."""
        if x is not None:
            check_matrix("x", x, self.features)
            if self.kind == "pixels":
                self._check_pixels(x)
        if self.classes:
            check_known_labels(x, y, self.classes)
        if step is not None and x is not None:
            t = self._of_rows(step, x)
            wrong = t[(t < 1) | (t > self.steps + 1)]
            if t.shape != x.shape[:1] or len(wrong):
                got = f"{wrong[0].item()}" if len(wrong) else tuple(t.shape)
                raise ValueError(f"step: expected one of each row, 1 to {self.steps + 1}, got {got}")

    def _check_pixels(self, x: Tensor) -> None:
        outside = x[(x < 0) | (x > 1)]
        if len(outside):
            raise ValueError(f"x: expected pixels in [0, 1], got {outside[0].item():g}")
        grid = x * (self.levels - 1)
        between = x[(grid - grid.round()).abs() > max(1e-3, 1e-6 * self.levels)]
        if len(between):
            raise ValueError(
                f"x: expected pixels of {self.levels} levels, multiples of 1 / {self.levels - 1}, got "
                f"{between[0].item():g}; set levels"
            )

    def _labels(self, y: Tensor | None) -> Tensor | None:
        return known_labels(y).long() if self.classes else None

    def _of_rows(self, step: int | Tensor, x: Tensor) -> Tensor:
        if isinstance(step, int):
            if not 1 <= step <= self.steps + 1:
                raise ValueError(f"step: expected 1 to {self.steps + 1} (steps + 1 is the prior's), got {step}")
            return torch.full((len(x),), step, device=x.device)
        return step


@dataclass(frozen=True)
class Guess:
    """What the network makes of noised rows, each (..., D).

    Attributes:
        out: Its prediction, whatever it predicts.
        clean: The clean rows that follow.
        noise: The noise that follows.
        wide: Log odds of the learned variance between its bounds.
    """

    out: Tensor
    clean: Tensor
    noise: Tensor
    wide: Tensor | None


def _where(mask: Any) -> Any:
    return poutine.mask(mask=mask)
