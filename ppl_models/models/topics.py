r"""Latent Dirichlet allocation: topics of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_models.models.checks import check_count, check_entries, check_matrix, check_positive, check_widths, fractional
from ppl_models.models.pair import Pair
from ppl_models.models.parts.distributions import Counts
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.networks import mlp

LEAST = 0.05
"""Smallest concentration of the guide: draws of smaller ones round to zero, where the prior has no finite density."""


class LDA(Pair):
    r"""Latent Dirichlet allocation (Blei, Ng and Jordan 2003), with an amortized guide.

    .. math::

        \phi_k \sim \mathrm{Dirichlet}(\eta), \qquad \theta_n \sim \mathrm{Dirichlet}(\alpha), \qquad
        x_n \sim \mathrm{Multinomial}(L_n, \sum_k \theta_{nk} \phi_k)

    The topic of each word is summed out. The length :math:`L_n` of a document is not modelled: it is the sum of x, or
    ``length`` where documents are drawn. The guide has a Dirichlet distribution of each topic, and a network from the
    counts of a document to the concentration of its mixture.

    Args:
        features: Number of words V, or the words.
        topics: Number of topics K.
        mixture: alpha, prior concentration of the topics of a document.
        concentration: eta, prior concentration of the words of a topic.
        length: Length of the documents drawn without data.
        hidden: Widths of the hidden layers of the network.

    Data: x (N, V) counts. Sites: topics (K, V), mixture (N, K), x.
    """

    def __init__(
        self,
        features: int | Sequence[str],
        topics: int = 10,
        *,
        mixture: float = 0.1,
        concentration: float = 0.1,
        length: int = 100,
        hidden: Sequence[int] = (100,),
    ) -> None:
        super().__init__()
        check_count("topics", topics)
        check_positive("mixture", mixture)
        check_positive("concentration", concentration)
        check_count("length", length)
        check_widths("hidden", hidden, 0)
        self.features = self.name_dimension("features", features)
        self.topics, self.length = int(topics), int(length)
        self.register_buffer("mixture", torch.full((self.topics,), float(mixture)))
        self.register_buffer("concentration", torch.full((self.features,), float(concentration)))
        self.dims = {"topics": ("topic", "features"), "mixture": ("topic",), "x": ("features",)}
        self.encoder = mlp(self.features, *hidden, self.topics)
        # Topics that are equal at the start would stay so.
        self.words = nn.Parameter(torch.randn(self.topics, self.features).mul(0.5))

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw or score topics, mixtures and counts; return the counts."""
        prior = dist.Dirichlet(self.concentration).expand((self.topics,)).to_event(1)
        topics = pyro.sample("topics", prior)
        with self.rows(x):
            mixture = pyro.sample("mixture", dist.Dirichlet(self.mixture))
            length = mixture.new_tensor(float(self.length)) if x is None else x.sum(-1)
            return pyro.sample("x", Counts(mixed(mixture, topics), length), obs=x)

    def guide(self, x: Tensor | None = None) -> None:
        """Draw the topics, and the mixture of each document given its counts."""
        if x is None:
            raise ValueError("x: expected the counts of every document, got none")
        pyro.sample("topics", dist.Dirichlet(self.words.exp() + LEAST).to_event(1))
        with self.rows(x):
            pyro.sample("mixture", dist.Dirichlet(softplus(self.encoder((x + 1).log())) + LEAST))

    def check(self, x: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a matrix (rows, V) of counts."""
        if x is not None:
            check_matrix("x", x, self.features)
            check_entries("x", x, (x < 0) | fractional(x), "counts (0, 1, 2, ...)")

    def mean_topics(self) -> Tensor:
        """Mean of the topics under the guide, (K, V)."""
        words = self.words.detach().exp() + LEAST
        return words / words.sum(-1, keepdim=True)

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """The topics, brightest at their most probable word."""
        topics = self.mean_topics()
        return {"topics": ((topics / topics.amax(-1, keepdim=True))[None], "topics")}


def mixed(mixture: Tensor, topics: Tensor) -> Tensor:
    """Probabilities of the words (..., N, V) of mixtures (..., N, K) of topics (..., K, V)."""
    if topics.dim() > 2:
        # Topics of S draws are (S, 1, K, V), with a 1 in the place of the rows.
        topics = topics.squeeze(-3)
    return mixture @ topics
