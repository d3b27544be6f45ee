r"""First-order Markov chain: sequences of symbols, each given the one before it.

.. math:: p(x_n) = \pi(x_{n1}) \prod_{t=2}^T P(x_{nt} \mid x_{n,t-1})

There are no latent sites: the guide is empty and the ELBO is the exact log likelihood. Shorter sequences are padded
with a symbol of its own for the end.

References: Markov 1913, who counted the letters of Eugene Onegin; Shannon 1948, "A Mathematical Theory of
Communication", sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.models.checks import (
    check_count,
    check_entries,
    check_matrix,
    check_positive,
    count_of,
    fractional,
    known_or_zero,
)
from ppl_models.models.pair import Visible, checked
from ppl_models.models.parts.distributions import Rowwise
from ppl_models.models.parts.labels import one_hot


class MarkovSequence(Rowwise):
    """Distribution of a sequence of symbols 0 to K - 1, as floats.

    Args:
        initial: Log probabilities of the first symbol (K,).
        transition: Log probabilities (K, K) of a symbol (columns) given the one before it (rows).
        length: T.
    """

    arg_constraints: ClassVar = {}
    support = dist.constraints.independent(dist.constraints.nonnegative_integer, 1)

    def __init__(self, initial: Tensor, transition: Tensor, length: int) -> None:
        self.initial, self.transition = initial, transition
        super().__init__(torch.Size(), torch.Size([length]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        codes = value.long()
        pairs = codes[..., :-1] * len(self.initial) + codes[..., 1:]
        return self._repeat(self.initial[codes[..., 0]] + self.transition.flatten()[pairs].sum(-1))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size((*sample_shape, *self.batch_shape))
        (length,) = self.event_shape
        rows = max(shape.numel(), 1)
        missing = torch.full((rows, length), torch.nan, dtype=self.initial.dtype, device=self.initial.device)
        return self.complete(missing).reshape(*shape, length)

    @torch.no_grad()
    def complete(self, x: Tensor) -> Tensor:
        """Draw the symbols that are nan given all others, exactly: rows (N, T).

        Forward filtering, backward sampling.
        """
        forward = [self._evidence(x[:, 0]) + self.initial]
        for t in range(1, x.shape[1]):
            ahead = (forward[-1][:, :, None] + self.transition).logsumexp(1)
            forward.append(ahead + self._evidence(x[:, t]))
        impossible = (forward[-1] == -torch.inf).all(-1)
        if impossible.any():
            row = int(impossible.nonzero()[0])
            raise ValueError(f"x: expected known symbols that can follow one another, got row {row} of probability 0")
        symbol = dist.Categorical(logits=forward[-1]).sample()
        drawn = [symbol]
        for weights in reversed(forward[:-1]):
            symbol = dist.Categorical(logits=weights + self.transition.mT[symbol]).sample()
            drawn.append(symbol)
        return torch.stack(drawn[::-1], 1).to(x.dtype)

    def _evidence(self, column: Tensor) -> Tensor:
        """Log likelihood (N, K) of each symbol at one position: 0 where it agrees or nothing is known, else -inf."""
        known = one_hot(column, len(self.initial), column.dtype).log()
        return torch.where(column.isnan()[:, None], torch.zeros_like(known), known)


class MarkovChain(Visible):
    r"""First-order Markov chain.

    Args:
        length: Length T of the sequences, or names of the positions.
        symbols: Number of symbols K, or their names; a text stands for its characters.

    Data: x (N, T), symbols 0 to K - 1 as floats. Sites: x (T,) of each row.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
        >>> pair = MarkovChain(4, "ab").estimate(x, smoothing=0.0)
        >>> pair.transition.softmax(-1).detach().round(decimals=2)
        tensor([[0.2500, 0.7500],
                [1.0000, 0.0000]])
        >>> pair.log_evidence(x).exp().detach().round(decimals=4)
        tensor([0.5625, 0.1875])
        >>> pair.impute(torch.tensor([[0.0, 1.0, torch.nan, 1.0]]))[0, 0]
        tensor([0., 1., 0., 1.])
    """

    def __init__(self, length: int | Sequence[str], symbols: int | Sequence[str]) -> None:
        super().__init__()
        count_of("length", length)
        self.length = self.name_dimension("features", length)
        self.symbols = self.name_dimension("symbols", tuple(symbols) if isinstance(symbols, str) else symbols)
        self.dims = {"x": ("features",)}
        self.initial = nn.Parameter(torch.zeros(self.symbols))
        self.transition = nn.Parameter(torch.zeros(self.symbols, self.symbols))

    def distribution(self) -> MarkovSequence:
        """p(x), an event (T,)."""
        return MarkovSequence(self.initial.log_softmax(-1), self.transition.log_softmax(-1), self.length)

    @checked
    @torch.no_grad()
    def estimate(self, x: Tensor, *, smoothing: float = 1.0) -> Self:
        r"""Set the parameters, in place, from counts, and return the pair.

        Args:
            x: Sequences (N, T).
            smoothing: Added to each count. 0 gives the maximum likelihood estimate, other values the posterior mean
                under a Dirichlet prior of that concentration.
        """
        check_positive("smoothing", smoothing, zero=True)
        first, pairs = self.count(x)
        # A symbol that never occurs keeps its transition probabilities.
        seen = (pairs.sum(-1, keepdim=True) > 0) | (smoothing > 0)
        self.initial.copy_((first + smoothing).log())
        self.transition.copy_(torch.where(seen, (pairs + smoothing).log(), self.transition.double()))
        return self

    @checked
    def count(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Counts of the first symbols (K,), and of the transitions (K, K)."""
        codes = x.long()
        first = codes[:, 0].bincount(minlength=self.symbols)
        pairs = (codes[:, :-1] * self.symbols + codes[:, 1:]).flatten().bincount(minlength=self.symbols**2)
        return first.double(), pairs.double().reshape(self.symbols, self.symbols)

    def impute(self, x: Tensor, draws: int = 1, **_: Any) -> Tensor:
        """Draw the missing symbols (nan) of rows (N, T) given all known ones, exactly: (draws, N, T)."""
        check_count("draws", draws)
        self.check(known_or_zero(x))
        return self.distribution().complete(x.repeat(draws, 1)).reshape(draws, *x.shape)

    @torch.no_grad()
    def columnwise(self, rows: int, **_: Any) -> Generator[tuple[int, Tensor], Tensor, None]:
        """One symbol of rows after another: each with its log weights (rows, K) given the one sent before."""
        weights = self.initial.log_softmax(-1).expand(rows, -1)
        for t in range(self.length):
            symbol = yield t, weights
            weights = self.transition.log_softmax(-1)[symbol.long()]

    def check(self, x: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a matrix (rows, T) of symbols."""
        if x is not None:
            check_matrix("x", x, self.length)
            wrong = (x < 0) | (x >= self.symbols) | fractional(x)
            check_entries("x", x, wrong, f"symbols 0 to {self.symbols - 1}")
