r"""One variational autoencoder, 784-H-L, as users of each library write it: the same networks and the same bound.

.. math:: z_n \sim \mathrm{N}(0, I), \qquad x_n \mid z_n \sim \mathrm{Bernoulli}(\sigma(f(z_n)))

Encoder and decoder have one hidden layer of softplus units. Pyro and NumPyro draw the whole bound, the hand-written
PyTorch takes the KL divergence in closed form, as people do (it is less work).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

PIXELS, LATENT = 784, 50


def images(rows: int = 2000) -> np.ndarray:
    """Binary images (rows, 784), float32. No step depends on what they show, so they are drawn, not loaded."""
    rng = np.random.default_rng(0)
    return (rng.random((rows, PIXELS)) < rng.random(PIXELS) ** 3).astype(np.float32)


class Encoder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(PIXELS, hidden)
        self.loc = nn.Linear(hidden, LATENT)
        self.log_scale = nn.Linear(hidden, LATENT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = softplus(self.inner(x))
        return self.loc(h), self.log_scale(h)


class Decoder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(LATENT, hidden)
        self.logits = nn.Linear(hidden, PIXELS)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(softplus(self.inner(z)))


class VAE(nn.Module):
    """In Pyro, and beside it the loss as written by hand."""

    def __init__(self, hidden: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.decoder = Encoder(hidden), Decoder(hidden)

    def model(self, x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            loc, log_scale = self.encoder(x)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def forward(self, x: Tensor, size: int) -> Tensor:
        """The loss written by hand: for the whole data set, as Pyro and NumPyro scale it."""
        loc, log_scale = self.encoder(x)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        misfit = binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        divergence = 0.5 * (loc**2 + (2 * log_scale).exp() - 1).sum() - log_scale.sum()
        return size / len(x) * (misfit + divergence)


def numpyro_pair(vae: VAE, x: np.ndarray, batch: int) -> tuple[Any, Any]:
    """The same pair in NumPyro, from the same initial weights; its plate draws the minibatch."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist

    start = {n: jnp.asarray(p.detach().numpy()) for n, p in vae.named_parameters()}
    data = jnp.asarray(x)

    def linear(name: str, value: Any) -> Any:
        weight, bias = (numpyro.param(f"{name}.{kind}", start[f"{name}.{kind}"]) for kind in ("weight", "bias"))
        return value @ weight.T + bias

    def model() -> None:
        with numpyro.plate("rows", len(x), subsample_size=batch) as rows:
            z = numpyro.sample("z", ndist.Normal(jnp.zeros((batch, LATENT)), 1.0).to_event(1))
            logits = linear("decoder.logits", jax.nn.softplus(linear("decoder.inner", z)))
            numpyro.sample("x", ndist.Bernoulli(logits=logits).to_event(1), obs=data[rows])

    def guide() -> None:
        with numpyro.plate("rows", len(x), subsample_size=batch) as rows:
            h = jax.nn.softplus(linear("encoder.inner", data[rows]))
            loc, log_scale = linear("encoder.loc", h), linear("encoder.log_scale", h)
            numpyro.sample("z", ndist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide
