r"""Generative adversarial networks: the model generates rows, the guide tells them from the data.

.. math::

    y_n \sim \mathrm{Bernoulli}(1/2), \qquad z_n \sim \mathrm{N}(0, I_L), \qquad
    x_n = y_n \, (\mathrm{a\ row\ of\ the\ data}) + (1 - y_n) \, G(z_n), \qquad
    q(y_n \mid x_n) = \mathrm{Bernoulli}(\sigma(D(x_n)))

The site of y is called ``real``, as y is the name of labels in the data. The model observes nothing, so there is no
ELBO; ``inference.objectives.Adversarial`` trains model and guide.

References: Goodfellow et al. 2014 (https://arxiv.org/abs/1406.2661); Hu et al. 2018 (https://arxiv.org/abs/1706.00550);
Mirza and Osindero 2014 (conditional); Chen et al. 2016 (https://arxiv.org/abs/1606.03657; InfoGAN); Donahue et al. 2017
and Dumoulin et al. 2017 (BiGAN, ALI); Lin et al. 2018 (https://arxiv.org/abs/1712.04086; PacGAN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.models.checks import (
    check_count,
    check_known_labels,
    check_labels,
    check_matrix,
    check_positive,
    check_widths,
    count_of,
    known_labels,
    random_source,
)
from ppl_models.models.pair import Pair, checked
from ppl_models.models.parts import grids
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.networks import check_network, evaluation, mlp
from ppl_models.models.vae import beside, normal


class Leaky(nn.LeakyReLU):
    """Leaky ReLU with slope 0.2, the activation of discriminators."""

    def __init__(self) -> None:
        super().__init__(0.2)


class AdversarialPair(Pair):
    """Base of adversarial pairs: the site ``real``, and a discriminator of rows or of packs of rows.

    The model of a subclass takes an argument ``real``: the value of the site for all rows, so that only that half is
    computed; None draws it.

    Attributes:
        discriminator: Network from ``pack`` rows side by side to log odds; set by :meth:`add_discriminator`.
        pack: Number of rows that the discriminator reads together (PacGAN).
    """

    discriminator: nn.Module
    pack: int

    def add_discriminator(self, network: nn.Module | None, inputs: int, hidden: Sequence[int], pack: int) -> None:
        """Set the discriminator; a subclass calls it in its constructor.

        Args:
            network: From (N, pack * inputs) to log odds (N, 1). Default: leaky ReLU layers.
            inputs: Width of what it reads of a row.
            hidden: Widths of the hidden layers of the default network.
            pack: Number of rows that it reads together.
        """
        check_count("pack", pack)
        check_widths("hidden", hidden, 0)
        self.pack = pack
        self.discriminator = mlp(pack * inputs, *hidden, 1, activation=Leaky) if network is None else network
        check_network("discriminator", self.discriminator, pack * inputs, 1)

    def real_or_generated(
        self, x: Tensor | None, real: bool | None, draw: Callable[[int], Tensor], *, like: Tensor | None = None
    ) -> Tensor:
        """The model: sample ``real``, and return rows x (N, D) of the data where it is one, generated where it is zero.

        Args:
            x: Rows of the data (N, D). Without them all rows are generated.
            real: Value of the site, if it is known for all rows: the other half is then not computed.
            draw: From the number of rows N to generated rows (N, D); it is called within the plate of rows.
            like: A tensor of N rows that stands for x where x is None.
        """
        at_hand = x if like is None else like
        packs, rows = self._plates(at_hand)
        count = self._count(at_hand)
        with packs:
            y = None if x is None else pyro.sample("real", dist.Bernoulli(torch.full((), 0.5).to(x)))
        with rows:
            if x is None or y is None or real is False:
                made = draw(count)
            elif real:
                made = x[:count]
            else:
                made = torch.where(y.repeat_interleave(self.pack, -1)[..., None] == 1, x[:count], draw(count))
            return pyro.deterministic("x", made, event_dim=1)

    def sample_real(self, x: Tensor, read: Callable[[Tensor], Sequence[Tensor]] = lambda x: (x,)) -> None:
        """The guide: sample ``real`` of each row, or pack of rows, given x (N, D).

        Args:
            read: From rows to the inputs of the discriminator, each (N, width); it is called within the plate of rows.
        """
        packs, rows = self._plates(x)
        with rows:
            inputs = read(x[: self._count(x)])
        with packs:
            pyro.sample("real", self.discriminate(*inputs))

    def discriminate(self, *inputs: Tensor) -> dist.TorchDistribution:
        """q(real) given the discriminator's inputs, each (N, width): N / pack Bernoulli distributions."""
        joined = torch.cat(inputs, -1)
        if self.pack > 1:
            joined = joined.reshape(*joined.shape[:-2], -1, self.pack * joined.shape[-1])
        return dist.Bernoulli(logits=self.discriminator(joined)[..., 0])

    def _count(self, x: Tensor | None) -> int:
        """Number of rows at hand, rounded down to whole packs."""
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
        if self.pack == 1:
            plate = self.rows(x)
            return plate, plate
        count, (size, rows) = self._count(x), self.minibatch
        total = count if rows is None else (size or count)
        index = torch.arange(count // self.pack, device=None if x is None else x.device)
        packs = pyro.plate("packs", total // self.pack, subsample=index, dim=-1)
        return packs, pyro.plate("rows", total, subsample=None if rows is None else rows[:count].long(), dim=-1)


class GAN(AdversarialPair):
    r"""A generative adversarial network.

    Args:
        features: Number of features D, or their names.
        noise: Width L of the noise.
        hidden: Widths of the hidden layers of both networks.
        generator: G, from noise (N, L) to rows (N, D). Default: ReLU layers.
        discriminator: D, from ``pack`` rows side by side (N, pack D) to log odds (N, 1). Default: leaky ReLU layers.
        pack: Number of rows, all real or all generated, that the discriminator classifies together (PacGAN), which
            shows it whether they are as diverse as the data. A batch is rounded down to a multiple of it.
        inputs: Input widths of generator and discriminator, where a subclass appends to z and x. Default: L and D.

    Data: x (N, D). Sites: real, z (L,) and deterministic x (D,) per row.

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
        inputs: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_count("noise", noise)
        check_widths("hidden", hidden, 0)
        self.features, self.noise = self.name_dimension("features", features), int(noise)
        of_generator, of_discriminator = (self.noise, self.features) if inputs is None else inputs
        if generator is None:
            generator = mlp(of_generator, *hidden, self.features, activation=nn.ReLU)
        self.generator = generator
        check_network("generator", self.generator, of_generator, self.features)
        self.add_discriminator(discriminator, of_discriminator, hidden, pack)
        self.register_buffer("origin", torch.zeros(self.noise))
        self.dims = {"x": ("features",), "z": ("noise",)}

    def model(self, x: Tensor | None = None, *, real: bool | None = None) -> Tensor:
        """Draw ``real``, and rows from the data or the generator; without data generate all rows. Return x."""
        return self.real_or_generated(x, real, self.draw)

    def guide(self, x: Tensor) -> None:
        """Classify each row, or pack of rows, as real or generated."""
        self.sample_real(x)

    def draw(self, count: int) -> Tensor:
        """Draw noise, and generate rows (count, D) from it, within the plate of rows."""
        return self.generator(pyro.sample("z", self.prior()))

    def prior(self) -> dist.TorchDistribution:
        """p(z): N(0, I), an event (L,)."""
        return dist.Normal(self.origin, 1.0).to_event(1)

    @torch.no_grad()
    def generate(self, count: int, *, seed: int = 0) -> Tensor:
        """Generate rows (count, D), in evaluation mode."""
        with evaluation(self):
            return self.generator(normal_noise(count, self.origin, seed))

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """Generated rows."""
        return {"samples": grids.samples(self)}

    def each_in_turn(self, name: str, given: Tensor | None, count: int, states: int) -> Tensor:
        """The states (count,) that rows are generated of: those given, which are checked, or all of them in turn."""
        check_count("count", count)
        if given is not None:
            check_labels(name, given, count, states, missing=False)
            return given.to(self.origin.device)
        return torch.arange(count, device=self.origin.device) % states

    def noisy(self, scale: float) -> Callable[..., None]:
        r"""The model :math:`x \sim \mathrm{N}(G(z), s^2 I)`, which has a likelihood, unlike the generator.

        ``log_evidence(pair.noisy(0.1), x, "annealed")`` estimates it (Wu et al. 2017,
        https://arxiv.org/abs/1611.04273). The estimate depends on the scale s as much as on the generator.
        """
        check_positive("scale", scale)

        def model(x: Tensor, *, size: int | None = None, rows: Tensor | None = None) -> None:
            with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
                z = pyro.sample("z", self.prior())
                pyro.sample("x", dist.Normal(self.generator(z), scale).to_event(1), obs=x)

        return model

    def check(self, x: Any = None, *, z: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite (rows, D), and z, noise of rows, a finite (rows, L)."""
        if x is not None:
            check_matrix("x", x, self.features)
            self._check_packs(len(x))
        if z is not None:
            check_matrix("z", z, self.noise)


class ConditionalGAN(GAN):
    r"""A conditional GAN: both networks read the label, one-hot, after z and x.

    Args:
        classes: Number of classes K, or their names.

    The other arguments, and the sites, are those of :class:`GAN`.

    Data: x (N, D) and labels y (N,); y alone to generate rows of given labels.
    """

    def __init__(
        self, features: int | Sequence[str], classes: int | Sequence[str], noise: int = 20, **shared: Any
    ) -> None:
        check_count("noise", noise)
        count, wide = count_of("classes", classes), count_of("features", features)
        super().__init__(features, noise, inputs=(noise + count, wide + count), **shared)
        self.classes = self.name_dimension("classes", classes)

    def model(self, x: Tensor | None = None, y: Tensor | None = None, *, real: bool | None = None) -> Tensor:
        """Draw ``real``, and rows from the data or the generator given their labels; return x."""
        labels = known_labels(y)

        def draw(count: int) -> Tensor:
            return self.generator(beside(pyro.sample("z", self.prior()), labels[:count], self.classes))

        return self.real_or_generated(x, real, draw, like=labels)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """Classify each row, or pack of rows, as real or generated given its label."""
        labels = known_labels(y)
        self.sample_real(x, lambda x: (beside(x, labels[: len(x)], self.classes),))

    @torch.no_grad()
    def generate(self, count: int, *, seed: int = 0, y: Tensor | None = None) -> Tensor:
        """Generate rows (count, D) of the labels y (count,), by default all labels in turn."""
        labels = self.each_in_turn("y", y, count, self.classes)
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
    r"""A GAN whose generator also reads a categorical code c, which the guide infers by :math:`q(c \mid x)`.

    ``Adversarial(information=("c",))`` maximises a bound of the mutual information of code and row.

    Args:
        codes: Number of states K.
        trunk: From rows (N, D) to features (N, W), with W the last of ``hidden``; the discriminator and q(c | x) are
            linear in them. Default: leaky ReLU layers. With ``warps.RandomWarp`` in front, codes of images ignore
            small rotations and shifts, and are closer to classes.

    The other arguments, and the sites, are those of :class:`GAN`, with one more site c per row, 0 to K - 1.
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
        check_count("noise", noise)
        check_count("codes", codes, 2)
        check_widths("hidden", hidden)
        width = hidden[-1]
        inputs, discriminator = (noise + codes, width), nn.Linear(width, 1)
        super().__init__(
            features, noise, hidden=hidden, generator=generator, discriminator=discriminator, inputs=inputs
        )
        self.codes = codes
        default = nn.Sequential(mlp(self.features, *hidden, activation=Leaky), Leaky())
        self.trunk = default if trunk is None else trunk
        self.reader = nn.Linear(width, codes)
        check_network("trunk", self.trunk, self.features, width)

    def draw(self, count: int) -> Tensor:
        """Draw noise and codes, and generate rows (count, D) from them, within the plate of rows."""
        c = pyro.sample("c", dist.Categorical(logits=torch.zeros(self.codes).to(self.origin)))
        return self.generator(beside(pyro.sample("z", self.prior()), c, self.codes))

    def guide(self, x: Tensor) -> None:
        """Infer the code of each row, and classify it, or its pack, as real or generated."""

        def read(x: Tensor) -> Sequence[Tensor]:
            features = self.trunk(x)
            pyro.sample("c", dist.Categorical(logits=self.reader(features)), infer={"is_auxiliary": True})
            return (features,)

        self.sample_real(x, read)

    @torch.no_grad()
    def generate(self, count: int, *, seed: int = 0, c: Tensor | None = None) -> Tensor:
        """Generate rows (count, D) of the codes c (count,), by default all codes in turn."""
        codes = self.each_in_turn("c", c, count, self.codes)
        with evaluation(self):
            return self.generator(beside(normal_noise(count, self.origin, seed), codes, self.codes))

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """Generated rows of each code."""
        return {"samples": grids.samples_by(self, "c", self.codes)}


class BiGAN(GAN):
    r"""A GAN with an encoder in the guide; the discriminator reads x and z.

    .. math::

        q(z \mid x) = \mathrm{N}(f_\mu(x), \mathrm{diag}(f_\sigma(x))^2), \qquad
        q(y \mid x, z) = \mathrm{Bernoulli}(\sigma(D(x, z)))

    At the optimum the joint distributions of generator and encoder are equal, and q(z | x) is the posterior of the
    generator. The encoder is part of the guide, and is trained with the generator against the discriminator.

    Args:
        encoder: From rows (N, D) to means and log standard deviations (N, 2 L). Default: leaky ReLU layers.

    The other arguments, and the sites, are those of :class:`GAN`.
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
        check_count("noise", noise)
        super().__init__(
            features, noise, hidden=hidden, inputs=(noise, count_of("features", features) + noise), **shared
        )
        self.encoder = mlp(self.features, *hidden, 2 * noise, activation=Leaky) if encoder is None else encoder
        check_network("encoder", self.encoder, self.features, 2 * noise)

    def guide(self, x: Tensor) -> None:
        """Encode each row, and classify it with its code, or a pack of them, as real or generated."""
        self.sample_real(x, lambda x: (x, pyro.sample("z", normal(self.encoder(x)))))

    @partial(checked, leading=True)
    def encode(self, x: Tensor) -> Tensor:
        """Means of q(z | x) (..., L) of rows (..., D)."""
        return self.encoder(x).chunk(2, -1)[0]

    @partial(checked, leading=True)
    def decode(self, z: Tensor) -> Tensor:
        """Rows (..., D) of noise (..., L)."""
        return self.generator(z)

    @checked
    def pictures(self, x: Tensor, **_: Any) -> dict[str, Grid]:
        """Generated rows, and reconstructions."""
        return {**super().pictures(), "reconstructions": grids.reconstructions(self, x)}


def normal_noise(count: int, like: Tensor, seed: int) -> Tensor:
    """Draws (count, L) from N(0, I) of the type and device of a vector (L,); a seed gives the same on every device."""
    check_count("count", count)
    return torch.randn(count, len(like), generator=random_source(seed)).to(like)
