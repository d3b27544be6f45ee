"""Every entry's ``ppl-models compare`` runs to the end at its defaults, and its default fit reaches a stated figure.

Figures come from outside: scikit-learn on the same split, the conjugate posterior, or features that are independent of
one another, which is what a model that has learnt nothing but means amounts to.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import decomposition, naive_bayes
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from torch import Tensor
from typer.testing import CliRunner

from inference import Comparison, Result, two_sample
from ppl_models.cli import app
from ppl_models.data import load
from ppl_models.data.sets import Dataset
from ppl_models.zoo.entries import ZOO
from ppl_models.zoo.entry import Entry

Check = Callable[[Comparison, Result, Dataset], None]
LEARNT = 4.0
"""Nats per row by which a model of 8 x 8 binary digits beats independent pixels at 24 nats: they are far apart."""


def first(table: Comparison, column: str) -> float:
    return float(table.table[column].iloc[0])


def independent(train: Tensor, rows: Tensor) -> float:
    """Mean log density of rows whose features are independent, as in the training rows, in nats."""
    train, rows = train.double(), rows.double()
    if set(train.unique().tolist()) <= {0.0, 1.0}:
        p = (train.sum(0) + 1) / (len(train) + 2)
        return float(torch.distributions.Bernoulli(p).log_prob(rows).sum(-1).mean())
    return float(torch.distributions.Normal(train.mean(0), train.std(0)).log_prob(rows).sum(-1).mean())


def beats_independence(margin: float) -> Check:
    def check(table: Comparison, result: Result, data: Dataset) -> None:
        assert first(table, "lpd") > independent(data.train["x"], data.test["x"]) + margin

    return check


def classifies_like(make: Callable[[], Any]) -> Check:
    def check(table: Comparison, result: Result, data: Dataset) -> None:
        theirs = make().fit(data.train["x"].numpy(), data.train["y"].numpy())
        reached = theirs.score(data.test["x"].numpy(), data.test["y"].numpy())
        error = (reached * (1 - reached) / len(data.test["y"])) ** 0.5
        # On the same rows: two rules that are equally good differ by less than that.
        assert first(table, "accuracy") > reached - 3 * error - 0.01

    return check


def scores_like(make: Callable[[], Any]) -> Check:
    def check(table: Comparison, result: Result, data: Dataset) -> None:
        theirs = make().fit(data.train["x"].numpy()).score(data.test["x"].numpy())
        assert first(table, "lpd") == pytest.approx(theirs, abs=0.1)

    return check


def is_the_posterior(table: Comparison, result: Result, data: Dataset) -> None:
    # 1,000 independent draws: the error of a mean is 0.03 posterior sd.
    assert first(table, "error_rms") < 0.06
    assert table.table.loc["ChEES", "error_rms"] < 0.1


def both(*checks: Check) -> Check:
    return lambda *given: [check(*given) for check in checks] and None


def draws_like_the_data(table: Comparison, result: Result, data: Dataset) -> None:
    """The share of drawn rows that lie among real ones is far above that of rows of independent pixels.

    The energy distance is too blunt: of real rows it is 0.000 +- 0.003, of rows of independent pixels 0.016 +- 0.002.
    """
    real, train = data.test["x"], data.train["x"]
    random = torch.Generator().manual_seed(0)
    shuffled = train.gather(0, torch.randint(len(train), real.shape, generator=random))
    assert first(table, "precision") > two_sample.precision(real, shuffled).value + 0.3


def codes_tell_labels(table: Comparison, result: Result, data: Dataset) -> None:
    """Rows of one code are mostly of one label, by far more than rows at random are."""
    pair, labels = result.bound.pair, load("digits").test["y"].numpy()
    with torch.no_grad():
        codes = pair.reader(pair.trunk(data.test["x"])).argmax(-1).numpy()
    counts = confusion_matrix(labels, codes)
    shuffled = confusion_matrix(np.random.default_rng(0).permutation(labels), codes)
    assert counts.max(0).sum() > 1.5 * shuffled.max(0).sum()


def translates_as_the_domains_were_made(table: Comparison, result: Result, data: Dataset) -> None:
    """The other domain are other digits, turned by a quarter and inverted: the map is known up to noise."""
    a, b = data.test["a"], data.test["b"]
    true = 1 - torch.rot90(a.reshape(-1, 8, 8), 1, (1, 2)).flatten(1)
    with torch.no_grad():
        error = (result.bound.pair.translate(a) - true).square().sum(1).mean()
    assert error < 0.1 * (b - b.mean(0)).square().sum(1).mean()


def reconstructs(table: Comparison, result: Result, data: Dataset) -> None:
    pair, x = result.bound.pair, data.test["x"]
    with torch.no_grad():
        left = (pair.decode(pair.encode(x)) - x).square().sum()
    assert left < 0.6 * (x - x.mean(0)).square().sum()


def reconstructs_like_pca(table: Comparison, result: Result, data: Dataset) -> None:
    pair, x = result.bound.pair, data.train["x"]
    pca = decomposition.PCA(2).fit(x.numpy())
    best = ((pca.inverse_transform(pca.transform(x.numpy())) - x.numpy()) ** 2).sum()
    with torch.no_grad():
        left = float((pair.decode(pair.encode(x)) - x).square().sum())
    assert 0.999 * best < left < 1.05 * best


def bounds_the_rows(table: Comparison, result: Result, data: Dataset) -> None:
    x = data.train["x"]
    assert -result.losses[-100:].mean() / len(x) > independent(x, x) + LEARNT


def needs_few_bits(table: Comparison, result: Result, data: Dataset) -> None:
    report = ZOO["diffusion"].report(result.bound.pair, data.test).set_index("bits per dimension, held out")
    levels = (data.train["x"] * 16).round().long()
    counts = torch.stack([(levels == k).sum(0) for k in range(17)]) + 1.0
    entropy = -(counts / counts.sum(0)).log2()
    test = (data.test["x"] * 16).round().long()
    assert report.loc["total", "mean"] < float(entropy.gather(0, test).mean())


def finds_labels(table: Comparison, result: Result, data: Dataset) -> None:
    known = ~data.train["y"].isnan()
    x, y = data.train["x"][known].numpy(), data.train["y"][known].numpy()
    theirs = LogisticRegression(max_iter=1000).fit(x, y).score(data.test["x"].numpy(), data.test["y"].numpy())
    reached = ZOO["semi_supervised_vae"].report(result.bound.pair, data.test)["mean"].iloc[0]
    assert reached > theirs - 0.05


def predicts_letters(table: Comparison, result: Result, data: Dataset) -> None:
    train, rows = data.train["x"].long(), data.test["x"].long()
    counts = torch.bincount(train.clamp(min=0).flatten(), minlength=int(max(train.max(), rows.max())) + 1) + 1.0
    alone = (counts / counts.sum()).log()[rows.clamp(min=0)].sum(-1).mean()
    assert first(table, "lpd") > float(alone) + 1


def has_the_moments(table: Comparison, result: Result, data: Dataset) -> None:
    # The guide is a normal distribution; chains are exact up to their noise.
    assert first(table, "error_rms") < 0.4
    assert table.table.loc["ChEES", "error_rms"] < 0.1


def follows_topics(table: Comparison, result: Result, data: Dataset) -> None:
    """Documents of mixed topics are likelier than ones of the words' overall shares, in nats per document."""
    pair, x = result.bound.pair, data.test["x"]
    shares = data.train["x"].sum(0) + 1
    with torch.no_grad():
        mixture = torch.nn.functional.softplus(pair.encoder((x + 1).log()))
        chance = (mixture / mixture.sum(-1, keepdim=True)) @ pair.mean_topics()
    gain = (x * (chance.log() - (shares / shares.sum()).log())).sum(-1)
    assert float(gain.mean()) > 10


FIGURES: dict[str, Check] = {
    **dict.fromkeys(
        (
            "eight_schools",
            "hierarchical_regression",
            "linear_regression",
            "robust_regression",
            "poisson_regression",
            "item_response",
            "hidden_markov",
            "garch",
            "gaussian_process",
        ),
        has_the_moments,
    ),
    "lda": follows_topics,
    "naive_bayes": both(is_the_posterior, classifies_like(naive_bayes.GaussianNB)),
    "bernoulli_naive_bayes": both(is_the_posterior, classifies_like(naive_bayes.BernoulliNB)),
    "multinomial_naive_bayes": both(is_the_posterior, classifies_like(naive_bayes.MultinomialNB)),
    "bayesian_network": is_the_posterior,
    "logistic_regression": classifies_like(LogisticRegression),
    "neural_classifier": classifies_like(LogisticRegression),
    "gaussian_mixture": beats_independence(1.0),
    "bernoulli_mixture": beats_independence(LEARNT),
    "factor_analysis": scores_like(lambda: decomposition.FactorAnalysis(2)),
    "ppca": scores_like(lambda: decomposition.PCA(2)),
    "autoencoder": reconstructs_like_pca,
    "factorial_code": reconstructs,
    "made": beats_independence(LEARNT),
    "nade": beats_independence(LEARNT),
    "eonade": beats_independence(LEARNT),
    "fvsbn": beats_independence(LEARNT),
    "markov_chain": predicts_letters,
    "sigmoid_belief_net": bounds_the_rows,
    "helmholtz_machine": beats_independence(LEARNT),
    "vae": beats_independence(LEARNT),
    "hierarchical_vae": beats_independence(LEARNT),
    "conditional_vae": beats_independence(LEARNT),
    "semi_supervised_vae": finds_labels,
    "gan": draws_like_the_data,
    "conditional_gan": draws_like_the_data,
    "infogan": codes_tell_labels,
    "bigan": draws_like_the_data,
    "vaegan": reconstructs,
    "adversarial_autoencoder": reconstructs,
    "cyclegan": translates_as_the_domains_were_made,
    "diffusion": needs_few_bits,
}
QUICK = {"factor_analysis", "ppca", "autoencoder", "markov_chain"}


def test_every_entry_has_a_figure() -> None:
    assert FIGURES.keys() == ZOO.keys()


def by_cost(name: str) -> Any:
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("name", [by_cost(name) for name in FIGURES])
def test_the_defaults_of_an_entry_run_to_the_end_and_reach_a_figure(name: str, tmp_path, monkeypatch) -> None:
    made: list[tuple[Comparison, Dataset]] = []
    run = Entry.compare

    def kept(self: Entry, dataset: Dataset, *args: Any, **kwargs: Any) -> Comparison:
        made.append((run(self, dataset, *args, **kwargs), dataset))
        return made[0][0]

    monkeypatch.setattr(Entry, "compare", kept)
    answer = CliRunner().invoke(app, ["compare", name, "--out", str(tmp_path)])
    assert answer.exit_code == 0, answer.output + answer.stderr
    ((comparison, dataset),) = made
    assert list(comparison.results) == list(ZOO[name].methods), "a method failed"
    # The method that ``ppl-models fit`` runs, from the same seed.
    FIGURES[name](comparison, comparison.results[next(iter(ZOO[name].methods))], dataset)


@pytest.mark.parametrize("name", ["naive_bayes", "bayesian_network", "ppca", "markov_chain", "gaussian_mixture"])
def test_the_default_fit_of_an_entry_is_its_first_method(name: str, tmp_path) -> None:
    answer = CliRunner().invoke(app, ["fit", name, "--out", str(tmp_path)])
    assert answer.exit_code == 0, answer.output + answer.stderr
    (path,) = tmp_path.glob("*/idata.nc")
    assert path.parent.name == next(iter(ZOO[name].methods)).lower().replace(" ", "_")
