"""Adversarial training: against losses by hand, against the divergence it descends, players, turns, what is refused."""

import math
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.nn.functional import relu, softplus

from inference import Joint, fit
from inference.compiler.objective import Compiled
from inference.core.handlers import isolated
from inference.objectives import Adversarial
from inference.objectives.adversarial import KINDS, _interpolate
from ppl_models.models.cyclegan import CycleGAN
from ppl_models.models.gan import GAN, BiGAN, ConditionalGAN, InfoGAN
from ppl_models.models.pair import Pair
from ppl_models.models.vaegan import VAEGAN, AdversarialAutoencoder

pytestmark = pytest.mark.usefixtures("alone")
ROWS, WIDTH = 12, 3
X = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5))
Y = torch.arange(ROWS) % 4
quiet = partial(fit, progress=False, compile=False)


def gan(**arguments) -> GAN:
    with isolated(0):
        return GAN(WIDTH, 2, hidden=(8,), **arguments)


def step(pair: Pair, objective: Adversarial, x: Tensor = X, **data) -> tuple[tuple[float, float], dict[str, Tensor]]:
    """Losses, and gradients by name, of one step from seed 1."""
    for p in pair.parameters():
        p.grad = None
    with isolated(1):
        losses = objective.loss_and_grads(pair.model, pair.guide, x=x, **data)
    return losses, {n: p.grad for n, p in pair.named_parameters()}


def noise(count: int = ROWS, width: int = 2) -> Tensor:
    """What the model draws from seed 1."""
    with isolated(1):
        return torch.randn(count, width)


BY_HAND: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "non_saturating": lambda a, b: (softplus(-a).sum() + softplus(b).sum(), softplus(-b).sum()),
    "minimax": lambda a, b: (softplus(-a).sum() + softplus(b).sum(), -softplus(b).sum()),
    "least_squares": lambda a, b: ((a - 1).square().sum() + (b + 1).square().sum(), b.square().sum()),
    "hinge": lambda a, b: (relu(1 - a).sum() + relu(1 + b).sum(), -b.sum()),
    "wasserstein": lambda a, b: (b.sum() - a.sum(), -b.sum()),
}


def agree(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)


def by_hand(pair: Pair, of_guide: Tensor, of_model: Tensor) -> dict[str, Tensor]:
    found = {}
    for name, p in pair.named_parameters():
        loss = of_guide if name.startswith("discriminator") else of_model
        (found[name],) = torch.autograd.grad(loss, p, retain_graph=True)
    return found


@pytest.mark.parametrize("kind", list(KINDS))
def test_losses_and_gradients_are_those_by_hand(kind: str) -> None:
    pair = gan()
    losses, gradients = step(pair, Adversarial(kind))
    made = pair.generator(noise())
    expected = BY_HAND[kind](pair.discriminator(X), pair.discriminator(made))
    assert losses == pytest.approx([v.item() for v in expected], rel=1e-5)
    agree(gradients, by_hand(pair, *expected))


def test_minibatches_are_scaled_as_their_plate_says() -> None:
    pair, rows = gan(), torch.tensor([1, 4, 6])
    whole, gradients = step(pair, Adversarial(), X[rows], size=ROWS, rows=rows)
    part, small = step(pair, Adversarial(), X[rows])
    assert whole == pytest.approx([ROWS / 3 * v for v in part], rel=1e-5)
    agree(gradients, {n: ROWS / 3 * g for n, g in small.items()})


def test_penalties_are_those_by_hand() -> None:
    pair = gan()
    made = pair.generator(noise()).detach()
    real = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(pair.discriminator(real).sum(), real, create_graph=True)
    base, plain = step(pair, Adversarial())
    losses, gradients = step(pair, Adversarial(r1=3.0))
    extra = 1.5 * slope.square().sum()
    assert losses[0] - base[0] == pytest.approx(extra.item(), rel=1e-4)
    assert losses[1] == base[1]
    found = torch.autograd.grad(extra, list(pair.discriminator.parameters()), allow_unused=True)
    for (name, _), g in zip(pair.discriminator.named_parameters(), found, strict=True):
        change = gradients[f"discriminator.{name}"] - plain[f"discriminator.{name}"]
        torch.testing.assert_close(change, torch.zeros_like(change) if g is None else g, rtol=1e-4, atol=1e-5)
    losses, _ = step(pair, Adversarial(penalty=2.0))
    with isolated(1):
        torch.randn(ROWS, 2)
        share = torch.rand(ROWS)[:, None]
    between = X.lerp(made, share).requires_grad_()
    (slope,) = torch.autograd.grad(pair.discriminator(between).sum(), between)
    slope = slope.detach()
    assert losses[0] - base[0] == pytest.approx(float(2 * (slope.norm(dim=1) - 1).square().sum()), rel=1e-4)


def test_importance_weights_are_the_odds_normalised() -> None:
    pair = gan()
    _, gradients = step(pair, Adversarial(importance=True))
    odds = pair.discriminator(pair.generator(noise()))[:, 0]
    weights = (odds.exp() / odds.exp().mean()).detach()
    expected = torch.autograd.grad((weights * softplus(-odds)).sum(), list(pair.generator.parameters()))
    agree(
        {n: gradients[f"generator.{n}"] for n, _ in pair.generator.named_parameters()},
        dict(zip((n for n, _ in pair.generator.named_parameters()), expected, strict=True)),
    )


def test_a_pack_is_judged_as_one() -> None:
    pair = gan(pack=5)
    losses, gradients = step(pair, Adversarial())
    made = pair.generator(noise(10)).reshape(2, 15)
    expected = BY_HAND["non_saturating"](pair.discriminator(X[:10].reshape(2, 15)), pair.discriminator(made))
    assert losses == pytest.approx([v.item() for v in expected], rel=1e-5)
    agree(gradients, by_hand(pair, *expected))
    rows = torch.arange(6)
    minibatch, _ = step(pair, Adversarial(), X[:6], size=ROWS, rows=rows)
    alone, _ = step(pair, Adversarial(), X[:5])
    assert minibatch == pytest.approx([2 * v for v in alone], rel=1e-5)


def test_labels_are_read_by_both_networks() -> None:
    with isolated(0):
        pair = ConditionalGAN(WIDTH, 4, 2, hidden=(8,))
    losses, _ = step(pair, Adversarial(), y=Y)
    label = torch.nn.functional.one_hot(Y, 4).float()
    made = pair.generator(torch.cat([noise(), label], 1))
    odds = (pair.discriminator(torch.cat([v, label], 1)) for v in (X, made))
    expected = BY_HAND["non_saturating"](*odds)
    assert losses == pytest.approx([v.item() for v in expected], rel=1e-5)


def test_an_encoder_in_the_guide_plays_for_the_model() -> None:
    with isolated(0):
        pair = BiGAN(WIDTH, 2, hidden=(8,))
    losses, gradients = step(pair, Adversarial())
    with isolated(1):
        z, eps = torch.randn(ROWS, 2), torch.randn(ROWS, 2)
    loc, log_scale = pair.encoder(X).chunk(2, -1)
    code = loc + log_scale.exp() * eps
    real = pair.discriminator(torch.cat([X, code], 1))
    made = pair.discriminator(torch.cat([pair.generator(z), z], 1))
    of_guide = softplus(-real).sum() + softplus(made).sum()
    of_model = softplus(-made).sum() + softplus(real).sum()
    assert losses == pytest.approx([of_guide.item(), of_model.item()], rel=1e-5)
    agree(gradients, by_hand(pair, of_guide, of_model))


def test_a_code_is_made_likely_by_both() -> None:
    with isolated(0):
        pair = InfoGAN(WIDTH, 4, 2, hidden=(8,))
    base, _ = step(pair, Adversarial())
    losses, gradients = step(pair, Adversarial(information=("c",), information_weight=2.0))
    assert losses[0] - base[0] == pytest.approx(losses[1] - base[1], rel=1e-4)
    with isolated(1):
        c = dist.Categorical(logits=torch.zeros(ROWS, 4)).sample()
        z = torch.randn(ROWS, 2)
    made = pair.generator(torch.cat([z, torch.nn.functional.one_hot(c, 4)], 1))
    told = -2 * dist.Categorical(logits=pair.reader(pair.trunk(made))).log_prob(c).sum()
    assert losses[1] - base[1] == pytest.approx(told.item(), rel=1e-4)
    agree(
        {n: g for n, g in gradients.items() if n.startswith("reader")},
        dict(
            zip(
                (f"reader.{n}" for n, _ in pair.reader.named_parameters()),
                torch.autograd.grad(told, list(pair.reader.parameters())),
                strict=True,
            )
        ),
    )


def test_a_cycle_is_judged_at_both_ends_and_led_back() -> None:
    with isolated(0):
        pair = CycleGAN((WIDTH, 2), hidden=(8,), scale=0.5)
    a, b = rows("cycle").values()
    for p in pair.parameters():
        p.grad = None
    losses = Adversarial(r1=2.0).loss_and_grads(pair.model, pair.guide, a=a, b=b)
    there, back = pair.forward_map(a), pair.backward_map(b)
    # log 2 s is 0.
    led = (pair.backward_map(there) - a).abs().sum() / 0.5 + (pair.forward_map(back) - b).abs().sum() / 0.5
    made = torch.cat([pair.discriminator_a(back), pair.discriminator_b(there)])
    ends = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    odds = [pair.discriminator_a(ends[0]), pair.discriminator_b(ends[1])]
    steep = sum(
        torch.autograd.grad(o.sum(), e, create_graph=True)[0].square().sum() for o, e in zip(odds, ends, strict=True)
    )
    of_guide = softplus(-torch.cat(odds)).sum() + softplus(made).sum() + steep
    of_model = softplus(-made).sum() + led
    assert losses == pytest.approx([of_guide.item(), of_model.item()], rel=1e-5)
    for name, p in pair.named_parameters():
        loss = of_guide if name.startswith("discriminator") else of_model
        (expected,) = torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True)
        if expected is not None:
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_a_bound_is_descended_beside() -> None:
    with isolated(0):
        pair = VAEGAN(WIDTH, 2, hidden=(8,), likelihood="gaussian")
    (_, of_model), gradients = step(pair, Adversarial(bound=Trace_ELBO(), weight=3.0))
    (_, adversarial), alone = step(pair, Adversarial())
    for p in pair.parameters():
        p.grad = None
    with isolated(1):
        # What the adversarial halves draw comes first.
        torch.randn(ROWS, 2)
        bound = Trace_ELBO().loss_and_grads(pair.model, pair.guide, x=X)
    assert of_model == pytest.approx(3 * adversarial + bound, rel=1e-5)
    for name, p in pair.named_parameters():
        parts = [0 * p if g is None else g for g in (alone[name], p.grad)]
        share = 1.0 if name.startswith("discriminator") else 3.0
        torch.testing.assert_close(gradients[name], share * parts[0] + parts[1], rtol=1e-4, atol=1e-5, msg=name)


def test_an_activated_bound_takes_generated_rows_as_they_pass_for_real() -> None:
    with isolated(0):
        pair = VAEGAN(WIDTH, 2, hidden=(8,), likelihood="gaussian")
    (_, plain), without = step(pair, Adversarial(bound=Trace_ELBO()))
    (_, loss), gradients = step(pair, Adversarial(bound=Trace_ELBO(), activated=True))
    for p in pair.parameters():
        p.grad = None
    with isolated(1):
        torch.randn(ROWS, 2)
        Trace_ELBO().loss(pair.model, pair.guide, x=X)
        with torch.no_grad():
            made = pair.decode(torch.randn(ROWS, 2))
            shares = pair.discriminator(made)[:, 0].sigmoid()
        q = pair.posterior(made)
        z = q.rsample()
        each = pair.likelihood(z).log_prob(made) + pair.prior().log_prob(z) - q.log_prob(z)
    more = -(shares * each).sum()
    more.backward()
    assert loss == pytest.approx(plain + more.item(), rel=1e-4)
    for name, p in pair.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name] - without[name], p.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_codes_of_an_autoencoder_play_against_the_prior() -> None:
    with isolated(0):
        pair = AdversarialAutoencoder(WIDTH, 2, hidden=(8,))
    losses, gradients = step(pair, Adversarial())
    real, made = pair.discriminator(pair.encoder(X)), pair.discriminator(noise())
    of_guide, of_model = softplus(-real).sum() + softplus(made).sum(), softplus(-made).sum() + softplus(real).sum()
    assert losses == pytest.approx([of_guide.item(), of_model.item()], rel=1e-5)
    assert all(g is None for n, g in gradients.items() if n.startswith("decoder"))
    encoder = torch.autograd.grad(of_model, list(pair.encoder.parameters()))
    for (name, _), g in zip(pair.encoder.named_parameters(), encoder, strict=True):
        torch.testing.assert_close(gradients[f"encoder.{name}"], g, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ the unified view


def nodes(count: int = 80) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss and Hermite for N(0, 1)."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(points), torch.tensor(weights / weights.sum())


POINTS, WEIGHTS = nodes()


def shifted(x: Tensor) -> None:
    """p_data = N(0, 1), p_g = N(theta, 1), with the expectations taken by quadrature."""
    theta = pyro.param("theta", torch.tensor(0.7, dtype=torch.float64))
    with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=WEIGHTS):
        real = pyro.sample("real", dist.Bernoulli(torch.tensor(0.5).double()))
        pyro.deterministic("x", torch.where(real == 1, x, theta + POINTS))


def bayes(x: Tensor) -> None:
    """log N(x; 0, 1) - log N(x; 0.7, 1) = -0.7 x + 0.245."""
    slope = pyro.param("slope", torch.tensor(-0.7, dtype=torch.float64))
    level = pyro.param("level", torch.tensor(0.245, dtype=torch.float64))
    with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=WEIGHTS):
        pyro.sample("real", dist.Bernoulli(logits=slope * x + level))


def divergences(theta: float) -> tuple[float, float]:
    """Slopes in theta of KL(p_g || p_data) and of JS(p_g, p_data), by the trapezium rule."""
    at = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-20, 20, 40_001).double()
    normal = torch.distributions.Normal
    p, g = normal(0.0, 1.0).log_prob(x), normal(at, 1.0).log_prob(x)
    m = torch.logaddexp(p, g) - math.log(2)
    kl = torch.trapezoid(g.exp() * (g - p), x)
    js = 0.5 * torch.trapezoid(g.exp() * (g - m) + p.exp() * (p - m), x)
    return tuple(torch.autograd.grad(v, at, retain_graph=True)[0].item() for v in (kl, js))


def slopes(objective: Adversarial) -> dict[str, float]:
    with isolated(0):
        objective.loss_and_grads(shifted, bayes, x=POINTS)
        return {n: p.grad.item() for n, p in pyro.get_param_store()._params.items()}


def test_the_best_guide_is_bayes_rule() -> None:
    found = slopes(Adversarial())
    assert found["slope"] == pytest.approx(0, abs=1e-8)
    assert found["level"] == pytest.approx(0, abs=1e-8)


def test_the_model_then_descends_kl_less_twice_js() -> None:
    kl, js = divergences(0.7)
    assert kl == pytest.approx(0.7, abs=1e-8)
    found = slopes(Adversarial())["theta"]
    assert found == pytest.approx(kl - 2 * js, abs=1e-8)
    assert abs(found - (kl - js)) > 0.05
    assert slopes(Adversarial("minimax"))["theta"] == pytest.approx(2 * js, abs=1e-8)


# ------------------------------------------------------------------------------------------ players and turns

PAIRS: dict[str, tuple[Callable[[], Pair], dict[str, object]]] = {
    "gan": (gan, {}),
    "packed": (partial(gan, pack=3), {}),
    "conditional": (lambda: ConditionalGAN(WIDTH, 4, 2, hidden=(8,)), {"y": Y}),
    "info": (lambda: InfoGAN(WIDTH, 4, 2, hidden=(8,)), {}),
    "bigan": (lambda: BiGAN(WIDTH, 2, hidden=(8,)), {}),
    "vaegan": (lambda: VAEGAN(WIDTH, 2, hidden=(8,), likelihood="gaussian"), {}),
    "aae": (lambda: AdversarialAutoencoder(WIDTH, 2, hidden=(8,)), {}),
    "cycle": (lambda: CycleGAN((WIDTH, 2), hidden=(8,)), {}),
}
EVERY = pytest.mark.parametrize("name", list(PAIRS))


def rows(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x = X.to(dtype)
    return {"a": x, "b": x[:, :2].flip(0)} if name == "cycle" else {"x": x}


def settings(name: str) -> dict[str, object]:
    extra = {"info": {"information": ("c",)}, "vaegan": {"bound": Trace_ELBO}, "aae": {"bound": Trace_ELBO}}
    return extra.get(name, {})


@EVERY
def test_a_player_that_rests_stands_still(name: str) -> None:
    make, data = PAIRS[name]
    with isolated(0):
        pair = make()
        objective = Adversarial(turns=(2, 1), **settings(name))
        svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
        for k in range(7):
            before = {n: p.detach().clone() for n, p in pair.named_parameters()}
            svi.step(**rows(name), **data)
            moved = {n for n, p in pair.named_parameters() if not torch.equal(p, before[n])}
            judges = {n for n in before if n.startswith(("discriminator", "trunk"))}
            assert moved == (before.keys() - judges if k % 3 == 2 else judges)


@EVERY
@pytest.mark.parametrize(("turns", "penalised"), [(None, False), ((2, 1), True)], ids=["together", "in turn"])
def test_compiled_steps_are_the_eager_ones(name: str, turns, penalised: bool) -> None:
    make, data = PAIRS[name]
    ends = []
    for wrap in (lambda o: o, partial(Compiled, fuse=False)):
        with isolated(0):
            pair = make().double()
            pair.train()
            own = {"r1": 0.5, "penalty": 0.1} if penalised else {}
            objective = Adversarial(turns=turns, **own, **settings(name))
            optimizer = Joint(torch.optim.Adam, objective.settings(guide={"lr": 0.02}, model={"lr": 0.01}))
            svi = SVI(pair.model, pair.guide, optimizer, loss=wrap(objective))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                losses = [svi.step(**rows(name, torch.float64), **data) for _ in range(14)]
            ends.append(({n: p.detach().clone() for n, p in pair.named_parameters()}, losses))
            if objective is not svi.loss_and_grads.__self__:
                assert svi.loss_and_grads.__self__.state == "traced"
    for n, p in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][n], p, rtol=1e-6, atol=1e-8, msg=n)
    np.testing.assert_allclose(ends[1][1], ends[0][1], rtol=1e-6)


def test_rates_are_by_player() -> None:
    pair = gan()
    before = {n: p.detach().clone() for n, p in pair.named_parameters()}
    objective = Adversarial()
    optimizer = Joint(torch.optim.SGD, objective.settings(guide={"lr": 0.0}, model={"lr": 0.1}))
    quiet(pair, X, objective, steps=1, optimizer=optimizer)
    for n, p in pair.named_parameters():
        assert torch.equal(p, before[n]) == n.startswith("discriminator")


# ------------------------------------------------------------------------------------------ a fit, and what is said


def test_a_fit_has_two_losses_and_no_posterior() -> None:
    result = quiet(gan(), X, Adversarial, steps=30)
    assert result.losses.shape == (30, 2)
    assert result.method == "Adversarial" and not result.draws
    assert not result.idata.children
    with pytest.raises(ValueError, match="draw: Adversarial learns a model and no posterior"):
        result.draw(3)


@pytest.mark.parametrize("rate", [0.01, 0.0], ids=["won", "even"])
def test_a_guide_that_has_won_is_told(rate: float) -> None:
    pair, objective = gan(), Adversarial()
    far = X + 10
    optimizer = Joint(torch.optim.Adam, objective.settings(guide={"lr": rate}, model={"lr": 1e-6}))
    result = quiet(pair, far, objective, steps=300, optimizer=optimizer)
    assert any("The guide has won" in line for line in result.diagnosis.advice) == bool(rate)
    assert any("coverage 0" in line for line in result.diagnosis.advice)


def test_players_that_circle_are_told() -> None:
    swing = 2 * math.log(2) * ROWS * (1 + 0.9 * np.sin(np.arange(1000) / 80))
    advice = list(Adversarial()._check_players(swing / ROWS))
    assert len(advice) == 1 and advice[0].startswith("The players cycle")
    still = np.full(1000, 2 * math.log(2)) + 0.1 * np.random.default_rng(0).standard_normal(1000)
    assert not list(Adversarial()._check_players(still))


def nameless(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("real", dist.Bernoulli(0.5))


def elsewhere(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("real", dist.Bernoulli(0.5))
        pyro.deterministic("image", x, event_dim=1)


def unasked(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("fake", dist.Bernoulli(logits=pyro.param("slope", torch.tensor(1.0)) * x[:, 0]))


def judging(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("real", dist.Bernoulli(logits=pyro.param("slope", torch.tensor(1.0)) * x[:, 0]))


def plain(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("real", dist.Bernoulli(0.5))
        pyro.deterministic("x", x + pyro.param("shift", torch.tensor(0.0)), event_dim=1)


REFUSED = [
    (lambda: Adversarial("softer"), "kind: expected one of non_saturating, .*, got 'softer'"),
    (lambda: Adversarial(r1=-1.0), "r1: expected zero or a positive number, got -1.0"),
    (lambda: Adversarial(penalty=math.nan), "penalty: expected zero or a positive number, got nan"),
    (lambda: Adversarial(activated=True), "activated: expected a bound that generated rows enter, got none"),
    (lambda: Adversarial(turns=(0, 1)), r"turns: expected steps of the guide and of the model, .*, got \(0, 1\)"),
    (lambda: Adversarial(information="c"), r"information: expected names of sites, such as \('c',\), got 'c'"),
    (lambda: quiet(gan(), X, Trace_ELBO, steps=2), "objective: Trace_ELBO needs a likelihood, .*; use Adversarial"),
    (lambda: quiet(gan(), X, steps=2), "objective: Trace_ELBO needs a likelihood, .*; use Adversarial"),
    (
        lambda: quiet((nameless, judging), X, Adversarial, steps=2),
        "model: expected a deterministic or observed site for the guide",
    ),
    (lambda: quiet((elsewhere, judging), X, Adversarial, steps=2), "guide: expected arguments named image"),
    (lambda: quiet((plain, unasked), X, Adversarial, steps=2), "guide: Adversarial expected a site real, got fake"),
    (lambda: quiet(gan(), X, Adversarial(information=("c",)), steps=2), "information: expected a site of the guide"),
    (lambda: gan(pack=0), "pack: expected an integer of at least 1, got 0"),
    (lambda: quiet(gan(pack=5), X[:4], Adversarial, steps=2), r"x: expected at least 5 rows at a time \(pack\), got 4"),
    (lambda: InfoGAN(3, 1), "codes: expected an integer of at least 2, got 1"),
    (lambda: quiet(ConditionalGAN(3, 4, 2), X, Adversarial, steps=2), "y: expected the label of every row, got none"),
    (lambda: quiet(gan(), X * math.nan, Adversarial, steps=2), "x: expected finite numbers"),
    (lambda: gan(generator=torch.nn.Linear(3, 3)), "generator: expected inputs of width 2"),
    (lambda: gan(discriminator=torch.nn.Linear(3, 2)), "discriminator: expected outputs of width 1"),
]


@pytest.mark.parametrize(("call", "said"), REFUSED, ids=[f"{k}-{r[1].split(':')[0]}" for k, r in enumerate(REFUSED)])
def test_what_is_refused_is_said_in_one_line(call, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_penalty_is_taken_between_packs() -> None:
    one, other = {"x": torch.zeros(12, 2)}, {"x": torch.ones(12, 2)}
    points = _interpolate(one, other, 4)["x"].reshape(4, 6)
    assert torch.equal(points, points[:, :1].expand(4, 6))
    assert len(points[:, 0].unique()) == 4
