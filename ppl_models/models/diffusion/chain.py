r"""The diffusion chain: a model that removes, step by step, the noise that its guide adds.

.. math::

    q(x_t \mid x_{t-1}) = \mathrm{N}(\sqrt{\alpha_t}\, x_{t-1}, (1 - \alpha_t) I), \qquad
    p(x_T) = \mathrm{N}(0, I), \qquad p(x_{t-1} \mid x_t) = \mathrm{N}(\mu_\theta(x_t, t), \sigma_t^2 I)

The guide has no parameters. :math:`\bar\alpha_t = \alpha_1 \cdots \alpha_t` falls from 1 to nearly 0. ``Trace_ELBO`` of
the pair is the exact bound of the whole chain.

References: Sohl-Dickstein et al. 2015 (https://arxiv.org/abs/1503.03585); Ho, Jain and Abbeel 2020
(https://arxiv.org/abs/2006.11239); Nichol and Dhariwal 2021 (https://arxiv.org/abs/2102.09672), the cosine schedule and
learned variances; Salimans and Ho 2022 (https://arxiv.org/abs/2202.00512), velocities; Ho and Salimans 2022
(https://arxiv.org/abs/2207.12598), guidance without a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from ppl_models.models.checks import (
    check_count,
    check_entries,
    check_fraction,
    check_known_labels,
    check_matrix,
    check_number,
    check_one_of,
    check_widths,
    known_labels,
)
from ppl_models.models.diffusion import inverse, sampling
from ppl_models.models.diffusion.denoisers import Denoiser
from ppl_models.models.diffusion.noising import Noising, normal_event
from ppl_models.models.diffusion.schedules import alpha_bar_of
from ppl_models.models.pair import as_matrix
from ppl_models.models.parts import grids
from ppl_models.models.parts.completion import View
from ppl_models.models.parts.distributions import Pixels
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.networks import check_network

PREDICTIONS = ("noise", "sample", "velocity")
VARIANCES = ("posterior", "forward", "learned")
LIKELIHOODS = ("gaussian", "pixels")


@dataclass(frozen=True)
class Prediction:
    """The network's output for rows x_t, and what follows from it; each (..., D).

    Attributes:
        output: The noise, clean rows or velocity, as the network predicts them.
        x0: Clean rows, scaled.
        eps: Noise.
        variance_logit: Logit of where the log variance lies between its bounds; None unless it is learned.
    """

    output: Tensor
    x0: Tensor
    eps: Tensor
    variance_logit: Tensor | None


class DiffusionChain(Noising):
    r"""A diffusion chain of T steps.

    Args:
        features: Number of features D, or their names.
        network: From scaled rows x_t (N, D), steps t (N,) and, with classes, labels (N,) to the prediction (N, D), or
            (N, 2 D) with learned variances. Default: a :class:`Denoiser`.
        steps: T.
        schedule: ``linear``, ``cosine``, ``log_snr``, or the values :math:`\bar\alpha` (T,), decreasing.
        prediction: What the network predicts: the ``noise`` :math:`\epsilon`, the clean ``sample`` :math:`x_0`, or the
            ``velocity`` :math:`\sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1 - \bar\alpha_t}\,x_0`.
        variance: :math:`\sigma_t^2`: that of the guide's ``posterior`` :math:`q(x_{t-1} \mid x_t, x_0)`, optimal for
            a single row; that of the ``forward`` step, optimal for N(0, I); or ``learned``, between the two. At step 1
            the first is zero, and the second is used.
        likelihood: Of x given x_1: ``gaussian``, or ``pixels`` in [0, 1], discretised into ``levels``.
        levels: Levels of a pixel; data are multiples of 1 / (levels - 1).
        classes: Number of classes K of the labels that the network reads, or their names. Default: no labels.
        drop: Fraction of rows whose label is replaced by K in training by single steps, for guidance without a
            classifier.
        hidden: Widths of the hidden layers of the default network.
        shift: Subtracted from the rows: a number or (D,). Default: 1/2 for pixels, else 0.
        scale: Divisor of the shifted rows, which should then have about unit variance: a number or (D,). Default: 1/2
            for pixels, else 1.

    Data: x (N, D), and y (N,) with classes. Sites: x_T, ..., x_1 and x, each (D,) per row.

    Given ``step``, one t per row, model and guide are a single edge of the chain: from x_t to x_{t-1} for t = 2 to T,
    from x_1 to x for t = 1, the prior of x_T for t = T + 1. The sites are then ``x_step``, ``x_prev``, x, and
    ``residual``, the network's output minus its target. Log densities are scaled by T + 1: an edge drawn uniformly
    gives an unbiased estimate of the bound.

    In evaluation mode predictions of clean pixels are clipped to their range.

    Example:
        >>> pair = DiffusionChain(2, steps=20, hidden=(16,))
        >>> pair.generate(5, seed=0).shape, pair.generate(5, steps=4, seed=0).shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    bound = sampling.bound
    generate = sampling.generate
    denoise_steps = sampling.denoise_steps

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
        scale: float | Tensor | None = None,
    ) -> None:
        for name, value, known in (
            ("prediction", prediction, PREDICTIONS),
            ("variance", variance, VARIANCES),
            ("likelihood", likelihood, LIKELIHOODS),
        ):
            check_one_of(name, value, known)
        check_count("levels", levels, 2)
        check_fraction("drop", drop, one=False)
        check_widths("hidden", hidden)
        super().__init__(features, alpha_bar_of(schedule, steps))
        self.classes = 0 if classes is None else self.name_dimension("classes", classes)
        self.prediction, self.variance, self.likelihood = prediction, variance, likelihood
        self.levels, self.drop = levels, drop
        self._set_scale("shift", shift, 0.5 if likelihood == "pixels" else 0.0)
        self._set_scale("scale", scale, 0.5 if likelihood == "pixels" else 1.0)
        if not bool((self.scale > 0).all()):
            raise ValueError(f"scale: expected positive numbers, got {self.scale.min().item():g}")
        width = self.features * (2 if variance == "learned" else 1)
        if network is None:
            network = Denoiser(self.features, width, self.steps, hidden=hidden, classes=self.classes)
        self.network = network
        one = torch.ones(1, dtype=torch.long)
        check_network("network", self.network, self.features, width, one, *([one] if self.classes else []))
        self.dims = {"x": ("features",), **{f"x_{t}": ("features",) for t in range(1, self.steps + 1)}}

    def _set_scale(self, name: str, value: float | Tensor | None, default: float) -> None:
        if not isinstance(value, Tensor | None):
            check_number(name, value)
        numbers = torch.as_tensor(default if value is None else value, dtype=torch.get_default_dtype())
        if numbers.shape not in ((), (self.features,)) or not bool(numbers.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, one or {self.features}, got {value!r}")
        self.register_buffer(name, numbers.expand(self.features).clone())

    def model(self, x: Tensor | None = None, y: Tensor | None = None, *, step: int | Tensor | None = None) -> Tensor:
        """Draw or score the reverse chain, or one edge of it; return x."""
        # Labels that the network does not read still say how many rows to draw.
        with self.rows(x, y):
            y = self.class_labels(y)
            if step is not None:
                return self._edge(x, y, step)
            x_t = pyro.sample(f"x_{self.steps}", self.prior())
            for t in range(self.steps, 1, -1):
                x_t = pyro.sample(f"x_{t - 1}", self.reverse(x_t, t, y))
            return pyro.sample("x", self.reconstruct(x_t, y), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None, *, step: int | Tensor | None = None) -> None:
        """Draw the forward chain, or one edge of it."""
        x0 = self.scaled(x)
        with self.rows(x):
            if step is not None:
                return self._forward_edge(x0, self._step_of_rows(step, x))
            x_t = x0
            for t in range(1, self.steps + 1):
                x_t = pyro.sample(f"x_{t}", normal_event(self.alpha(t).sqrt() * x_t, self.beta(t).sqrt()))

    def _edge(self, x: Tensor | None, y: Tensor | None, step: int | Tensor) -> Tensor:
        if x is None:
            raise ValueError("step: expected rows x, as single steps start from data, got none")
        t = self._step_of_rows(step, x)
        inner, prior = t.clamp(max=self.steps), (t > self.steps)[:, None]
        if y is not None and self.training and self.drop:
            y = torch.where(torch.rand(len(y), device=y.device) < self.drop, self.classes, y)
        with poutine.scale(scale=self.steps + 1.0):
            with _mask(False):
                x_t = pyro.sample("x_step", self.prior())
            prediction = self.predict(x_t, inner, y)
            reverse = self.step_distribution(x_t, prediction, inner)
            mean, stddev = torch.where(prior, 0.0, reverse.mean), torch.where(prior, 1.0, reverse.stddev)
            with _mask(t > 1):
                pyro.sample("x_prev", normal_event(mean, stddev))
            with _mask(t == 1):
                pyro.sample("x", self._data_distribution(reverse), obs=x)
        # Outside of the scale: the simple loss has none.
        pyro.deterministic("residual", prediction.output - self._target(x_t, self.scaled(x), inner), event_dim=1)
        return x

    def _forward_edge(self, x0: Tensor, t: Tensor) -> None:
        inner, prior = t.clamp(max=self.steps), (t > self.steps)[:, None]
        noised = self.noised(x0, inner)
        with poutine.scale(scale=self.steps + 1.0):
            with _mask(False):
                x_t = pyro.sample("x_step", noised)
            posterior = self.posterior(x_t, x0, inner)
            mean = torch.where(prior, noised.mean, posterior.mean)
            stddev = torch.where(prior, noised.stddev, posterior.stddev)
            with _mask(t > 1):
                pyro.sample("x_prev", normal_event(mean, stddev))

    def reverse(self, x_t: Tensor, t: int | Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """p(x_{t-1} | x_t) of scaled rows (..., D), for t from 2."""
        return self.step_distribution(x_t, self.predict(x_t, t, y), t)

    def reconstruct(self, x_1: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """p(x | x_1) of scaled rows (..., D)."""
        return self._data_distribution(self.reverse(x_1, 1, y))

    def predict(self, x_t: Tensor, t: int | Tensor, y: Tensor | None = None, *, guidance: float = 0.0) -> Prediction:
        r"""The network's prediction for scaled rows (..., D).

        Args:
            t: Steps, an integer or (...,).
            y: Labels, broadcast against the rows.
            guidance: w of :math:`(1 + w) f(x_t, y) - w f(x_t)`, the prediction with labels and without. A learned
                variance is that with labels: extrapolated it would be no variance of any step.
        """
        check_number("guidance", guidance)
        y = self.class_labels(y)
        t = torch.tensor(t, device=x_t.device).expand(x_t.shape[:-1]) if isinstance(t, int) else t
        output, variance_logit = self._run_network(x_t, t, y)
        if guidance:
            without, _ = self._run_network(x_t, t, torch.full_like(known_labels(y), self.classes))
            output = (1 + guidance) * output - guidance * without
        gain, sigma = self.alpha_bar(t).sqrt(), self.noise_variance(t).sqrt()
        if self.prediction == "noise":
            x0 = (x_t - sigma * output) / gain
        elif self.prediction == "sample":
            x0 = output
        else:
            x0 = gain * x_t - sigma * output
        if self.likelihood == "pixels" and not self.training:
            x0 = x0.clamp(self.scaled(torch.zeros_like(x0)), self.scaled(torch.ones_like(x0)))
        return Prediction(output, x0, (x_t - gain * x0) / sigma, variance_logit)

    def _run_network(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The prediction, and the logit of the variance if it is learned."""
        labels = () if y is None else (y.expand(x_t.shape[:-1]),)
        out: Tensor = self.network(x_t, t.expand(x_t.shape[:-1]), *labels)
        if self.variance != "learned":
            return out, None
        prediction, variance_logit = out.chunk(2, -1)
        return prediction, variance_logit

    def step_distribution(self, x_t: Tensor, prediction: Prediction, t: int | Tensor) -> dist.TorchDistribution:
        """p(x_{t-1} | x_t) from a prediction; at t = 1 that of the scaled rows x_0."""
        low, high = self.variance_bounds(t)
        if prediction.variance_logit is not None:
            fraction = prediction.variance_logit.sigmoid()
            stddev = (0.5 * (fraction * high.log() + (1 - fraction) * low.log())).exp()
        elif self.variance == "forward":
            stddev = high.sqrt()
        else:
            stddev = torch.where(torch.as_tensor(t, device=high.device).reshape(low.shape) == 1, high, low).sqrt()
        return normal_event(self.posterior_mean(x_t, prediction.x0, t), stddev)

    def _data_distribution(self, scaled: dist.TorchDistribution) -> dist.TorchDistribution:
        """p(x) of rows in their own units, from the normal of scaled rows."""
        loc, scale = self.shift + self.scale * scaled.mean, self.scale * scaled.stddev
        if self.likelihood == "gaussian":
            return normal_event(loc, scale)
        return Pixels(loc, scale, self.levels, validate_args=False).to_event(1)

    def _target(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        gain, sigma = self.alpha_bar(t).sqrt(), self.noise_variance(t).sqrt()
        eps = (x_t - gain * x0) / sigma
        return {"noise": eps, "sample": x0, "velocity": gain * eps - sigma * x0}[self.prediction]

    def scaled(self, x: Tensor) -> Tensor:
        """Rows (..., D) less ``shift``, divided by ``scale``: the units of the chain."""
        if not am_i_wrapped():
            check_matrix("x", as_matrix(x), self.features)
        return (x - self.shift) / self.scale

    def unscaled(self, x0: Tensor) -> Tensor:
        """The inverse of :meth:`scaled`; pixels are clipped to [0, 1]."""
        x = self.shift + self.scale * x0
        return x.clamp(0, 1) if self.likelihood == "pixels" else x

    def class_labels(self, y: Tensor | None) -> Tensor | None:
        """Labels as integers; None if the pair has no classes.

        Raises:
            ValueError: The pair has classes, and y is None or not of 0 to K, where K stands for no label.
        """
        if not self.classes:
            return None
        y = known_labels(y)
        if not am_i_wrapped():
            if not isinstance(y, Tensor):
                raise ValueError(f"y: expected a tensor of labels, got {type(y).__name__}")
            known = (y >= 0) & (y <= self.classes) & (y == y.round())
            check_entries("y", y, ~known, f"labels 0 to {self.classes - 1}")
        return y.long()

    def restore(
        self, x: Tensor, y: Tensor | None = None, *, draws: int = 16, **view: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation (N, D) of draws of rows seen through noise (N, M), and the error of the mean.

        The chain runs down from the step of that noise; with a matrix it is guided (:mod:`.inverse`).

        Args:
            x: What is seen.
            y: Labels (N,), with classes.
            draws: Number of draws per row.
            view: ``sd`` and ``matrix`` of a :class:`View`.
        """
        seen = View.of(view)
        check_matrix("x", x, self.features if seen.matrix is None else len(seen.matrix))
        sd, seed = seen.gaussian(), int(torch.randint(2**31, ()))
        if seen.matrix is None:
            drawn = inverse.denoise(self, x, sd, draws=draws, y=y, seed=seed)
        else:
            drawn = inverse.restore(self, x, seen.matrix, sd, particles=draws, y=y, seed=seed).draws
        return drawn.mean(1), drawn.std(1), drawn.std(1) / draws**0.5

    def pictures(self, x: Tensor, **_: Any) -> dict[str, Grid]:
        """Generated rows, the chain forward and back, and rows by the number of deterministic steps."""
        self._check_rows(x)
        samples = grids.samples_by(self, "y", self.classes) if self.classes else grids.samples(self)
        return {"samples": samples, "chain": grids.chain(self, x), "steps": grids.by_steps(self)}

    def check(self, x: Any = None, y: Any = None, step: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite (rows, D), of pixels with the stated levels if it holds pixels, and y
        has a class for every row."""
        if x is not None:
            self._check_rows(x)
        if self.classes:
            check_known_labels(x, y, self.classes)
        if step is not None and x is not None:
            t = self._step_of_rows(step, x)
            wrong = t[(t < 1) | (t > self.steps + 1)]
            if t.shape != x.shape[:1] or len(wrong):
                got = f"{wrong[0].item()}" if len(wrong) else tuple(t.shape)
                raise ValueError(f"step: expected one per row, 1 to {self.steps + 1}, got {got}")

    def _check_rows(self, x: Any) -> None:
        check_matrix("x", x, self.features)
        if self.likelihood == "pixels":
            self._check_pixels(x)

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

    def _step_of_rows(self, step: int | Tensor, x: Tensor) -> Tensor:
        if isinstance(step, int):
            if not 1 <= step <= self.steps + 1:
                raise ValueError(f"step: expected 1 to {self.steps + 1} (steps + 1 is the prior's), got {step}")
            return torch.full((len(x),), step, device=x.device)
        return step


def _mask(mask: Any) -> Any:
    # Pyro's annotation allows no Tensor.
    return poutine.mask(mask=mask)
