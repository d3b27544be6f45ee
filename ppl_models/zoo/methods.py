r"""How a pair is fitted: methods, each from a pair and its data to a Result, for the rows of the zoo and the ledger."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta

from inference import Joint, Method, Result, fit
from inference.objectives import EM, Adversarial, Denoising, Predictability
from ppl_models.models.bayesian_network import BayesianNetwork
from ppl_models.models.diffusion.chain import DiffusionChain
from ppl_models.models.linear_factors import PPCA
from ppl_models.models.markov_chain import MarkovChain
from ppl_models.models.mixture import Mixture
from ppl_models.models.naive_bayes import NaiveBayes
from ppl_models.models.pair import Pair, continuous


def exact(pair: NaiveBayes | BayesianNetwork, data: Any, **arguments: Any) -> Any:
    """Draw from a conjugate posterior: the pair's ``exact`` is a guide with nothing left to fit."""
    return fit((pair.model, pair.exact), data, steps=0, **arguments)


def point(pair: Pair, given: Any, **arguments: Any) -> Any:
    """Maximum a posteriori: the pair's model with a Delta guide."""
    model = pair.model
    return fit((model, AutoDelta(continuous(model))), given, **arguments)


def em(pair: Mixture, given: Any, **arguments: Any) -> Any:
    """Maximum likelihood (or a posteriori, with a conjugate prior) by expectation maximisation."""
    pair.prior = pair.prior and pair.conjugate
    guide = AutoDelta(continuous(pair.model))
    objective = EM(pair.maximise, pair.start(given["x"]), max_plate_nesting=1)
    return fit((pair.model, guide), given, objective, **arguments)


def closed_form(pair: PPCA, given: Any, **arguments: Any) -> Any:
    """Maximum likelihood without steps."""
    return fit(pair.closed_form(given["x"]), given, steps=0, **arguments)


def counted(pair: MarkovChain, given: Any, **arguments: Any) -> Any:
    """A Markov chain by counting, one added to each count."""
    return fit(pair.estimate(given["x"]), given, steps=0, **arguments)


def by_minibatches(**arguments: Any) -> Method:
    """A fit by minibatches of a hundred rows, with arguments of its own."""
    return partial(fit, **{"steps": 3000, "batch": 100, "learning_rate": 0.005, "draws": 20, **arguments})


def adversaries(
    pair: Any,
    given: Any,
    objective: Any,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.5, 0.9),
    seed: int = 0,
    **arguments: Any,
) -> Result:
    """A fit by Adam whose rate falls to a thousandth on a half cosine: with a constant one samples stay blurred."""
    falling = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps, eta_min=learning_rate / 1000)
    optimizer = Joint(torch.optim.Adam, {"lr": learning_rate, "betas": betas}, schedule=falling)
    return fit(pair, given, objective, steps=steps, batch=batch, optimizer=optimizer, seed=seed, **arguments)


def denoising(**own: Any) -> Method:
    """A diffusion chain by single steps; ``own`` are arguments of ``Denoising``."""

    def method(pair: DiffusionChain, given: Any, **arguments: Any) -> Result:
        schedule: dict[str, Any] = {"steps": 2000, "batch": 128, "learning_rate": 0.002}
        return fit(pair, given, Denoising(pair.steps, **own), **{**schedule, **arguments})

    return method


def adversarial(kind: str = "non_saturating", **penalty: Any) -> Method:
    """Adversarial training at the zoo's size, of a kind of objective and with penalties."""
    schedule: dict[str, Any] = {"steps": 6000, "batch": 64, "learning_rate": 0.001}
    return partial(adversaries, objective=partial(Adversarial, kind, **penalty), **schedule)


def unpredictable(weight: float) -> Method:
    """Predictability minimisation at the zoo's size."""
    objective = partial(Predictability, Trace_ELBO, weight=weight)
    return partial(adversaries, objective=objective, steps=3000, batch=100, learning_rate=0.003)
