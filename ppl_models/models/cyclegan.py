r"""CycleGAN: two domains without pairs, a map each way, and the way back.

.. math::

    b' = G(a), \quad a' = F(b), \qquad a \mid b' \sim \mathrm{Laplace}(F(b'), s), \quad
    b \mid a' \sim \mathrm{Laplace}(G(a'), s), \qquad q(y \mid a), \; q(y \mid b)

In the generated half the guide judges a' and b', and the model observes the data at the end of the cycle: its log
density is the cycle's loss, of weight 1 / s a feature.

Reference: Zhu, Park, Isola and Efros 2017 (https://arxiv.org/abs/1703.10593).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.models.checks import check_matrix
from ppl_models.models.gan import Leaky
from ppl_models.models.pair import Pair
from ppl_models.models.parts import grids
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.networks import Residual, check_network, evaluation, mlp


class CycleGAN(Pair):
    """Two generators that undo each other, and a discriminator for each domain.

    Args:
        features: Numbers of features of the domains a and b.
        scale: s, of the cycle's error; smaller is stricter.
        hidden: Widths of the hidden layers of all four networks.
        forward_map: G, from rows of a to rows of b. Default: ReLU layers, added to the row itself where both domains
            have as many features: of all maps that take one law to the other those near the identity are found first.
        backward_map: F, from rows of b to rows of a. Default: as for G.
        discriminators: From rows of a, and from rows of b, to log odds. Default: leaky ReLU layers.

    Data: a (N, D_a) and b (N, D_b); row n of a has nothing to do with row n of b. Sites: real, of each domain and row;
    a and b, deterministic; in the generated half ``cycle_a`` and ``cycle_b``, observed.
    """

    def __init__(
        self,
        features: tuple[int, int],
        *,
        scale: float = 0.1,
        hidden: Sequence[int] = (64, 64),
        forward_map: nn.Module | None = None,
        backward_map: nn.Module | None = None,
        discriminators: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        self.features, self.scale = tuple(features), scale
        one, other = self.features
        default = mlp(one, *hidden, 1, activation=Leaky), mlp(other, *hidden, 1, activation=Leaky)
        self.there = _between(one, other, hidden) if forward_map is None else forward_map
        self.back = _between(other, one, hidden) if backward_map is None else backward_map
        self.of_a, self.of_b = default if discriminators is None else discriminators
        check_network("forward_map", self.there, one, other)
        check_network("backward_map", self.back, other, one)
        check_network("discriminators", self.of_a, one, 1)
        check_network("discriminators", self.of_b, other, 1)

    def model(
        self,
        a: Tensor,
        b: Tensor,
        *,
        real: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rows of both domains: the data, or each made of the other and led back; return them."""
        with self.rows(a):
            with pyro.plate("domains", 2, dim=-2):
                y = pyro.sample("real", dist.Bernoulli(torch.full((), 0.5).to(a)))
            made = (a, b) if real else (self.back(b), self.there(a))
            if real is None:
                made = torch.where(y[0, :, None] == 1, a, made[0]), torch.where(y[1, :, None] == 1, b, made[1])
            pyro.deterministic("a", made[0], event_dim=1)
            pyro.deterministic("b", made[1], event_dim=1)
            if real is False:
                pyro.sample("cycle_a", dist.Laplace(self.back(made[1]), self.scale).to_event(1), obs=a)
                pyro.sample("cycle_b", dist.Laplace(self.there(made[0]), self.scale).to_event(1), obs=b)
        return made

    def guide(self, a: Tensor, b: Tensor) -> None:
        """Whether each row of each domain is real."""
        with self.rows(a), pyro.plate("domains", 2, dim=-2):
            pyro.sample("real", dist.Bernoulli(logits=torch.stack([self.of_a(a)[..., 0], self.of_b(b)[..., 0]])))

    @torch.no_grad()
    def translate(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Rows of b made of rows of a, or the way back, in evaluation mode."""
        with evaluation(self):
            return self.back(x) if back else self.there(x)

    def pictures(self, a: Tensor, b: Tensor, **_: Any) -> dict[str, Grid]:
        """Rows of each domain, each above its translation."""
        return {
            "forward": grids.beside(a, self.translate, "rows of a, each above its translation"),
            "backward": grids.beside(
                b, lambda x: self.translate(x, back=True), "rows of b, each above its translation"
            ),
        }

    def check(self, a: Any = None, b: Any = None, **_: Any) -> None:
        """Raise ValueError unless both are finite (rows, D)."""
        for name, value, width in (("a", a, self.features[0]), ("b", b, self.features[1])):
            check_matrix(name, value, width)


def _between(inputs: int, outputs: int, hidden: Sequence[int]) -> nn.Module:
    inner = mlp(inputs, *hidden, outputs, activation=nn.ReLU)
    return Residual(inner) if inputs == outputs else inner
