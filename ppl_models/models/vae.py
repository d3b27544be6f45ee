r"""Variational autoencoders: a few latent factors per row, with neural networks as decoder and encoder.

.. math:: z_n \sim \mathrm{N}(0, I_L), \qquad x_n \mid z_n \sim p(x \mid g(z_n)), \qquad
    q(z_n \mid x_n) = \mathrm{N}(f_\mu(x_n), \mathrm{diag}(f_\sigma(x_n))^2)

Reference: Kingma and Welling 2014, "Auto-Encoding Variational Bayes" (https://arxiv.org/abs/1312.6114).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from ppl_models.models.checks import (
    check_count,
    check_entries,
    check_known_labels,
    check_labels,
    check_matrix,
    check_one_of,
    check_positive,
    check_widths,
    count_of,
    known_labels,
)
from ppl_models.models.linear_factors import FactorModel
from ppl_models.models.pair import as_matrix, checked
from ppl_models.models.parts import grids
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.labels import one_hot
from ppl_models.models.parts.networks import check_network, mlp

LIKELIHOODS = ("bernoulli", "continuous_bernoulli", "gaussian")


class VAE(FactorModel):
    r"""Variational autoencoder.

    Args:
        features: Number of features D, or their names.
        factors: Number of factors L, or their names.
        likelihood: ``bernoulli``, for x in [0, 1], a proper likelihood only of zeros and ones;
            ``continuous_bernoulli``, for x in [0, 1] (Loaiza-Ganem and Cunningham 2019); ``gaussian``, for any x, with
            one learnt noise variance.
        hidden: Widths of the hidden layers of both networks, from x to z.
        encoder: From rows (..., D) to means and log standard deviations (..., 2 L) of the guide. Default: tanh layers.
        decoder: From factors (..., L) to logits (``gaussian``: means) of the rows (..., D). Default: tanh layers.
        extra: Number of further inputs that a subclass appends to x and to z in both networks.

    Data: x (N, D). Sites: z (L,) and x (D,) of each row.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> pair = VAE(features=6, factors=2, hidden=(4,))
        >>> pair.model(size=3).shape, pair.encode(torch.zeros(3, 6)).shape, pair.decode(torch.zeros(2)).shape
        (torch.Size([3, 6]), torch.Size([3, 2]), torch.Size([6]))
    """

    learning_rate = 0.002

    def __init__(
        self,
        features: int | Sequence[str],
        factors: int | Sequence[str],
        *,
        likelihood: str = "bernoulli",
        hidden: Sequence[int] = (200, 200),
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        extra: int = 0,
    ) -> None:
        check_one_of("likelihood", likelihood, LIKELIHOODS)
        check_widths("hidden", hidden, 0)
        check_count("extra", extra, 0)
        super().__init__(features, factors)
        widths = self.features, *hidden
        wide, narrow = self.features + extra, self.factors + extra
        self.encoder = mlp(wide, *hidden, 2 * self.factors) if encoder is None else encoder
        self.decoder = mlp(narrow, *reversed(widths)) if decoder is None else decoder
        check_network("encoder", self.encoder, wide, 2 * self.factors)
        check_network("decoder", self.decoder, narrow, self.features)
        self.kind, self._widths, self._extra = likelihood, {"x": self.features, "z": self.factors}, extra
        if likelihood == "gaussian":
            self.noise: Any = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) of factors (..., L), an event (D,)."""
        self._check_inputs("z", z)
        out = self.decoder(z)
        if self.kind == "gaussian":
            return dist.Normal(out, self.noise.sqrt()).to_event(1)
        if self.kind == "continuous_bernoulli":
            return dist.ContinuousBernoulli(logits=out).to_event(1)
        # Grey values are accepted, as is common practice; ``check`` has verified that they lie in [0, 1].
        return dist.Bernoulli(logits=out, validate_args=False).to_event(1)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) of rows (..., D), an event (L,)."""
        self._check_inputs("x", x)
        return normal(self.encoder(x))

    def encode(self, x: Tensor) -> Tensor:
        """Posterior means of the factors (..., L) of rows (..., D)."""
        self._check_inputs("x", x)
        return self.encoder(x).chunk(2, -1)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Means of the rows (..., D) given factors (..., L)."""
        return self.likelihood(z).mean

    @checked
    def active(self, x: Tensor, *, least: float = 0.01) -> Tensor:
        r"""Active factors (L,): :math:`\mathrm{Var}_n(\mathrm{E}_q[z \mid x_n]) > 0.01` (Burda et al. 2016)."""
        check_positive("least", least, zero=True)
        return self.encode(x).var(0) > least

    @checked
    def pictures(self, x: Tensor, **_: Any) -> dict[str, Grid]:
        """Prior samples, reconstructions and traversals; with two factors also the manifold."""
        shown = {
            "prior": grids.prior_samples(self),
            "reconstructions": grids.reconstructions(self, x),
            "traversals": grids.traversals(self, x),
        }
        return shown | ({"manifold": grids.manifold(self)} if self.factors == 2 else {})

    def _check_inputs(self, name: str, rows: Any) -> None:
        """Check inputs of a network: rows or factors, beside one-hot labels where a subclass appends them."""
        if not am_i_wrapped():
            check_matrix(name, as_matrix(rows), self._widths[name] + self._extra)
            if name == "x":
                VAE.check(self, as_matrix(rows)[:, : self.features])

    def check(self, x: Any = None, *, z: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite matrix (rows, D), in [0, 1] unless the likelihood is Gaussian."""
        super().check(x, z=z)
        if x is not None and self.kind != "gaussian":
            check_entries("x", x, (x < 0) | (x > 1), f"pixels in [0, 1] for a {self.kind} likelihood")


class SemiSupervisedVAE(VAE):
    r"""Semi-supervised VAE (M2), for data with few labelled rows: the label is a second latent variable.

    .. math::

        y_n \sim \mathrm{Categorical}(1/K), \qquad x_n \mid y_n, z_n \sim p(x \mid g(z_n, y_n)), \qquad
        q(y_n, z_n \mid x_n) = q(y_n \mid x_n) \, \mathrm{N}(f_\mu(x_n, y_n), f_\sigma(x_n, y_n)^2)

    The guide enumerates missing labels, for ``TraceEnum_ELBO``, and puts all mass on a known label. Known labels also
    train the classifier q(y | x), by the term :math:`\alpha \log q(y_n \mid x_n)` of Kingma et al. 2014.

    Args:
        classes: Number of classes K, or their names.
        auxiliary: :math:`\alpha`, the weight of this term per labelled row.
        classifier: From rows (..., D) to logits (..., K). Default: tanh layers.

    The other arguments are those of :class:`VAE`; encoder and decoder take the one-hot label after x and z.

    Data: x (N, D); y (N,), floats with nan where the label is missing. Sites: y, z (L,), x (D,) of each row.

    Reference: Kingma, Rezende, Mohamed and Welling 2014, "Semi-Supervised Learning with Deep Generative Models"
    (https://arxiv.org/abs/1406.5298).
    """

    def __init__(
        self,
        features: int | Sequence[str],
        factors: int | Sequence[str],
        classes: int | Sequence[str],
        *,
        hidden: Sequence[int] = (500,),
        auxiliary: float = 50.0,
        classifier: nn.Module | None = None,
        **shared: Any,
    ) -> None:
        count = count_of("classes", classes, 2)
        check_positive("auxiliary", auxiliary, zero=True)
        super().__init__(features, factors, hidden=hidden, extra=count, **shared)
        self.classes = self.name_dimension("classes", classes)
        self.auxiliary = auxiliary
        self.classifier = mlp(self.features, *hidden, self.classes) if classifier is None else classifier
        check_network("classifier", self.classifier, self.features, self.classes)
        self.register_buffer("uniform_logits", torch.zeros(self.classes))

    def model(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Draw or score labels, factors and rows; return x."""
        with self.rows(x):
            label = pyro.sample("y", dist.Categorical(logits=self.uniform_logits))
            z = pyro.sample("z", self.prior())
            if y is not None:
                # Labels other than the known one get probability 0, also without the guide.
                agrees = y.isnan() | (label == y)
                pyro.factor("given", torch.where(agrees, 0.0, -torch.inf).to(self.uniform_logits))
            # In training alone: it is no part of the likelihood.
            if x is not None and y is not None and self.auxiliary and self.training:
                self._classification_loss(x, y)
            return pyro.sample("x", self.likelihood(beside(z, label, self.classes)), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """Draw or score the label, with certainty if it is known, and the factors of each row."""
        with self.rows(x):
            logits = self.classifier(x)
            if y is not None:
                certain = one_hot(y, self.classes, logits.dtype).log()
                logits = torch.where(y.isnan()[..., None], logits, certain)
            label = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", self.posterior(beside(x, label, self.classes)))

    @partial(checked, leading=True)
    def probabilities(self, x: Tensor) -> Tensor:
        """q(y | x): class probabilities (..., K) of rows (..., D)."""
        return self.classifier(x).softmax(-1)

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """Means of x of each class."""
        return {"classes": grids.by_class(self)}

    def _classification_loss(self, x: Tensor, y: Tensor) -> None:
        known = ~y.isnan()
        score = dist.Categorical(logits=self.classifier(x)).log_prob(y.nan_to_num().long())
        pyro.factor("taught", self.auxiliary * torch.where(known, score, 0.0))

    def check(self, x: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless x fits the likelihood and y, if given, holds float labels of its rows."""
        super().check(x)
        if y is not None:
            check_labels("y", y, len(y) if x is None else len(x), self.classes, missing=True)
            if not y.is_floating_point():
                raise ValueError("y: expected floats, with nan where the label is missing, got integers")


class ConditionalVAE(VAE):
    r"""Conditional VAE p(x | y).

    Encoder and decoder both take the label, so the factors z model only the variation within a class.

    .. math::

        z_n \sim \mathrm{N}(0, I_L), \qquad x_n \mid y_n, z_n \sim p(x \mid g(z_n, y_n)), \qquad
        q(z_n \mid x_n, y_n) = \mathrm{N}(f_\mu(x_n, y_n), f_\sigma(x_n, y_n)^2)

    Args:
        classes: Number of classes K, or their names.

    The other arguments are those of :class:`VAE`; encoder and decoder take the one-hot label after x and z.

    Data: x (N, D) and y (N,), integers; to draw rows of given labels, y alone. Sites: z (L,), x (D,) of each row.

    Reference: Sohn, Lee and Yan 2015, "Learning Structured Output Representation using Deep Conditional Generative
    Models".
    """

    def __init__(
        self,
        features: int | Sequence[str],
        factors: int | Sequence[str],
        classes: int | Sequence[str],
        **shared: Any,
    ) -> None:
        count = count_of("classes", classes)
        super().__init__(features, factors, extra=count, **shared)
        self.classes = self.name_dimension("classes", classes)

    def model(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Draw or score factors and rows, given the labels; return x."""
        y = known_labels(y)
        with self.rows(y):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(beside(z, y, self.classes)), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """Draw or score the factors of each row, given its label."""
        with self.rows(x):
            pyro.sample("z", self.posterior(beside(x, known_labels(y), self.classes)))

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """Means of x of each class."""
        return {"classes": grids.by_class(self)}

    def check(self, x: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless x fits the likelihood and y has a label for every row."""
        super().check(x)
        check_known_labels(x, y, self.classes)


class HierarchicalVAE(VAE):
    r"""VAE with a chain of stochastic layers.

    .. math::

        z_{K} \sim \mathrm{N}(0, I), \qquad z_{k} \mid z_{k+1} \sim \mathrm{N}(g_k(z_{k+1})), \qquad
        x \mid z_1 \sim p(x \mid g(z_1)), \qquad
        q(z \mid x) = q(z_1 \mid x) \prod_k q(z_{k+1} \mid z_k)

    Args:
        factors: Number of factors of each of at least two layers, from x upwards.
        between: Widths of the hidden layers of the networks between two stochastic layers.

    The other arguments are those of :class:`VAE`. Sites: z_1 (L_1,), ..., z_K (L_K,) and x (D,) of each row. ``encode``
    and ``decode`` go from x to the top layer and back through the means of the layers in between.

    Reference: Burda, Grosse and Salakhutdinov 2016, "Importance Weighted Autoencoders"
    (https://arxiv.org/abs/1509.00519), for the default widths.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        factors: Sequence[int] = (100, 50),
        *,
        between: Sequence[int] = (100, 100),
        **shared: Any,
    ) -> None:
        check_widths("factors", factors, 2)
        check_widths("between", between, 0)
        super().__init__(features, factors[0], **shared)
        layers = {f"z_{k}": (f"factors_{k}",) for k, _ in enumerate(factors, 1)}
        self.dims = {"x": ("features",), **layers}
        self.factors = factors[-1]
        self.origin = torch.zeros(self.factors)
        self.rising = nn.ModuleList(mlp(a, *between, 2 * b) for a, b in pairwise(factors))
        self.falling = nn.ModuleList(mlp(b, *reversed(between), 2 * a) for a, b in pairwise(factors))

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw or score the layers, from the top, and the rows; return x."""
        with self.rows(x):
            z = pyro.sample(f"z_{len(self.falling) + 1}", self.prior())
            for k in range(len(self.falling), 0, -1):
                z = pyro.sample(f"z_{k}", normal(self.falling[k - 1](z)))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw or score the layers of each row, from the bottom."""
        with self.rows(x):
            z = pyro.sample("z_1", self.posterior(x))
            for k, network in enumerate(self.rising, 2):
                z = pyro.sample(f"z_{k}", normal(network(z)))

    @partial(checked, leading=True)
    def encode(self, x: Tensor) -> Tensor:
        """Means of the top layer (..., L_K) given rows (..., D), through the means of the layers below."""
        z = super().encode(x)
        for network in self.rising:
            z = network(z).chunk(2, -1)[0]
        return z

    @partial(checked, leading=True)
    def decode(self, z: Tensor) -> Tensor:
        """Means of the rows (..., D) given the top layer (..., L_K), through the means of the layers below."""
        for network in reversed(self.falling):
            z = network(z).chunk(2, -1)[0]
        return super().decode(z)

    def pictures(self, x: Tensor, **_: Any) -> dict[str, Grid]:
        """Those of a VAE, with prior samples through draws of the layers between the top and x."""
        random = np.random.default_rng(1)

        def drawn(z: Tensor) -> Tensor:
            for network in reversed(self.falling):
                below = normal(network(z))
                z = below.mean + below.stddev * torch.as_tensor(random.standard_normal(below.mean.shape)).to(z)
            return VAE.decode(self, z)

        return {**super().pictures(x), "prior": grids.prior_samples(self, image=drawn)}


def normal(out: Tensor) -> dist.TorchDistribution:
    """Normal distribution, an event (L,), from a network's output (..., 2 L): means and log standard deviations."""
    loc, log_scale = out.chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def beside(left: Tensor, label: Tensor, classes: int) -> Tensor:
    """Concatenate rows (..., W) and their one-hot labels (...): (..., W + K)."""
    code = one_hot(label, classes, left.dtype)
    shape = torch.broadcast_shapes(left.shape[:-1], code.shape[:-1])
    return torch.cat([left.expand(*shape, -1), code.expand(*shape, -1)], -1)
