"""Guides that are messengers, which run the model themselves: their density is that of the sites that they draw.

z_n ~ N(0, 1), y_n ~ N(z_n, 1): the posterior of z_n is N(y_n / 2, 1 / 2), and y_n ~ N(0, 2).
"""

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoHierarchicalNormalMessenger, AutoNormalMessenger
from pyro.poutine.guide import GuideMessenger
from torch import Tensor
from torch.distributions import constraints

from inference import fit, log_evidence, log_weights
from inference.core.bound import bind
from inference.core.handlers import isolated
from inference.objectives import IWAE, RWS, VIMCO, BetaELBO, WakeSleep

Y = torch.tensor([1.0, 2.0, 3.0, 2.5, 1.5])
EVIDENCE = dist.Normal(0.0, 2**0.5).log_prob(Y)
quiet = partial(fit, progress=False)


def model(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


class Exact(GuideMessenger):
    def get_posterior(self, name: str, prior: Any) -> Any:
        return dist.Normal(self.args_kwargs[1]["y"] / 2, 0.5**0.5)


def posterior(y: Tensor) -> Any:
    slope = pyro.param("slope", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.9), constraint=constraints.positive)
    return dist.Normal(slope * y, scale)


class Sloped(GuideMessenger):
    def get_posterior(self, name: str, prior: Any) -> Any:
        return posterior(self.args_kwargs[1]["y"])


def plain(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        pyro.sample("z", posterior(y))


OBJECTIVES = {
    "elbo": lambda: Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1),
    "beta": lambda: BetaELBO(0.5),
    "iwae": lambda: IWAE(3),
    "dreg": lambda: IWAE(3, doubly=True),
    "vimco": lambda: VIMCO(3),
    "rws": lambda: RWS(3),
    "rws with sleep": lambda: RWS(3, insomnia=0.5),
    "wake-sleep": WakeSleep,
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("bound", [True, False], ids=["by fit", "by SVI"])
def test_objectives_have_the_loss_and_gradients_of_the_same_plain_guide(name: str, bound: bool) -> None:
    def gradients(guide: Any) -> tuple[float, list[Tensor]]:
        half = bind((model, guide), Y).guide if bound else guide
        with isolated(3):
            loss = OBJECTIVES[name]().loss_and_grads(model, half, y=Y)
            store = pyro.get_param_store()
            return float(loss), [store._params[n].grad.clone() for n in ("slope", "scale")]

    (expected, theirs), (loss, ours) = gradients(plain), gradients(Sloped(model))
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(ours, theirs)
    assert all(g.abs() > 0 for g in ours)


@pytest.mark.parametrize("objective", [lambda: IWAE(3), lambda: VIMCO(3), lambda: RWS(3), Trace_ELBO])
def test_the_bound_of_the_exact_guide_is_the_evidence(objective: Any) -> None:
    with isolated(0):
        assert float(objective().loss(model, bind((model, Exact(model)), Y).guide, y=Y)) == pytest.approx(
            -float(EVIDENCE.sum()), rel=1e-5
        )


def test_weights_of_the_exact_guide_are_the_evidence() -> None:
    result = quiet((model, Exact(model)), Y, steps=0, draws=200)
    torch.testing.assert_close(log_weights(result, draws=200), EVIDENCE.sum().expand(200).double(), check_dtype=False)
    # Equal weights but for rounding, of which no tail can be fitted.
    assert result.diagnosis.pareto_k < 0.5 and result.diagnosis.effective == pytest.approx(1, abs=1e-4)
    values = log_evidence(result, k=5, progress=False).values
    torch.testing.assert_close(torch.as_tensor(values), EVIDENCE, check_dtype=False)


def test_a_guide_that_is_the_prior_has_the_weights_of_the_likelihood() -> None:
    class Prior(GuideMessenger):
        def get_posterior(self, name: str, prior: Any) -> Any:
            return prior

    result = quiet((model, Prior(model)), Y, steps=0, draws=200)
    mean = log_weights(result, draws=20_000).double().logsumexp(0) - math.log(20_000)
    assert float(mean) == pytest.approx(float(EVIDENCE.sum()), abs=0.5)


@pytest.mark.parametrize("kind", [AutoNormalMessenger, AutoHierarchicalNormalMessenger])
@pytest.mark.parametrize("objective", [lambda: IWAE(3), lambda: VIMCO(3)])
def test_a_fit_finds_the_posterior(kind: Any, objective: Any) -> None:
    result = quiet((model, kind(model)), Y, objective, steps=400, learning_rate=0.05, draws=400)
    torch.testing.assert_close(result.draws["z"].mean(0), Y / 2, rtol=0, atol=0.4)
    assert result.diagnosis.pareto_k < 0.7


def test_a_plain_guide_that_observes_what_the_model_observes_is_refused() -> None:
    messenger = AutoNormalMessenger(model)
    with pytest.raises(ValueError, match="guide: expected latent sites of the model, got y, which the model observes"):
        quiet((model, lambda y: messenger(y)), Y, steps=1)
