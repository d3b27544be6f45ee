r"""Sigmoid belief networks: layers of binary units, each given the layer above it.

.. math::

    z_{nL} \sim \mathrm{Bernoulli}(\sigma(b_L)), \qquad
    z_{nk} \mid z_{n,k+1} \sim \mathrm{Bernoulli}(\sigma(W_k z_{n,k+1} + b_k)), \qquad
    x_n \mid z_{n1} \sim \mathrm{Bernoulli}(\sigma(W_0 z_{n1} + b_0))

The **sigmoid belief network** (Neal 1992) has a mean-field guide with free parameters for each row. The **Helmholtz
machine** (Dayan et al. 1995) is the same model with an amortised guide, a recognition network.

References: Neal 1992, "Connectionist learning of belief networks"; Saul, Jaakkola and Jordan 1996 for the mean field;
Dayan, Hinton, Neal and Zemel 1995, "The Helmholtz machine"; Hinton, Dayan, Frey and Neal 1995, "The wake-sleep
algorithm for unsupervised neural networks".
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from ppl_models.models.checks import MAX_TABLE, check_binary, check_count, check_matrix, check_widths
from ppl_models.models.pair import Pair, checked
from ppl_models.models.parts import grids
from ppl_models.models.parts.distributions import log_odds_of_means
from ppl_models.models.parts.grids import Grid
from ppl_models.models.parts.networks import mlp
from ppl_models.models.parts.randomness import bernoulli


class SigmoidBeliefNet(Pair):
    r"""Sigmoid belief network with a free mean-field guide.

    .. math:: q(z_n) = \prod_{ku} \mathrm{Bernoulli}(z_{nku} \mid \sigma(\lambda_{nku}))

    The first call of the guide creates the log odds :math:`\lambda`, one for each row and unit.

    Args:
        features: Number of features D, or their names.
        layers: Number of units of each latent layer, from x upwards.

    Data: x (N, D), zeros and ones. Sites: z_1 (units,), ..., z_L and x (D,) of each row, 0 or 1.

    Raises:
        ValueError: A layer has no units, x is not binary, or the number of rows N has changed.

    Example:
        >>> pair = SigmoidBeliefNet(4, layers=(2,))
        >>> x = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
        >>> pair.model(size=3).shape, pair.log_evidence(x).shape, pair.posterior(x).shape
        (torch.Size([3, 4]), torch.Size([1]), torch.Size([1, 4]))
    """

    def __init__(self, features: int | Sequence[str], layers: Sequence[int] = (200, 200)) -> None:
        super().__init__()
        self.features = self.name_dimension("features", features)
        check_widths("layers", layers)
        self.layers = tuple(layers)
        self.sites = tuple(f"z_{k}" for k, _ in enumerate(layers, 1))
        widths = (self.features, *layers)
        self.weights = nn.ParameterList(nn.init.xavier_uniform_(torch.empty(a, b)) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(units) for units in widths)
        self.dims = {"x": ("features",)}
        self.dims |= {name: (f"units_{k}",) for k, name in enumerate(self.sites, 1)}

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw or score the layers, from the top, and the rows; return x."""
        with self.rows(x):
            logits = self.biases[-1]
            for k in range(len(self.layers), 0, -1):
                logits = self._below(k, pyro.sample(f"z_{k}", binary(logits)))
            return pyro.sample("x", binary(logits), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw or score each unit of each row, with its own probability."""
        count = self.minibatch.size or len(x)
        with self.rows(x) as rows:
            for name, units in zip(self.sites, self.layers, strict=True):
                pyro.sample(name, binary(self._row_parameter(f"{name}_logits", count, units)[rows]))

    def conditional(self, site: str, values: Mapping[str, Tensor]) -> Generator[Tensor, Tensor, None]:
        r"""Log weights (..., rows, 2) of the states of one unit after another, given all others: for ``Gibbs``.

        .. math:: \mathrm{logit}\, p(z_u = 1 \mid \cdot) = a_u + \sum_i \big( y_i W_{iu}
            - \mathrm{softplus}(c_i + W_{iu}) + \mathrm{softplus}(c_i) \big)

        with y the layer below, a the input from the layer above, and c the input that the other units of the layer send
        to the layer below. The generator is sent the new state of each unit.
        """
        k = self.sites.index(site) + 1
        z, below = values[site], values["x" if k == 1 else f"z_{k - 1}"]
        prior = self.biases[k] if k == len(self.layers) else self._below(k + 1, values[f"z_{k + 1}"])
        weight = self.weights[k - 1]
        drive = self._below(k, z)
        # The linear part is the same throughout; the rest changes as units are drawn.
        odds = prior + below @ weight
        for u, column in enumerate(weight.mT):
            off = drive - z[..., u, None] * column
            on = off + column
            weights = odds[..., u] - (softplus(on) - softplus(off)).sum(-1)
            state = yield torch.stack([torch.zeros_like(weights), weights], -1)
            drive = off + state[..., None] * column

    @checked
    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of rows (N, D), in nats, by summing over all states of all layers: (N,).

        Raises:
            ValueError: The layers have too many states.
        """
        prior, emission = self._enumerated(x)
        return torch.logsumexp(emission + prior, -1)

    @checked
    def posterior(self, x: Tensor) -> Tensor:
        r"""Exact p(z | x) of rows (N, D): (N, 2^units of z_1, ..., 2^units of z_L), in the order of :func:`states`.

        Raises:
            ValueError: The layers have too many states.
        """
        self._check_size(len(x) * 2 ** sum(self.layers), sum(self.layers))
        joint = self._emission(x)
        for k, (below, above) in enumerate(pairwise(self.layers), 2):
            table = self._scores(k, states(below, self.origin), states(above, self.origin))
            joint = joint[..., None] + table
        top = states(self.layers[-1], self.origin)
        joint = joint + binary(self.biases[-1]).log_prob(top)
        return joint.flatten(1).softmax(-1).reshape(joint.shape)

    @checked
    def marginals(self, x: Tensor) -> dict[str, Tensor]:
        """Exact posterior probability of each unit (N, units) given rows (N, D), by site.

        Raises:
            ValueError: The layers have too many states.
        """
        posterior, marginals = self.posterior(x), {}
        for k, (name, units) in enumerate(zip(self.sites, self.layers, strict=True), 1):
            layer = posterior.movedim(k, 1).reshape(len(x), 2**units, -1).sum(-1)
            marginals[name] = layer @ states(units, self.origin)
        return marginals

    @checked
    @torch.no_grad()
    def centre(self, x: Tensor) -> None:
        """Initialise the biases of x by the log odds of the feature means of rows (N, D)."""
        self.biases[0].copy_(log_odds_of_means(x))

    @torch.no_grad()
    def fantasies(self, size: int, random: torch.Generator | None = None) -> Tensor:
        """Means of x (size, D) given latent units drawn from the model, by a source on the CPU or torch's own."""
        check_count("size", size)
        logits = self.biases[-1].expand(size, -1)
        for k in range(len(self.layers), 0, -1):
            logits = self._below(k, bernoulli(logits.sigmoid(), random))
        return logits.sigmoid()

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """Samples of the model, and the weights of the lowest layer."""
        samples = grids.drawn(self.fantasies, "means of x given causes drawn from the model")
        return {"prior": samples, "fields": grids.fields(self)}

    @partial(checked, leading=True)
    def decode(self, z: Tensor) -> Tensor:
        """Means of the rows (..., D) of the top layer (..., units), through the means of those below."""
        for k in range(len(self.layers), 0, -1):
            z = self._below(k, z).sigmoid()
        return z

    @property
    def origin(self) -> Tensor:
        """A tensor of the type and device of the parameters."""
        return self.biases[0]

    def check(self, x: Any = None, *, z: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a binary matrix (rows, D), and z, units of the top layer, has its width."""
        if x is not None:
            check_matrix("x", x, self.features)
            check_binary("x", x)
        if z is not None:
            check_matrix("z", z, self.layers[-1])

    def _below(self, k: int, z: Tensor) -> Tensor:
        """Log odds of the layer below layer k, given the units of layer k (..., units)."""
        return linear(z, self.weights[k - 1], self.biases[k - 1])

    def _row_parameter(self, name: str, count: int, units: int) -> Tensor:
        """A parameter with one entry per row and unit, created by the first call."""
        if name not in self._parameters:
            setattr(self, name, nn.Parameter(torch.zeros_like(self.origin).new_zeros(count, units)))
        value: Tensor = getattr(self, name)
        if len(value) != count:
            raise ValueError(f"x: expected the {len(value)} rows that the guide was fitted to, got {count}")
        return value

    def _emission(self, x: Tensor) -> Tensor:
        """log p(x | z_1) of rows (N, D), (N, 2^units)."""
        return self._scores(1, x, states(self.layers[0], self.origin))

    def _scores(self, k: int, below: Tensor, above: Tensor) -> Tensor:
        """Log probability of states of the layer below layer k, (B, units), given states of k, (A, units): (B, A)."""
        logits = self._below(k, above)
        return below @ logits.mT - softplus(logits).sum(-1)

    def _enumerated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(z_1), (2^units,), and log p(x | z_1), (N, 2^units)."""
        for below, above in ((0, self.layers[0]), *pairwise(self.layers)):
            self._check_size(2 ** (below + above), below + above)
        self._check_size(len(x) * 2 ** self.layers[0], self.layers[0])
        prior = binary(self.biases[-1]).log_prob(states(self.layers[-1], self.origin))
        for k in range(len(self.layers), 1, -1):
            scores = self._scores(k, *(states(self.layers[j], self.origin) for j in (k - 2, k - 1)))
            prior = torch.logsumexp(scores + prior, -1)
        return prior, self._emission(x)

    def _check_size(self, numbers: int, units: int) -> None:
        if numbers > MAX_TABLE:
            raise ValueError(
                f"layers: exact answers over {units} units need {float(numbers):.1e} numbers, expected at most "
                f"{float(MAX_TABLE):.1e}; use log_evidence, which samples, or sample with kernel=Gibbs"
            )


class HelmholtzMachine(SigmoidBeliefNet):
    r"""Sigmoid belief network with a recognition network, which runs bottom-up, as guide.

    .. math:: q(z \mid x) = \prod_k \mathrm{Bernoulli}(z_k \mid \sigma(R_k z_{k-1} + c_k)), \qquad z_0 = x

    Args:
        baseline: Hidden width of the neural baselines of ``TraceGraph_ELBO``, which predict the learning signal of each
            layer from x (Mnih and Gregor 2014, NVIL). 0: none.

    The other arguments are those of :class:`SigmoidBeliefNet`.
    """

    def __init__(self, features: int | Sequence[str], layers: Sequence[int] = (200, 200), *, baseline: int = 0) -> None:
        check_count("baseline", baseline, 0)
        super().__init__(features, layers)
        widths = (self.features, *layers)
        self.recognition = nn.ParameterList(nn.init.xavier_uniform_(torch.empty(b, a)) for a, b in pairwise(widths))
        self.thresholds = nn.ParameterList(torch.zeros(units) for units in layers)
        self.baselines = nn.ModuleList(mlp(self.features, baseline, 1) for _ in layers) if baseline else None

    def guide(self, x: Tensor, *, observations: Mapping[str, Tensor] | None = None) -> None:
        """Draw or score the layers of each row, from the bottom; ``observations["x"]`` takes the place of x."""
        below = x if observations is None else observations["x"]
        with self.rows(x):
            for k, name in enumerate(self.sites):
                distribution = binary(linear(below, self.recognition[k], self.thresholds[k]))
                below = pyro.sample(name, distribution, infer=self._baseline(k, x))

    @partial(checked, leading=True)
    def encode(self, x: Tensor) -> Tensor:
        """Means of the top layer (..., units) of rows (..., D), through the means of those below."""
        for weight, threshold in zip(self.recognition, self.thresholds, strict=True):
            x = linear(x, weight, threshold).sigmoid()
        return x

    @checked
    def pictures(self, x: Tensor, **_: Any) -> dict[str, Grid]:
        """Samples of the model, reconstructions, and the weights of the lowest layer."""
        return {**super().pictures(), "reconstructions": grids.reconstructions(self, x)}

    def _baseline(self, k: int, x: Tensor) -> Any:
        if self.baselines is None:
            return {}
        network = self.baselines[k]
        return {"baseline": {"nn_baseline": lambda rows: network(rows)[..., 0], "nn_baseline_input": x}}


def binary(logits: Tensor) -> dist.TorchDistribution:
    """Independent binary units with log odds (..., units), as an event."""
    # Pair.check has validated x; torch would validate every draw.
    return dist.Bernoulli(logits=logits, validate_args=False).to_event(1)


def states(units: int, like: Tensor) -> Tensor:
    """All states of binary units, (2^units, units), in binary counting order with the first unit slowest."""
    count = torch.arange(2**units, device=like.device)
    return (count[:, None] >> torch.arange(units - 1, -1, -1, device=like.device) & 1).to(like.dtype)
