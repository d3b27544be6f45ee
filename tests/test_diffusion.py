"""The diffusion chain: its bound three ways, its exact case, what a fitted chain can be asked, what is refused."""

import math
from functools import partial
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from inference import Joint, fit, log_evidence, prior_predictive
from inference.core.handlers import isolated
from inference.diagnostics.two_sample import energy_distance
from inference.objectives import Compiled, Denoising
from ppl_models.models.diffusion import flow, inverse
from ppl_models.models.diffusion.chain import PREDICTIONS, DiffusionChain
from ppl_models.models.diffusion.denoisers import ExactDenoiser, UNet
from ppl_models.models.diffusion.schedules import SCHEDULES, cosine, linear, log_snr, timesteps
from ppl_models.models.parts import grids
from ppl_models.models.parts.distributions import Pixels
from ppl_models.models.parts.networks import evaluation
from ppl_models.zoo import pictures

pytestmark = pytest.mark.usefixtures("alone")

MEANS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5]])
SD = 0.3
MIXTURE = MixtureSameFamily(Categorical(torch.ones(3)), Independent(Normal(MEANS, SD), 1))


def rows(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return MEANS[torch.randint(3, (count,), generator=random)] + SD * torch.randn(count, 2, generator=random)


def exact(steps: int, last: float = -8, **own: Any) -> DiffusionChain:
    """The chain of the mixture whose network is the best that there can be."""
    signal = log_snr(steps, 10, last)
    network = ExactDenoiser(MEANS, SD, signal)
    return DiffusionChain(2, network, schedule=signal, **{"prediction": "sample", "variance": "forward", **own})


def small(**own: Any) -> DiffusionChain:
    """A chain with an untrained network, whose last layer is not small."""
    with isolated(0):
        pair = DiffusionChain(2, **{"steps": 4, "hidden": (8,), **own})
        for p in pair.network.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    return pair


def gradients(pair: DiffusionChain, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(pair.network.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


# -------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_the_signal_falls_from_nearly_one_to_nearly_none(name: str, steps: int) -> None:
    signal = SCHEDULES[name](steps)
    assert len(signal) == steps and bool((signal[1:] < signal[:-1]).all())
    assert 0 < float(signal[-1]) < (0.01 if steps > 2 else 0.2) and float(signal[0]) < 1


def test_schedules_are_those_by_hand() -> None:
    # Ho et al. 2020: a thousand steps leave 4e-5 of the signal.
    noise = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(linear(1000), np.cumprod(1 - noise), rtol=1e-10)
    at = (np.array([0, 0.3]) + 0.008) / 1.008
    whole = np.cos(at * np.pi / 2) ** 2
    assert float(cosine(10)[2]) == pytest.approx(whole[1] / whole[0], rel=1e-6)
    assert float(log_snr(5, 4, -4)[2]) == 0.5


def test_schedules_end_where_they_say() -> None:
    # The last beta of a cosine would be 1: it is clipped to 0.999, also in the schedule that is the default.
    signal = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    assert beta[-1] == 0.999 and (beta[:-1] < 0.999).all()
    np.testing.assert_allclose(cosine(50), np.cumprod(1 - beta), rtol=1e-9)
    pair = DiffusionChain(2, steps=50, hidden=(8,)).double()
    np.testing.assert_allclose(pair.alpha_bar(torch.arange(1, 51))[:, 0], np.cumprod(1 - beta), rtol=1e-6)
    assert DiffusionChain(2, hidden=(8,)).steps == 100
    ends = log_snr(7).logit()[[0, -1]]
    assert ends.tolist() == pytest.approx([12.0, -8.0], abs=1e-6)
    # Fewer steps than a thousand add as much noise in all.
    noise = np.minimum(np.linspace(1e-4, 0.02, 100) * 10, 0.999)
    np.testing.assert_allclose(linear(100), np.cumprod(1 - noise), rtol=1e-10)


def test_steps_that_are_taken_are_spread_evenly() -> None:
    assert timesteps(100, 5) == [100, 75, 50, 26, 1] or timesteps(100, 5) == [100, 75, 50, 25, 1]
    assert timesteps(10, 10) == list(range(10, 0, -1)) and timesteps(10, 1) == [10]


# ------------------------------------------------------------------------------------------- the bound, three ways


@pytest.mark.parametrize(
    ("prediction", "variance"), [*((p, "learned") for p in PREDICTIONS), ("noise", "posterior"), ("sample", "forward")]
)
def test_all_edges_together_are_the_whole_chain(prediction: str, variance: str) -> None:
    pair, x, draws = small(prediction=prediction, variance=variance), rows(3), 800
    repeated = x.repeat(draws, 1)
    pyro.set_rng_seed(0)
    values, slopes = [], []
    for _ in range(30):
        whole = Trace_ELBO().differentiable_loss(pair.model, pair.guide, repeated) / draws
        objective = Denoising(4)
        parts = []
        for t in range(1, 6):
            objective.draw = lambda count, device=None, t=t: (torch.full((count,), t), torch.ones(count))
            parts.append(objective._loss(pair.model, pair.guide, (repeated,), {})[0] / draws / 5)
        edges = torch.stack(parts).sum()
        values.append([whole.item(), edges.item(), -float(pair.bound(repeated, seed=len(values)).total.sum()) / draws])
        slopes.append(torch.stack([gradients(pair, whole), gradients(pair, edges)]))
    found = np.array(values)
    for other in (1, 2):
        apart = found[:, 0] - found[:, other]
        assert abs(apart.mean()) < 4.5 * apart.std() / 30**0.5, other
    apart = torch.stack(slopes)[:, 0] - torch.stack(slopes)[:, 1]
    z = apart.mean(0) / (apart.std(0) / 30**0.5).clamp(min=1e-9)
    # Each of Student's law with 29 degrees of freedom; all but a few depend on one another.
    assert float(z.abs().max()) < 6
    assert len(z) > 100


def test_what_the_last_step_leaves_of_the_data_is_paid_for() -> None:
    pair, x = small(schedule=torch.linspace(0.95, 0.3, 5)), rows(20)
    terms = pair.bound(x)
    paid = 0.5 * (0.7 + 0.3 * x.square() - 1 - math.log(0.7)).sum(1)
    torch.testing.assert_close(terms.prior_kl, paid)
    torch.testing.assert_close(terms.total, terms.reconstruction - paid - terms.step_kl.sum(1))
    assert terms.bits()["total"] == pytest.approx(-float(terms.total.mean()) / 2 / math.log(2), rel=1e-5)


@pytest.mark.parametrize("importance", [False, True])
def test_random_edges_of_a_minibatch_are_the_bound_on_average(importance: bool) -> None:
    pair, x = small(steps=10), rows(40).repeat(50, 1)
    objective = Denoising(10, importance=importance)
    pyro.set_rng_seed(0)
    losses = []
    for _ in range(130):
        chosen = torch.randperm(2000)[:1000]
        loss, step, cost = objective._loss(pair.model, pair.guide, (x[chosen],), {"size": 2000, "rows": chosen})
        losses.append(loss.item())
        if importance:
            objective._record(step, cost)
    truth, error = -float(pair.bound(x, draws=6).total.sum()), np.std(losses[30:]) / 100**0.5
    assert error < 0.01 * truth
    assert np.mean(losses[30:]) == pytest.approx(truth, abs=4.5 * error)


def test_importance_spares_variance_where_steps_cost_unlike() -> None:
    pair, x = small(steps=30, prediction="noise"), rows(64)
    pyro.set_rng_seed(0)
    sd = {}
    for importance in (False, True):
        objective = Denoising(30, importance=importance)
        losses = []
        for _ in range(100):
            loss, step, cost = objective._loss(pair.model, pair.guide, (x,), {})
            losses.append(loss.item())
            if importance:
                objective._record(step, cost)
        sd[importance] = np.std(losses[40:])
    assert sd[True] < 0.7 * sd[False]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_simple_loss_is_that_by_hand(prediction: str) -> None:
    pair, x, objective = small(prediction=prediction), rows(500), Denoising(4, simple=True)
    pyro.set_rng_seed(1)
    loss, *_ = objective._loss(pair.model, pair.guide, (x[:100],), {"size": 500, "rows": torch.arange(100)})
    pyro.set_rng_seed(1)
    step, _ = objective.draw(100)
    noised = pyro.poutine.trace(pair.guide).get_trace(x[:100], size=500, rows=torch.arange(100), step=step)
    noised = noised.nodes["x_step"]["value"]
    signal = torch.tensor([1.0, *cosine(4).tolist()])[step][:, None]
    noise = (noised - signal.sqrt() * x[:100]) / (1 - signal).sqrt()
    velocity = signal.sqrt() * noise - (1 - signal).sqrt() * x[:100]
    target = {"noise": noise, "sample": x[:100], "velocity": velocity}[prediction]
    expected = 5 * (pair.network(noised, step) - target).square().sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_beside_the_simple_loss_the_bound_is_whole_but_for_the_prior() -> None:
    pair, x, differences = small(), rows(40).repeat(20, 1), []
    for seed in range(60):
        losses = []
        for bound in (0.0, 1.0):
            pyro.set_rng_seed(seed)
            losses.append(Denoising(4, simple=True, bound=bound)._loss(pair.model, pair.guide, (x,), {})[0].item())
        differences.append(losses[1] - losses[0])
    terms = pair.bound(x, draws=15)
    truth, error = -float((terms.total + terms.prior_kl).sum()), np.std(differences) / 60**0.5
    assert error < 0.01 * truth
    assert np.mean(differences) == pytest.approx(truth, abs=4.5 * error)


def test_steps_of_a_batch_leave_no_gap() -> None:
    torch.manual_seed(0)
    for simple, count in ((True, 10), (False, 11)):
        step, weight = Denoising(10, simple=simple).draw(3 * count)
        assert step.bincount(minlength=count + 1)[1:].tolist() == [3] * count
        torch.testing.assert_close(weight, torch.full((3 * count,), count / 11))
        # Steps do not begin at the first one in each batch.
        assert any(bool((Denoising(10, simple=simple).draw(3 * count)[0].diff() < 0).any()) for _ in range(30))


LOSSES = pytest.mark.parametrize(
    "own", [{}, {"simple": True}, {"importance": True}, {"simple": True, "bound": 0.001}], ids=str
)


@LOSSES
def test_traced_steps_are_the_eager_ones(own: dict[str, Any]) -> None:
    x, batches, losses = rows(64).double(), torch.arange(64).split(16) * 3, []
    compiled = Compiled(Denoising(6, **own), fuse=False)
    for objective in (Denoising(6, **own), compiled):
        pair = small(steps=6, variance="learned").double()
        svi = SVI(pair.model, pair.guide, Joint(torch.optim.Adam, {"lr": 0.01}), loss=objective)
        with isolated(0):
            losses.append([float(svi.step(x[k], size=64, rows=k)) for k in batches])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    assert compiled.state == "traced" and len(set(losses[0])) == 12


@pytest.mark.slow
@LOSSES
def test_compiled_steps_are_the_eager_ones(own: dict[str, Any]) -> None:
    losses = []
    for compile in (False, True):
        pair = small(steps=6, variance="learned")
        made = fit(pair, rows(64), Denoising(6, **own), steps=25, batch=16, compile=compile, progress=False)
        losses.append(made.losses)
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)
    assert len(set(losses[0])) == 25


def test_a_fall_of_the_loss_at_the_end_is_told() -> None:
    noise = np.random.default_rng(0).normal(size=500)
    assert Denoising(10).advise(None, 100 + noise) == ()
    (said,) = Denoising(10).advise(None, np.linspace(200, 100, 500) + noise)
    # A line of a hundred in 500 steps: 25 in the last quarter.
    assert said.startswith("The loss still falls, by 2")


def test_one_who_looks_on_finds_the_pair_as_it_was() -> None:
    pair = small()
    for z in pair.denoise_steps(torch.zeros(2, 2), torch.Generator()):
        assert pair.training and torch.is_grad_enabled() and not z.requires_grad


@pytest.mark.parametrize("wrap", [lambda o: o, Compiled, lambda o: lambda: o], ids=["plain", "compiled", "factory"])
def test_a_fit_looks_at_one_edge_and_never_runs_the_whole_chain(wrap) -> None:
    pair = small(steps=9)
    seen = []
    pair.network.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    fit(pair, rows(30), wrap(Denoising(9)), steps=1, compile=False, progress=False)
    assert len(seen) <= 3


def test_a_fit_keeps_no_posterior() -> None:
    pair = DiffusionChain(2, steps=10, hidden=(16,))
    result = fit(pair, rows(500), Denoising(10, simple=True), steps=20, batch=100, progress=False)
    assert result.method == "Denoising" and not result.idata.children and not result.draws
    with pytest.raises(ValueError, match="draw: Denoising learns a model and no posterior"):
        result.draw(3)
    # The whole chain is the model of the result.
    assert set(prior_predictive(pair, size=5, draws=3)) == {"x", *(f"x_{t}" for t in range(1, 11))}


# ------------------------------------------------------------------------------------------------ the exact case


def test_the_exact_network_is_the_mean_by_quadrature() -> None:
    signal = log_snr(8, 4, -4)
    network = ExactDenoiser(MEANS[:, :1], 0.3, signal, weights=torch.tensor([0.2, 0.5, 0.3]))
    x = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    prior = MixtureSameFamily(Categorical(torch.tensor([0.2, 0.5, 0.3])), Normal(MEANS[:, 0], 0.3)).log_prob(x).exp()
    for t in (1, 4, 8):
        keep, lose = float(signal[t - 1]) ** 0.5, float(1 - signal[t - 1]) ** 0.5
        at = torch.tensor([-1.2, 0.1, 2.0], dtype=torch.float64)
        weight = prior * torch.exp(-0.5 * ((at[:, None] - keep * x) / lose) ** 2)
        expected = (weight * x).sum(1) / weight.sum(1)
        found = network(at.float()[:, None], torch.full((3,), t))[:, 0]
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_bound_comes_up_to_the_entropy_as_steps_grow() -> None:
    x = rows(20_000)
    gaps = {steps: MIXTURE.log_prob(x) - exact(steps).bound(x).total for steps in (10, 30, 100)}
    mean = {steps: float(gap.mean()) for steps, gap in gaps.items()}
    error = {steps: float(gap.std()) / len(x) ** 0.5 for steps, gap in gaps.items()}
    for few, many in ((10, 30), (30, 100)):
        # One over the steps, nearly: a third is left, give or take five standard errors.
        assert mean[few] - mean[many] > 5 * math.hypot(error[few], error[many])
        assert mean[many] < mean[few] / 2 + 5 * error[many]
    assert mean[100] > -5 * error[100]


@pytest.mark.parametrize("way", [{}, {"steps": 20}, {"steps": 100, "eta": 1.0}], ids=str)
def test_the_exact_chain_draws_the_mixture(way: dict[str, Any]) -> None:
    found = exact(100).generate(3000, seed=1, **way)
    distance = energy_distance(rows(3000, 7), found)
    assert distance.value < 4 * distance.error + (0.004 if way.get("steps") == 20 else 0)


@pytest.mark.parametrize("prediction", ["noise", "sample", "velocity"])
def test_the_implicit_sampler_with_all_its_noise_is_the_ancestral_one(prediction: str) -> None:
    pair = small(steps=6, prediction=prediction, variance="posterior").double()
    ancestral = pair.generate(50, seed=1)
    torch.testing.assert_close(pair.generate(50, steps=6, eta=1.0, seed=1), ancestral)
    assert not torch.allclose(pair.generate(50, steps=6, eta=0.9, seed=1), ancestral, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_rows_of_the_implicit_sampler_have_the_variance_of_its_equation(eta: float) -> None:
    r"""Of rows N(m, s^2) all steps are linear: x_s = a x_t + b + \sigma z, equation 12 of Song et al. 2021."""
    mean, sd, signal = 0.7, 0.4, log_snr(20, 6, -6)
    pair = DiffusionChain(1, ExactDenoiser(torch.tensor([[mean]]), sd, signal), schedule=signal, prediction="sample")
    pair, alpha_bar = pair.double(), signal.tolist()
    steps = timesteps(20, 5)

    def law(noise: float) -> tuple[float, float]:
        centre, variance = 0.0, 1.0
        for t, s in zip(steps, [*steps[1:], 0], strict=True):
            at, before = alpha_bar[t - 1], alpha_bar[s - 1] if s else 1.0
            gain = at**0.5 * sd**2 / (at * sd**2 + 1 - at)
            sigma = noise * ((1 - before) / (1 - at)) ** 0.5 * (1 - at / before) ** 0.5
            # The clean row is m + gain (x - sqrt(at) m), and the noise (x - sqrt(at) clean) / sqrt(1 - at).
            direct = ((1 - before - sigma**2) / (1 - at)) ** 0.5
            slope = before**0.5 * gain + direct * (1 - at**0.5 * gain)
            shift = (before**0.5 - direct * at**0.5) * (1 - gain * at**0.5) * mean
            centre, variance = slope * centre + shift, slope**2 * variance + sigma**2
        return centre, variance

    centre, variance = law(eta)
    count = 40_000
    found = pair.generate(count, steps=5, eta=eta, seed=1)
    assert float(found.mean()) == pytest.approx(centre, abs=4.5 * (variance / count) ** 0.5)
    room = 4.5 * (2 / count) ** 0.5
    assert float(found.var()) / variance == pytest.approx(1, abs=room)
    # Half as much noise again would be seen.
    assert eta == 0 or abs(law(1.5 * eta if eta < 0.6 else 0.8 * eta)[1] / variance - 1) > 2 * room


def test_the_flow_has_the_exact_density() -> None:
    pair = exact(60, last=-14)
    keep, lose = float(pair.alpha_bar(1)) ** 0.5, float(pair.noise_variance(1))
    law = MixtureSameFamily(
        Categorical(torch.ones(3)), Independent(Normal(keep * MEANS, (keep**2 * SD**2 + lose) ** 0.5), 1)
    )
    x = law.sample((40,))
    found = flow.log_density(pair, x, tolerance=1e-6)
    torch.testing.assert_close(found, law.log_prob(x), atol=0.01, rtol=0)
    many = torch.stack([flow.log_density(pair, x, divergence="hutchinson", seed=k) for k in range(30)])
    error = many.std(0) / 30**0.5
    assert bool(((many.mean(0) - found).abs() < 4.5 * error + 0.01).all())


def test_the_flow_is_above_the_chain_and_below_the_truth() -> None:
    pair, x = exact(10), rows(200)
    chain, ode, truth = (
        float(v.mean()) for v in (pair.bound(x, draws=20).total, flow.log_evidence(pair, x), MIXTURE.log_prob(x))
    )
    assert chain < ode - 0.3 and ode == pytest.approx(truth, abs=0.1)


def test_codes_lead_back_to_their_rows_and_between_them() -> None:
    pair, x = exact(200), rows(20)
    torch.testing.assert_close(flow.decode(pair, flow.encode(pair, x)), x, atol=0.06, rtol=0)
    between = flow.interpolate(pair, x[:5], x[5:10], 7)
    assert between.shape == (5, 7, 2)
    torch.testing.assert_close(between[:, 0], x[:5], atol=0.06, rtol=0)
    torch.testing.assert_close(between[:, -1], x[5:10], atol=0.06, rtol=0)
    codes = flow.encode(pair, rows(2000))
    assert energy_distance(codes, torch.randn(2000, 2)).value < 0.01


def test_a_trained_network_comes_near_the_best_one() -> None:
    with isolated(0):
        pair = DiffusionChain(2, schedule=log_snr(50, 10, -8), variance="forward", hidden=(64, 64, 64))
    fit(
        pair,
        rows(20_000),
        Denoising(50, importance=True),
        steps=1500,
        batch=128,
        learning_rate=0.003,
        compile=False,
        progress=False,
    )
    fresh = rows(4000, 9)
    excess = exact(50).bound(fresh).total.mean() - pair.bound(fresh).total.mean()
    # Of 0.16 nats that the best network itself stays below the truth.
    assert 0 < float(excess) < 0.05


# --------------------------------------------------------------------------------------- rows seen in part, or noise


def posterior(matrix: Tensor, seen: Tensor, deviation: float) -> MixtureSameFamily:
    """The exact law of a row of the mixture given A x + noise."""
    a, s = matrix.double(), SD**2 * torch.eye(2, dtype=torch.float64)
    total = a @ s @ a.mT + deviation**2 * torch.eye(len(a), dtype=torch.float64)
    gain = s @ a.mT @ torch.linalg.inv(total)
    means = MEANS.double()
    off = seen.double() - means @ a.mT
    weight = MultivariateNormal(torch.zeros(len(a), dtype=torch.float64), total).log_prob(off)
    return MixtureSameFamily(Categorical(logits=weight), MultivariateNormal(means + off @ gain.mT, s - gain @ a @ s))


@pytest.mark.parametrize("step", [60, 80])
def test_denoising_is_the_exact_posterior(step: int) -> None:
    pair = exact(150)
    deviation = float((-0.5 * pair.log_snr[step]).exp())
    seen = torch.tensor([[0.4, -0.4], [1.5, 0.2]])
    drawn = inverse.denoise(pair, seen, deviation, draws=4000)
    mean = inverse.posterior_mean(pair, seen, deviation)
    for k in range(2):
        law = posterior(torch.eye(2), seen[k], deviation)
        torch.testing.assert_close(mean[k].double(), law.mean, atol=1e-3, rtol=0)
        distance = energy_distance(drawn[k], law.sample((4000,)).float())
        assert distance.value < 4 * distance.error + 0.002


@pytest.mark.parametrize(
    ("matrix", "seen"),
    [(inverse.mask_matrix(torch.tensor([False, True])), [0.2]), (torch.tensor([[0.5, 0.5]]), [-0.1])],
    ids=["inpainting", "super-resolution"],
)
def test_restoring_is_the_exact_posterior_with_many_particles(matrix: Tensor, seen: list[float]) -> None:
    pair, v = exact(100), torch.tensor([seen])
    law = posterior(matrix, v[0], 0.1)
    truth = law.sample((4000,)).float()
    distances = {}
    for particles, times in ((1, 2000), (100, 20)):
        found = inverse.restore(pair, v.expand(times, -1), matrix, 0.1, particles=particles)
        distances[particles] = energy_distance(found.draws.flatten(0, 1), truth)
        assert bool((found.ess >= 1 - 1e-5).all() and (found.ess <= particles + 1e-3).all())
    assert distances[100].value < 0.02
    spread = (found.draws @ matrix.mT).std() / (truth @ matrix.mT).std()
    assert float(spread) == pytest.approx(1, abs=0.12)
    # Guidance alone is biased, and the weights are what mends it.
    assert distances[100].value < distances[1].value


def test_matrices_are_those_by_hand() -> None:
    assert inverse.mask_matrix(torch.tensor([True, False, True])).tolist() == [[1, 0, 0], [0, 0, 1]]
    x = torch.arange(16.0)
    assert (inverse.pooling_matrix((4, 4), 2) @ x).tolist() == [2.5, 4.5, 10.5, 12.5]


# ------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize(("loc", "scale"), [(0.3, 0.05), (-0.4, 0.2), (1.6, 0.01), (0.5, 30.0), (0.0, 1e-4)])
def test_probabilities_of_all_levels_sum_to_one(levels: int, loc: float, scale: float) -> None:
    at = torch.tensor(loc, dtype=torch.float64, requires_grad=True)
    law = Pixels(at, torch.tensor(scale, dtype=torch.float64), levels)
    score = law.log_prob(torch.arange(levels, dtype=torch.float64) / (levels - 1))
    assert score.exp().sum().item() == pytest.approx(1, abs=1e-9)
    score.sum().backward()
    assert at.grad is not None and math.isfinite(float(at.grad))


def test_pixels_are_drawn_as_often_as_they_are_likely() -> None:
    law = Pixels(torch.tensor(0.8), torch.tensor(0.3), 5)
    drawn = law.sample((20_000,))
    share = torch.bincount((drawn * 4).round().long(), minlength=5) / 20_000
    chance = law.log_prob(torch.arange(5) / 4).exp()
    assert float(((share - chance).abs() / (chance * (1 - chance) / 20_000).sqrt()).max()) < 4.5


def test_clean_pixels_are_kept_within_their_range_however_they_are_scaled() -> None:
    for own in ({}, {"shift": 0.13, "scale": 0.31}):
        pair = DiffusionChain(
            3,
            ExactDenoiser(torch.full((1, 3), 9.0), 0.1, cosine(5)),
            schedule=cosine(5),
            prediction="sample",
            likelihood="pixels",
            levels=4,
            **own,
        )
        torch.testing.assert_close(pair.generate(2), torch.ones(2, 3))
        with evaluation(pair):
            found = pair.unscaled(pair.predict(torch.zeros(2, 3), 1).x0)
        torch.testing.assert_close(found, torch.ones(2, 3))


@pytest.mark.parametrize(
    "schedule",
    [torch.tensor([0.9, 0.1, 1e-8, 1e-9]), linear(1000), cosine(4000), log_snr(100, 12, -20)],
    ids=["steep", "linear", "cosine", "log_snr"],
)
def test_single_precision_keeps_the_digits_of_a_schedule(schedule: Tensor) -> None:
    pair = DiffusionChain(2, schedule=schedule, hidden=(4,))
    t = torch.arange(1, pair.steps + 1)
    whole = torch.cat([torch.ones(1).double(), schedule.double()])
    added = 1 - whole[1:] / whole[:-1]
    torch.testing.assert_close(pair.beta(t)[:, 0].double(), added, rtol=1e-5, atol=0)
    torch.testing.assert_close(pair.float().beta(t)[:, 0].double(), added, rtol=1e-3, atol=0)


# -------------------------------------------------------------------------------------- labels, images, likelihood


def test_labels_are_hidden_in_training_alone_and_guide() -> None:
    y = torch.arange(3).repeat(400)
    x = MEANS[y] + SD * torch.randn(1200, 2, generator=torch.Generator().manual_seed(0))
    with isolated(0):
        pair = DiffusionChain(2, classes=3, steps=30, hidden=(64, 64), drop=0.3)
    seen = []
    handle = pair.network.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    fit(
        pair,
        {"x": x, "y": y},
        Denoising(30, simple=True),
        steps=600,
        batch=100,
        learning_rate=0.005,
        compile=False,
        progress=False,
    )
    hidden = torch.cat(seen[-500:]).eq(3).float().mean()
    assert float(hidden) == pytest.approx(0.3, abs=0.02)
    seen.clear()
    pair.bound(x, y)
    with evaluation(pair):
        Denoising(30).loss(pair.model, pair.guide, x, y)
    assert int(torch.cat(seen).max()) == 2
    handle.remove()
    asked = torch.arange(3).repeat_interleave(300)
    error = {}
    for guidance in (0.0, 3.0):
        drawn = pair.generate(900, y=asked, guidance=guidance)
        assert float((torch.cdist(drawn, MEANS).argmin(1) == asked).float().mean()) > 0.97
        error[guidance] = float((drawn - MEANS[asked]).norm(dim=1).mean())
    assert error[3.0] != pytest.approx(error[0.0], rel=0.02)


def test_guidance_moves_the_mean_and_leaves_a_learned_variance_as_it_is() -> None:
    pair = small(classes=3, variance="learned", prediction="noise").eval()
    x_t, y, t = torch.randn(20, 2), torch.arange(20) % 3, 3
    with torch.no_grad():
        plain, guided = pair.predict(x_t, t, y), pair.predict(x_t, t, y, guidance=4.0)
        out = [pair.network(x_t, torch.full((20,), t), labels) for labels in (y, torch.full((20,), 3))]
        steps = [pair.step_distribution(x_t, prediction, t) for prediction in (plain, guided)]
    expected = 5 * out[0][:, :2] - 4 * out[1][:, :2]
    torch.testing.assert_close(guided.eps, expected)
    assert torch.equal(guided.variance_logit, plain.variance_logit)
    assert torch.equal(steps[0].stddev, steps[1].stddev)
    assert not torch.allclose(steps[0].mean, steps[1].mean) and not torch.allclose(out[0][:, 2:], out[1][:, 2:])


@pytest.mark.parametrize("learned", [False, True])
def test_a_small_unet_takes_images_steps_and_labels(learned: bool) -> None:
    network = UNet((7, 5), 20, channels=(8, 16, 16), classes=3, learned_variance=learned)
    pair = DiffusionChain(
        35, network, classes=3, steps=20, likelihood="pixels", variance=("forward", "learned")[learned]
    )
    x = torch.randint(256, (6, 35)) / 255
    y = torch.arange(6) % 3
    assert pair.bound(x, y).total.shape == (6,)
    for p in network.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    first = network(x, torch.full((6,), 3), y)
    assert not torch.allclose(first, network(x, torch.full((6,), 9), y))
    assert not torch.allclose(first, network(x, torch.full((6,), 3), (y + 1) % 3))
    # Leading dimensions are particles.
    wide_x, wide_t = x[None].expand(2, -1, -1), torch.full((2, 6), 3)
    torch.testing.assert_close(network(wide_x, wide_t, y.expand(2, -1))[1], first, rtol=1e-4, atol=1e-5)
    result = fit(pair, {"x": x, "y": y}, Denoising(20, simple=True, bound=0.001), steps=3, batch=3, progress=False)
    assert np.isfinite(result.losses).all()


def test_the_likelihood_is_one_call_and_tighter_with_particles() -> None:
    pair, x = exact(20), rows(50)
    estimate = log_evidence((pair.model, pair.guide), x, k=300, progress=False)
    bound, truth = pair.bound(x, draws=50).total.double(), MIXTURE.log_prob(x).double()
    assert float(bound.mean()) + 0.05 < estimate.mean < float(truth.mean()) + 0.1


# ------------------------------------------------------------------------------------------------------ pictures


def test_pictures_of_a_chain(tmp_path) -> None:
    pair = DiffusionChain(16, steps=6, likelihood="pixels", levels=4, hidden=(8,))
    x = torch.randint(4, (20, 16)) / 3
    names = [path.name for path in pictures.save(pair, {"x": x}, (4, 4), tmp_path)]
    assert names == ["samples.png", "chain.png", "steps.png"] and all((tmp_path / n).exists() for n in names)
    images, _ = grids.chain(pair, x, rows=4, columns=5)
    assert images.shape == (4, 5, 16)
    # From data to noise, and back.
    torch.testing.assert_close(images[:2, 0], x[[0, 19]])
    drawn = pair.generate(2, seed=0)
    torch.testing.assert_close(images[2:, -1], drawn)


def test_ways_in_the_plane_end_where_rows_are_drawn() -> None:
    pair = exact(20)
    figure = pictures.trajectories(pair, rows(100), count=7, seed=3)
    ends = figure.axes[1].collections[-1].get_offsets().data
    torch.testing.assert_close(torch.as_tensor(np.asarray(ends)).float(), pair.generate(7, steps=20, seed=3))
    # A network that learns, too.
    assert len(pictures.trajectories(small(), rows(9)).axes) == 2
    with pytest.raises(ValueError, match="features: expected 2 for paths in the plane, got 16"):
        pictures.trajectories(DiffusionChain(16, steps=3, hidden=(4,)), torch.zeros(3, 16))


# ------------------------------------------------------------------------------------------------ what is refused

PIXELS = partial(DiffusionChain, 2, likelihood="pixels", steps=5, hidden=(4,))
REFUSED: list[tuple[Any, str]] = [
    (lambda: DiffusionChain(2, schedule="square"), "schedule: expected one of linear, cosine, log_snr"),
    (
        lambda: DiffusionChain(2, schedule=torch.tensor([0.9, 0.95, 0.1])),
        r"schedule: expected alpha_bar to decrease within \(0, 1\), got 0.9 and then 0.95 at step 2",
    ),
    (lambda: DiffusionChain(2, schedule=torch.tensor([1.0, 0.5])), "got 1 and then 1 at step 1"),
    (lambda: DiffusionChain(2, schedule=torch.tensor([0.9, 0.0])), "got 0.9 and then 0 at step 2"),
    (lambda: DiffusionChain(2, steps=1), "steps: expected an integer of at least 2, got 1"),
    (lambda: DiffusionChain(2, prediction="score"), "prediction: expected one of noise, sample, velocity, got 'score'"),
    (lambda: DiffusionChain(2, scale=0.0), "scale: expected positive numbers, got 0"),
    (lambda: DiffusionChain(2, nn.Linear(2, 2)), "network: expected inputs of width 2, got an error"),
    (
        lambda: DiffusionChain(2, ExactDenoiser(MEANS, SD, cosine(9)), variance="learned", schedule=cosine(9)),
        r"network: expected outputs of width 4, got \(1, 2\)",
    ),
    (lambda: small().generate(3, steps=5), r"steps: expected 1 to 4 \(those of the chain\), got 5"),
    (lambda: small().generate(3, guidance=1.0), "guidance: expected a pair with classes and drop above 0"),
    (lambda: small().generate(3, steps=2, eta=-1.0), "eta: expected a fraction from 0 to 1, got -1.0"),
    (lambda: small().generate(3, steps=2, eta=math.nan), "eta: expected a fraction from 0 to 1, got nan"),
    (
        lambda: small().generate(3, eta=0.5),
        "eta: expected steps, as only the implicit sampler has it, got eta 0.5 without",
    ),
    (lambda: small().generate(0), "count: expected an integer of at least 1, got 0"),
    (lambda: small(classes=3).generate(2, y=torch.tensor([0, 3])), "y: expected labels 0 to 2, got 3"),
    (lambda: small(classes=3).generate(5, y=torch.tensor([0, 1])), r"y: expected one label per row \(5,\), got \(2,\)"),
    (lambda: small().bound(rows(3), draws=0), "draws: expected an integer of at least 1, got 0"),
    (lambda: flow.log_evidence(small(), rows(3), draws=0), "draws: expected an integer of at least 1, got 0"),
    (lambda: DiffusionChain(2, shift=torch.zeros(3)), "shift: expected finite numbers, one or 2, got"),
    (lambda: DiffusionChain(2, scale=math.inf), "scale: expected a finite number, got inf"),
    (lambda: fit(small(), rows(4), Denoising(9), steps=2), "steps: expected 4, those of the pair, got 9"),
    (lambda: fit(small(), {"x": rows(4), "step": torch.zeros(4).long()}), "step: expected one per row, 1 to 5"),
    (lambda: Denoising(5, bound=0.0), "bound: expected a positive weight where there is no simple loss, got 0"),
    (lambda: flow.log_density(small(), rows(3) * math.nan), "x_1: expected finite numbers, got nan"),
    (lambda: flow.encode(small(), rows(3) * math.nan), "x: expected finite numbers, got nan"),
    (lambda: inverse.restore(small(), rows(3) * math.nan, torch.eye(2)), "observed: expected finite numbers, got nan"),
    (lambda: inverse.restore(small(classes=3), rows(3), torch.eye(2)), "y: expected the label of every row, got none"),
    (lambda: inverse.posterior_mean(small(classes=3), rows(3), 0.5), "y: expected the label of every row, got none"),
    (lambda: flow.encode(small(classes=3), rows(3)), "y: expected the label of every row, got none"),
    (lambda: inverse.denoise(small(), rows(3)[0], 0.5), r"x: expected \(rows, 2\), got \(2,\)"),
    (lambda: fit(PIXELS(), torch.tensor([[0.5, 1.5]]), Denoising(5)), r"x: expected pixels in \[0, 1\], got 1.5"),
    (
        lambda: fit(PIXELS(levels=3), torch.tensor([[0.5, 0.3]]), Denoising(5)),
        r"x: expected pixels of 3 levels, multiples of 1 / 2, got 0.3; set levels",
    ),
    (lambda: fit(small(), {"x": rows(4), "step": 9}), r"step: expected 1 to 5 \(steps \+ 1 is the prior's\), got 9"),
    (lambda: Denoising(1), "steps: expected an integer of at least 2, got 1"),
    (lambda: Denoising(5, simple=True, importance=True), "importance: expected the bound, got simple"),
    (lambda: inverse.denoise(small(), rows(3), 1e-6), "sd: expected a noise level between those of the first"),
    (lambda: inverse.restore(small(), rows(3), torch.eye(3)), r"matrix: expected \(M, 2\), got \(3, 3\)"),
    (
        lambda: inverse.restore(small(), rows(3), torch.eye(2)[:1]),
        r"observed: expected \(rows, 1\), one column per row",
    ),
    (lambda: inverse.mask_matrix(torch.tensor([False, False])), "observed: expected booleans"),
    (lambda: inverse.pooling_matrix((4, 4), 3), "side: expected a divisor of 4 and 4, got 3"),
    (lambda: flow.log_density(small(), rows(3), divergence="none"), "divergence: expected one of exact, hutchinson"),
]


@pytest.mark.parametrize(("call", "said"), REFUSED, ids=[r[1][:24] for r in REFUSED])
def test_what_is_refused_is_said_in_one_line(call, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_an_edge_asks_for_a_model_that_has_one() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("x", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1), obs=x[0])

    with pytest.raises((ValueError, TypeError), match="step"):
        fit((model, lambda x: None), rows(3), Denoising(5), progress=False)
