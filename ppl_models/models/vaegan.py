"""Pairs that have a likelihood and an adversary: the VAE-GAN, and the adversarial autoencoder.

Run without ``real`` they are a VAE and an autoencoder; in either half their guide is a discriminator, of rows or of
codes. ``inference.objectives.Adversarial(bound=..., weight=...)`` trains both at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.models.checks import count_of
from ppl_models.models.gan import AdversarialPair, normal_noise
from ppl_models.models.linear_factors import Autoencoder
from ppl_models.models.parts import grids
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.networks import evaluation, mlp
from ppl_models.models.vae import VAE


class WithLikelihood(AdversarialPair):
    """What both share: run without ``real`` the pair is that of the class after this one; in a half it is judged.

    A subclass says what the model makes in the generated half, ``forge``, and what the guide reads of a row, ``read``.
    """

    forge: Callable[[Tensor], Tensor]

    def model(
        self,
        x: Tensor | None = None,
        *,
        real: bool | None = None,
    ) -> Tensor:
        """Draw or score rows; in a half, hand over rows of the data, or what passes for them. Return x."""
        if real is None or x is None:
            return super().model(x)
        return self._real_or_generated(x, real, lambda count: self.forge(x[:count]))

    def guide(
        self,
        x: Tensor,
        *,
        real: bool | None = None,
    ) -> None:
        """The latent sites of each row; in a half, whether it is real."""
        if real is None:
            return super().guide(x)
        return self._discriminate(x, self.read)

    def read(self, x: Tensor) -> Sequence[Tensor]:
        """What the discriminator sees of rows (N, D)."""
        return (x,)


class VAEGAN(WithLikelihood, VAE):
    r"""A VAE whose decoder also has to pass for the data.

    Run without ``real`` the pair is the VAE; in either half its guide is a discriminator, and what the model generates
    are the decoder's means. ``Adversarial(bound=Trace_ELBO(), weight=...)`` trains both.

    Args:
        discriminator: As of :class:`GAN`.
        pack: As of :class:`GAN`.

    The rest are those of :class:`VAE`.

    Reference: Larsen et al. 2016 (https://arxiv.org/abs/1512.09300), here with the likelihood of the pixels.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        factors: int | Sequence[str],
        *,
        hidden: Sequence[int] = (200, 200),
        discriminator: nn.Module | None = None,
        pack: int = 1,
        **shared: Any,
    ) -> None:
        VAE.__init__(self, features, factors, hidden=hidden, **shared)
        self._add_discriminator(discriminator, self.features, hidden, pack)

    def forge(self, x: Tensor) -> Tensor:
        """Means of the decoder at factors of the prior, as many as rows."""
        return self.decode(pyro.sample("z", self.prior()))

    @torch.no_grad()
    def generate(self, count: int, *, seed: int = 0) -> Tensor:
        """Means (count, D) of the decoder as it stands, in evaluation mode."""
        with evaluation(self):
            return self.decode(normal_noise(count, self.origin, seed))


class AdversarialAutoencoder(WithLikelihood, Autoencoder):
    r"""An autoencoder whose codes have to pass for draws of N(0, I).

    Run without ``real`` the pair is the autoencoder. In either half the guide judges codes: those of the data where
    ``real`` is one, draws of the prior where it is zero. ``Adversarial(bound=Trace_ELBO(), weight=...)`` trains both.

    Args:
        discriminator: From codes (N, L), or packs of them, to log odds (N, 1). Default: leaky ReLU layers.
        hidden: Widths of its hidden layers, and of those of encoder and decoder where these are not given.

    The rest are those of :class:`Autoencoder`.

    Reference: Makhzani et al. 2016 (https://arxiv.org/abs/1511.05644).
    """

    def __init__(
        self,
        features: int | Sequence[str],
        factors: int | Sequence[str],
        *,
        hidden: Sequence[int] = (128, 128),
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        pack: int = 1,
    ) -> None:
        wide, narrow = count_of(features), count_of(factors)
        Autoencoder.__init__(
            self,
            features,
            factors,
            encoder=mlp(wide, *hidden, narrow, activation=nn.ReLU) if encoder is None else encoder,
            decoder=mlp(narrow, *hidden, wide, activation=nn.ReLU) if decoder is None else decoder,
        )
        self._add_discriminator(discriminator, self.factors, hidden, pack)

    def forge(self, x: Tensor) -> Tensor:
        """Codes of N(0, I), as many as rows; the rows themselves nobody looks at."""
        pyro.sample("z", dist.Normal(self.origin, 1.0).to_event(1))
        return x

    def read(self, x: Tensor) -> Sequence[Tensor]:
        """Codes of rows (N, D)."""
        return (pyro.sample("z", self.posterior(x)),)

    def pictures(self, x: Tensor, **_: Any) -> dict[str, Grid]:
        """Rows of codes drawn from N(0, I), and reconstructions."""
        return {"prior": grids.prior_samples(self), **super().pictures(x)}
