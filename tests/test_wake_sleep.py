"""Wake-sleep, its reweighted form and VIMCO: gradients against enumeration, minibatches, what is refused."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, ReweightedWakeSleep
from test_sigmoid_belief import net, scores
from torch import Tensor

from inference import fit
from inference.core.handlers import isolated
from inference.objectives import RWS, VIMCO, Compiled, WakeSleep
from ppl_models.models.sigmoid_belief import HelmholtzMachine, SigmoidBeliefNet, states
from ppl_models.models.vae import VAE, ConditionalVAE, SemiSupervisedVAE

DRAWS = 1500


def mean_gradients(objective, pair: SigmoidBeliefNet, x: Tensor, **arguments) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean over draws of each parameter's gradient, and its standard error."""
    each: dict[str, list[Tensor]] = {n: [] for n, _ in pair.named_parameters()}
    with isolated(3):
        for _ in range(DRAWS):
            for p in pair.parameters():
                p.grad = None
            objective.loss_and_grads(pair.model, pair.guide, x=x, **arguments)
            for name, p in pair.named_parameters():
                each[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    stacked = {n: torch.stack(g) for n, g in each.items()}
    return {n: (g.mean(0), g.std(0) / DRAWS**0.5) for n, g in stacked.items()}


def agree(found: dict[str, tuple[Tensor, Tensor]], loss: Tensor, pair: SigmoidBeliefNet, half: str = "") -> None:
    """The mean gradients are those of an exact loss, within the noise."""
    guides = ("recognition", "thresholds")
    named = [(n, p) for n, p in pair.named_parameters() if not half or n.startswith(guides) == (half == "guide")]
    slopes = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    for (name, p), slope in zip(named, slopes, strict=True):
        mean, error = found[name]
        expected = torch.zeros_like(p) if slope is None else slope
        assert error.max() > 0, name
        assert ((mean - expected).abs() <= 4.8 * error + 1e-9).all(), name


def test_the_wake_phase_is_the_gradient_of_the_bound_and_the_sleep_phase_that_of_dreams(alone) -> None:
    pair, x = net(2)
    found = mean_gradients(WakeSleep(), pair, x)
    joint, guide = scores(pair.model, pair, x), scores(pair.guide, pair, x)
    agree(found, -(guide.exp().detach() * joint).sum(), pair, "model")
    images = states(pair.features, pair.origin)
    dreams = scores(pair.model, pair, images).exp().detach()
    agree(found, -len(x) * (dreams * scores(pair.guide, pair, images)).sum(), pair, "guide")


@pytest.mark.parametrize("insomnia", [0.3, 1.0])
def test_reweighted_phases_weigh_the_particles_of_a_row(insomnia: float, alone) -> None:
    pair, x = net(0)
    found = mean_gradients(RWS(2, insomnia=insomnia), pair, x)
    joint, guide = scores(pair.model, pair, x), scores(pair.guide, pair, x)
    # All pairs of two particles, with their normalised weights.
    chance = (guide[:, :, None] + guide[:, None, :]).exp().detach()
    ratio = (joint - guide).detach()
    first = (ratio[:, :, None] - ratio[:, None, :]).sigmoid()
    wake = [(chance * (first * v[:, :, None] + (1 - first) * v[:, None, :])).sum() for v in (joint, guide)]
    agree(found, -wake[0], pair, "model")
    images = states(pair.features, pair.origin)
    dreams = scores(pair.model, pair, images).exp().detach()
    sleep = len(x) * (dreams * scores(pair.guide, pair, images)).sum()
    agree(found, -insomnia * wake[1] - (1 - insomnia) * sleep, pair, "guide")


def test_vimco_is_the_gradient_of_the_bound_with_several_particles(alone) -> None:
    pair, x = net(0)
    found = mean_gradients(VIMCO(3), pair, x)
    joint, guide = scores(pair.model, pair, x), scores(pair.guide, pair, x)
    ratio = joint - guide
    three = [v[:, :, None, None], v[:, None, :, None], v[:, None, None, :]] if (v := ratio) is not None else []
    bound = torch.stack(torch.broadcast_tensors(*three)).logsumexp(0) - math.log(3)
    chance = (guide[:, :, None, None] + guide[:, None, :, None] + guide[:, None, None, :]).exp()
    agree(found, -(chance * bound).sum(), pair)


def test_baselines_of_vimco_leave_less_noise_than_the_score_alone(alone) -> None:
    class Score(VIMCO):
        def _without(self, log_weights: Tensor) -> Tensor:
            return torch.zeros_like(log_weights)

    pair, x = net(1)
    plain, ours = (mean_gradients(o, pair, x)["recognition.0"][1] for o in (Score(5), VIMCO(5)))
    assert float(ours.square().mean()) < 0.5 * float(plain.square().mean())


@pytest.mark.parametrize(
    "objective", [WakeSleep(), RWS(4), RWS(4, insomnia=0.5), VIMCO(4)], ids=["WakeSleep", "RWS", "RWS-both", "VIMCO"]
)
def test_a_minibatch_counts_for_all_rows(objective, alone) -> None:
    pair, x = net(1)

    def run(**arguments) -> tuple[float, list[Tensor]]:
        with isolated(4):
            for p in pair.parameters():
                p.grad = None
            loss = objective.loss_and_grads(pair.model, pair.guide, x=x[:2], **arguments)
        return float(loss), [p.grad.clone() for p in pair.parameters()]

    (loss, slopes), (scaled, steeper) = run(), run(size=8, rows=torch.arange(2))
    assert scaled == pytest.approx(4 * loss)
    for one, other in zip(slopes, steeper, strict=True):
        torch.testing.assert_close(other, 4 * one)


def test_pyros_weights_for_all_rows_at_once_fail_on_rows(alone) -> None:
    truth, _ = net(1, SigmoidBeliefNet)
    torch.manual_seed(0)
    x = truth.model(size=256).detach()
    truth.requires_grad_(False).train(False)
    with torch.no_grad():
        exact = truth.posterior(x) @ states(3, truth.origin)
        objective = RWS(50)
        guide_trace = objective.draw(truth.guide, (x,), {})
        model_trace = objective.replay(truth.model, guide_trace, (x,), {})
        for t in (guide_trace, model_trace):
            t.compute_log_prob()
        ratio = sum(model_trace.nodes[n]["log_prob"] for n in ("z_1", "x")) - guide_trace.nodes["z_1"]["log_prob"]

    def effective(log_weights: Tensor) -> float:
        return float((1 / log_weights.softmax(0).square().sum(0)).mean())

    # Of fifty particles: many for a row, hardly more than one for 256 rows at once.
    assert effective(ratio) > 3 * effective(ratio.sum(1))
    # What the rows' posterior is taken for: that of a single particle is either 0 or 1.
    z = guide_trace.nodes["z_1"]["value"]
    by_row = torch.einsum("in,inu->nu", ratio.softmax(0), z)
    at_once = torch.einsum("i,inu->nu", ratio.sum(1).softmax(0), z)
    errors = [float((found - exact).square().mean().sqrt()) for found in (by_row, at_once)]
    assert errors[0] < 0.1 < 0.3 < errors[1], errors
    # That is what Pyro's objective weighs by.
    theirs = ReweightedWakeSleep(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    with isolated(5):
        truth.requires_grad_(True).train(True)
        theirs.loss_and_grads(truth.model, truth.guide, x)
        slope = truth.z_1_logits.grad
    # Its gradient of the log odds of a row is 1/2 less the posterior mean that the particles give.
    assert float((0.5 - slope - exact).square().mean().sqrt()) > 0.3


def test_reparameterised_guides_learn_too_and_through_their_draws_goes_nothing(alone) -> None:
    torch.manual_seed(1)
    pair = VAE(6, 2, hidden=(4,)).double()
    x = (torch.rand(12, 6) > 0.5).double()
    objective = RWS(4, insomnia=0.5)
    trace = objective.draw(pair.guide, (x,), {}, detach=True)
    assert not trace.nodes["z"]["value"].requires_grad
    assert trace.nodes["z"]["fn"].base_dist.loc.requires_grad
    before = [p.clone() for p in pair.parameters()]
    result = fit(pair, x, objective, steps=200, draws=2, progress=False)
    assert result.losses[-20:].mean() < result.losses[:20].mean()
    assert all(not torch.equal(p, q) for p, q in zip(before, pair.parameters(), strict=True))


def test_what_a_model_is_given_stays_when_it_dreams(alone) -> None:
    # Labels of a conditional pair are inputs: the dreamed rows are of the same classes.
    pair = ConditionalVAE(6, 2, 3, hidden=(4,)).double()
    seen = []
    inner = pair.guide

    def guide(x, y=None, **arguments):
        seen.append((x, y))
        return inner(x, y, **arguments)

    x, y = (torch.rand(5, 6) > 0.5).double(), torch.tensor([0, 1, 2, 0, 1])
    WakeSleep().loss_and_grads(pair.model, guide, x=x, y=y)
    (real, _), (dreamed, labels) = seen
    assert torch.equal(real, x) and not torch.equal(dreamed, x) and torch.equal(labels, y)
    # A factor is no data, and is not dreamed.
    partly = SemiSupervisedVAE(6, 2, 3, hidden=(4,), auxiliary=1.0).double()
    given = torch.tensor([0.0, torch.nan, 2.0, torch.nan, 1.0]).double()
    assert math.isfinite(RWS(3, insomnia=0.5).loss_and_grads(partly.model, partly.guide, x=x, y=given))


@pytest.mark.parametrize(
    "method",
    [
        partial(RWS, 4, insomnia=0.5),
        pytest.param(WakeSleep, marks=pytest.mark.slow),
        pytest.param(partial(VIMCO, 4), marks=pytest.mark.slow),
    ],
)
def test_it_runs_as_a_program(method, alone) -> None:
    runs = []
    x = (torch.rand(20, 5) > 0.5).double()
    for compiled in (False, True):
        with isolated(0):
            pair = HelmholtzMachine(5, (4, 2)).double()
        result = fit(pair, x, method, steps=30, batch=5, draws=1, compile=compiled, progress=False)
        runs.append(torch.as_tensor(result.losses))
        assert result.idata.attrs["execution"] == ("fused" if compiled else "eager")
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-6)


def test_it_works_in_plain_pyro_through_observations(alone) -> None:
    pair, x = net(1)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}), loss=Compiled(RWS(5, insomnia=0.5), fuse=False))
    losses = [float(svi.step(x)) for _ in range(200)]
    assert sum(losses[-50:]) < sum(losses[:50])


def test_dreams_are_draws_of_the_model(alone) -> None:
    pair, x = net(1)
    seen = []

    def guide(x, observations=None, **arguments):
        seen.append(x if observations is None else observations["x"])
        return pair.guide(x, observations=observations)

    for _ in range(1500):
        RWS(1, insomnia=0.0).loss_and_grads(pair.model, guide, x[:1])
    dreamed = torch.cat(seen[1::2])
    images = states(pair.features, pair.origin)
    with torch.no_grad():
        exact = pair.log_evidence(images).exp()
    share = (dreamed[:, None] == images).all(-1).double().mean(0)
    assert ((share - exact).abs() < 4.8 * (exact * (1 - exact) / 1500).sqrt() + 1e-3).all()


def outside(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def deaf(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))


def local(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def alone_in_the_guide(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: RWS(0), "particles: expected an integer of at least 1, got 0"),
        (lambda: RWS(5, insomnia=1.5), "insomnia: expected a number between 0 and 1, got 1.5"),
        (lambda: VIMCO(1), "particles: expected an integer of at least 2, got 1"),
        (
            lambda: RWS(3).loss_and_grads(outside, lambda x: outside(x), torch.zeros(4)),
            "guide: RWS expected z in the plate of rows, got a global site; use Trace_ELBO",
        ),
        (
            lambda: WakeSleep().loss_and_grads(local, deaf, torch.zeros(4)),
            "guide: the sleep phase expected arguments named x, or an argument observations, got neither",
        ),
        (
            lambda: WakeSleep().loss_and_grads(local, alone_in_the_guide, x=torch.zeros(4)),
            "guide: WakeSleep expected latent sites of the model, got u",
        ),
    ],
)
def test_bad_input_gets_one_line(call, said: str) -> None:
    with isolated(0), pytest.raises(ValueError, match=said):
        call()
