"""Every quantity of many draws is that of one draw: entries of the zoo, and models as Pyro users write them.

The reference is plain Pyro: the model or guide is traced for one draw after another. Where a site would be drawn at
random, both runs take a central value of it instead, so that predictions can be compared at float precision.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import Case
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.poutine.messenger import Messenger
from torch import Tensor

from inference.core.bound import BoundPair, bind
from inference.core.handlers import isolated
from inference.draws import scoring
from inference.draws.mapping import mapped
from ppl_models.zoo.entries import ZOO

DRAWS = 7
Model = Callable[..., Any]
torch_y = torch.linspace(-1.0, 2.0, 5)


class Central(Messenger):
    """A value in the middle for each site that would be drawn at random."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None or type(msg["fn"]).__name__ == "_Subsample":
            return
        fn = msg["fn"]
        if fn.has_enumerate_support:
            msg["value"] = fn.enumerate_support(expand=True)[-1]
        else:
            msg["value"] = _middle(fn)
        msg["done"] = True


def _middle(fn: Any) -> Tensor:
    try:
        mean = fn.mean
    except NotImplementedError:
        return torch.ones(fn.shape())
    # A Cauchy distribution has no mean, and a mean of counts need not be a count.
    mean = torch.nan_to_num(mean, 1.0, 1.0, 1.0)
    return mean.round() if fn.support.is_discrete else mean


def draw_by_draw(bound: BoundPair, half: Model, draws: Mapping[str, Tensor], count: int) -> list[Any]:
    """A trace of a half for each draw, by plain Pyro."""
    singles = [{n: v[k] for n, v in draws.items()} for k in range(count)]
    with Central():
        return [poutine.trace(poutine.condition(half, single)).get_trace(**bound.arguments()) for single in singles]


def same(got: Tensor, expected: list[Any]) -> None:
    truth = torch.stack([torch.as_tensor(e).detach() for e in expected]).to(got.dtype)
    torch.testing.assert_close(got.detach(), truth.reshape(got.shape), rtol=2e-5, atol=2e-5)


def check(
    bound: BoundPair, draws: dict[str, Tensor], summed: Callable[[dict[str, Tensor]], float] | None = None
) -> None:
    """Compare densities, deterministic sites and predictions of draws with plain Pyro's, draw by draw."""
    count = len(next(iter(draws.values()))) if draws else 1
    observed = bound.select("observed")
    if summed is None:
        traces = draw_by_draw(bound, bound.model, draws, count)
        same(scoring.log_joint(bound, draws), [t.log_prob_sum() for t in traces])
        for name, density in scoring.log_likelihood_by_site(bound, draws).items():
            # The values of rows are without what weighs them, as the evidence is.
            for t in traces:
                t.compute_log_prob()
            shape, nodes = density.shape[1:], [t.nodes[name] for t in traces]
            same(density, [(n["log_prob"] / torch.as_tensor(n["scale"])).expand(shape) for n in nodes])
        for name, value in scoring.latent_functions(bound, draws).items():
            same(value, [t.nodes[name]["value"] for t in traces])
    else:
        same(scoring.log_joint(bound, draws), [summed({n: v[k] for n, v in draws.items()}) for k in range(count)])
    generator = bound.generator()
    with Central():
        predicted = scoring.draw_sites(generator, draws, count)
    traces = draw_by_draw(generator, generator.model, draws, count)
    for name in observed:
        same(predicted[name], [t.nodes[name]["value"].expand(bound.sites[name].shape) for t in traces])


def check_guide(bound: BoundPair) -> dict[str, Tensor]:
    """Compare the density of draws of the guide with plain Pyro's; return the draws."""
    draws, density = scoring.sample_guide(bound, DRAWS)
    if any(len(v.unique(dim=0)) == 1 for v in draws.values()):
        return draws
    if draws.keys() == {n for n in poutine.trace(bound.guide).get_trace(**bound.arguments()).stochastic_nodes}:
        same(density, [t.log_prob_sum() for t in draw_by_draw(bound, bound.guide, draws, DRAWS)])
    return draws


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    """Sets the type of new tensors for the length of a test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


# The zoo.


@pytest.mark.parametrize("name", ZOO)
def test_an_entry_of_the_zoo(name: str) -> None:
    case = Case(ZOO[name])
    if not case.likelihood:
        pytest.skip("no likelihood")
    with isolated(0), torch.no_grad():
        bound = case.bound
        for module in bound.modules:
            module.eval()
        draws = check_guide(bound) if bound.guide is not None else scoring.draw_sites(bound.generator(), {}, DRAWS)
        draws = {n: v for n, v in draws.items() if n in bound.select("latent")}
        if all(n in draws for n in bound.select("latent")):
            check(bound, draws)
        else:
            # Finite sites are summed out: the sum is compared by hand below, here with a single draw of the program.
            singles = [{n: v[k : k + 1] for n, v in draws.items()} for k in range(DRAWS)]
            same(scoring.log_joint(bound, draws), [scoring.log_joint(bound, s)[0] for s in singles])


# Models as Pyro users write them, for one draw.


def sums(y: Tensor) -> None:
    with pyro.plate("groups", 5):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
    pyro.deterministic("mean", t.mean())
    pyro.deterministic("softmax", torch.softmax(t, 0))
    pyro.deterministic("stack", torch.stack([t.sum(-1), 10 + t.sum(-1)]))
    pyro.deterministic("last", t[-1] - t[0])
    pyro.sample("zero", dist.Normal(t.sum(), 0.5), obs=torch.tensor(0.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(t, 1.0), obs=y)


def factors(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    pyro.factor("ridge", -1e-3 * (z**2).sum())


def nested(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("A", 5, dim=-2):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with pyro.plate("B", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(b + a.mean(), 1.0), obs=y[:, None].expand(5, 3))


def masked(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)), poutine.mask(mask=y > 0):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def scaled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with poutine.scale(scale=0.5), pyro.plate("rows", len(y)):
        pyro.sample("y", dist.StudentT(3.0, mu, 1.0), obs=y)


def recursion(y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    means = torch.zeros(len(y))
    for t in range(1, len(y)):
        means[t] = phi * y[t - 1] + 0.1 * means[t - 1]
    pyro.deterministic("means", means)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(means, 1.0), obs=y)


def sequential(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for k in pyro.plate("rows", len(y)):
        pyro.sample(f"y_{k}", dist.Normal(mu, 1.0), obs=y[k])


def regression(y: Tensor) -> None:
    X = torch.stack([torch.ones(len(y)), y**2], -1)
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.Gamma(2.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(X @ w, s), obs=y)


def bounded(y: Tensor) -> None:
    a = pyro.sample("a", dist.HalfCauchy(1.0))
    x = pyro.sample("x", dist.Uniform(0.0, a))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def correlated(y: Tensor) -> None:
    L = pyro.sample("L", dist.LKJCholesky(3, 2.0))
    d = pyro.sample("d", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", len(y)):
        rows = torch.stack([y, y + 1, y - 1], -1)
        pyro.sample("y", dist.MultivariateNormal(d, scale_tril=L), obs=rows)


def process(y: Tensor) -> None:
    x = torch.linspace(0.0, 1.0, len(y))
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    covariance = torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + torch.eye(len(y))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), covariance), obs=y)


def looked_up(y: Tensor) -> None:
    with pyro.plate("levels", 3):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    group = torch.arange(len(y)) % 3
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(level[group].exp()), obs=y.abs().round())


def indexed_by_a_mask(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    loc = mu * torch.ones(len(y))
    loc[y < 0] = 0.0
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def counted(y: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("rows", 2):
        pyro.sample("counts", dist.Multinomial(6, p), obs=torch.tensor([[1.0, 2, 3, 0], [6, 0, 0, 0]]))


def built_ahead(y: Tensor) -> None:
    mu = pyro.sample("mu", PRIOR)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y[:, None].expand(-1, 2))


PRIOR = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
PLAIN = [
    sums,
    factors,
    nested,
    masked,
    scaled,
    recursion,
    sequential,
    regression,
    bounded,
    correlated,
    process,
    looked_up,
    indexed_by_a_mask,
    counted,
    built_ahead,
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("model", PLAIN, ids=lambda m: m.__name__)
def test_a_plain_model(model: Model, dtype: torch.dtype, default_dtype: Callable[[torch.dtype], None]) -> None:
    default_dtype(dtype)
    with isolated(0), torch.no_grad():
        bound = bind(model, torch_y.to(dtype))
        draws = scoring.draw_sites(bound.generator(), {}, DRAWS)
        if model is not built_ahead:
            assert all(v.dtype is dtype for n, v in draws.items() if not bound.sites[n].discrete)
        check(bound, {n: v for n, v in draws.items() if n in bound.select("latent")})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "labels", [torch.tensor([1, 0, 1, 1]), np.array([True, False, True, True])], ids=["int", "bool"]
)
def test_labels_that_are_no_floats(labels: Any) -> None:
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    with isolated(0), torch.no_grad():
        bound = bind(model, labels)
        draws = {"p": torch.tensor([0.2, 0.5, 0.9])}
        check(bound, draws)
        same(scoring.log_joint(bound, draws), [3 * p.log() + (1 - p).log() for p in draws["p"]])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_an_autoguide_of_a_plain_model(family: Any) -> None:
    with isolated(0), torch.no_grad():
        bound = bind((nested, family(nested)), torch_y)
        check(bound, check_guide(bound))


def state_of_a_group(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("A", 5, dim=-2):
        z = pyro.sample("z", dist.Bernoulli(p))
        with pyro.plate("B", 3, dim=-1):
            pyro.sample("y", dist.Normal(torch.where(z > 0, 1.0, -1.0) * p, 1.0), obs=y[:, None].expand(5, 3))


def chain_of_states(y: Tensor) -> None:
    stay = pyro.sample("stay", dist.Beta(4.0, 2.0))
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.stack([stay, 1 - stay])[torch.stack([z, 1 - z], -1)]))
        pyro.sample(f"y_{t}", dist.Normal(z.to(y.dtype), 1.0), obs=y[t])


@pytest.mark.parametrize("model", [state_of_a_group, chain_of_states], ids=lambda m: m.__name__)
def test_a_model_whose_states_are_summed_out(model: Model) -> None:
    with isolated(0), torch.no_grad():
        bound = bind(model, torch_y)
        names = [n for n, s in bound.select("latent").items() if s.finite]
        shapes = {n: bound.sites[n].shape for n in names}
        counts = [math.prod(s) for s in shapes.values()]

        def summed(draw: dict[str, Tensor]) -> float:
            terms = []
            for states in itertools.product((0.0, 1.0), repeat=sum(counts)):
                parts = torch.tensor(states).split(counts)
                values = {n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
                if model is chain_of_states:
                    values = {n: v.long() for n, v in values.items()}
                trace = poutine.trace(poutine.condition(model, {**draw, **values})).get_trace(torch_y)
                terms.append(trace.log_prob_sum())
            return float(torch.stack(terms).logsumexp(0))

        draws = {n: v for n, v in scoring.draw_sites(bound.generator(), {}, 4).items() if n in ("p", "stay")}
        check(bound, draws, summed)


# The map itself.


@pytest.mark.parametrize(
    "distribution",
    [
        lambda s: dist.Normal(s, 1.0),
        lambda s: dist.Exponential(s),
        lambda s: dist.Laplace(s, 1.0),
        lambda s: dist.Cauchy(s, 1.0),
        lambda s: dist.Uniform(0.0, s),
        lambda s: dist.Gamma(s, 1.0),
        lambda s: dist.Beta(s, 2.0),
        lambda s: dist.StudentT(3.0, s),
        lambda s: dist.Poisson(3 * s),
        lambda s: dist.Binomial(10, logits=s),
        lambda s: dist.NegativeBinomial(5.0, logits=s),
        lambda s: dist.Bernoulli(logits=s),
        lambda s: dist.Geometric(logits=s),
        lambda s: dist.Categorical(logits=s * torch.arange(3.0)),
        lambda s: dist.Dirichlet(s * torch.ones(3)),
        lambda s: dist.Multinomial(10, logits=s * torch.arange(3.0)),
        lambda s: dist.MultivariateNormal(s * torch.ones(2), torch.eye(2)),
        lambda s: dist.LKJCholesky(3, s),
        lambda s: dist.HalfCauchy(s).mask(torch.tensor(True)),
        lambda s: dist.Gumbel(s, 1.0),
        lambda s: dist.OrderedLogistic(s, torch.arange(3.0)),
        lambda s: dist.BetaBinomial(s, 1.0, 10),
    ],
)
def test_mapped_noise_has_its_distribution_and_is_each_draws_own(distribution: Model) -> None:
    pytest.importorskip("scipy")
    from scipy.stats import ks_2samp, spearmanr

    count = 4000
    scale = torch.linspace(0.5, 2.0, count)
    for buffers in (False, True):
        try:
            got = mapped(
                lambda d: {"x": distribution(d["s"])()}, {"s": scale}, count, torch.device("cpu"), buffers=buffers
            )["x"]
            break
        except RuntimeError:
            assert not buffers
    expected = torch.stack([distribution(s)() for s in scale])
    assert got.shape == expected.shape
    one, other = (v.double().reshape(count, -1)[:, -1].numpy() for v in (got, expected))
    assert ks_2samp(one, other, method="asymp").pvalue > 1e-6
    # Neighbours share nothing but their nearly equal parameter.
    assert abs(spearmanr(np.diff(one)[::2], np.diff(other)[::2]).statistic) < 6 / math.sqrt(count / 2)
    assert len(np.unique(one)) > min(2, len(np.unique(other))) - 1


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        int,
        float,
        bool,
        lambda x: x.item(),
        lambda x: f"{x:.2f}",
        lambda x: [1, 2, 3][x.long()],
        lambda x: torch.equal(x, x + 0),
        lambda x: x.reshape(1).nonzero(),
        lambda x: x.reshape(1)[x.reshape(1) > 0],
        lambda x: x in [1.0],
        math.exp,
    ],
)
def test_a_value_that_differs_between_draws_cannot_be_read(read: Callable[[Tensor], Any]) -> None:
    def function(draw: dict[str, Tensor]) -> dict[str, Tensor]:
        read(draw["x"])
        return draw

    with pytest.raises(RuntimeError):
        mapped(function, {"x": torch.arange(3.0)}, 3, torch.device("cpu"))


def test_noise_that_torch_does_not_know_is_not_shared_in_silence() -> None:
    function = lambda draw: {"x": draw["x"] + float(np.random.standard_normal())}  # noqa: E731, NPY002
    with pytest.raises(RuntimeError, match="NumPy"):
        mapped(function, {"x": torch.arange(3.0)}, 3, torch.device("cpu"))


def test_what_is_written_in_place_is_written_for_each_draw() -> None:
    x = torch.tensor([-1.0, 0.5, 3.0])
    got = mapped(lambda draw: {"x": (draw["x"] + 0).clamp_(0.0, 1.0)}, {"x": x}, 3, torch.device("cpu"))["x"]
    assert torch.equal(got, x.clamp(0.0, 1.0))


@pytest.mark.filterwarnings("ignore:.*cannot be mapped over draws")
def test_a_seed_gives_one_answer_whether_or_not_it_is_known_how_a_program_runs() -> None:
    def steered(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu if mu > 0 else 2 * mu, 1.0), obs=y)

    # The first run tries to map the program, and fails after it has drawn.
    generator = bind(steered, torch.tensor(1.0)).generator()
    first, second = (run_with_seed(generator) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in ("mu", "y"))


def run_with_seed(generator: BoundPair) -> dict[str, Tensor]:
    with isolated(3):
        return scoring.draw_sites(generator, {}, 5)


def test_parameters_that_a_distribution_refuses_at_some_draw_are_named() -> None:
    function = lambda draw: {"x": dist.Normal(0.0, draw["s"])()}  # noqa: E731
    with pytest.raises(ValueError, match="Normal: expected scale in GreaterThan, got another at 2 of 4 draws"):
        mapped(function, {"s": torch.tensor([1.0, -1.0, 2.0, -2.0])}, 4, torch.device("cpu"))


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_that_share_a_summed_out_site_have_a_likelihood_given_its_draws(grouped: bool) -> None:
    """Enumerated by hand: the sum over the state of a group; of all rows, the mean of p(y_n | z) over its posterior."""
    y = torch.tensor([[0.3, 1.2, 0.9], [-0.2, 0.4, -1.0]]).double()
    groups = len(y)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).double(), 3.0))
        chance = torch.tensor(0.4).double()
        if grouped:
            with pyro.plate("groups", groups, dim=-2):
                z = pyro.sample("z", dist.Bernoulli(chance))
                with pyro.plate("rows", 3, dim=-1):
                    pyro.sample("y", dist.Normal(mu + z, 1.0), obs=y)
        else:
            z = pyro.sample("z", dist.Bernoulli(chance))
            with pyro.plate("rows", 3, dim=-1):
                pyro.sample("y", dist.Normal(mu + z, 1.0), obs=y[0])

    count, mu = 4000, 0.2
    draws = {"mu": torch.full((count,), mu).double()}
    bound = bind(model, y)
    seen = y if grouped else y[:1]
    given = torch.stack([dist.Normal(mu + z, 1.0).log_prob(seen) for z in (0, 1)])
    joint = given.sum(-1) + torch.tensor([0.6, 0.4]).double().log()[:, None]
    expected = (joint.softmax(0)[..., None] * given.exp()).sum(0)
    with isolated(3):
        density = scoring.log_likelihood_by_site(bound, draws)["y"]
    if grouped:
        torch.testing.assert_close(density, joint.logsumexp(0).expand(count, groups))
        return
    assert density.shape == (count, 3)
    values = density.exp()
    error = values.std(0) / math.sqrt(count)
    assert ((values.mean(0) - expected.reshape(values.shape[1:])).abs() < 5 * error + 1e-12).all()
    with pytest.raises(ValueError, match="independent given the draws, got y, whose rows share z"):
        scoring.rowwise(bound, draws)


def branching(y: Tensor | None = None) -> None:
    """P(a) = p, and P(b) = 0.6 where a is 1 and 0.2 where it is 0: a program whose course depends on a draw."""
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    a = pyro.sample("a", dist.Bernoulli(p), obs=None if y is None else y[0])
    b = 0.6 if a.item() > 0.5 else 0.2
    pyro.sample("b", dist.Bernoulli(torch.tensor(b)), obs=None if y is None else y[1])


def test_replicates_of_a_point_estimate_have_noise_of_their_own() -> None:
    """The first two replicates are often equal by chance; P(b) = 0.5 * 0.6 + 0.5 * 0.2 where p = 0.5."""
    generator = bind(branching, torch.ones(2)).generator()
    found = []
    for seed in range(20):
        with isolated(seed), nullcontext() if seed else pytest.warns(UserWarning, match="run one by one"):
            found.append(scoring.draw_sites(generator, {"p": torch.full((40,), 0.5)}, 40))
    for values in found:
        assert (values["a"] != values["a"][0]).any() and (values["b"] != values["b"][0]).any()
    assert float(torch.cat([v["a"] for v in found]).mean()) == pytest.approx(0.5, abs=0.1)
    assert float(torch.cat([v["b"] for v in found]).mean()) == pytest.approx(0.4, abs=0.1)


def test_what_draws_nothing_runs_but_a_few_times_for_a_point_estimate() -> None:
    runs = []

    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        runs.append(p.item())
        pyro.deterministic("odds", p / (1 - p))
        pyro.sample("y", dist.Bernoulli(p), obs=y)

    bound = bind(model, torch.tensor(1.0))
    with pytest.warns(UserWarning, match="run one by one"):
        scoring.latent_functions(bound, {"p": torch.tensor([0.5, 0.75])})
    runs.clear()
    odds = scoring.latent_functions(bound, {"p": torch.full((1000,), 0.75)})["odds"]
    assert odds.shape == (1000,) and odds.eq(3).all()
    assert len(runs) < 10


ONE_STATE = {
    "categorical": (dist.Categorical(torch.ones(1)), 0.0),
    "one-hot": (dist.OneHotCategorical(torch.ones(1)), 1.0),
    "no trials": (dist.Binomial(0, torch.tensor(0.5)), 0.0),
}


@pytest.mark.parametrize("kind", ONE_STATE)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside two states"])
@pytest.mark.filterwarnings("ignore:Categorical does not support")
def test_a_site_of_one_state_keeps_its_value_in_each_row(kind: str, beside: bool) -> None:
    """The state of the other site has the posterior of Bayes' rule: log odds 2 y - 2 of N(2, 1) against N(0, 1)."""
    fn, state = ONE_STATE[kind]
    y = torch.tensor([0.0, 1.0, 2.0])

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", fn)
            where = mu[z.long() if kind == "categorical" else torch.zeros(1).long()]
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5))) if beside else torch.zeros(())
            pyro.deterministic("where", where.expand(len(y)), event_dim=0)
            pyro.sample("y", dist.Normal(where + 2 * k, 1.0), obs=y)

    with isolated(0):
        found = scoring.latent_functions(bind(model, y), {"mu": torch.zeros(2000, 1)})
    assert found["z"].shape[:2] == (2000, 3) and found["z"].eq(state).all()
    assert found["where"].shape == (2000, 3) and found["where"].eq(0).all()
    if beside:
        torch.testing.assert_close(found["k"].mean(0), (2 * y - 2).sigmoid(), rtol=0, atol=0.06)
