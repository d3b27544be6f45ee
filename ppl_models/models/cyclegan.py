r"""CycleGAN: two domains without paired rows, and a map in each direction.

.. math::

    b' = G(a), \quad a' = F(b), \qquad a \mid b' \sim \mathrm{Laplace}(F(b'), s), \quad
    b \mid a' \sim \mathrm{Laplace}(G(a'), s), \qquad q(y \mid a), \; q(y \mid b)

In the generated half the guide classifies a' and b', and the model observes the data at the end of the cycle: their
negative log density is the cycle consistency loss, with weight 1 / s.

Reference: Zhu, Park, Isola and Efros 2017 (https://arxiv.org/abs/1703.10593).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.models.checks import check_matrix, check_positive, check_widths
from ppl_models.models.gan import Leaky
from ppl_models.models.pair import Pair, as_matrix, checked
from ppl_models.models.parts import grids
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.networks import Residual, check_network, evaluation, mlp


class CycleGAN(Pair):
    """Two generators that invert each other, and a discriminator for each domain.

    Args:
        features: Numbers of features of the domains a and b.
        scale: s, scale of the cycle's error.
        hidden: Widths of the hidden layers of the default networks.
        forward_map: G, from rows of a to rows of b. Default: ReLU layers; residual if both domains have the same number
            of features, which favours maps near the identity among all that match the distributions.
        backward_map: F, from rows of b to rows of a. Default: as for G.
        discriminators: From rows of a, and from rows of b, to log odds. Default: leaky ReLU layers.

    Data: a (N, D_a) and b (N, D_b); row n of a is unrelated to row n of b. Sites: real, per domain and row; a and b,
    deterministic; in the generated half ``cycle_a`` and ``cycle_b``, observed.
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
        check_positive("scale", scale)
        check_widths("features", features, 2)
        check_widths("hidden", hidden, 0)
        self.features, self.scale = tuple(features), scale
        a, b = self.features
        default = mlp(a, *hidden, 1, activation=Leaky), mlp(b, *hidden, 1, activation=Leaky)
        self.forward_map = _default_map(a, b, hidden) if forward_map is None else forward_map
        self.backward_map = _default_map(b, a, hidden) if backward_map is None else backward_map
        self.discriminator_a, self.discriminator_b = default if discriminators is None else discriminators
        check_network("forward_map", self.forward_map, a, b)
        check_network("backward_map", self.backward_map, b, a)
        check_network("discriminators", self.discriminator_a, a, 1)
        check_network("discriminators", self.discriminator_b, b, 1)

    def model(self, a: Tensor, b: Tensor, *, real: bool | None = None) -> tuple[Tensor, Tensor]:
        """Return rows of both domains: the data where ``real`` is one, translated rows where it is zero."""
        with self.rows(a):
            with pyro.plate("domains", 2, dim=-2):
                y = pyro.sample("real", dist.Bernoulli(torch.full((), 0.5).to(a)))
            made_a, made_b = (a, b) if real else (self.backward_map(b), self.forward_map(a))
            if real is None:
                made_a = torch.where(y[0, :, None] == 1, a, made_a)
                made_b = torch.where(y[1, :, None] == 1, b, made_b)
            pyro.deterministic("a", made_a, event_dim=1)
            pyro.deterministic("b", made_b, event_dim=1)
            if real is False:
                pyro.sample("cycle_a", dist.Laplace(self.backward_map(made_b), self.scale).to_event(1), obs=a)
                pyro.sample("cycle_b", dist.Laplace(self.forward_map(made_a), self.scale).to_event(1), obs=b)
        return made_a, made_b

    def guide(self, a: Tensor, b: Tensor) -> None:
        """Classify each row of each domain as real or generated."""
        with self.rows(a), pyro.plate("domains", 2, dim=-2):
            logits = torch.stack([self.discriminator_a(a)[..., 0], self.discriminator_b(b)[..., 0]])
            pyro.sample("real", dist.Bernoulli(logits=logits))

    @torch.no_grad()
    def translate(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Translate rows of a to b, or with ``back`` rows of b to a, in evaluation mode."""
        check_matrix("x", as_matrix(x), self.features[1 if back else 0])
        with evaluation(self):
            return self.backward_map(x) if back else self.forward_map(x)

    @checked
    def generate_like(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Rows of each domain translated from those of the other, to compare with rows of that domain."""
        return {"a": self.translate(b, back=True), "b": self.translate(a)}

    @checked
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


def _default_map(inputs: int, outputs: int, hidden: Sequence[int]) -> nn.Module:
    inner = mlp(inputs, *hidden, outputs, activation=nn.ReLU)
    return Residual(inner) if inputs == outputs else inner
