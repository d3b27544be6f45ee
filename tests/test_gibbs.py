"""Gibbs sampling: conditionals, data augmentation against quadrature, and what is refused."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from scipy.stats import norm
from test_sigmoid_belief import net
from torch import Tensor

from inference import sample
from inference.core.handlers import isolated
from inference.kernels import ChEES, Gibbs
from ppl_models.models.bayesian_network import BayesianNetwork
from ppl_models.models.mixture import BernoulliMixture
from ppl_models.models.sigmoid_belief import SigmoidBeliefNet

quiet = partial(sample, progress=False)


@pytest.mark.parametrize("seed", range(9))
def test_a_pairs_own_conditional_is_that_of_its_density(seed: int, alone) -> None:
    pair, x = net(seed, SigmoidBeliefNet)
    kernel = Gibbs(partial(pair.model, x), num_chains=3)
    kernel.setup(0)
    values = {**{n: v for n, v in kernel.initial_params.items()}, "x": x}
    with torch.no_grad():
        for name, units in zip(pair.sites, pair.layers, strict=True):
            own, scored = pair.conditional(name, values), kernel.score(name, values)
            one, other = next(own), next(scored)
            for k in range(units):
                torch.testing.assert_close(one.log_softmax(-1), other.log_softmax(-1))
                drawn = (torch.rand(3, 4) < 0.5).double()
                if k < units - 1:
                    one, other = own.send(drawn), scored.send(drawn)


def two_groups(x: Tensor) -> None:
    """Two normal components a known distance apart, of unknown share."""
    share = pyro.sample("share", dist.Beta(torch.tensor(2.0).double(), 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share))
        pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)


def exactly(x: Tensor) -> tuple[float, float, np.ndarray]:
    """Mean and standard deviation of the share, and the probability of each label, by quadrature."""
    grid = np.linspace(0, 1, 20_001)[1:-1]
    one, zero = norm.pdf(x[:, None], 2, 1), norm.pdf(x[:, None], 0, 1)
    mixed = grid * one + (1 - grid) * zero
    density = grid * (1 - grid) * np.exp(np.log(mixed).sum(0))
    weight = density / density.sum()
    mean = (weight * grid).sum()
    return mean, float(np.sqrt((weight * grid**2).sum() - mean**2)), (weight * grid * one / mixed).sum(1)


DATA = torch.tensor([-0.7, 0.1, 0.4, 1.2, 1.9, 2.2, 2.6, 3.1]).double()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "compiled"])
def test_data_augmentation_has_the_posterior_that_summing_out_has(compiled: bool, alone) -> None:
    mean, sd, labels = exactly(DATA.numpy())
    result = quiet(two_groups, DATA, partial(Gibbs), draws=400, warmup=200, chains=100, compile=compiled)
    assert result.method == "Gibbs"
    assert result.idata.attrs["execution"] == ("fused" if compiled else "traced")
    table = result.diagnosis.table
    assert result.diagnosis.worst_r_hat < 1.01
    error = float(table.loc["share", "mcse_mean"])
    assert error < 0.02 * sd
    assert float(result.draws["share"].mean()) == pytest.approx(mean, abs=5 * error)
    assert float(result.draws["share"].std()) == pytest.approx(sd, rel=0.03)
    assert result.draws["z"].double().mean(0).numpy() == pytest.approx(labels, abs=0.02)
    summed = quiet(two_groups, DATA, ChEES, draws=400, warmup=200, chains=100, compile=False)
    assert float(summed.draws["share"].mean()) == pytest.approx(mean, abs=0.02 * sd * 5)


def test_the_same_seed_gives_the_same_chains_and_more_are_drawn(alone) -> None:
    one, two, other = (quiet(two_groups, DATA, Gibbs, draws=8, warmup=8, chains=4, seed=s) for s in (1, 1, 2))
    for name, value in one.draws.items():
        assert torch.equal(value, two.draws[name])
        assert not torch.equal(value, other.draws[name])
    more, again = one.draw(9), one.draw(9)
    assert more["z"].shape == (9, 8) and torch.equal(more["z"], again["z"])
    assert not torch.equal(more["share"], one.draws["share"][:9])


def test_it_runs_in_plain_pyro(alone) -> None:
    kernel = Gibbs(two_groups, num_chains=200, jit_compile=False)
    mcmc = MCMC(kernel, num_samples=100, warmup_steps=100, disable_progbar=True)
    mcmc.run(DATA)
    draws = mcmc.get_samples()
    mean, _, labels = exactly(DATA.numpy())
    assert draws["share"].shape == (100, 200) and draws["z"].shape == (100, 200, 8)
    assert float(draws["share"].mean()) == pytest.approx(mean, abs=0.01)
    assert draws["z"].double().mean((0, 1)).numpy() == pytest.approx(labels, abs=0.02)
    assert kernel.diagnostics()["divergences"] == {}


def test_finite_sites_in_no_plate_in_nested_plates_and_of_several_states(alone) -> None:
    table = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).double()
    seen = torch.tensor([[0.2, 1.4], [1.9, 0.1], [0.8, 2.3]]).double()

    def model() -> None:
        kind = pyro.sample("kind", dist.Bernoulli(torch.tensor(0.4).double()))
        with pyro.plate("columns", 2, dim=-1), pyro.plate("rows", 3, dim=-2):
            z = pyro.sample("z", dist.Categorical(table[kind.long()]))
            pyro.sample("x", dist.Normal(z.double(), 1.0), obs=seen)

    emission = torch.distributions.Normal(torch.arange(3.0).double(), 1.0).log_prob(seen[..., None]).exp()
    evidence = torch.stack([(emission * table[k]).sum(-1).prod() for k in (0, 1)]) * torch.tensor([0.6, 0.4])
    kinds = evidence / evidence.sum()
    exact = sum(kinds[k] * (emission * table[k]) / (emission * table[k]).sum(-1, keepdim=True) for k in (0, 1))
    result = quiet(model, {}, Gibbs, chains=4000, warmup=30, draws=4)
    last = {n: v.unflatten(0, (4000, 4))[:, -1] for n, v in result.draws.items()}
    assert float(last["kind"].double().mean()) == pytest.approx(float(kinds[1]), abs=0.04)
    for k in range(3):
        share = (last["z"] == k).double().mean(0)
        assert share.numpy() == pytest.approx(exact[..., k].numpy(), abs=0.04)


def test_a_network_with_missing_states_is_completed_as_queries_say(alone) -> None:
    net = BayesianNetwork(
        {"rain": [], "sprinkler": ["rain"], "wet": ["sprinkler", "rain"]},
        tables={
            "rain": torch.tensor([0.8, 0.2]),
            "sprinkler": torch.tensor([[0.6, 0.4], [0.95, 0.05]]),
            "wet": torch.tensor([[[0.95, 0.05], [0.2, 0.8]], [[0.1, 0.9], [0.01, 0.99]]]),
        },
        missing=True,
    )
    x = torch.tensor([[torch.nan, torch.nan, 1.0], [1.0, torch.nan, 0.0]])
    result = quiet(net, x, chains=4000, warmup=30, draws=4)
    assert result.method == "Gibbs"
    rain, sprinkler = (result.draws[n].unflatten(0, (4000, 4))[:, -1].float().mean(0) for n in ("rain", "sprinkler"))
    assert float(rain[0]) == pytest.approx(float(net.query("rain", {"wet": 1})[1]), abs=0.04)
    assert float(sprinkler[0]) == pytest.approx(float(net.query("sprinkler", {"wet": 1})[1]), abs=0.04)
    assert float(rain[1]) == 1.0
    assert float(sprinkler[1]) == pytest.approx(float(net.query("sprinkler", {"wet": 0, "rain": 1})[1]), abs=0.02)


@pytest.mark.slow
def test_a_mixture_of_the_zoo_by_augmentation(alone) -> None:
    torch.manual_seed(0)
    rows = torch.cat([torch.rand(30, 6) < 0.9, torch.rand(20, 6) < 0.1]).double()
    pair = BernoulliMixture(6, components=2, alpha=1.0).double()
    drawn = quiet(pair, rows, Gibbs, draws=150, warmup=150, chains=32, compile=False)
    summed = quiet(pair, rows, partial(ChEES), draws=150, warmup=150, chains=32, compile=False)
    # Labels may be exchanged between chains: what they cannot tell is compared.
    spread = {n: r.draws["probs"].sort(1).values.mean(0) for n, r in (("drawn", drawn), ("summed", summed))}
    torch.testing.assert_close(spread["drawn"], spread["summed"], atol=0.02, rtol=0)


def test_labels_alone_are_judged_by_their_density(alone) -> None:
    def model() -> None:
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.8])))

    result = quiet(model, {}, draws=50, warmup=10, chains=8)
    assert list(result.diagnosis.table.index) == ["lp"]
    assert result.diagnosis.worst_r_hat < 1.05
    assert result.diagnosis.divergences == 0


def dependent() -> None:
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    pyro.sample("total", dist.Normal(z.sum(-1, keepdim=True).squeeze(-1) ** 2, 1.0), obs=torch.tensor(3.0))


FIELD = torch.tensor([0.9, -0.3, 0.4, -1.1]).double()


def energy(z: Tensor) -> Tensor:
    """Log weight of a ring of four spins, per spin: each couples to its left neighbour."""
    spins = 2 * z - 1
    return 0.8 * spins * spins.roll(1, -1) + FIELD * spins


def ring() -> None:
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5).double()))
        pyro.factor("coupling", energy(z))


def ring_of_one_event() -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.full((4,), 0.5).double()).to_event(1))
    pyro.factor("coupling", energy(z).sum(-1))


def neighbours() -> None:
    """Coupled only where two rare states meet."""
    with pyro.plate("rows", 6):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.98, 0.01, 0.01])))
        pyro.factor("coupling", 2.0 * ((z == 2) & (z.roll(1, -1) == 2)))


def no_two() -> None:
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.factor("hard", torch.where((z == 1) & (z.roll(1, -1) == 1), -torch.inf, 0.0))


def table_of_sums() -> None:
    """Elements of a row are coupled through what the row observes."""
    with pyro.plate("rows", 3, dim=-2):
        with pyro.plate("columns", 2, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=torch.ones(3, 1))


def test_the_units_of_an_event_may_be_coupled(alone) -> None:
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 4)
    weights = energy(states).sum(-1).softmax(0)
    exact = weights @ states
    result = quiet(ring_of_one_event, {}, chains=4000, warmup=40, draws=4)
    last = result.draws["z"].unflatten(0, (4000, 4))[:, -1]
    error = (exact * (1 - exact) / 4000).sqrt()
    assert ((last.mean(0) - exact).abs() < 4.5 * error).all()


def unplated() -> None:
    pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(3)))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: quiet(dependent, {}), "z: expected conditionally independent elements of rows, got"),
        (lambda: quiet(ring, {}), "z: expected conditionally independent elements of rows, got .* with to_event"),
        (lambda: quiet(neighbours, {}), "z: expected conditionally independent elements of rows, got"),
        (lambda: quiet(no_two, {}), "z: expected conditionally independent elements of rows, got"),
        (lambda: quiet(table_of_sums, {}), "z: expected conditionally independent elements of rows, columns, got"),
        (lambda: quiet(unplated, {}), "z: expected a plate for each batch dimension, got none for dimension 0"),
        (
            lambda: Gibbs(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))).setup(0),
            "model: Gibbs expected a finite latent site, got x; use ChEES or NUTS",
        ),
        (lambda: Gibbs(two_groups, num_chains=0), "num_chains: expected an integer of at least 1, got 0"),
        (
            lambda: quiet(SigmoidBeliefNet(3, (4,)), torch.zeros(2, 3), NUTS),
            "z_1: an event of 4 finite units cannot be summed out; use kernel=Gibbs",
        ),
        (
            lambda: quiet(lambda: pyro.sample("z", dist.Bernoulli(torch.tensor(0.5))), {}, NUTS),
            "model: expected a continuous latent site to sample, got z; use kernel=Gibbs",
        ),
    ],
)
def test_what_cannot_be_sampled_is_said_in_one_line(call, said: str) -> None:
    with isolated(0), pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)
