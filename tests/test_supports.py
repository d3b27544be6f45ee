"""Supports that move with another latent site, and sites without a density of their own."""

from functools import partial
from typing import Any

import arviz_base as azb
import arviz_stats as azs
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineTransform
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from pyro.infer.mcmc.rwkernel import RandomWalkKernel
from torch import Tensor

from inference import fit, sample
from inference.compiler.supports import support_of
from inference.core.bound import bind
from inference.draws.scoring import outside_supports
from inference.kernels import ChEES, Gibbs

quiet = partial(sample, progress=False, compile=False)
pytestmark = pytest.mark.usefixtures("alone")
Y = torch.tensor(1.0).double()


def double(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def below_another(y: Tensor) -> None:
    a = pyro.sample("a", dist.HalfNormal(double(2.0)))
    x = pyro.sample("x", dist.Uniform(double(0.0), a))
    pyro.sample("y", dist.Normal(x, 0.3), obs=y)


def moments() -> dict[str, tuple[float, float]]:
    """Posterior mean and second moment of both sites by quadrature on a grid of midpoints."""
    a, x = np.meshgrid(np.arange(0.0005, 14, 0.004), np.arange(0.0005, 3, 0.002), indexing="ij")
    density = np.where(x < a, np.exp(-(a**2) / 8 - 0.5 * ((1 - x) / 0.3) ** 2) / a, 0.0)
    density /= density.sum()
    return {n: (float((density * v).sum()), float((density * v**2).sum())) for n, v in (("a", a), ("x", x))}


def assert_moments(draws: dict[str, np.ndarray]) -> None:
    for name, expected in moments().items():
        for power, exact in enumerate(expected, 1):
            values = azb.convert_to_dataset({"v": draws[name] ** power})
            error = float(azs.mcse(values, method="mean")["v"])
            assert abs(float(values["v"].mean()) - exact) < 5 * error, (name, power)
    assert (draws["x"] < draws["a"]).all()


def test_a_support_that_moves_has_the_posterior_of_quadrature() -> None:
    result = quiet(below_another, Y, kernel=ChEES, warmup=200, draws=150)
    assert result.diagnosis.worst_r_hat < 1.05
    assert_moments({n: result.idata.posterior[n].values for n in ("a", "x")})
    more = result.draw(50)
    assert bool((more["x"] < more["a"]).all())


@pytest.mark.parametrize("kernel", [NUTS, HMC, RandomWalkKernel])
def test_kernels_of_one_chain_follow_a_support(kernel: Any) -> None:
    result = quiet(below_another, Y, kernel, chains=2, warmup=10, draws=10)
    inside = result.draws["x"] < result.draws["a"]
    assert bool(inside.all())
    # Minus the log density of the unconstrained values, whose transforms are exp(u) and a sigmoid(v).
    a, x = result.draws["a"], result.draws["x"]
    density = dist.HalfNormal(double(2.0)).log_prob(a) - a.log() + dist.Normal(x, 0.3).log_prob(Y)
    density += a.log() + (x * (1 - x / a)).log()
    if kernel is not RandomWalkKernel:
        np.testing.assert_allclose(result.idata.sample_stats.lp.values.reshape(-1), density, rtol=1e-6)


def test_a_compiled_potential_follows_a_support_too() -> None:
    result = quiet(below_another, Y, NUTS, chains=1, warmup=100, draws=150, compile="auto")
    assert result.idata.attrs["execution"] == "traced"
    assert_moments({n: result.idata.posterior[n].values for n in ("a", "x")})


def test_plain_mcmc_with_chees_follows_a_support() -> None:
    kernel = ChEES(below_another, num_chains=32, jit_compile=False)
    mcmc = MCMC(kernel, num_samples=100, warmup_steps=200, disable_progbar=True)
    mcmc.run(Y)
    assert_moments({n: v.T.numpy() for n, v in mcmc.get_samples().items()})


def test_a_support_that_moves_with_a_finite_site_is_refused() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(double(0.5)))
        x = pyro.sample("x", dist.Uniform(double(0.0), 1 + z))
        pyro.sample("y", dist.Normal(x, 1.0), obs=double(1.0))

    with pytest.raises(ValueError, match="x: expected a support .* got one that moves with z"):
        quiet(model, kernel=Gibbs, draws=10, warmup=10)


def test_draws_of_a_guide_outside_of_a_support_that_moves_are_found() -> None:
    guide, bound = AutoNormal(below_another, init_scale=1.0), bind(below_another, Y)
    runs = [guide(Y) for _ in range(300)]
    draws = {n: torch.stack([run[n] for run in runs]).detach() for n in ("a", "x")}
    share = float((draws["x"] > draws["a"]).double().mean())
    assert share > 0
    assert outside_supports(bound, draws) == pytest.approx({"x": share})
    inside = {"a": double(1.0, 2.0, 3.0), "x": double(0.5, 0.6, 0.7)}
    assert outside_supports(bound, inside) == {}


def test_a_guide_that_leaves_a_moving_support_is_told() -> None:
    def guide(y: Tensor) -> None:
        pyro.sample("a", dist.LogNormal(double(0.5), 0.5))
        pyro.sample("x", dist.Uniform(double(0.0), 1.5))

    result = fit((below_another, guide), Y, steps=0, progress=False)
    left = float((result.draws["x"] > result.draws["a"]).double().mean())
    (said, *_) = result.diagnosis.advice
    assert left > 0
    assert said.startswith(f"{100 * left:.2g} % of the guide's draws of x have density zero")


def test_missing_entries_do_not_wander_where_they_are_observed() -> None:
    """The observed entries of the site of the missing ones are draws of the prior; mu has its conjugate posterior."""
    y, seen = double(1.0, 2.0, 0.0, 3.0, 0.0), torch.tensor([True, True, False, True, False])

    def model(y: Tensor, seen: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(double(0.0), 3.0))
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    result = quiet(model, {"y": y, "seen": seen}, kernel=ChEES, draws=150, warmup=200)
    assert result.diagnosis.worst_r_hat < 1.03
    missing = azb.convert_to_dataset({"v": result.idata.posterior["y_unobserved"].values})
    precision = 3 + 1 / 9
    off = missing["v"].mean(("chain", "draw")) - 6 / precision
    assert float((abs(off) / azs.mcse(missing, method="mean")["v"]).max()) < 5
    assert float(result.draws["mu"].mean()) == pytest.approx(6 / precision, abs=0.05)


def shifted(rate: Tensor, shift: Any = 0.0, scale: Any = 1.0) -> Any:
    return dist.TransformedDistribution(dist.Exponential(rate), [AffineTransform(shift, scale)])


def below(y: Tensor) -> None:
    """x = a - 2 e with e ~ Exponential(1): x is below a."""
    a = pyro.sample("a", dist.Normal(double(0.0), 1.0))
    x = pyro.sample("x", shifted(double(1.0), a, -2.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def above(y: Tensor) -> None:
    """x = 10 + e with e ~ Exponential(1): x is above 10, where no start in (-2, 2) is."""
    x = pyro.sample("x", shifted(double(1.0), 10.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=10 + y)


def events(y: Tensor) -> None:
    """Two shifted elements in an event, scaled further by a latent site."""
    a = pyro.sample("a", dist.HalfNormal(double(1.0)))
    base = dist.Exponential(double(1.0, 1.0)).to_event(1)
    x = pyro.sample("x", dist.TransformedDistribution(base, [AffineTransform(1.0, 2.0), AffineTransform(0.0, a)]))
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)


def expected(name: str) -> dict[str, float]:
    """Posterior means by quadrature over a and e, or over a and both elements."""
    e = np.arange(0.005, 25, 0.01)
    if name == "above":
        weight = np.exp(-e - 0.5 * (1 - e) ** 2)
        return {"x": float((weight * (10 + e)).sum() / weight.sum())}
    if name == "below":
        a, e = np.meshgrid(np.arange(-6, 8, 0.02), e, indexing="ij")
        weight = np.exp(-0.5 * a**2 - e - 0.5 * (1 - (a - 2 * e)) ** 2)
        return {"a": float((weight * a).sum() / weight.sum()), "x": float((weight * (a - 2 * e)).sum() / weight.sum())}
    # The sum s of two exponentials has density s exp(-s), and the sum of the elements is a (2 + 2 s).
    a, s = np.meshgrid(np.arange(0.0025, 6, 0.005), e, indexing="ij")
    weight = s * np.exp(-0.5 * a**2 - s - 0.5 * (1 - a * (2 + 2 * s)) ** 2)
    return {n: float((weight * v).sum() / weight.sum()) for n, v in (("a", a), ("x", a * (2 + 2 * s)))}


@pytest.mark.parametrize(("model", "kernel"), [(below, ChEES), (events, ChEES), (above, ChEES), (above, NUTS)])
def test_chains_stay_on_the_image_of_a_bounded_support(model: Any, kernel: Any) -> None:
    few = {"chains": 1, "warmup": 50, "draws": 150} if kernel is NUTS else {"chains": 32, "warmup": 150, "draws": 80}
    result = quiet(model, Y, kernel, **few)
    x, name = result.draws["x"], model.__name__
    inside = {"below": lambda: x < result.draws["a"], "above": lambda: x > 10, "events": lambda: (x > 0).all()}
    assert bool(inside[name]().all())
    values = {n: v.values.reshape(*v.shape[:2], -1).sum(-1) for n, v in result.idata.posterior.data_vars.items()}
    for site, mean in expected(name).items():
        error = float(azs.mcse(azb.convert_to_dataset({"v": values[site]}), method="mean")["v"])
        assert abs(values[site].mean() - mean) < 5 * error + 1e-3, site


def test_draws_of_a_guide_outside_of_an_image_are_found() -> None:
    bound = bind(above, Y)
    draws = {"x": double(9.0, 10.5, 12.0, 3.0)}
    assert outside_supports(bound, draws) == {"x": 0.5}
    assert outside_supports(bound, {"x": double(10.5, 12.0)}) == {}

    def guide(y: Tensor) -> None:
        pyro.sample("x", dist.Normal(double(10.5), 1.0))

    with pyro.validation_enabled(False):
        result = fit((above, guide), Y, steps=0, progress=False)
    assert "of the guide's draws of x have density zero" in result.diagnosis.advice[0]
    # A distribution whose class says what its support is keeps it, and so does one on all real numbers.
    for free in (
        dist.LogNormal(0.0, 1.0),
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), [AffineTransform(1.0, 2.0)]),
    ):
        assert support_of(free) is free.support or repr(support_of(free)) == repr(free.support)
