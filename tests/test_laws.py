"""The laws of every pair of the zoo, and what they rest on: rows with latents of their own, plain Pyro functions."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import *  # noqa: F403
from laws import Case, quick_fit
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from inference import fit, posterior_predictive, sample
from ppl_models.models.cyclegan import CycleGAN
from ppl_models.models.gan import GAN
from ppl_models.models.pair import Pair, Visible
from ppl_models.models.sigmoid_belief import SigmoidBeliefNet
from ppl_models.zoo.entries import ZOO

HERE = Path(__file__).parent
ENTRIES = list(ZOO.values())


def test_each_kind_of_pair_is_known_by_its_sites(case: Case) -> None:
    pair = case.pair()
    assert case.likelihood == (not isinstance(pair, GAN | CycleGAN))
    assert case.latent == (not isinstance(pair, Visible))
    assert (case.likelihood and case.latent and case.finite) == isinstance(pair, SigmoidBeliefNet)


class RowLatents(Pair):
    r"""z_n ~ N(0, 1), x_n ~ N(z_n, s^2): a latent a row, with a mean-field guide of a parameter a row."""

    def __init__(self, count: int, noise: float = 0.5) -> None:
        super().__init__()
        self.noise = noise
        self.loc = torch.nn.Parameter(torch.zeros(count))
        self.log_scale = torch.nn.Parameter(torch.zeros(count))

    def model(self, x=None, *, size=None, rows=None, **_):
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("x", dist.Normal(z, self.noise), obs=x)

    def guide(self, x=None, *, size=None, rows=None, **_):
        at = slice(None) if rows is None else rows
        with pyro.plate("rows", size or len(self.loc), subsample=rows, dim=-1):
            pyro.sample("z", dist.Normal(self.loc[at], self.log_scale[at].exp()))


def test_a_latent_a_row_fitted_by_minibatches_equals_the_full_batch_fit() -> None:
    torch.manual_seed(0)
    x = torch.randn(37)
    exact = x / 1.25
    elbo = partial(pyro.infer.TraceMeanField_ELBO, num_particles=8, vectorize_particles=True)
    mean_field = partial(fit, objective=elbo, steps=3000, draws=4, learning_rate=0.05, progress=False)
    full, batched = mean_field(RowLatents(37), x), mean_field(RowLatents(37), x, batch=10)
    # What the noise of gradients leaves is up to 0.02 of all rows together, and more of minibatches.
    torch.testing.assert_close(full.params["loc"], exact, atol=0.05, rtol=0)
    torch.testing.assert_close(batched.params["loc"], exact, atol=0.1, rtol=0)
    scale = torch.full_like(x, 0.2**0.5).log()
    torch.testing.assert_close(batched.params["log_scale"], scale, atol=0.12, rtol=0)


def test_pairs_make_pyro_methods_of_their_halves() -> None:
    pair = RowLatents(3)
    result = quick_fit(pair, torch.zeros(3))
    assert set(result.params) == {"loc", "log_scale"}
    assert all(p.grad is not None for p in pair.parameters())


def test_plain_functions_keep_their_parameters_in_the_result() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    y = torch.tensor([1.0, 2.0, 3.0])
    elbo = partial(pyro.infer.Trace_ELBO, num_particles=20, vectorize_particles=True)
    result = fit((model, guide), y, elbo, steps=2000, progress=False)
    assert len(pyro.get_param_store()) == 0
    precision = 3 + 0.01
    assert float(result.params["loc"]) == pytest.approx(6 / precision, abs=0.03)
    assert float(result.params["scale"]) == pytest.approx(precision**-0.5, rel=0.05)
    assert float(result.draw(4000)["mu"].mean()) == pytest.approx(6 / precision, abs=0.05)
    chains = sample(model, y, draws=400, warmup=200, chains=2, progress=False)
    assert float(chains.draws["mu"].mean()) == pytest.approx(6 / precision, abs=0.1)
    assert chains.idata.posterior_predictive["y"].dims == ("chain", "draw", "observations")


def test_autoguides_of_plain_models_work_as_pairs() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)

    x = torch.linspace(-1, 1, 20)
    result = fit((model, AutoNormal(model)), {"x": x, "y": 0.7 * x}, steps=1500, progress=False)
    assert float(result.draws["slope"].mean()) == pytest.approx(0.7, abs=0.02)
    assert set(posterior_predictive(result, {"x": x[:5]})) == {"y"}


PAIR = """
import pyro, torch
import pyro.distributions as dist
from pyro.infer.autoguide import AutoNormal
from ppl_models import Pair
from ppl_models.models.checks import check_matrix


class PoissonRates(Pair):
    def __init__(self, features):
        super().__init__()
        self.register_buffer("shape", torch.full((self.name_dimension("features", features),), 2.0))
        self.guide = AutoNormal(self.model)

    def model(self, x=None):
        rates = pyro.sample("rates", dist.Gamma(self.shape, 1.0).to_event(1))
        with self.rows(x):
            return pyro.sample("x", dist.Poisson(rates).to_event(1), obs=x)

    def check(self, x=None, **_):
        if x is not None:
            check_matrix("x", x, len(self.shape))
"""
ENTRY = """
from functools import partial
from inference import fit
from poisson_rates import PoissonRates
from ppl_models import Entry

ENTRY = Entry(
    name="poisson_rates",
    title="Poisson rates, Gamma prior",
    make=PoissonRates,
    data="digits",
    methods={"SVI": partial(fit, steps=1000)},
    source="conjugate posterior",
)
"""
TESTS = """
from laws import *
from poisson_entry import ENTRY

ENTRIES = [ENTRY]
"""


def test_a_new_pair_is_one_file_one_entry_and_one_test_file(tmp_path) -> None:
    files = {"poisson_rates.py": PAIR, "poisson_entry.py": ENTRY, "test_poisson_rates.py": TESTS}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    paths = os.pathsep.join([str(tmp_path), str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    quiet = ["-o", "addopts=", "-q", "-p", "no:cacheprovider", "-c", str(HERE.parent / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", *quiet, str(tmp_path / "test_poisson_rates.py")]
    answer = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout
    assert "22 passed, 2 skipped" in answer.stdout, answer.stdout
