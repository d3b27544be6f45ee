"""Predictability minimisation: codes whose units are independent, and what comes out without the adversary."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy.stats import entropy
from torch import Tensor

from inference import Joint, fit
from inference.core.handlers import isolated
from inference.objectives import Predictability
from ppl_models.models.factorial_code import FactorialCode, Predictors, mutual_information

pytestmark = pytest.mark.usefixtures("alone")


def factorial(rows: int) -> Tensor:
    """Four fair bits in four orthogonal directions of ten dimensions, with a little noise."""
    random = torch.Generator().manual_seed(0)
    bits = (torch.rand(rows, 4, generator=random) < 0.5).float()
    # Directions that are nearly parallel would make a code hard to find.
    directions = 10**0.5 * torch.linalg.qr(torch.randn(10, 4, generator=random)).Q.mT
    mixed = (2 * bits - 1) @ directions
    return mixed + 0.05 * torch.randn(rows, 10, generator=random)


def bars(rows: int) -> Tensor:
    """Three upright and three flat bars in 3 x 3 pixels, each there with probability 1/2; where two cross it is 2."""
    random = torch.Generator().manual_seed(0)
    bits = (torch.rand(rows, 6, generator=random) < 0.5).float()
    return (bits[:, :3, None] + bits[:, None, 3:]).flatten(1)


@pytest.mark.parametrize(
    ("make", "units", "weight", "steps"),
    [(factorial, 4, 1.0, 1200), pytest.param(bars, 6, 3.0, 3000, marks=pytest.mark.slow)],
    ids=["factorial", "bars"],
)
def test_units_are_independent_with_the_adversary_and_not_without(
    make: Any, units: int, weight: float, steps: int
) -> None:
    x = make(4000)

    def largest_information(weight: float, seed: int) -> float:
        with isolated(seed):
            pair = FactorialCode(x.shape[1], units)
        schedule = lambda adam: torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps, eta_min=3e-5)  # noqa: E731
        optimizer = Joint(torch.optim.Adam, {"lr": 0.003}, schedule=schedule)
        objective = Predictability(Trace_ELBO, weight=weight)
        result = fit(
            pair, x, objective, steps=steps, batch=200, optimizer=optimizer, draws=1, progress=False, seed=seed
        )
        with torch.no_grad():
            code = pair.encode(x)
            error = (pair.decode(code) - x).square().mean() / x.var(0).mean()
        information = mutual_information(code)
        assert float(error) < 0.01, "the row stays decodable"
        assert result.losses.shape == (steps, 2)
        return float((information - information.diag().diag()).max())

    # A third of the starts (4 of 12) ended in a code whose units depend on one another.
    assert any(largest_information(weight, seed) < 0.01 for seed in range(8))
    assert any(largest_information(0.0, seed) > 0.1 for seed in range(4))


def test_a_predictor_does_not_see_its_own_unit() -> None:
    z = torch.rand(5, 4, requires_grad=True)
    out = Predictors(4, (8, 3))(z)
    assert out.shape == (5, 4)
    for k in range(4):
        (slope,) = torch.autograd.grad(out[:, k].sum(), z, retain_graph=True)
        assert not slope[:, k].any() and bool((slope.abs().sum(0) > 0).sum() == 3)


def test_predictors_learn_what_can_be_predicted() -> None:
    torch.manual_seed(0)
    z = torch.rand(500, 3)
    z[:, 2] = 0.5 * z[:, 0] + 0.5 * z[:, 1].square()
    network = Predictors(3)
    adam = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(400):
        adam.zero_grad()
        (network(z) - z).square().sum(1).mean().backward()
        adam.step()
    error = (network(z) - z).detach().square().mean(0)
    # The square is learnt too: a linear prediction leaves about 3 % of the variance.
    others = torch.cat([torch.ones(500, 1), z[:, :2]], 1)
    linear = (others @ torch.linalg.lstsq(others, z[:, 2:]).solution - z[:, 2:]).square().mean()
    assert float(error[2]) < 0.75 * float(linear)


def test_mutual_information_is_that_of_scipy() -> None:
    code = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
    code[:, 1] = 0.5 * code[:, 0] + 0.5 * code[:, 1]
    joint, _, _ = np.histogram2d(*code.numpy().T, bins=10, range=[[0, 1], [0, 1]])
    alone = [entropy(joint.sum(axis), base=2) for axis in (1, 0)]
    expected = sum(alone) - entropy(joint.ravel(), base=2)
    found = mutual_information(code)
    assert found[0, 1] == pytest.approx(expected, abs=1e-6)
    assert found.diag().tolist() == pytest.approx(alone, abs=1e-6)


def test_players_and_their_gradients() -> None:
    with isolated(0):
        pair = FactorialCode(3, 2, hidden=(4,))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    with isolated(0):
        losses = Predictability(Trace_ELBO, weight=2.0).loss_and_grads(pair.model, pair.guide, x=x)
    z = pair.encode(x)
    predicted = dist.Normal(pair.predictors(z), 1.0).log_prob(z).sum()
    bound = dist.Normal(pair.decode(z), 1.0).log_prob(x).sum()
    assert losses == pytest.approx([-predicted.item(), 2 * predicted.item() - bound.item()], rel=1e-5)
    for name, p in pair.named_parameters():
        loss = -predicted if name.startswith("predictors") else 2 * predicted - bound
        (expected,) = torch.autograd.grad(loss, p, retain_graph=True)
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5, msg=name)


def silent(x: Tensor, predict: bool = False) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.0)), 1.0))


def seen(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def deaf(x: Tensor) -> None:
    silent(x)


REFUSED = [
    (lambda: FactorialCode(3, 1), "units: expected at least 2, got 1"),
    (lambda: Predictability(Trace_ELBO, weight=-1.0), "weight: expected zero or a positive number, got -1.0"),
    (lambda: fit((seen, deaf), torch.zeros(4), Predictability(Trace_ELBO), steps=1), "guide: .* an argument predict"),
    (
        lambda: fit((seen, silent), torch.zeros(4), Predictability(Trace_ELBO), steps=1),
        "guide: .* site predicted, got .*z",
    ),
]


@pytest.mark.parametrize(("call", "said"), REFUSED, ids=[r[1][:12] for r in REFUSED])
def test_what_is_refused_is_said_in_one_line(call, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
