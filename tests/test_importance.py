"""The importance-weighted objective: against Pyro's, by hand, its gradients, minibatches, what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor

from inference import fit
from inference.core.handlers import isolated
from inference.objectives import IWAE, Compiled
from ppl_models.models.vae import VAE

DRAWS = 1500
X = (torch.rand(12, 6, generator=torch.Generator().manual_seed(0)) > 0.5).double()


def pair() -> VAE:
    torch.manual_seed(1)
    return VAE(6, 2, hidden=(4,)).double()


def gradients(objective, made: VAE, **arguments) -> tuple[float, dict[str, Tensor]]:
    with isolated(4):
        for p in made.parameters():
            p.grad = None
        loss = objective.loss_and_grads(made.model, made.guide, **{"x": X, **arguments})
    return float(loss), {n: p.grad.clone() for n, p in made.named_parameters()}


@pytest.mark.parametrize("k", [1, 2, 7])
def test_on_all_rows_it_is_pyros_bound(k: int) -> None:
    theirs = RenyiELBO(alpha=0.0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)
    if k == 1:
        theirs = Trace_ELBO(num_particles=1, max_plate_nesting=1)
    (expected, slopes), (got, ours) = gradients(theirs, pair()), gradients(IWAE(k), pair())
    assert got == pytest.approx(expected, rel=1e-9)
    for name, g in slopes.items():
        torch.testing.assert_close(ours[name], g)
    made = pair()
    with isolated(4):
        assert IWAE(k).loss(made.model, made.guide, X) == pytest.approx(expected, rel=1e-9)


def test_minibatches_are_unbiased_where_pyros_bound_is_not() -> None:
    made, k = pair(), 6
    rows = torch.arange(3)

    def mean(objective, **arguments) -> Tensor:
        with isolated(0):
            losses = [objective.loss(made.model, made.guide, **arguments) for _ in range(DRAWS)]
        return torch.tensor(losses).double()

    whole = mean(IWAE(k), x=X[:3])
    part = mean(IWAE(k), x=X[:3], size=12, rows=rows)
    error = 4 * float((part.var() / DRAWS + 16 * whole.var() / DRAWS).sqrt())
    assert abs(float(part.mean() - 4 * whole.mean())) < error
    theirs = RenyiELBO(alpha=0.0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)
    assert abs(float(mean(theirs, x=X[:3], size=12, rows=rows).mean() - 4 * whole.mean())) > 5 * error


@pytest.mark.parametrize("doubly", [False, True])
def test_a_minibatch_counts_for_all_rows(doubly: bool) -> None:
    made, objective = pair(), IWAE(4, doubly=doubly)
    loss, slopes = gradients(objective, made, x=X[:3])
    scaled, steeper = gradients(objective, made, x=X[:3], size=12, rows=torch.arange(3))
    assert scaled == pytest.approx(4 * loss)
    for name, g in slopes.items():
        torch.testing.assert_close(steeper[name], 4 * g)


def test_the_doubly_reparameterised_gradient_has_the_same_mean_and_less_noise() -> None:
    made, k, count = pair(), 8, 1000
    found: list[dict[str, Tensor]] = []
    for objective in (IWAE(k), IWAE(k, doubly=True)):
        each = []
        with isolated(2):
            for _ in range(count):
                for p in made.parameters():
                    p.grad = None
                objective.loss_and_grads(made.model, made.guide, X)
                each.append({n: p.grad.flatten() for n, p in made.named_parameters()})
        halves = {h: [n for n in each[0] if h in n] for h in ("encoder", "decoder")}
        found.append({h: torch.stack([torch.cat([g[n] for n in names]) for g in each]) for h, names in halves.items()})
    plain, doubly = found
    torch.testing.assert_close(doubly["decoder"], plain["decoder"])
    gap = doubly["encoder"] - plain["encoder"]
    assert float((gap.mean(0) / (gap.std(0) / count**0.5)).abs().max()) < 4.5
    assert doubly["encoder"].var(0).sum() < 0.4 * plain["encoder"].var(0).sum()


def test_more_particles_make_a_tighter_bound_below_the_truth() -> None:
    x = torch.tensor([0.5, -1.0, 2.0]).double()

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.2 * x, 1.0))

    truth = float(dist.Normal(0.0, math.sqrt(2)).log_prob(x).sum())
    with isolated(0):
        bounds = [-sum(IWAE(k).loss(model, guide, x) for _ in range(400)) / 400 for k in (1, 4, 50)]
    assert bounds[0] < bounds[1] < bounds[2] < truth + 0.01
    assert bounds[2] > truth - 0.05


@pytest.mark.parametrize("doubly", [pytest.param(False, marks=pytest.mark.slow), True])
def test_it_runs_as_a_program(doubly: bool) -> None:
    runs = []
    for compiled in (False, True):
        made = pair()
        result = fit(made, X, IWAE(4, doubly=doubly), steps=30, batch=5, draws=1, compile=compiled, progress=False)
        runs.append(torch.as_tensor(result.losses))
        assert result.idata.attrs["execution"] == ("fused" if compiled else "eager")
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-6)


def test_bad_input_gets_one_line() -> None:
    with pytest.raises(ValueError, match="particles: expected an integer of at least 1, got 0"):
        IWAE(0)

    def outside(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def discrete(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.5).double()))

    for made, line in ((outside, "IWAE expected z in the plate of rows"), (discrete, "IWAE expected reparameterised")):
        with pytest.raises(ValueError, match=line), isolated(0):
            IWAE(2).loss_and_grads(made, made, X)
    assert Compiled(IWAE(2)).objective.num_particles == 2
