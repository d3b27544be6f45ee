"""Pairs with a likelihood and a discriminator: the VAE-GAN, and the adversarial autoencoder.

Without ``real`` they are a VAE and an autoencoder; given ``real``, the guide is a discriminator of rows or of codes.
``inference.objectives.Adversarial(bound=..., weight=...)`` trains both at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.models.checks import check_widths, count_of
from ppl_models.models.gan import AdversarialPair, normal_noise
from ppl_models.models.linear_factors import Autoencoder
from ppl_models.models.pair import checked
from ppl_models.models.parts import grids
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.networks import evaluation, mlp
from ppl_models.models.vae import VAE


class WithLikelihood(AdversarialPair):
    """Base of both: without ``real`` model and guide are those of the next base class, with it they are adversarial."""

    def model(self, x: Tensor | None = None, *, real: bool | None = None) -> Tensor:
        """Draw or score rows; given ``real``, return rows of the data or generated ones."""
        if real is None or x is None:
            return super().model(x)
        return self.real_or_generated(x, real, lambda count: self.generated(x[:count]))

    def guide(self, x: Tensor, *, real: bool | None = None) -> None:
        """Draw the latent sites of each row; given ``real``, classify it as real or generated."""
        if real is None:
            return super().guide(x)
        return self.sample_real(x, self.read)

    @abstractmethod
    def generated(self, x: Tensor) -> Tensor:
        """Rows (N, D) of the generated half, as many as rows x, within the plate of rows."""

    def read(self, x: Tensor) -> Sequence[Tensor]:
        """Inputs of the discriminator, each (N, width), for rows (N, D), within the plate of rows."""
        return (x,)


class VAEGAN(WithLikelihood, VAE):
    r"""A VAE whose decoder is also the generator of a GAN: generated rows are its means at z drawn from the prior.

    Args:
        discriminator: As for :class:`GAN`.
        pack: As for :class:`GAN`.

    The other arguments are those of :class:`VAE`.

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
        self.add_discriminator(discriminator, self.features, hidden, pack)

    def generated(self, x: Tensor) -> Tensor:
        """Means of the decoder (N, D) at factors drawn from the prior."""
        return self.decode(pyro.sample("z", self.prior()))

    @torch.no_grad()
    def generate(self, count: int, *, seed: int = 0) -> Tensor:
        """Means of the decoder (count, D) at factors drawn from the prior, in evaluation mode."""
        with evaluation(self):
            return self.decode(normal_noise(count, self.origin, seed))


class AdversarialAutoencoder(WithLikelihood, Autoencoder):
    r"""An autoencoder whose codes are trained to be distributed as N(0, I).

    The discriminator reads codes: of the data where ``real`` is one, draws from N(0, I) where it is zero.

    Args:
        discriminator: From codes (N, L), or packs of them, to log odds (N, 1). Default: leaky ReLU layers.
        hidden: Widths of the hidden layers of the default networks.

    The other arguments are those of :class:`Autoencoder`.

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
        wide, narrow = count_of("features", features), count_of("factors", factors)
        check_widths("hidden", hidden, 0)
        Autoencoder.__init__(
            self,
            features,
            factors,
            encoder=mlp(wide, *hidden, narrow, activation=nn.ReLU) if encoder is None else encoder,
            decoder=mlp(narrow, *hidden, wide, activation=nn.ReLU) if decoder is None else decoder,
        )
        self.add_discriminator(discriminator, self.factors, hidden, pack)

    def generated(self, x: Tensor) -> Tensor:
        """Draw codes from N(0, I); the rows, returned unchanged, are not used."""
        pyro.sample("z", dist.Normal(self.origin, 1.0).to_event(1))
        return x

    def read(self, x: Tensor) -> Sequence[Tensor]:
        """Codes of rows (N, D)."""
        return (pyro.sample("z", self.posterior(x)),)

    @checked
    def pictures(self, x: Tensor, **_: Any) -> dict[str, Grid]:
        """Rows of codes drawn from N(0, I), and reconstructions."""
        return {"prior": grids.prior_samples(self), **super().pictures(x)}
