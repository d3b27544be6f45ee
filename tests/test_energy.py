"""The energies of Hamiltonian transitions, on a target where their distribution is known."""

from functools import partial

import arviz_stats as azs
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC as PyroHMC
from pyro.infer import NUTS as PyroNUTS
from scipy import stats

from inference import sample
from inference.kernels import NUTS, ChEES, Gibbs

pytestmark = pytest.mark.usefixtures("alone")

SD = torch.tensor([0.5, 1.0, 1.0, 2.0], dtype=torch.float64)


def normal() -> None:
    """Four independent normal quantities: the normaliser of the density is known."""
    pyro.sample("x", dist.Normal(torch.zeros(4).double(), SD).to_event(1))


def with_label() -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5).double()))
    pyro.sample("x", dist.Normal(torch.zeros(4).double(), SD).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.3).double())


KERNELS = {
    "ChEES": (ChEES, {"chains": 16, "warmup": 100, "draws": 60}),
    "NUTS": (NUTS, {"chains": 4, "warmup": 100, "draws": 80}),
    "NUTS of Pyro": (partial(PyroNUTS, full_mass=False), {"chains": 1, "warmup": 100, "draws": 200}),
    "HMC of Pyro": (partial(PyroHMC, trajectory_length=2.0), {"chains": 1, "warmup": 100, "draws": 200}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_energy_of_a_normal_target_is_gamma_distributed(name: str) -> None:
    """Potential and kinetic energy are halves of independent chi squares of D degrees: together Gamma(D, 1)."""
    kernel, lengths = KERNELS[name]
    result = sample(normal, None, kernel, compile=False, progress=False, **lengths)
    group = result.idata.sample_stats
    constant = float(SD.log().sum()) + 2 * np.log(2 * np.pi)
    energy = group["energy"].values - constant
    assert (energy > 0).all()
    size = min(float(azs.ess(energy)), energy.size)
    assert abs(energy.mean() - 4) < 5 * 2 / size**0.5
    # Every eighth transition: nearly independent, since its momentum is new.
    assert stats.kstest(energy[:, ::8].ravel(), stats.gamma(4).cdf).pvalue > 1e-5
    # A transition begins where the one before ended, with a kinetic energy above zero.
    assert (group["energy"].values[:, 1:] > -group["lp"].values[:, :-1]).all()
    kinetic = group["energy"].values[:, 1:] + group["lp"].values[:, :-1]
    assert abs(kinetic.mean() - 2) < 5 * 2**0.5 / kinetic.size**0.5


def test_arviz_judges_the_energy() -> None:
    """The correlation of successive energies, which share the potential energy, is 1/2, so E-BFMI is 2 (1 - 1/2)."""
    result = sample(normal, None, ChEES, chains=16, warmup=150, draws=100, compile=False, progress=False)
    assert 0.7 < float(azs.bfmi(result.idata)["energy"].mean()) < 1.5


def test_gibbs_has_the_energy_of_its_continuous_moves() -> None:
    result = sample(with_label, None, Gibbs, chains=4, warmup=20, draws=10, compile=False, progress=False)
    kinetic = result.idata.sample_stats["energy"].values[:, 1:] + result.idata.sample_stats["lp"].values[:, :-1]
    assert np.isfinite(kinetic).all()
