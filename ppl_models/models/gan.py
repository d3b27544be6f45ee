r"""Generative adversarial pairs: a model that generates rows, a guide that tells them from the data.

.. math::

    y_n \sim \mathrm{Bernoulli}(1/2), \qquad z_n \sim \mathrm{N}(0, I_L), \qquad
    x_n = \begin{cases} \text{a row of the data} & y_n = 1 \\ G(z_n) & y_n = 0 \end{cases}, \qquad
    q(y_n \mid x_n) = \mathrm{Bernoulli}(\sigma(D(x_n)))

The site y is called ``real``, for labels of rows are y in the data. The model observes nothing, so that there is no
ELBO: ``inference.objectives.Adversarial`` trains both.

References: Goodfellow et al. 2014 (https://arxiv.org/abs/1406.2661); Hu et al. 2018 (https://arxiv.org/abs/1706.00550);
Mirza and Osindero 2014 (conditional); Chen et al. 2016 (https://arxiv.org/abs/1606.03657; InfoGAN); Donahue et al. 2017
and Dumoulin et al. 2017 (BiGAN, ALI); Lin et al. 2018 (https://arxiv.org/abs/1712.04086; PacGAN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.models.checks import check_count, check_known_labels, check_matrix, count_of, known_labels
from ppl_models.models.pair import Pair
from ppl_models.models.parts import grids
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.networks import check_network, evaluation, mlp
from ppl_models.models.vae import beside, normal


class Leaky(nn.LeakyReLU):
    """The discriminator's activation: a slope of 0.2 below zero, so that it has a gradient everywhere."""

    def __init__(self) -> None:
        super().__init__(0.2)


class AdversarialPair(Pair):
    """What adversarial pairs share: the site ``real``, and a discriminator of rows or of packs of them.

    In either half ``real`` is known to model and guide, as an argument, so that neither computes the other half.
    """

    discriminator: nn.Module
    pack: int = 1

    def _add_discriminator(self, given: nn.Module | None, reads: int, hidden: Sequence[int], pack: int) -> None:
        """The network, from ``pack`` rows of what it reads side by side to log odds."""
        check_count("pack", pack)
        self.pack = pack
        self.discriminator = mlp(pack * reads, *hidden, 1, activation=Leaky) if given is None else given
        check_network("discriminator", self.discriminator, pack * reads, 1)

    def _count(self, x: Tensor | None) -> int:
        """Rows at hand: whole packs."""
        at_hand = self.minibatch.size if x is None else len(x)
        if at_hand is None:
            raise ValueError("size: expected the number of rows to draw when x is not given, got None")
        self._check_packs(at_hand)
        return at_hand // self.pack * self.pack

    def _check_packs(self, rows: int) -> None:
        if rows < self.pack:
            raise ValueError(f"x: expected at least {self.pack} rows at a time (pack), got {rows}")

    def _plates(self, x: Tensor | None) -> tuple[Any, Any]:
        """The plate of ``real``, and that of rows."""
        count, (size, rows) = self._count(x), self.minibatch
        if self.pack == 1:
            each = self.rows(x)
            return each, each
        whole = count if rows is None else (size or count)
        packs = torch.arange(count // self.pack, device=None if x is None else x.device)
        several = pyro.plate("packs", whole // self.pack, subsample=packs, dim=-1)
        return several, pyro.plate("rows", whole, subsample=None if rows is None else rows[:count].long(), dim=-1)

    def _real_or_generated(
        self,
        x: Tensor | None,
        real: bool | None,
        draw: Callable[[int], Tensor],
        *,
        like: Tensor | None = None,
    ) -> Tensor:
        """Where rows come from, and the rows: of the data, or drawn within their plate; without data all are drawn."""
        given = x if like is None else like
        packs, each = self._plates(given)
        count = self._count(given)
        with packs:
            y = None if x is None else pyro.sample("real", dist.Bernoulli(torch.full((), 0.5).to(x)))
        with each:
            if x is None or y is None or real is False:
                made = draw(count)
            elif real:
                made = x[:count]
            else:
                made = torch.where(y.repeat_interleave(self.pack, -1)[..., None] == 1, x[:count], draw(count))
            return pyro.deterministic("x", made, event_dim=1)

    def _discriminate(
        self,
        x: Tensor,
        read: Callable[[Tensor], Sequence[Tensor]] = lambda x: (x,),
    ) -> None:
        """Whether each row, or pack of rows, is real, by what is read of it within the plate of rows."""
        packs, each = self._plates(x)
        with each:
            seen = read(x[: self._count(x)])
        with packs:
            pyro.sample("real", self.discriminate(*seen))

    def discriminate(self, *read: Tensor) -> dist.TorchDistribution:
        """q(real) of what is read of rows, each (N, width)."""
        seen = torch.cat(read, -1)
        if self.pack > 1:
            seen = seen.reshape(*seen.shape[:-2], -1, self.pack * seen.shape[-1])
        return dist.Bernoulli(logits=self.discriminator(seen)[..., 0])


class GAN(AdversarialPair):
    r"""A generator and a discriminator.

    Args:
        features: Number of features D, or their names.
        noise: Width L of the noise.
        hidden: Widths of the hidden layers of both networks.
        generator: G, from noise (N, L) to rows (N, D). Default: ReLU layers.
        discriminator: D, from ``pack`` rows side by side (N, pack D) to log odds (N, 1). Default: leaky ReLU layers.
        pack: Rows that the discriminator sees together and judges as one (PacGAN): all real or all generated. What it
            then sees too is whether they differ as the data do. A batch is cut down to a multiple of it.
        reads: Widths of what generator and discriminator read of a row, where a subclass adds to it. None: L and D.

    Data: x (N, D). Sites: real, z (L,), and x (D,), deterministic, of every row.

    Example:
        >>> pair = GAN(features=2, noise=2, hidden=(8,))
        >>> pair.generate(5, seed=0).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        features: int | Sequence[str],
        noise: int = 2,
        *,
        hidden: Sequence[int] = (128, 128),
        generator: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        pack: int = 1,
        reads: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.features = self.name_dimension("features", features)
        self.noise = self.name_dimension("noise", noise)
        drawn, read = (self.noise, self.features) if reads is None else reads
        self.generator = mlp(drawn, *hidden, self.features, activation=nn.ReLU) if generator is None else generator
        check_network("generator", self.generator, drawn, self.features)
        self._add_discriminator(discriminator, read, hidden, pack)
        self.register_buffer("origin", torch.zeros(self.noise))
        self.dims = {"x": ("features",), "z": ("noise",)}

    def model(
        self,
        x: Tensor | None = None,
        *,
        real: bool | None = None,
    ) -> Tensor:
        """Draw where rows come from, and those that do not come from the data, which are all without them; return x."""
        return self._real_or_generated(x, real, self.draw)

    def guide(self, x: Tensor) -> None:
        """Whether each row, or pack of rows, is real."""
        self._discriminate(x)

    def draw(self, count: int) -> Tensor:
        """Draw noise and generate rows (count, D) of it, within the plate of rows."""
        return self.generator(pyro.sample("z", self.prior()))

    def prior(self) -> dist.TorchDistribution:
        """p(z): N(0, I), an event (L,)."""
        return dist.Normal(self.origin, 1.0).to_event(1)

    @torch.no_grad()
    def generate(self, count: int, *, seed: int = 0) -> Tensor:
        """Rows (count, D) of the generator as it stands, in evaluation mode."""
        with evaluation(self):
            return self.generator(normal_noise(count, self.origin, seed))

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """Generated rows."""
        return {"samples": grids.samples(self)}

    def noisy(self, scale: float) -> Callable[..., None]:
        r"""The model :math:`x \sim \mathrm{N}(G(z), s^2 I)`, which has a likelihood where the generator has none.

        ``log_evidence(pair.noisy(0.1), x, "annealed")`` estimates it. The figure is that of this model, and as much
        the scale's as the generator's (Wu et al. 2017, https://arxiv.org/abs/1611.04273).
        """
        if not scale > 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")

        def model(x: Tensor, *, size: int | None = None, rows: Tensor | None = None) -> None:
            with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
                z = pyro.sample("z", self.prior())
                pyro.sample("x", dist.Normal(self.generator(z), scale).to_event(1), obs=x)

        return model

    def check(self, x: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite (rows, D)."""
        if x is not None:
            check_matrix("x", x, self.features)
            self._check_packs(len(x))


class ConditionalGAN(GAN):
    r"""A GAN of rows given their label, which both networks read in one-hot form after z and x.

    Args:
        classes: Number of classes K, or their names.

    The rest are those of :class:`GAN`.

    Data: x (N, D) and y (N,), labels; to draw rows of given labels, y alone. Sites are those of :class:`GAN`.
    """

    def __init__(
        self, features: int | Sequence[str], classes: int | Sequence[str], noise: int = 20, **shared: Any
    ) -> None:
        count = count_of(classes)
        super().__init__(features, noise, reads=(noise + count, count_of(features) + count), **shared)
        self.classes = self.name_dimension("classes", classes)

    def model(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        real: bool | None = None,
    ) -> Tensor:
        """Draw where rows come from, and those that do not come from the data, each of its label; return x."""
        labels = known_labels(y)

        def draw(count: int) -> Tensor:
            return self.generator(beside(pyro.sample("z", self.prior()), labels[:count], self.classes))

        return self._real_or_generated(x, real, draw, like=labels)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """Whether each row, or pack of rows, is a real one of its label."""
        labels = known_labels(y)
        self._discriminate(x, lambda x: (beside(x, labels[: len(x)], self.classes),))

    @torch.no_grad()
    def generate(self, count: int, *, seed: int = 0, y: Tensor | None = None) -> Tensor:
        """Rows (count, D) of the labels y (count,); None: of all labels in turn."""
        labels = torch.arange(count, device=self.origin.device) % self.classes if y is None else y
        with evaluation(self):
            return self.generator(beside(normal_noise(count, self.origin, seed), labels, self.classes))

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """Generated rows of each class."""
        return {"samples": grids.samples_by(self, "y", self.classes)}

    def check(self, x: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite (rows, D) and y has a class for every row."""
        super().check(x)
        check_known_labels(x, y, self.classes)


class InfoGAN(GAN):
    r"""A GAN with a code c of K states beside the noise, which the guide reads off the rows, :math:`q(c \mid x)`.

    ``Adversarial(information=("c",))`` makes code and row say much of each other: a bound of their mutual information.

    Args:
        codes: Number of states K.
        trunk: From rows (N, D) to what both read off, (N, W) with W the last of ``hidden``. Default: leaky ReLU layers.
            What tells real rows also tells codes: with a reader of its own a code says less of what matters. With
            ``warps.Shaken`` before it codes of images are blind to small turns and shifts, and nearer to classes.

    The rest are those of :class:`GAN`, of which the discriminator and the reader are linear in the trunk. Sites: those
    of :class:`GAN`, and c of every row, 0 to K - 1.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        codes: int = 10,
        noise: int = 20,
        *,
        hidden: Sequence[int] = (256, 256),
        generator: nn.Module | None = None,
        trunk: nn.Module | None = None,
    ) -> None:
        if codes < 2:
            raise ValueError(f"codes: expected at least 2, got {codes}")
        width = hidden[-1]
        reads, judge = (noise + codes, width), nn.Linear(width, 1)
        super().__init__(features, noise, hidden=hidden, generator=generator, discriminator=judge, reads=reads)
        self.codes = codes
        own = nn.Sequential(mlp(self.features, *hidden, activation=Leaky), Leaky())
        self.trunk = own if trunk is None else trunk
        self.reader = nn.Linear(width, codes)
        check_network("trunk", self.trunk, self.features, width)

    def draw(self, count: int) -> Tensor:
        """Draw noise and codes, and generate rows (count, D) of them, within the plate of rows."""
        c = pyro.sample("c", dist.Categorical(logits=torch.zeros(self.codes).to(self.origin)))
        return self.generator(beside(pyro.sample("z", self.prior()), c, self.codes))

    def guide(self, x: Tensor) -> None:
        """The code of each row, and whether it, or its pack, is real."""

        def read(x: Tensor) -> Sequence[Tensor]:
            seen = self.trunk(x)
            pyro.sample("c", dist.Categorical(logits=self.reader(seen)), infer={"is_auxiliary": True})
            return (seen,)

        self._discriminate(x, read)

    @torch.no_grad()
    def generate(self, count: int, *, seed: int = 0, c: Tensor | None = None) -> Tensor:
        """Rows (count, D) of the codes c (count,); None: of all codes in turn."""
        codes = torch.arange(count, device=self.origin.device) % self.codes if c is None else c
        with evaluation(self):
            return self.generator(beside(normal_noise(count, self.origin, seed), codes, self.codes))

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """Generated rows of each code."""
        return {"samples": grids.samples_by(self, "c", self.codes)}


class BiGAN(GAN):
    r"""A GAN with an inference model: the guide also encodes rows, and judges (x, z) together.

    .. math::

        q(z \mid x) = \mathrm{N}(f_\mu(x), \mathrm{diag}(f_\sigma(x))^2), \qquad
        q(y \mid x, z) = \mathrm{Bernoulli}(\sigma(D(x, z)))

    At the optimum the joint laws of model and encoder are one, so that q(z | x) is the posterior of the generator. The
    encoder stands in the guide and plays on the model's side.

    Args:
        encoder: From rows (N, D) to means and log standard deviations (N, 2 L). Default: leaky ReLU layers.

    The rest, and the sites, are those of :class:`GAN`; the discriminator reads x and z.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        noise: int = 2,
        *,
        hidden: Sequence[int] = (128, 128),
        encoder: nn.Module | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(features, noise, hidden=hidden, reads=(noise, count_of(features) + noise), **shared)
        self.encoder = mlp(self.features, *hidden, 2 * noise, activation=Leaky) if encoder is None else encoder
        check_network("encoder", self.encoder, self.features, 2 * noise)

    def guide(self, x: Tensor) -> None:
        """The noise of each row, and whether row and noise, or a pack of them, are real."""
        self._discriminate(x, lambda x: (x, pyro.sample("z", normal(self.encoder(x)))))

    def encode(self, x: Tensor) -> Tensor:
        """Means of the noise (..., L) of rows (..., D)."""
        return self.encoder(x).chunk(2, -1)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Rows (..., D) of noise (..., L)."""
        return self.generator(z)

    def pictures(self, x: Tensor, **_: Any) -> dict[str, Grid]:
        """Generated rows, and reconstructions."""
        return {**super().pictures(), "reconstructions": grids.reconstructions(self, x)}


def normal_noise(count: int, like: Tensor, seed: int) -> Tensor:
    """Draws (count, L) of N(0, I), of the type and device of a vector (L,); one seed gives the same on every device."""
    return torch.randn(count, len(like), generator=torch.Generator().manual_seed(seed)).to(like)
