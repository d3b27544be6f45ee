"""Guides of many rows beside sites that all rows share: rows are judged given these, and no VAE is sent to sample().

mu ~ N(0, 1), z_n ~ N(mu, 1), x_n ~ N(z_n, 1): given mu the posterior of z_n is N((mu + x_n) / 2, 1 / 2), and that of
mu is N(sum x / (N + 2), 2 / (N + 2)).
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from inference import fit

quiet = partial(fit, progress=False, steps=0)
Guide = Callable[..., None]


def rows(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def model(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(width: float, shift: float = 0.0) -> Guide:
    """The posterior, with the sd of each row times ``width`` and mu moved by ``shift`` standard deviations."""

    def guide(x: Tensor) -> None:
        sd = (2 / (len(x) + 2)) ** 0.5
        mu = pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 2) + shift * sd, sd))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal((mu + x) / 2, width * 0.5**0.5))

    return guide


def fraction(width: float) -> float:
    """Effective fraction of the weights of a normal guide ``width`` times too wide."""
    return (2 * width**2 - 1) ** 0.5 / width**2


def test_rows_are_judged_given_what_they_share_and_the_rest_is_said_not_to_be() -> None:
    found = quiet((model, guide_of(1.1)), rows(400)).diagnosis
    assert found.advice == ()
    assert found.unjudged == ("Pareto k of mu: joint weights of 400 rows say nothing of sites outside of them",)
    assert found.pareto_k < 0.7
    assert found.effective == pytest.approx(fraction(1.1), abs=0.01)


def test_rows_that_are_twice_too_wide_are_found_beside_a_shared_site() -> None:
    found = quiet((model, guide_of(2.0)), rows(400)).diagnosis
    assert "the standard deviation of z is 2 times" in str(found) and "sample()" not in str(found)
    assert found.effective == pytest.approx(fraction(2.0), abs=0.1)


def test_rows_that_are_too_narrow_are_not_sent_to_chains() -> None:
    found = quiet((model, guide_of(0.4)), rows(400)).diagnosis
    assert "of 100 rows" in found.advice[0] and "sample()" not in str(found)


def test_an_autoguide_of_rows_and_a_shared_site_is_judged_by_rows() -> None:
    """Its rows keep a scale of 0.1, seven times too narrow, for it takes no step."""
    found = quiet((model, AutoNormal(model)), rows(400)).diagnosis
    assert "of 100 rows" in found.advice[0] and "sample()" not in str(found)


@pytest.mark.parametrize(("shift", "count"), [(0.0, 8), (8.0, 8)])
def test_joint_weights_of_few_rows_judge_all_sites(shift: float, count: int) -> None:
    found = quiet((model, guide_of(1.1, shift)), rows(count)).diagnosis
    assert found.unjudged == ()
    if shift:
        assert found.advice[0].startswith("Pareto k of the guide is ") and "sample()" in found.advice[0]
    else:
        assert found.advice == () and found.effective == pytest.approx(fraction(1.1) ** count, abs=0.05)


def test_a_site_that_rows_share_through_what_is_observed_keeps_the_joint_weights() -> None:
    """A factor of all rows together: given mu they are not independent."""

    def coupled(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("sum", -((z.sum() - 3) ** 2))

    found = quiet((coupled, guide_of(1.1)), rows(400)).diagnosis
    assert found.pareto_k > 0.7 and np.isfinite(found.pareto_k) and found.unjudged == ()
