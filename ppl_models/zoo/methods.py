r"""Methods of the zoo and the ledger: functions from a pair and its data to a Result.

A method changes nothing about the pair but its parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta

from inference import Joint, Method, Result, fit
from inference.objectives import EM, Adversarial, Denoising, Predictability
from ppl_models.models.any_order import EoNADE
from ppl_models.models.bayesian_network import BayesianNetwork
from ppl_models.models.diffusion.chain import DiffusionChain
from ppl_models.models.linear_factors import PPCA
from ppl_models.models.markov_chain import MarkovChain
from ppl_models.models.mixture import Mixture
from ppl_models.models.naive_bayes import NaiveBayes
from ppl_models.models.pair import Pair, continuous


def settings(method: Method) -> set[str]:
    """Names of the settings that a method of the zoo takes beside a pair and its data."""
    named, function = set(), getattr(method, "func", method)
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        # What is not named is handed on to ``fit``.
        named |= set(inspect.signature(fit).parameters)
    return (named | {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}) - {"pair", "data", "objective"}


def exact(
    pair: NaiveBayes | BayesianNetwork, data: Any, *, draws: int = 1000, seed: int = 0, progress: bool = True
) -> Result:
    """Draw from the conjugate posterior. The guide ``exact`` of the pair has no parameters, so nothing is fitted."""
    return fit((pair.model, pair.exact), data, steps=0, draws=draws, seed=seed, progress=progress)


def point(pair: Pair, given: Any, **arguments: Any) -> Any:
    """Maximum a posteriori estimate, with a Delta guide."""
    model = pair.model
    return fit((model, AutoDelta(continuous(model))), given, **arguments)


def em(
    pair: Mixture, given: Any, *, steps: int = 100, draws: int = 1000, seed: int = 0, progress: bool = True
) -> Result:
    """Expectation maximisation: the maximum a posteriori estimate, or without a conjugate prior maximum likelihood."""
    if pair.prior and not pair.conjugate:
        # A copy with the same buffers: the caller's pair keeps its prior.
        pair = copy(pair)
        pair.prior = False
    guide = AutoDelta(continuous(pair.model))
    objective = EM(pair.maximise, pair.start(given["x"]), max_plate_nesting=1)
    return fit((pair.model, guide), given, objective, steps=steps, draws=draws, seed=seed, progress=progress)


def closed_form(pair: PPCA, given: Any, *, draws: int = 1000, seed: int = 0, progress: bool = True) -> Result:
    """Maximum likelihood in closed form."""
    return fit(pair.closed_form(given["x"]), given, steps=0, draws=draws, seed=seed, progress=progress)


def counted(pair: MarkovChain, given: Any, *, draws: int = 1000, seed: int = 0, progress: bool = True) -> Result:
    """Transition probabilities from counts, with one added to each count."""
    return fit(pair.estimate(given["x"]), given, steps=0, draws=draws, seed=seed, progress=progress)


def by_minibatches(**arguments: Any) -> Method:
    """``fit`` with minibatches of 100 rows; ``arguments`` replace these defaults.

    The learning rate is that of the deep pairs. In two runs per rate on digits, of 3,000 steps, the held-out bound of a
    VAE was the same to 0.1 nats from 0.002 to 0.005, but one run at a higher rate than 0.002 collapsed.
    """
    return partial(fit, **{"steps": 3000, "batch": 100, "learning_rate": 0.002, "draws": 20, **arguments})


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
    """Adversarial training by Adam, with a cosine decay of the learning rate to a thousandth.

    At a constant learning rate the samples stay blurred.
    """
    decay = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps, eta_min=learning_rate / 1000)
    optimizer = Joint(torch.optim.Adam, {"lr": learning_rate, "betas": betas}, schedule=decay)
    return fit(pair, given, objective, steps=steps, batch=batch, optimizer=optimizer, seed=seed, **arguments)


def by_single_steps(
    pair: DiffusionChain | EoNADE, given: Any, objective: Callable[[int], Denoising], **arguments: Any
) -> Result:
    """Train a pair of many steps by one random step per row; the objective is made from their number."""
    return fit(pair, given, objective(pair.steps), **arguments)


def denoising(**settings: Any) -> Method:
    """Training by single steps with the zoo's defaults; ``settings`` are arguments of ``Denoising``."""
    schedule: dict[str, Any] = {"steps": 2000, "batch": 128, "learning_rate": 0.002}
    return partial(by_single_steps, objective=partial(Denoising, **settings), **schedule)


def adversarial(kind: str = "non_saturating", **penalty: Any) -> Method:
    """Adversarial training with the zoo's defaults; the arguments are those of ``Adversarial``."""
    schedule: dict[str, Any] = {"steps": 6000, "batch": 64, "learning_rate": 0.001}
    return partial(adversaries, objective=partial(Adversarial, kind, **penalty), **schedule)


def unpredictable(weight: float) -> Method:
    """Predictability minimisation at the zoo's size."""
    objective = partial(Predictability, Trace_ELBO, weight=weight)
    return partial(adversaries, objective=objective, steps=3000, batch=100, learning_rate=0.003)
