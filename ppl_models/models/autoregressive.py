r"""Autoregressive models of binary features: each feature given the preceding ones.

.. math:: p(x) = \prod_{d=1}^D \mathrm{Bernoulli}(x_d \mid \sigma(f_d(x_1, \dots, x_{d-1})))

In the fully visible sigmoid belief net f is linear; in NADE all f share one hidden layer; in MADE they are one network
with masked weights. There are no latent sites: the guide is empty and the ELBO is the exact log likelihood.

References: Frey, Hinton and Dayan 1996; Larochelle and Murray 2011, "The Neural Autoregressive Distribution
Estimator"; Germain et al. 2015, "MADE: Masked Autoencoder for Distribution Estimation"
(https://arxiv.org/abs/1502.03509).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid, pad

from ppl_models.models.checks import (
    check_binary,
    check_count,
    check_matrix,
    check_widths,
    count_of,
    known_or_zero,
    random_source,
)
from ppl_models.models.pair import Visible, checked
from ppl_models.models.parts import grids
from ppl_models.models.parts.distributions import Rowwise, log_odds_of_means
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.randomness import bernoulli

GROUP = 14
"""Features that NADE takes at once."""


class Conditionals(Rowwise):
    r"""Binary features, each of which depends on the preceding ones in some order.

    Several sets of conditionals make a mixture, with equal weights, of as many distributions.

    Args:
        logits: For each set a function from features (..., D) to the log odds of each given the preceding (..., D).
        order: For each set the order in which the features are drawn (sets, D).
        like: A tensor of the type and device of the draws.
    """

    arg_constraints: ClassVar = {}
    support = dist.constraints.independent(dist.constraints.boolean, 1)

    def __init__(self, logits: Sequence[Callable[[Tensor], Tensor]], order: Tensor, like: Tensor) -> None:
        self.logits, self.order, self.like = logits, order, like
        super().__init__(torch.Size(), order.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        # Zeros and ones are the same in any precision.
        value = value.to(self.like.dtype)
        sign = 2 * value - 1
        scores = torch.stack([logsigmoid(sign * logits(value)).sum(-1) for logits in self.logits])
        # The average of densities: an average of log odds over orders would belong to no density.
        return self._repeat(scores.logsumexp(0) - math.log(len(scores)))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.drawn(sample_shape)

    @torch.no_grad()
    def drawn(self, sample_shape: Any = (), random: torch.Generator | None = None) -> Tensor:
        """Samples by a random source on the CPU, or torch's own."""
        shape = torch.Size((*sample_shape, *self.batch_shape))
        rows = max(shape.numel(), 1)
        x = torch.full((rows, *self.event_shape), torch.nan, dtype=self.like.dtype, device=self.like.device)
        drawn, _ = self.complete(x, random=random)
        if len(self.logits) > 1:
            # Every row is drawn in every order and takes one: which rows an order has would steer the program.
            place = self.like.device if random is None else random.device
            which = torch.randint(len(self.logits), (rows, 1), device=place, generator=random).to(self.like.device)
            for k in range(1, len(self.logits)):
                drawn = torch.where(which == k, self.complete(x, k, random)[0], drawn)
        return drawn.reshape(*shape, *self.event_shape)

    def complete(self, x: Tensor, k: int = 0, random: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw the features that are nan, in the order of set k.

        Returns:
            Rows (N, D), and their log importance weights (N,): the log probability of the known features, each given
            the preceding ones, which the draws did not take into account.
        """
        x = x.to(self.like.dtype)
        filled, weight = x.nan_to_num(), torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for d in self.order[k].tolist():
            logit = self.logit(filled, d, k)
            missing = x[:, d].isnan()
            filled[:, d] = torch.where(missing, bernoulli(logit.sigmoid(), random), x[:, d])
            weight = weight + torch.where(missing, 0.0, logsigmoid((2 * filled[:, d] - 1) * logit))
        return filled, weight

    def logit(self, x: Tensor, d: int, k: int = 0) -> Tensor:
        """Log odds (N,) of feature d given those of rows (N, D) that precede it in the order of set k."""
        logits: Any = self.logits[k]
        # The log odds of one feature, where they can be computed alone, are much cheaper than those of all.
        return logits.one(x, d) if hasattr(logits, "one") else logits(x)[:, d]


class Autoregressive(Visible):
    r"""Base class: binary rows, and an order of the features.

    Args:
        features: Number of features D, or their names.

    Data: x (N, D), zeros and ones. Sites: x (D,) of each row.
    """

    bias: Tensor
    """Biases b (D,) of the log odds."""

    def __init__(self, features: int | Sequence[str]) -> None:
        super().__init__()
        self.features = self.name_dimension("features", features)
        self.register_buffer("order", torch.arange(self.features)[None])
        self.register_buffer("origin", torch.zeros(()))
        self.dims = {"x": ("features",)}

    @abstractmethod
    def conditionals(self) -> list[Callable[[Tensor], Tensor]]:
        """The ``logits`` of :class:`Conditionals`. Reads all parameters when called."""

    @checked
    @torch.no_grad()
    def centre(self, x: Tensor) -> None:
        """Initialise the biases by the log odds of the feature means of rows (N, D).

        Features that hardly vary, as the edges of images, are then right before the first step.
        """
        self.bias.copy_(log_odds_of_means(x))

    def distribution(self) -> Conditionals:
        """p(x), an event (D,)."""
        return Conditionals(self.conditionals(), self.order, self.origin)

    @torch.no_grad()
    def impute(self, x: Tensor, draws: int = 1, *, particles: int = 100, **_: Any) -> Tensor:
        """Draw the missing features (nan) of rows (N, D) given any known ones, by sampling importance resampling.

        The draws are exact if all missing features come after the known ones, else in the limit of many particles.

        Args:
            x: Rows (N, D) of zeros, ones and nan.
            draws: Number of draws per row.
            particles: Number of particles per row, from which the draws are chosen.

        Returns:
            Completed rows (draws, N, D).
        """
        check_count("draws", draws)
        check_count("particles", particles)
        self.check(known_or_zero(x))
        distribution, kept = self.distribution(), []
        count = -(-particles // len(distribution.logits))
        for row in x:
            sets = [distribution.complete(row.expand(count, -1), k) for k in range(len(distribution.logits))]
            filled, weight = map(torch.cat, zip(*sets, strict=True))
            kept.append(filled[dist.Categorical(logits=weight).sample((draws,))])
        return torch.stack(kept, 1)

    @torch.no_grad()
    def columnwise(self, rows: int, **_: Any) -> Generator[tuple[int, Tensor], Tensor, None]:
        """One feature of rows after another: each with its log weights (rows, 2) given those sent before.

        Raises:
            ValueError: There are several orders: the mean of their densities has no conditionals of one feature.
        """
        distribution = self.distribution()
        if len(self.order) > 1:
            raise ValueError(f"orders: expected one order to take features in turn, got {len(self.order)}")
        x = self.origin.new_zeros(rows, self.features)
        for d in self.order[0].tolist():
            logit = distribution.logit(x, d)
            x[:, d] = yield d, torch.stack([torch.zeros_like(logit), logit], -1)

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """Rows drawn from the model."""
        draw = lambda count, random: self.distribution().drawn((count,), random)  # noqa: E731
        return {"samples": grids.drawn(draw, "drawn from the model")}

    def check(self, x: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a binary matrix (rows, D)."""
        if x is not None:
            check_matrix("x", x, self.features)
            check_binary("x", x)


class FVSBN(Autoregressive):
    r"""Fully visible sigmoid belief net: :math:`f_d(x) = b_d + \sum_{j<d} w_{dj} x_j`.

    Arguments, data and sites are those of :class:`Autoregressive`.

    Example:
        >>> pair = FVSBN(3)
        >>> pair.log_evidence(torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])).exp().detach()
        tensor([0.1250, 0.1250])
    """

    def __init__(self, features: int | Sequence[str]) -> None:
        super().__init__(features)
        self.weight = nn.Parameter(torch.zeros(self.features, self.features))
        self.bias = nn.Parameter(torch.zeros(self.features))

    def conditionals(self) -> list[Callable[[Tensor], Tensor]]:
        """A linear map to each feature from the preceding ones."""
        return [_Masked([self.weight.tril(-1)], [self.bias])]


class NADE(Autoregressive):
    r"""Neural autoregressive distribution estimator.

    .. math:: h_d = \sigma(c + \sum_{j<d} x_j w_j), \qquad f_d(x) = b_d + v_d \cdot h_d

    Args:
        hidden: Width H of the hidden layer.

    The other arguments are those of :class:`Autoregressive`. One pass needs memory for N x D x H numbers.
    """

    def __init__(self, features: int | Sequence[str], *, hidden: int = 500) -> None:
        super().__init__(features)
        check_count("hidden", hidden)
        self.inward = nn.Parameter(torch.randn(self.features, hidden) / self.features**0.5)
        self.outward = nn.Parameter(torch.randn(self.features, hidden) / hidden**0.5)
        self.threshold = nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.zeros(self.features))

    def conditionals(self) -> list[Callable[[Tensor], Tensor]]:
        """Each feature from the hidden layer of the preceding ones."""
        return [HiddenUnits(self.inward, self.outward, self.threshold, self.bias)]


@dataclass(frozen=True)
class _Masked:
    """Log odds of all features by layers whose weights are masked, or of one; ``direct``: from the inputs, besides."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    direct: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        out = linear(self._below(x), self.weights[-1], self.biases[-1])
        return out if self.direct is None else out + linear(x, self.direct)

    def one(self, x: Tensor, d: int) -> Tensor:
        out = self._below(x) @ self.weights[-1][d] + self.biases[-1][d]
        return out if self.direct is None else out + x @ self.direct[d]

    def _below(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = linear(x, weight, bias).relu()
        return x


@dataclass(frozen=True)
class HiddenUnits:
    """Log odds of all features by hidden units that see the preceding ones in an order, or of one.

    Attributes:
        inward: Weights from each feature to the units, (D, H).
        outward: Weights from the units to each feature, (D, H).
        threshold: Biases of the units (H,).
        bias: Biases of the features (D,).
        places: What is added to the units for each preceding feature, whatever its value, (D, H); None: nothing.
        activation: From their sums to the units.
        order: Order of the features (D,); None: that of the columns.
    """

    inward: Tensor
    outward: Tensor
    threshold: Tensor
    bias: Tensor
    places: Tensor | None = None
    activation: Callable[[Tensor], Tensor] = torch.sigmoid
    order: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.order is not None:
            names = ("inward", "outward", "bias", "places")
            parts: dict[str, Any] = {n: None if (v := getattr(self, n)) is None else v[self.order] for n in names}
            in_turn = replace(self, order=None, **parts)
            return in_turn(x[..., self.order])[..., self.order.argsort()]
        # Features in groups of F: the sum before a group is cumulative, that within it a product with a triangle.
        size, width = self.inward.shape
        fill = -size % GROUP
        inward, outward = (pad(w, (0, 0, 0, fill)).reshape(-1, GROUP, width) for w in (self.inward, self.outward))
        rows = pad(x.reshape(-1, size), (0, fill)).reshape(-1, len(inward), GROUP).transpose(0, 1)
        sums = rows @ inward
        before = sums.cumsum(0) - sums + self.threshold
        preceding = rows[:, :, None] * torch.ones(GROUP, GROUP, dtype=x.dtype, device=x.device).tril(-1)
        within = (preceding.reshape(len(inward), -1, GROUP) @ inward).reshape(*preceding.shape[:3], width)
        summed = before[:, :, None] + within
        if self.places is not None:
            shifts = pad(self.places.cumsum(0) - self.places, (0, 0, 0, fill))
            summed = summed + shifts.reshape(-1, 1, GROUP, width)
        hidden = self.activation(summed)
        logits = (hidden * outward[:, None]).sum(-1).transpose(0, 1).reshape(-1, size + fill)
        return logits[:, :size].reshape(x.shape) + self.bias

    def one(self, x: Tensor, d: int) -> Tensor:
        before = slice(d) if self.order is None else self.order[: int((self.order == d).nonzero())]
        summed = x[:, before] @ self.inward[before] + self.threshold
        if self.places is not None:
            summed = summed + self.places[before].sum(0)
        return self.activation(summed) @ self.outward[d] + self.bias[d]


class MADE(Autoregressive):
    r"""Masked autoencoder for distribution estimation: each output sees only the preceding inputs in some order.

    Each hidden unit has a random degree from 1 to D - 1 and is connected to units of the same or a smaller degree below
    it. The output for the d-th feature of the order is connected to units of degree smaller than d, and, directly, to
    the preceding features, as in the runs of the paper; without hidden layers this is the :class:`FVSBN`.

    Args:
        hidden: Widths of the hidden layers.
        direct: Whether features are connected to the outputs directly as well.
        orders: Number of orders, each with its own masks on the same weights; their densities are averaged. The first
            is the order of the columns.
        seed: Seed of the masks and orders.

    The other arguments are those of :class:`Autoregressive`.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        *,
        hidden: Sequence[int] = (500,),
        direct: bool = True,
        orders: int = 1,
        seed: int = 0,
    ) -> None:
        count_of("features", features, 2)
        check_widths("hidden", hidden, 0)
        check_count("orders", orders)
        super().__init__(features)
        widths = (self.features, *hidden, self.features)
        self.weights = nn.ParameterList(nn.Linear(a, b).weight for a, b in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(b) for b in widths[1:])
        random = random_source(seed)
        order = [
            torch.randperm(self.features, generator=random) if k else torch.arange(self.features) for k in range(orders)
        ]
        self.order = torch.stack(order)
        self.direct = nn.Parameter(torch.zeros(self.features, self.features)) if direct and hidden else None
        masks = list[list[Tensor]]()
        for k in range(orders):
            place = torch.empty_like(self.order[k])
            place[self.order[k]] = torch.arange(1, self.features + 1)
            masks.append(_masks(place, hidden, random))
            for depth, mask in enumerate(masks[k]):
                self.register_buffer(f"mask_{k}_{depth}", mask)
            if self.direct is not None:
                self.register_buffer(f"mask_{k}_direct", (place[:, None] > place).float())
        with torch.no_grad():
            # What no order uses stays at zero.
            for weight, *used in zip(self.weights, *masks, strict=True):
                weight.mul_(torch.stack(used).amax(0))

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """Biases b (D,) of the log odds."""
        return self.biases[-1]

    def conditionals(self) -> list[Callable[[Tensor], Tensor]]:
        """The masked network of each order."""
        return [self._network(k) for k in range(len(self.order))]

    def _network(self, k: int) -> _Masked:
        weights = [w * getattr(self, f"mask_{k}_{depth}") for depth, w in enumerate(self.weights)]
        direct = None if self.direct is None else self.direct * getattr(self, f"mask_{k}_direct")
        return _Masked(weights, list(self.biases), direct)


def _masks(place: Tensor, hidden: Sequence[int], random: torch.Generator) -> list[Tensor]:
    """Mask of the weights of each layer, (outputs, inputs) of zeros and ones, by the features' places in the order."""
    count, degrees, masks = len(place), place, []
    for width in hidden:
        # A unit whose degree is smaller than all of the layer below would have no inputs.
        low = int(degrees.min())
        degrees_next = torch.randint(min(low, count - 1), count, (width,), generator=random)
        masks.append((degrees_next[:, None] >= degrees).float())
        degrees = degrees_next
    masks.append((place[:, None] > degrees).float())
    return masks
