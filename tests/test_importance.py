"""The importance-weighted objective: against Pyro's, by hand, its gradients, minibatches, what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor

from inference import fit
from inference.core.handlers import isolated
from inference.objectives import IWAE, RWS, VIMCO, Compiled, WakeSleep
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
    made, k, count = pair(), 8, 300
    with torch.no_grad():
        # A guide near the posterior: far from it gradients have tails too heavy for their moments to be compared.
        for p in made.parameters():
            p *= 0.3
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
    assert float((gap.mean(0) / (gap.std(0) / count**0.5)).abs().max()) < 5
    assert doubly["encoder"].var(0).sum() < 0.05 * plain["encoder"].var(0).sum()


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


def chain(x: Tensor) -> None:
    """z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1) per row."""
    with pyro.plate("rows", len(x)):
        first = pyro.sample("z1", dist.Normal(torch.zeros(()).double(), 1.0))
        second = pyro.sample("z2", dist.Normal(first, 1.0))
        pyro.sample("x", dist.Normal(second, 1.0), obs=x)


def chained(x: Tensor) -> None:
    """z1 | x and z2 | z1: the second site's density depends on the draws of the first."""
    a, b = (pyro.param(n, torch.tensor(v).double()) for n, v in (("a", 0.5), ("b", 0.3)))
    with pyro.plate("rows", len(x)):
        first = pyro.sample("z1", dist.Normal(a * x, 0.8))
        pyro.sample("z2", dist.Normal(b * first + 0.4 * x, 0.9))


def test_the_doubly_reparameterised_gradient_is_unbiased_for_guides_with_dependent_sites() -> None:
    x = torch.full((4000,), 1.2).double()
    slopes = {}
    for doubly in (False, True):
        with isolated(5):
            found = []
            for _ in range(15):
                IWAE(5, doubly=doubly).loss_and_grads(chain, chained, x)
                params = [pyro.get_param_store()._params[n] for n in ("a", "b")]
                found.append(torch.stack([p.grad.clone() for p in params]) / len(x))
                for p in params:
                    p.grad = None
            slopes[doubly] = torch.stack(found)
    (plain, noise), (ours, less) = ((s.mean(0), s.std(0) / len(s) ** 0.5) for s in (slopes[False], slopes[True]))
    assert ((ours - plain).abs() < 6 * (noise.square() + less.square()).sqrt()).all(), (ours, plain)
    assert noise.max() < 0.02


PENALTY = 7.0
ONCE = {
    "IWAE": lambda: IWAE(3),
    "DReG": lambda: IWAE(3, doubly=True),
    "VIMCO": lambda: VIMCO(3),
    "RWS": lambda: RWS(3),
    "WakeSleep": WakeSleep,
}


def with_sites_outside(where: str):
    """A pair of independent rows, whose model also has a penalty and an observed total outside of the plate."""

    def model(x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        w = pyro.param("w", torch.tensor(0.7).double())
        if "before" in where:
            pyro.deterministic("twice", 2 * w)
            pyro.factor("penalty", -PENALTY * w.square())
        with pyro.plate("rows", size or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(w + z, 1.0), obs=x)
        if "after" in where:
            pyro.sample("total", dist.Normal(w, 0.1), obs=torch.tensor(1.0).double())

    def guide(x: Tensor, size: int | None = None, rows: Tensor | None = None, observations: object = None) -> None:
        # Rows of the sleep phase are observations beside the data.
        slope = pyro.param("slope", torch.tensor(0.4).double())
        with pyro.plate("rows", size or len(x), subsample=rows):
            pyro.sample("z", dist.Normal(slope * x, 0.8))

    return model, guide


@pytest.mark.parametrize("objective", ONCE.values(), ids=list(ONCE))
@pytest.mark.parametrize("batch", [None, 3])
def test_what_lies_outside_of_the_plate_of_rows_counts_once(objective, batch) -> None:
    """Its share of the loss and of the gradient is that of the density itself, whatever the minibatch."""
    x = torch.linspace(-1, 2, 12).double()
    rows = None if batch is None else torch.arange(batch)
    named = {"x": x} if rows is None else {"x": x[rows], "size": len(x), "rows": rows}

    def run(where: str) -> tuple[float, float]:
        model, guide = with_sites_outside(where)
        with isolated(3):
            loss = objective().loss_and_grads(model, guide, **named)
            assert loss == pytest.approx(float(evaluated(model, guide, objective)))
            return float(loss), float(pyro.get_param_store()._params["w"].grad)

    def evaluated(model, guide, objective) -> float:
        with isolated(3):
            return objective().loss(model, guide, **named)

    w = torch.tensor(0.7).double().requires_grad_()
    penalty, total = PENALTY * w.square(), -dist.Normal(w, 0.1).log_prob(torch.tensor(1.0).double())
    bare, slope = run("")
    for where, extra in (("before", penalty), ("after", total), ("before and after", penalty + total)):
        loss, steeper = run(where)
        assert loss - bare == pytest.approx(float(extra.detach()))
        assert steeper - slope == pytest.approx(float(torch.autograd.grad(extra, w, retain_graph=True)[0]))


def test_a_latent_site_of_the_model_alone_is_refused() -> None:
    def more(x: Tensor) -> None:
        pyro.sample("s", dist.HalfNormal(torch.ones(()).double()))
        chain(x)

    def fewer(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z1", dist.Normal(torch.zeros(()).double(), 1.0)), 1.0), obs=x)

    x = torch.zeros(4).double()
    for objective in (IWAE(2), IWAE(2, doubly=True), VIMCO(2), RWS(2), WakeSleep()):
        for call in (objective.loss_and_grads, objective.loss):
            with (
                isolated(0),
                pytest.raises(ValueError, match="guide: .* expected all latent sites of the model, .* s$"),
            ):
                call(more, chained, x)
            with isolated(0), pytest.raises(ValueError, match="guide: .* expected latent sites of the model, got z2"):
                call(fewer, chained, x)


def test_a_site_outside_of_the_plate_that_reads_the_latents_is_refused() -> None:
    def coupled(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("coupling", z.sum(-1, keepdim=True) if z.dim() > 1 else z.sum())

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 0.8))

    with isolated(0), pytest.raises(ValueError, match="not to depend on the latent sites in it, got coupling"):
        IWAE(3).loss_and_grads(coupled, guide, torch.zeros(4).double())


def test_scales_of_some_sites_are_exponents_and_a_scale_of_all_multiplies_the_bound() -> None:
    x = torch.linspace(-1, 2, 5).double()

    def model(x: Tensor, beta: float, all_of_it: float | Tensor) -> None:
        with poutine.scale(scale=all_of_it), pyro.plate("rows", len(x)):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, beta: float, all_of_it: float | Tensor) -> None:
        with poutine.scale(scale=all_of_it), pyro.plate("rows", len(x)), poutine.scale(scale=beta):
            pyro.sample("z", dist.Normal(0.4 * x, 0.8))

    def loss(beta, all_of_it) -> float:
        with isolated(3):
            return IWAE(6).loss(model, guide, x=x, beta=beta, all_of_it=all_of_it)

    with isolated(3):
        z = dist.Normal(0.4 * x, 0.8).expand([6, 5]).sample()
    gap = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.4 * x, 0.8).log_prob(z)
    tempered = 0.25 * gap + dist.Normal(z, 1.0).log_prob(x)
    expected = -(tempered.logsumexp(0) - math.log(6)).sum()
    assert loss(0.25, 1.0) == pytest.approx(float(expected))
    assert loss(torch.tensor(0.25), 1.0) == pytest.approx(float(expected))
    assert loss(1.0, 3.0) == pytest.approx(3 * loss(1.0, 1.0))
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 5.0]).double()
    bounds = (gap + dist.Normal(z, 1.0).log_prob(x)).logsumexp(0) - math.log(6)
    assert loss(1.0, weights) == pytest.approx(float(-(weights * bounds).sum()))
