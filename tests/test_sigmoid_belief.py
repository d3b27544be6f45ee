"""Sigmoid belief networks and the Helmholtz machine, compared with the enumeration of all their states."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from inference import fit, log_evidence, posterior_predictive, prior_predictive, sample
from inference.core.handlers import isolated
from inference.objectives import RWS, WakeSleep
from ppl_models.models.sigmoid_belief import HelmholtzMachine, SigmoidBeliefNet, states

LAYERS = ((2,), (3,), (2, 2), (4, 2), (2, 1, 2), (5, 3), (1, 4), (6,), (3, 2, 1))
SHAPES = tuple(zip((3, 4, 3, 5, 2, 6, 4, 5, 3), LAYERS, strict=True))
quick_fit = partial(fit, progress=False, compile=False)


def net(seed: int, kind: type[SigmoidBeliefNet] = HelmholtzMachine) -> tuple[SigmoidBeliefNet, Tensor]:
    """A net with random weights of at most 2^16 joint states, in double precision, and four rows."""
    features, layers = SHAPES[seed % len(SHAPES)]
    random = torch.Generator().manual_seed(seed)
    pair = kind(features, layers).double()
    with torch.no_grad():
        for name, p in pair.named_parameters():
            # A guide that is not far off: weights of a poor one vary too much to compare anything.
            scale = 0.3 if name.startswith(("recognition", "thresholds")) else 1.3
            p.copy_(scale * torch.randn(p.shape, generator=random, dtype=torch.float64))
    return pair, torch.rand(4, features, generator=random).round().double()


def every(pair: SigmoidBeliefNet) -> list[dict[str, Tensor]]:
    """All joint states of the layers, the last layer fastest."""
    each = [states(units, pair.origin) for units in pair.layers]
    return [dict(zip(pair.sites, chosen, strict=True)) for chosen in itertools.product(*each)]


def scores(half, pair: SigmoidBeliefNet, x: Tensor) -> Tensor:
    """Log density of a half of the pair in each joint state, (N, states), by Pyro alone."""
    found = []
    for chosen in every(pair):
        values = {n: v.expand(len(x), -1) for n, v in chosen.items()}
        trace = poutine.trace(poutine.condition(half, values)).get_trace(x)
        trace.compute_log_prob()
        sites = [s for n, s in trace.nodes.items() if s["type"] == "sample" and n != "rows"]
        found.append(sum(s["log_prob"] for s in sites))
    return torch.stack(found, 1)


@pytest.mark.parametrize("seed", range(20))
def test_bound_evidence_and_posterior_are_those_of_all_states(seed: int, alone) -> None:
    pair, x = net(seed)
    with torch.no_grad():
        joint, guide = scores(pair.model, pair, x), scores(pair.guide, pair, x)
        evidence = joint.logsumexp(1)
        torch.testing.assert_close(pair.log_evidence(x), evidence)
        posterior = pair.posterior(x).flatten(1)
        torch.testing.assert_close(posterior, joint.softmax(1))
        for name, value in pair.marginals(x).items():
            torch.testing.assert_close(value, posterior @ torch.stack([s[name] for s in every(pair)]))
        torch.testing.assert_close(guide.logsumexp(1), torch.zeros(4).double(), atol=1e-9, rtol=0)
        bound = (guide.exp() * (joint - guide)).sum(1)
        assert (bound <= evidence).all()
        gap = (guide.exp() * (guide - posterior.log())).sum(1)
        torch.testing.assert_close(evidence - bound, gap)
        # The distribution of x sums to one.
        total = pair.log_evidence(states(pair.features, pair.origin)).logsumexp(0)
        assert float(total) == pytest.approx(0, abs=1e-9)
    estimate = log_evidence(pair, x, k=4000, progress=False)
    # By the exact variance of a weight: that of the draws misses rare large ones.
    error = ((2 * joint - guide).logsumexp(1) - 2 * evidence).expm1().clamp_min(0).div(4000).sqrt()
    assert ((estimate.values - evidence).expm1().abs() <= 5 * error + 1e-9).all()
    assert log_evidence(pair, x, "exact").values == pytest.approx(evidence)


@pytest.mark.parametrize("seed", range(10))
def test_gibbs_draws_are_those_of_the_posterior(seed: int, alone) -> None:
    pair, x = net(seed)
    with torch.no_grad():
        exact = pair.posterior(x).flatten(1)
    chains = 2000
    result = sample(pair, x, chains=chains, warmup=150, draws=4, seed=seed, progress=False)
    # The chains' last draws are independent of each other.
    last = {n: v.unflatten(0, (chains, 4))[:, -1] for n, v in result.draws.items()}
    bits = torch.cat([last[n] for n in pair.sites], -1).long()
    which = (bits * 2 ** torch.arange(bits.shape[-1] - 1, -1, -1)).sum(-1)
    frequency = torch.stack([(which == s).double().mean(0) for s in range(exact.shape[1])], 1)
    error = (exact * (1 - exact) / chains).sqrt()
    # Normal tails are those of a count of at least a few.
    assert ((frequency - exact).abs() <= 4.8 * error + 3 / chains).all()


@pytest.mark.parametrize("seed", range(20))
def test_weights_of_a_row_find_the_posterior(seed: int, alone) -> None:
    pair, x = net(seed)
    objective, particles = RWS(20_000), 20_000
    with torch.no_grad():
        exact = pair.posterior(x).flatten(1)
        guide_trace = objective.draw(pair.guide, (x,), {})
        model_trace = objective.replay(pair.model, guide_trace, (x,), {})
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
        ratio = sum(model_trace.nodes[n]["log_prob"] for n in (*pair.sites, "x"))
        weights = (ratio - sum(guide_trace.nodes[n]["log_prob"] for n in pair.sites)).softmax(0)
    bits = torch.cat([guide_trace.nodes[n]["value"] for n in pair.sites], -1).long()
    which = (bits * 2 ** torch.arange(bits.shape[-1] - 1, -1, -1)).sum(-1)
    frequency = torch.stack([(weights * (which == s)).sum(0) for s in range(exact.shape[1])], 1)
    effective = 1 / weights.square().sum(0)
    assert (effective > 30).all() and effective.max() <= particles
    effective = effective[:, None]
    assert ((frequency - exact).abs() <= 5 * (exact * (1 - exact) / effective).sqrt() + 4 / effective).all()


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_reweighted_wake_sleep_fits_the_exact_marginals_and_the_bound_does_not(seed: int, alone) -> None:
    # What minimises KL(p, q) among products has p's marginals; what minimises KL(q, p) has not.
    pair, x = net(seed, SigmoidBeliefNet)
    # Only the guide learns.
    pair.requires_grad_(False).train(False)
    exact = pair.marginals(x)
    result = quick_fit(pair, x, RWS(200), steps=1500, learning_rate=0.1, draws=4)
    for name, value in exact.items():
        assert (result.params[f"{name}_logits"].sigmoid() - value).abs().max() < 0.03, name


@torch.no_grad()
def evidence(pair: SigmoidBeliefNet, x: Tensor) -> float:
    return float(pair.log_evidence(x).mean())


def test_the_helmholtz_machine_learns_by_every_objective(alone) -> None:
    truth, _ = net(1)
    x = prior_predictive(truth, size=500, draws=1, seed=3)["x"][0]
    best = evidence(truth, x)
    for objective in (WakeSleep, partial(RWS, 5), partial(TraceGraph_ELBO)):
        with isolated(1):
            pair = HelmholtzMachine(truth.features, truth.layers).double()
        before = evidence(pair, x)
        quick_fit(pair, x, objective, steps=800, learning_rate=0.03, draws=4)
        after = evidence(pair, x)
        assert after > before + 0.5 * (best - before), objective


def test_the_free_guide_knows_its_rows_and_no_others(alone) -> None:
    pair, x = net(3, SigmoidBeliefNet)
    result = quick_fit(pair, x, steps=5, draws=7, batch=2)
    assert result.draws["z_1"].shape == (7, 4, 4)
    assert result.params["z_1_logits"].shape == (4, 4)
    with pytest.raises(ValueError, match="data: expected the 4 rows of the fit, whose guide has no z_1, z_2"):
        posterior_predictive(result, torch.cat([x, x[:2]]))
    with pytest.raises(ValueError, match="x: expected the 4 rows that the guide was fitted to, got 3"):
        quick_fit(pair, x[:3], steps=5)


def test_a_baseline_learns_the_signal_of_each_layer(alone) -> None:
    pair = HelmholtzMachine(3, (2, 2), baseline=4).double()
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]).double()
    with isolated(0):
        TraceGraph_ELBO().loss_and_grads(pair.model, pair.guide, x)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pair.baselines.parameters())


def test_data_that_were_dreamed_reach_the_guide_through_observations(alone) -> None:
    pair, x = net(2)
    with isolated(0):
        read = poutine.trace(pair.guide).get_trace(x, observations={"x": 1 - x}).nodes["z_1"]["fn"].base_dist.logits
        plain = poutine.trace(pair.guide).get_trace(1 - x).nodes["z_1"]["fn"].base_dist.logits
    torch.testing.assert_close(read, plain)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: SigmoidBeliefNet(3, ()), r"layers: expected a sequence of positive integers, at least 1, got \(\)"),
        (
            lambda: HelmholtzMachine(3, (2, 0)),
            r"layers: expected a sequence of positive integers, at least 1, got \(2, 0\)",
        ),
        (
            lambda: SigmoidBeliefNet(3).log_evidence(torch.zeros(2, 3)),
            "layers: exact answers over 200 units need 1.6e.60 numbers, expected at most 6.7e.07; use log_evidence.*"
            "kernel=Gibbs",
        ),
        (lambda: SigmoidBeliefNet(3, (20, 20)).log_evidence(torch.zeros(2, 3)), "layers: exact answers over 40 units"),
        (lambda: SigmoidBeliefNet(3, (15, 15)).posterior(torch.zeros(2, 3)), "layers: exact answers over 30 units"),
        (
            lambda: quick_fit(HelmholtzMachine(3, (2,)), torch.full((2, 3), 0.5), steps=1),
            "x: expected zeros and ones, got 0.5",
        ),
    ],
)
def test_bad_input_gets_one_clear_line(call, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_states_count_in_binary() -> None:
    assert states(3, torch.zeros(1)).tolist() == [list(map(float, f"{k:03b}")) for k in range(8)]
    assert np.array_equal(states(1, torch.zeros(1)), [[0.0], [1.0]])
