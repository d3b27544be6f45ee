"""Autoregressive pairs: densities that sum to one, orders that hold, draws, imputation, learning."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import logsigmoid

from inference import fit, log_evidence, prior_predictive
from inference.objectives import Denoising
from ppl_models import ZOO, data
from ppl_models.models.any_order import EoNADE, Remaining
from ppl_models.models.autoregressive import FVSBN, MADE, NADE, Autoregressive

ALL = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6))).double()


def pairs() -> dict[str, Autoregressive]:
    torch.manual_seed(1)
    made = {
        "FVSBN": FVSBN(6),
        "NADE": NADE(6, hidden=5),
        "MADE": MADE(6, hidden=(9,), seed=2),
        "MADE, two layers": MADE(6, hidden=(24, 16), direct=False),
        "MADE, three orders": MADE(6, hidden=(12,), orders=3),
        "EoNADE": EoNADE(6, hidden=5, orders=3),
    }
    for pair in made.values():
        for p in pair.parameters():
            torch.nn.init.normal_(p, std=0.8)
    return {name: pair.double() for name, pair in made.items()}


PAIRS = pytest.mark.parametrize("name", list(pairs()))


@PAIRS
def test_probabilities_sum_to_one(name: str) -> None:
    pair = pairs()[name]
    with torch.no_grad():
        assert float(pair.log_evidence(ALL).exp().sum()) == pytest.approx(1.0, abs=1e-10)
        assert float(pair.log_evidence(ALL).std()) > 0.1


@PAIRS
def test_each_feature_reads_those_before_it_alone(name: str) -> None:
    pair = pairs()[name]
    distribution = pair.distribution()
    for logits, order in zip(distribution.logits, distribution.order.tolist(), strict=True):
        # At one point alone all units may be off.
        rows = torch.rand(20, 6).double()
        jacobian = partial(torch.autograd.functional.jacobian, lambda x, f=logits: f(x[None])[0])
        slopes = torch.stack([jacobian(row).abs() for row in rows]).sum(0)
        for k, feature in enumerate(order):
            assert not slopes[feature, order[k:]].any()
            # What it may read it reads, but for what no path of the masks joins.
            direct = not isinstance(pair, MADE) or pair.direct is not None
            assert slopes[feature, order[:k]].all() or not direct
        assert slopes.count_nonzero() >= 6


@PAIRS
def test_a_centred_pair_begins_at_the_means_of_the_features(name: str) -> None:
    pair, rows = pairs()[name], torch.tensor([[1.0, 0, 0, 1, 1, 0]] * 3 + [[1.0, 1, 0, 0, 1, 0]]).double()
    with torch.no_grad():
        for p in pair.parameters():
            p.zero_()
    pair.centre(rows)
    # Half a zero and half a one more than the four rows have.
    means = torch.tensor([4.5, 1.5, 0.5, 3.5, 4.5, 0.5]).double() / 5
    expected = torch.distributions.Bernoulli(means).log_prob(ALL).sum(-1)
    torch.testing.assert_close(pair.log_evidence(ALL).detach(), expected)
    with pytest.raises(ValueError, match=r"x: expected zeros and ones, got 0\.5"):
        pair.centre(rows / 2)


@pytest.mark.parametrize("name", ["made", "nade", "eonade", "fvsbn", "helmholtz_machine"])
def test_pairs_of_the_zoo_begin_centred_and_take_data_of_any_form(name: str) -> None:
    entry, run = ZOO[name], {"draws": 1, "progress": False}
    whole = entry.load()
    data = replace(whole, train={"x": whole.train["x"][:200]})
    x, pair = data.train["x"], entry.pair(data)
    bias = (pair.biases[0] if name == "helmholtz_machine" else pair.bias).detach()
    torch.testing.assert_close(bias.double().sigmoid(), (x.double().sum(0) + 0.5) / 201, rtol=1e-4, atol=1e-5)
    bias.fill_(0.25)
    for given in (x, x.numpy(), x.bool(), {"x": x.int()}, pd.DataFrame(x.numpy())):
        # A fit goes on from where the pair is.
        entry.fit(pair, given, **run, steps=0)
        assert bool((bias == 0.25).all())


def test_made_whose_hidden_units_are_off_is_a_sigmoid_belief_net() -> None:
    pair, linear = pairs()["MADE"], pairs()["FVSBN"]
    with torch.no_grad():
        pair.weights[1].zero_()
        pair.direct.copy_(linear.weight)
        pair.biases[1].copy_(linear.bias)
        torch.testing.assert_close(pair.log_evidence(ALL), linear.log_evidence(ALL))
    # Without hidden layers there is nothing beside the direct connections.
    assert [tuple(p.shape) for p in MADE(6, hidden=()).parameters()] == [(6, 6), (6,)]


@PAIRS
@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_rows_may_have_another_precision_than_the_pair(name: str, own: torch.dtype, given: torch.dtype) -> None:
    pair, rows = pairs()[name].to(own), ALL[::5].to(given)
    row = rows[:1].clone()
    row[0, 3:] = torch.nan
    with torch.no_grad():
        expected = pairs()[name].log_evidence(ALL[::5])
        torch.testing.assert_close(pair.log_evidence(rows).double(), expected, rtol=1e-5, atol=1e-5)
    assert pair.impute(row, draws=2, particles=5).shape == (2, 1, 6)


def test_nade_is_the_loop_of_its_paper() -> None:
    pair = pairs()["NADE"]
    with torch.no_grad():
        for x in ALL[::7]:
            total, inside = 0.0, pair.threshold.clone()
            for d in range(6):
                logit = pair.bias[d] + pair.outward[d] @ inside.sigmoid()
                total += float(torch.nn.functional.logsigmoid((2 * x[d] - 1) * logit))
                inside = inside + x[d] * pair.inward[d]
            assert float(pair.log_evidence(x[None])) == pytest.approx(total, abs=1e-10)


def test_orders_are_averaged_as_densities() -> None:
    pair = pairs()["MADE, three orders"]
    with torch.no_grad():
        single = []
        for k in range(3):
            sign = 2 * ALL - 1
            single.append(torch.nn.functional.logsigmoid(sign * pair.conditionals()[k](ALL)).sum(-1).exp())
            assert float(single[-1].sum()) == pytest.approx(1.0)
        torch.testing.assert_close(pair.log_evidence(ALL).exp(), torch.stack(single).mean(0))
    assert len({tuple(o) for o in pair.order.tolist()}) == 3


def test_an_order_of_an_order_agnostic_pair_is_the_loop_of_its_paper() -> None:
    pair = pairs()["EoNADE"]
    for order, logits in zip(pair.order.tolist(), pair.conditionals(), strict=True):
        for x in ALL[::9]:
            inside, expected = pair.threshold.clone(), torch.zeros(6).double()
            for d in order:
                expected[d] = pair.bias[d] + pair.outward[d] @ inside.relu()
                inside = inside + x[d] * pair.inward[d] + pair.places[d]
            torch.testing.assert_close(logits(x[None])[0], expected)
            torch.testing.assert_close(torch.cat([logits.one(x[None], d) for d in range(6)]), expected)
            known = torch.isin(torch.arange(6), torch.tensor(order[:2]))[None]
            torch.testing.assert_close(pair.log_odds(x[None], known)[0, order[2]], expected[order[2]])


def test_one_place_of_a_random_order_estimates_the_mean_over_all_orders() -> None:
    """Exactly, by all subsets and all 720 orders."""
    pair, rows = pairs()["EoNADE"], ALL[::5]
    with torch.no_grad():
        by_place = []
        for size in range(6):
            chosen = [torch.tensor(c, dtype=torch.long) for c in itertools.combinations(range(6), size)]
            known = [torch.zeros(6, dtype=torch.bool).index_fill(0, c, True).expand(len(rows), 6) for c in chosen]
            by_place.append(torch.stack([Remaining(pair.log_odds(rows, k), k).log_prob(rows) for k in known]).mean(0))
        pair.order = torch.tensor(list(itertools.permutations(range(6))))
        scores = [logsigmoid((2 * rows - 1) * logits(rows)).sum(-1) for logits in pair.conditionals()]
    torch.testing.assert_close(torch.stack(by_place).mean(0), torch.stack(scores).mean(0))
    # What is known at a place is any subset of its size, equally often.
    torch.manual_seed(0)
    step = torch.arange(6_000) % 6 + 1
    known = pair.given_some(rows[:1].expand(6_000, 6), step).known
    assert torch.equal(known.sum(1), step - 1)
    for place in range(2, 7):
        share = known[step == place].double().mean(0)
        assert float((share - (place - 1) / 6).abs().max()) < 5 * 0.5 / 1_000**0.5


def test_training_at_random_places_lowers_the_loss_in_every_order() -> None:
    digits = data.load("digits", binarise=True)
    torch.manual_seed(0)
    pair = EoNADE(64, hidden=100, orders=4)
    x, test = digits.train["x"], digits.test["x"]
    result = fit(pair, x, Denoising(pair.steps), steps=1500, batch=100, learning_rate=0.005, progress=False)
    share = x.mean(0).clamp(1e-3, 1 - 1e-3)
    alone = float(torch.distributions.Bernoulli(share).log_prob(test).sum(-1).mean())
    with torch.no_grad(), result.state():
        each = [float(logsigmoid((2 * test - 1) * f(test)).sum(-1).mean()) for f in pair.conditionals()]
        together = float(pair.log_evidence(test).mean())
    assert min(each) > alone + 4
    # The logarithm of a mean is at least the mean of the logarithms.
    assert together > sum(each) / len(each)
    # The loss is that of the mean order, in training and per data set.
    assert -result.losses[-200:].mean() / len(x) == pytest.approx(sum(each) / len(each), abs=3)


@PAIRS
def test_draws_follow_the_density(name: str) -> None:
    pair = pairs()[name]
    drawn = prior_predictive(pair, size=30_000, draws=1)["x"][0]
    which = (drawn @ (2.0 ** torch.arange(5, -1, -1)).double()).long()
    with torch.no_grad():
        expected = pair.log_evidence(ALL).exp()
    share = torch.bincount(which, minlength=64) / 30_000
    error = (expected * (1 - expected) / 30_000).sqrt()
    assert float(((share - expected) / error.clamp_min(1e-5)).abs().max()) < 4.5


@PAIRS
@pytest.mark.parametrize("hidden", [(0, 3), (4, 5), (1, 2, 5)], ids=str)
def test_any_subset_is_imputed(name: str, hidden: tuple[int, ...]) -> None:
    pair, row = pairs()[name], ALL[37].clone()
    row[list(hidden)] = torch.nan
    torch.manual_seed(0)
    drawn = torch.cat([pair.impute(row[None], draws=40, particles=400)[:, 0] for _ in range(60)])
    known = ~row.isnan()
    assert torch.equal(drawn[:, known], row[known].expand(len(drawn), -1))
    fits = (ALL[:, known] == row[known]).all(-1)
    with torch.no_grad():
        exact = pair.log_evidence(ALL[fits]).softmax(0)
    cells = [(drawn == x).all(-1).double().mean().item() for x in ALL[fits]]
    # 60 sets of particles: draws of one set hang together.
    assert cells == pytest.approx(exact.tolist(), abs=0.05)


def test_its_fit_is_logistic_regression_feature_by_feature() -> None:
    x = data.load("wine", binarise=True, dtype=torch.float64).train["x"][:, :5]
    pair = FVSBN(5).double()
    fit(pair, x, steps=1500, learning_rate=0.1, draws=1, progress=False)
    with torch.no_grad():
        got = float(pair.log_evidence(x).mean())
    share = x[:, 0].mean().item()
    expected = share * math.log(share) + (1 - share) * math.log(1 - share)
    for d in range(1, 5):
        judge = LogisticRegression(C=1e6, max_iter=5000).fit(x[:, :d].numpy(), x[:, d].numpy())
        odds = judge.predict_log_proba(x[:, :d].numpy())
        expected += float(np.where(x[:, d].numpy() == 1, odds[:, 1], odds[:, 0]).mean())
    assert got == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "make", [lambda: NADE(64, hidden=50), lambda: MADE(64, hidden=(100,), orders=2)], ids=["NADE", "MADE"]
)
def test_networks_learn_digits(make) -> None:
    digits = data.load("digits", binarise=True)
    torch.manual_seed(0)
    pair = make()
    result = fit(pair, digits.train["x"], steps=600, batch=100, learning_rate=0.01, draws=1, progress=False)
    found = log_evidence(result, digits.test["x"], "exact", progress=False)
    share = digits.train["x"].mean(0).clamp(1e-3, 1 - 1e-3)
    alone = torch.distributions.Bernoulli(share).log_prob(digits.test["x"]).sum(-1).mean()
    assert found.mean > float(alone) + 6


REFUSED = [
    (lambda: fit(FVSBN(3), torch.full((2, 3), 0.5)), "x: expected zeros and ones, got 0.5"),
    (lambda: fit(FVSBN(3), torch.zeros(2, 4)), r"x: expected \(rows, 3\), got \(2, 4\)"),
    (lambda: NADE(3, hidden=0), "hidden: expected an integer of at least 1, got 0"),
    (lambda: MADE(3, orders=0), "orders: expected an integer of at least 1, got 0"),
    (lambda: EoNADE(2), "features: expected at least 3, got 2"),
    (lambda: EoNADE(3).model(torch.zeros(2, 3), step=4), "step: expected 1 to 3, got 4"),
    (lambda: EoNADE(3).model(torch.zeros(2, 3), step=np.int64(0)), "step: expected 1 to 3, got 0"),
    (lambda: EoNADE(3).model(torch.zeros(2, 3), step=1.5), "step: expected integers, got torch.float32"),
    (lambda: EoNADE(3).check(torch.zeros(2, 3), step=torch.tensor([1, 4])), "step: expected 1 to 3, got 1 to 4"),
    (
        lambda: EoNADE(3).check(torch.zeros(2, 3), step=torch.ones(3).int()),
        r"step: expected one integer, or one per row, got \(3,\)",
    ),
    (
        lambda: fit(EoNADE(3), torch.zeros(2, 3), Denoising(2, simple=True), progress=False),
        "simple: expected a model with the site residual, got one without",
    ),
    (lambda: EoNADE(3).model(step=1), "step: expected rows x to score at it, got none"),
    (lambda: fit(EoNADE(3), torch.zeros(2, 3), Denoising(3)), "steps: expected 2, those of the pair, got 3"),
    (lambda: MADE(1), "features: expected at least 2, got 1"),
    (lambda: FVSBN(3).impute(torch.tensor([[0.0, 2.0, torch.nan]])), "x: expected zeros and ones, got 2"),
    (lambda: FVSBN(3).impute(torch.zeros(1, 3), particles=0), "particles: expected an integer of at least 1, got 0"),
]


@pytest.mark.parametrize(("call", "line"), REFUSED, ids=[line[:20] for _, line in REFUSED])
def test_bad_input_gets_one_line(call, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        call()


def test_one_feature_of_nade_is_that_of_all() -> None:
    torch.manual_seed(0)
    pair = NADE(7, hidden=5).double()
    x = (torch.rand(4, 7) < 0.5).double()
    (logits,) = pair.conditionals()
    found = torch.stack([logits.one(x, d) for d in range(7)], -1)
    torch.testing.assert_close(found, logits(x))
