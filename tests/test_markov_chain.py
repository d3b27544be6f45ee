"""The Markov chain: counts, brute force, imputation, real text."""

import itertools
import math

import pytest
import torch

from inference import fit, log_evidence, prior_predictive
from ppl_models import data
from ppl_models.models.bayesian_network import BayesianNetwork
from ppl_models.models.markov_chain import MarkovChain


def chain(length: int = 4, symbols: int = 3, seed: int = 0) -> MarkovChain:
    pair = MarkovChain(length, symbols).double()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in pair.parameters():
            p.copy_(torch.randn(p.shape, generator=random, dtype=torch.float64))
    return pair


def sequences(length: int, symbols: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(symbols), repeat=length))).double()


def test_it_is_the_bayesian_network_of_a_chain() -> None:
    pair, every = chain(), sequences(4, 3)
    score = pair.log_evidence(every).detach()
    assert float(score.logsumexp(0)) == pytest.approx(0, abs=1e-9)
    tables = {"x0": pair.initial.softmax(-1), **{f"x{k}": pair.transition.softmax(-1) for k in (1, 2, 3)}}
    net = BayesianNetwork.markov_chain([f"x{k}" for k in range(4)], states=3, tables=tables)
    torch.testing.assert_close(score, net.log_evidence(every).detach())
    torch.testing.assert_close(log_evidence(pair, every, "exact").values, score)


def test_counting_is_the_maximum_of_the_likelihood() -> None:
    torch.manual_seed(0)
    x = prior_predictive(chain(6), size=200, draws=1)["x"][0]
    counted = MarkovChain(6, 3).double().estimate(x, smoothing=0.0)
    best = counted.log_evidence(x).sum().detach()
    gradient = torch.autograd.grad(counted.log_evidence(x).sum(), list(counted.parameters()))
    assert max(float(g.abs().max()) for g in gradient) < 1e-8
    fitted = MarkovChain(6, 3).double()
    result = fit(fitted, x, steps=1500, draws=1, progress=False)
    assert -float(result.losses[-1]) == pytest.approx(float(best), abs=1e-3)
    torch.testing.assert_close(fitted.transition.softmax(-1), counted.transition.softmax(-1), atol=1e-3, rtol=0)
    smooth = MarkovChain(6, 3).double().estimate(x)
    first, pairs = counted.count(x)
    torch.testing.assert_close(smooth.initial.softmax(-1).detach(), (first + 1) / (200 + 3))
    torch.testing.assert_close(smooth.transition.softmax(-1).detach(), (pairs + 1) / (pairs.sum(-1, keepdim=True) + 3))
    assert first.sum() == 200 and pairs.sum() == 200 * 5


def test_a_symbol_that_never_comes_keeps_its_distribution() -> None:
    pair = MarkovChain(3, 3).double().estimate(torch.tensor([[0.0, 1.0, 0.0]]).double(), smoothing=0.0)
    assert pair.transition.softmax(-1)[2].tolist() == pytest.approx([1 / 3] * 3)
    assert pair.transition.softmax(-1)[0].tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("known", [(0, None, None, 2), (None, 1, None, None), (None,) * 4, (2, 0, 1, 1)])
def test_missing_symbols_are_drawn_given_all_known_ones(known, alone) -> None:
    pair, every = chain(), sequences(4, 3)
    row = torch.tensor([math.nan if k is None else float(k) for k in known]).double()
    agrees = ((every == row) | row.isnan()).all(1)
    exact = torch.where(agrees, pair.log_evidence(every).exp(), 0.0).detach()
    exact = exact / exact.sum()
    drawn = pair.impute(row[None], draws=20_000)
    assert drawn.shape == (20_000, 1, 4)
    share = (drawn == every).all(-1).double().mean(0)
    assert ((share - exact).abs() < 4.8 * (exact * (1 - exact) / 20_000).sqrt() + 1e-9).all()


def test_draws_have_the_chains_law(alone) -> None:
    pair, every = chain(3), sequences(3, 3)
    drawn = prior_predictive(pair, size=100, draws=200)["x"]
    assert drawn.shape == (200, 100, 3)
    exact = pair.log_evidence(every).exp().detach()
    share = (drawn.reshape(-1, 1, 3) == every).all(-1).double().mean(0)
    assert ((share - exact).abs() < 4.8 * (exact * (1 - exact) / 20_000).sqrt()).all()


def test_text_is_learnt_letter_after_letter() -> None:
    text = data.load("descriptions", dtype=torch.float64)
    pair = MarkovChain(text.features, text.symbols).double().estimate(text.train["x"])
    alone = MarkovChain(1, text.symbols).double()
    first, _ = alone.count(text.train["x"].reshape(-1, 1))
    often = text.test["x"].long().flatten().bincount(minlength=len(first))
    independent = often * ((first + 1) / (first + 1).sum()).log()
    held = float(pair.log_evidence(text.test["x"]).detach().sum())
    # The letter before says a good deal of the next one.
    assert held > 0.8 * float(independent.sum())
    likeliest = int(pair.transition[text.symbols.index("q")].argmax())
    assert text.symbols[likeliest] == "u"
    end = text.symbols.index("end")
    assert float(pair.transition[end].softmax(-1)[end].detach()) > 0.95


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: chain().check(torch.full((2, 4), 3.0)), "x: expected symbols 0 to 2, got 3"),
        (lambda: chain().check(torch.full((2, 4), 0.5)), "x: expected symbols 0 to 2, got 0.5"),
        (lambda: chain().check(torch.zeros(2, 5)), r"x: expected \(rows, 4\), got \(2, 5\)"),
        (lambda: chain().estimate(torch.zeros(2, 4), smoothing=-1.0), "smoothing: expected zero or a positive number"),
        (lambda: chain().impute(torch.zeros(2, 4), draws=0), "draws: expected an integer of at least 1, got 0"),
        (
            lambda: MarkovChain(3, 3).estimate(torch.zeros(2, 3), smoothing=0.0).impute(torch.ones(1, 3)),
            "x: expected known symbols that can follow one another, got row 0 of probability 0",
        ),
        (lambda: MarkovChain(0, 3), "length: expected at least one, got 0"),
    ],
)
def test_bad_input_gets_one_line(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
