r"""Order-agnostic NADE: one network for the conditionals of any feature given any others.

.. math::

    h = \mathrm{relu}(c + W (x \odot m) + U m), \qquad
    p(x_d = 1 \mid x_m) = \sigma(b_d + v_d \cdot h), \quad m_d = 0

A mask m says which features are known. In an order o of the features each is given those before it, so that one network
has D! densities; they are trained together, and some of them averaged.

References: Uria, Murray and Larochelle 2014, "A Deep and Tractable Density Estimator"
(https://arxiv.org/abs/1310.1757); Hoogeboom et al. 2022, "Autoregressive Diffusion Models"
(https://arxiv.org/abs/2110.02037).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

from ppl_models.models.autoregressive import NADE, HiddenUnits
from ppl_models.models.checks import check_count, count_of, random_source
from ppl_models.models.parts.distributions import Rowwise


class EoNADE(NADE):
    r"""Order-agnostic NADE, and the average of its densities over some orders.

    .. math:: \log p(x) = \log \frac{1}{K} \sum_k \prod_i p(x_{o_k(i)} \mid x_{o_k(1)}, \dots, x_{o_k(i-1)})

    Given ``step``, one i from 1 to D per row, the model scores each row at one place of an order of its own, drawn
    anew: i - 1 features, drawn at random, are known, and the mean log probability of the others counts D times. With i
    uniform this is an unbiased estimate of the mean of log p over all orders. ``Denoising(pair.steps)`` draws i so.

    Args:
        features: Number of features D, at least three, or their names.
        hidden: Number of hidden units H.
        orders: Number of orders K whose densities are averaged. The first is the order of the columns.
        seed: Seed of the other orders.

    Data: x (N, D), zeros and ones. Sites: x (D,) of each row. Without ``step`` one pass needs memory for N x D x H
    numbers, with gradients for K times as many.

    Example:
        >>> pair = EoNADE(3, hidden=8, orders=2)
        >>> x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
        >>> print(f"{pair.log_evidence(x).exp().sum().item():.3f}")
        1.000
    """

    def __init__(self, features: int | Sequence[str], *, hidden: int = 500, orders: int = 1, seed: int = 0) -> None:
        count_of("features", features, 3)
        check_count("orders", orders)
        super().__init__(features, hidden=hidden)
        random = random_source(seed)
        others = [torch.randperm(self.features, generator=random) for _ in range(orders - 1)]
        self.order = torch.stack([torch.arange(self.features), *others])
        self.steps = self.features - 1
        self.places = nn.Parameter(torch.zeros(self.features, hidden))

    def conditionals(self) -> list[Callable[[Tensor], Tensor]]:
        """Each feature from the hidden units of those before it, in each order."""
        parts = self.inward, self.outward, self.threshold, self.bias, self.places
        return [HiddenUnits(*parts, torch.relu, order) for order in self.order]

    def model(self, x: Tensor | None = None, *, step: int | Tensor | None = None) -> Tensor:
        """Draw or score the rows, or with ``step`` score them at one place of a random order; return x."""
        if step is None:
            return super().model(x)
        if x is None:
            raise ValueError("step: expected rows x to score at it, got none")
        with self.rows(x):
            return pyro.sample("x", self.given_some(x, step), obs=x)

    def given_some(self, x: Tensor, step: int | Tensor) -> Remaining:
        """The features of rows (N, D) that are not known, given ``step`` - 1 random ones."""
        if not isinstance(step, Tensor):
            self.check(step=step)
        place = torch.rand_like(x, dtype=self.origin.dtype).argsort(-1).argsort(-1)
        known = place < torch.as_tensor(step, device=x.device).reshape(-1, 1) - 1
        return Remaining(self.log_odds(x, known), known)

    def log_odds(self, x: Tensor, known: Tensor) -> Tensor:
        """Log odds (N, D) of each feature given the known ones of its row; those of known features mean nothing."""
        mask = known.to(self.origin.dtype)
        summed = (x.to(mask) * mask) @ self.inward + mask @ self.places + self.threshold
        return linear(summed.relu(), self.outward, self.bias)

    def check(self, x: Any = None, *, step: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a binary matrix (rows, D), and step one integer, or one per row, from 1 to D."""
        super().check(x)
        if step is not None:
            steps = torch.as_tensor(step)
            if steps.is_floating_point() or steps.dtype == torch.bool:
                raise ValueError(f"step: expected integers, got {steps.dtype}")
            if steps.dim() and (x is None or steps.shape != (len(x),)):
                raise ValueError(f"step: expected one integer, or one per row, got {tuple(steps.shape)}")
            low, high = map(int, steps.aminmax())
            if not 1 <= low <= high <= self.features:
                got = low if low == high else f"{low} to {high}"
                raise ValueError(f"step: expected 1 to {self.features}, got {got}")


class Remaining(Rowwise):
    r"""Binary features of rows of which some are known: D times the mean log probability of the others.

    Args:
        logits: Log odds (N, D).
        known: Which features are known (N, D); at least one of each row is not.
    """

    arg_constraints: ClassVar = {}
    support = dist.constraints.independent(dist.constraints.boolean, 1)

    def __init__(self, logits: Tensor, known: Tensor) -> None:
        self.logits, self.known = logits, known
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        scores = logsigmoid((2 * value.to(self.logits) - 1) * self.logits).masked_fill(self.known, 0.0)
        return self.event_shape[0] * scores.sum(-1) / (~self.known).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        raise NotImplementedError("rows of which some features are known are scored, not drawn")
