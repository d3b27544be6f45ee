"""BetaELBO and the divergences of latent sites: closed forms, floors, warmup, layers, collapse named."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from inference import fit
from inference.core.handlers import isolated
from inference.draws.kl import kl_by_site
from inference.objectives import BetaELBO
from inference.predict import latent_kl
from ppl_models.models.linear_factors import PPCA
from ppl_models.models.pair import Pair
from ppl_models.models.vae import VAE

X = torch.rand(12, 6, generator=torch.Generator().manual_seed(0)).double()
NORMAL = torch.distributions.Normal(0.0, 1.0)


def small(factors: int = 3) -> VAE:
    torch.manual_seed(3)
    return VAE(6, factors, hidden=(5,)).double()


def exact(pair: VAE, x: Tensor = X) -> Tensor:
    """KL of each row and factor from the standard normal, by torch."""
    distribution = pair.posterior(x).base_dist
    return torch.distributions.kl_divergence(torch.distributions.Normal(distribution.loc, distribution.scale), NORMAL)


def loss(pair: VAE, objective, seed: int = 1, **arguments) -> float:
    with isolated(seed):
        return objective.loss(pair.model, pair.guide, **(arguments or {"x": X}))


def gradients(pair: VAE, objective, **arguments) -> dict[str, Tensor]:
    pair.zero_grad()
    with isolated(1):
        objective.loss_and_grads(pair.model, pair.guide, **(arguments or {"x": X}))
    return {n: p.grad.clone() for n, p in pair.named_parameters()}


def test_with_beta_one_it_is_the_mean_field_elbo_and_its_gradient() -> None:
    pair = small()
    assert loss(pair, BetaELBO()) == pytest.approx(loss(pair, TraceMeanField_ELBO()), rel=1e-12)
    expected, got = gradients(pair, TraceMeanField_ELBO()), gradients(pair, BetaELBO())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_beta_weighs_the_divergence_alone() -> None:
    pair = small()
    with torch.no_grad():
        cost = float(exact(pair).sum())
    assert loss(pair, BetaELBO(4.0)) - loss(pair, BetaELBO()) == pytest.approx(3 * cost, rel=1e-9)
    assert loss(pair, BetaELBO(0.0)) - loss(pair, BetaELBO()) == pytest.approx(-cost, rel=1e-9)


def test_free_bits_floor_each_dimension_on_average_over_rows() -> None:
    pair = small()
    with torch.no_grad():
        means = exact(pair).mean(0)
    floor = float(means.sort().values[1])
    expected = len(X) * float((floor - means).clamp_min(0).sum())
    assert expected > 0
    assert loss(pair, BetaELBO(free_bits=floor)) - loss(pair, BetaELBO()) == pytest.approx(expected, rel=1e-9)
    # A floor above all: the divergence says nothing to the guide any more.
    high, none = gradients(pair, BetaELBO(free_bits=50.0)), gradients(pair, BetaELBO(0.0))
    for name, value in none.items():
        torch.testing.assert_close(high[name], value)


@pytest.mark.parametrize("settings", [{}, {"free_bits": 0.2}], ids=["plain", "floored"])
def test_minibatches_are_scaled_to_all_rows(settings) -> None:
    pair = small()
    twice = {"x": X, "size": 24, "rows": torch.arange(12)}
    assert loss(pair, BetaELBO(2.0, **settings), **twice) == pytest.approx(2 * loss(pair, BetaELBO(2.0, **settings)))


def test_particles_are_averaged() -> None:
    pair = small()
    apart = BetaELBO(2.0, num_particles=5, max_plate_nesting=1)
    together = BetaELBO(2.0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    one = BetaELBO(2.0)
    found = [sum(loss(pair, o, seed) for seed in range(300)) / 300 for o in (one, apart, together)]
    assert found[1] == pytest.approx(found[0], rel=0.01)
    assert found[2] == pytest.approx(found[0], rel=0.01)


@pytest.mark.parametrize("compile", [False, True])
def test_the_warmup_rises_by_its_own_steps(compile: bool) -> None:
    pair = small()
    with torch.no_grad():
        cost = float(exact(pair).sum())
    still = partial(fit, steps=8, learning_rate=1e-12, draws=2, progress=False, seed=5, compile=compile)
    warm = still(small(), X, BetaELBO(2.0, warmup=4)).losses
    full = still(small(), X, BetaELBO(2.0)).losses
    expected = [(k / 4 - 1) * 2 * cost for k in (1, 2, 3)] + [0.0] * 5
    assert (warm - full).tolist() == pytest.approx(expected, abs=1e-4)


class TwoLayers(Pair):
    """z_2 ~ N(0, 1), z_1 ~ N(z_2, 1), x ~ N(z_1, 1); the guide draws z_1, then z_2."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.6).double())

    def model(self, x=None, *, size=None, rows=None, **_):
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            top = pyro.sample("z_2", dist.Normal(torch.zeros(()).double(), 1.0))
            z = pyro.sample("z_1", dist.Normal(top, 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x=None, *, size=None, rows=None, **_):
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            z = pyro.sample("z_1", dist.Normal(self.slope * x, 0.8))
            pyro.sample("z_2", dist.Normal(0.5 * z, 0.7))


def test_a_layer_that_the_guide_draws_first_is_not_taken_in_closed_form() -> None:
    pair, x = TwoLayers(), X[:, 0]
    with isolated(0):
        guide = poutine.trace(pair.guide).get_trace(x)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
        found = kl_by_site(model, guide)
    z, top = guide.nodes["z_1"]["value"], guide.nodes["z_2"]["value"]
    expected = dist.Normal(pair.slope * x, 0.8).log_prob(z) - dist.Normal(top, 1.0).log_prob(z)
    torch.testing.assert_close(found["z_1"], expected)
    torch.testing.assert_close(found["z_2"], torch.distributions.kl_divergence(dist.Normal(0.5 * z, 0.7), NORMAL))
    # Its mean is the ELBO of any estimator; closed form by closed form it would be off by the covariance of the layers.
    with isolated(0), torch.no_grad():
        many = x.repeat(4000)
        one, other = (o.loss(pair.model, pair.guide, many) / 4000 for o in (BetaELBO(), Trace_ELBO()))
        with pytest.warns(UserWarning, match="mean field"):
            biased = TraceMeanField_ELBO().loss(pair.model, pair.guide, many) / 4000
    assert one == pytest.approx(other, abs=0.1)
    assert biased - one == pytest.approx(12 * 0.5 * 0.8**2, abs=0.1)


def test_the_table_of_latents_is_that_of_the_guide() -> None:
    pair = small()
    result = fit(pair, X, BetaELBO(), steps=0, draws=5, progress=False)
    with torch.no_grad():
        cost, spread = exact(pair).mean(0), pair.encode(X).var(0)
    table = result.diagnosis.latent_kl
    assert list(table.index) == ["z[0]", "z[1]", "z[2]"]
    assert table["kl"].tolist() == pytest.approx(cost.tolist())
    assert table["variance"].tolist() == pytest.approx(spread.tolist())
    assert table["active"].tolist() == (spread > 0.01).tolist()
    other = latent_kl(result, X[:4])
    with torch.no_grad():
        assert other["kl"].tolist() == pytest.approx(exact(pair, X[:4]).mean(0).tolist())


def test_collapse_is_named() -> None:
    pair = small()
    with torch.no_grad():
        last = pair.encoder[-1]
        last.weight.zero_()
        last.bias.zero_()
        last.weight[0] = 3.0
    part = fit(pair, X, steps=0, draws=5, progress=False).diagnosis
    assert any("z: 2 of 3 dimensions have collapsed to the prior" in line for line in part.advice)
    with torch.no_grad():
        last.weight.zero_()
    whole = fit(pair, X, steps=0, draws=5, progress=False).diagnosis
    assert any(line.startswith("z: posterior collapse") for line in whole.advice)
    with torch.no_grad():
        last.weight.fill_(2.0)
    assert not any("collapse" in line for line in fit(pair, X, steps=0, draws=5, progress=False).diagnosis.advice)


def test_a_posterior_whose_dimensions_hang_together_is_one_line() -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(1)).double() @ torch.randn(5, 5).double()
    pair = PPCA(5, 2).double().closed_form(x)
    table = fit(pair, x, steps=0, draws=5, progress=False).diagnosis.latent_kl
    with torch.no_grad():
        distribution = pair.posterior(x)
        prior = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
        expected = float(torch.distributions.kl_divergence(distribution, prior).mean())
    assert list(table.index) == ["z[0]"]
    assert float(table["kl"].iloc[0]) == pytest.approx(expected, rel=0.2)


def test_guides_without_sites_of_rows_have_no_table() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    assert fit((model, AutoNormal(model)), X[:, 0], steps=2, draws=5, progress=False).diagnosis.latent_kl is None


def discrete_guide(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.full((12,), 0.4).double())))


def discrete_model(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((12,), 0.5).double()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def joint_guide() -> tuple:
    pair = TwoLayers()
    return pair.model, AutoMultivariateNormal(pair.model)


REFUSED = [
    (lambda: BetaELBO(-1.0), "beta: expected zero or a positive number, got -1.0"),
    (lambda: BetaELBO(free_bits=-0.1), "free_bits: expected zero or a positive number, got -0.1"),
    (lambda: BetaELBO(warmup=-3), "warmup: expected an integer of at least 0, got -3"),
    (
        lambda: fit((discrete_model, discrete_guide), X[:, 0], BetaELBO(), steps=3, progress=False),
        "guide: BetaELBO expected reparameterised draws of z, got Bernoulli",
    ),
    (
        lambda: fit(joint_guide(), X[:, 0], BetaELBO(), steps=3, progress=False),
        "guide: BetaELBO expected latent sites of the model, got _AutoMultivariateNormal_latent",
    ),
]


@pytest.mark.parametrize(("call", "line"), REFUSED, ids=[line[:24] for _, line in REFUSED])
def test_bad_input_gets_one_line(call, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        call()


@pytest.mark.parametrize("case", ["model's mask", "guide's mask", "model's scale", "guide's scale", "masks of both"])
def test_masks_and_scales_of_either_half_count_as_in_the_elbo(case: str) -> None:
    """At beta 1 the mean loss is that of the ELBO: E[a log q - b log p] of each row, by the moments of a normal."""
    count = 2000
    x = torch.linspace(-1, 1, count).double()
    keep = torch.arange(count) % 3 > 0

    def handled(half: str, site):
        if "mask" in case and (half in case or "both" in case):
            return poutine.mask(mask=keep)
        return poutine.scale(scale=2.5) if half in case else poutine.scale(scale=1.0)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", count):
            with handled("model", "z"):
                z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(0 * z + x.mean(), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", count), handled("guide", "z"):
            pyro.sample("z", dist.Normal(0.5 + x, 0.6))

    weight = {half: torch.ones(count).double() for half in ("model", "guide")}
    for half in weight:
        if "mask" in case and (half in case or "both" in case):
            weight[half] = keep.double()
        elif half in case:
            weight[half] = torch.full((count,), 2.5).double()
    log_q = -0.5 * math.log(2 * math.pi * 0.36) - 0.5
    log_p = -0.5 * math.log(2 * math.pi) - 0.5 * ((0.5 + x).square() + 0.36)
    likelihood = dist.Normal(x.mean(), 1.0).log_prob(x).sum()
    expected = (weight["guide"] * log_q - weight["model"] * log_p).sum() - likelihood
    with isolated(0):
        got = torch.tensor([BetaELBO().loss(model, guide, x) for _ in range(40)], dtype=torch.float64)
    assert float(got.mean()) == pytest.approx(float(expected), abs=5 * float(got.std()) / 40**0.5 + 1e-6)
    with isolated(0), torch.no_grad():
        guided = poutine.trace(guide).get_trace(x)
        found = kl_by_site(poutine.trace(poutine.replay(model, trace=guided)).get_trace(x), guided)["z"]
    assert bool((found[~keep] == 0).all()) == ("mask" in case)
    assert float(found[keep].min()) > 0


def test_free_bits_are_those_of_the_rows_that_are_not_masked() -> None:
    x, keep = torch.zeros(8).double(), torch.arange(8) < 2

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 8), poutine.mask(mask=keep):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 8), poutine.mask(mask=keep):
            pyro.sample("z", dist.Normal(0.1 + x, 1.0))

    with isolated(0):
        floored = BetaELBO(free_bits=0.5).loss(model, guide, x)
    with isolated(0):
        plain = BetaELBO().loss(model, guide, x)
    # Two rows of KL 0.005 count as 0.5 each.
    assert floored - plain == pytest.approx(2 * (0.5 - 0.005))
