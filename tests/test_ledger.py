"""The ledger: records, its table, what is refused; the recipes' quick sizes."""

import gzip
import json
import math
import re
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.optim import PyroOptim
from safetensors.torch import save
from torch.nn.functional import logsigmoid
from typer.testing import CliRunner

from inference import fit, isolated, log_evidence
from inference.objectives import Adversarial
from ppl_models import data, ledger
from ppl_models.cli import app
from ppl_models.data.sbibm import Benchmark
from ppl_models.ledger import pictures, record
from ppl_models.ledger.entries import RECIPES
from ppl_models.ledger.recipes import likelihood, simulators
from ppl_models.ledger.recipes.adversarial import duelled
from ppl_models.ledger.recipes.posteriors import POSTERIORS, R_HAT, SPREAD, WORST_Z, by_measure, judged
from ppl_models.ledger.recipes.trained import (
    Weights,
    fitted,
    kept,
    placed,
    seen,
    trained,
    trained_by_stages,
    weights_at,
)
from ppl_models.ledger.record import GRADES, Recipe
from ppl_models.models.autoregressive import FVSBN
from ppl_models.models.gan import GAN
from ppl_models.models.mixture import BernoulliMixture

README = Path(__file__).parent.parent / "README.md"
ROWS = (torch.rand(200, 6, generator=torch.Generator().manual_seed(0)) < 0.3).float()
STAGES = ((1, 0.1), (1, 0.1), (1, 0.1), (1, 0.01), (1, 0.01))
FOUND = {0: {"figure": 1.0, "train": 0.5}, 1: {"figure": 3.0, "train": 0.25}}


def recipe(**changes) -> Recipe:
    made = Recipe("made", "test NLL", lambda quick, seed: FOUND[seed], 2.5, "nobody", "none", "recalled", seeds=2)
    return replace(made, **changes)


def test_a_record_has_the_figure_and_its_standard_error_over_seeds(tmp_path, monkeypatch) -> None:
    record = ledger.reproduce(recipe(), tmp_path)
    assert record["figure"] == 2.0
    assert record["standard_error"] == pytest.approx(1.0)  # sd of 1 and 3 is sqrt 2, over sqrt 2
    assert record["details"] == {"figure": [1.0, 3.0], "train": [0.5, 0.25]}
    ledger.reproduce(recipe(), tmp_path, seeds=1)
    written = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert [r["figure"] for r in written] == [2.0, 1.0]
    assert written[1]["standard_error"] is None
    monkeypatch.setattr("ppl_models.ledger.entries.RECIPES", {"made": recipe()})
    assert ledger.records(tmp_path) == written
    assert "| 2.5 | 1.00 | 1 |" in ledger.table(tmp_path)


def test_a_seed_that_is_recorded_is_not_run_again(tmp_path, monkeypatch) -> None:
    ran: list[int] = []

    def run(quick: bool, seed: int) -> dict[str, float]:
        if seed == 1 and len(ran) < 2:
            ran.append(seed)
            raise KeyboardInterrupt
        ran.append(seed)
        return FOUND[seed]

    with pytest.raises(KeyboardInterrupt):
        ledger.reproduce(recipe(run=run), tmp_path)
    assert not (tmp_path / "made.jsonl").exists()
    record = ledger.reproduce(recipe(run=run), tmp_path)
    assert record["details"]["figure"] == [1.0, 3.0]
    assert ran == [0, 1, 1]
    # Nothing is left to do, and nothing is recorded twice.
    assert ledger.reproduce(recipe(run=run), tmp_path) == record
    assert len((tmp_path / "made.jsonl").read_text().splitlines()) == 1
    # Lines of another commit count when they are asked for alone.
    monkeypatch.setattr("ppl_models.ledger.record._commit", lambda: "another")
    assert ledger.reproduce(recipe(run=run), tmp_path, missing=True)["commit"] == record["commit"]
    assert ran == [0, 1, 1]
    assert ledger.reproduce(recipe(run=run), tmp_path, only=1) is None
    assert ran == [0, 1, 1, 1]
    joined = ledger.reproduce(recipe(run=run), tmp_path, missing=True)
    assert joined["commit"] == f"{record['commit']}, another"


def test_seeds_run_side_by_side_and_give_one_record(tmp_path) -> None:
    alone = ledger.reproduce(recipe(run=_drawn), tmp_path / "one", seeds=3)
    beside = ledger.reproduce(recipe(run=_drawn), tmp_path / "two", seeds=3, jobs=2)
    assert beside["details"] == alone["details"]
    assert len((tmp_path / "two" / "made.seeds.jsonl").read_text().splitlines()) == 3


def _drawn(quick: bool, seed: int) -> dict[str, float]:
    return {"figure": seed**0.5}


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_recipe_runs_on_the_device_that_is_asked_for(tmp_path, jobs: int) -> None:
    run = {"seeds": 2, "jobs": jobs}
    assert ledger.reproduce(recipe(run=_placed), tmp_path / "cpu", **run)["figure"] == 0
    assert ledger.reproduce(recipe(run=_placed), tmp_path / "meta", **run, device="meta")["figure"] == 1
    with pytest.raises(ValueError, match="^device: expected a device that torch can use here"):
        ledger.reproduce(recipe(run=_placed), tmp_path / "none", device="cuda:99")
    assert not (tmp_path / "none").exists()


def _placed(quick: bool, seed: int) -> dict[str, float]:
    pair, x = placed(torch.nn.Linear(1, 1)), placed(torch.zeros(1))
    return {"figure": float(pair.weight.device.type == x.device.type == "meta")}


def test_a_killed_seed_goes_on_from_its_checkpoints(tmp_path, monkeypatch) -> None:
    x = torch.randn(20)

    def model(x: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    class Plain:
        def __init__(self) -> None:
            self.model, self.guide = model, AutoNormal(model)

    killed, computed = [True], list[int]()

    def run(quick: bool, seed: int) -> dict[str, float]:
        _, first = trained(Plain, x, steps=20, draws=10, seed=seed, progress=False)
        _, second = trained(Plain, x, steps=30, draws=10, seed=seed, progress=False)
        long = kept("long", lambda: computed.append(1) or 1 / 3)
        if killed.pop() if killed else False:
            raise KeyboardInterrupt
        return {"figure": float(first.losses[-1]), "other": float(second.losses[-1]), "long": long}

    expected = ledger.reproduce(recipe(run=lambda *a: (killed.clear(), run(*a))[1]), tmp_path / "whole", seeds=1)
    killed.append(True)
    with pytest.raises(KeyboardInterrupt):
        ledger.reproduce(recipe(run=run), tmp_path / "killed", seeds=1)
    (folder,) = (tmp_path / "killed" / ".running").glob("made-0-*")
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "long.json"]
    assert len(computed) == 2
    # The second start takes no step: what the first one took is there.
    monkeypatch.setattr("inference.runners.steps.EagerSteps.advance", None)
    record = ledger.reproduce(recipe(run=run), tmp_path / "killed", seeds=1)
    assert record["details"] == expected["details"]
    assert len(computed) == 2 and not folder.exists()


def staged(scores: list[float], tmp_path: Path, *, read: bool = False) -> tuple[float, dict[str, float]]:
    """Density of a small pair that was fitted in stages which have these scores on validation rows."""
    given = iter(scores)
    with weights_at(tmp_path / "weights" / "made.safetensors.gz", read=read):
        result, found = trained_by_stages(
            lambda: FVSBN(6), ROWS, stages=STAGES, score=lambda _: next(given), batch=50, seed=0
        )
    return log_evidence(result, ROWS, "exact").mean, found


@pytest.mark.parametrize(
    ("scores", "epochs"),
    [([-3, -2, -2.5, -9], 2), ([-3, -2, -1, -1.5, -4], 3), ([-1, -2, -3], 1), ([-2, -3, -1, -2], 3)],
)
def test_the_best_stage_is_kept_and_lower_rates_begin_there(scores: list[float], epochs: int, tmp_path) -> None:
    value, found = staged(scores, tmp_path)
    assert (found["epochs"], found["valid"]) == (epochs, -max(scores))
    # By hand: the stages that were kept, each with its seed; a worse one has left no trace but its epochs.
    kept = {2: (0, 1), 3: (0, 1, 2) if scores[1] > scores[0] else (0, 3), 1: (0,)}[epochs]
    with isolated(0):
        pair = FVSBN(6)
    for k in kept:
        adam = PyroOptim(torch.optim.Adam, {"lr": STAGES[k][1]})
        result = fit(pair, ROWS, steps=4, batch=50, draws=1, optimizer=adam, seed=k, progress=False)
    assert value == log_evidence(result, ROWS, "exact").mean
    again, trained_again = staged([], tmp_path, read=True)
    assert again == pytest.approx(value, rel=1e-3) and trained_again == {}


def test_a_stage_takes_the_rows_that_are_made_for_it(tmp_path) -> None:
    asked = list[tuple[int, int]]()

    def rows(stage: int, epochs: int) -> torch.Tensor:
        asked.append((stage, epochs))
        return ROWS.repeat(stage + 1, 1)

    given = iter([-3.0, -2.0])
    with seen() as shown:
        result, found = trained_by_stages(
            lambda: FVSBN(6), rows, stages=((1, 0.1), (2, 0.1)), score=lambda _: next(given), batch=50, seed=0
        )
    # An epoch is one of the training rows, however many copies a stage has.
    assert asked == [(0, 1), (0, 1), (1, 2)] and found["epochs"] == 3
    assert len(shown[0].losses) == 4 + 2 * 4 and len(result.losses) == 8
    # Losses are per row.
    assert found["train"] == pytest.approx(result.losses[-4:].mean() / 400)
    assert abs(shown[0].losses[-1] - shown[0].losses[3]) < 0.3 * shown[0].losses[3]


def test_dynamic_binarization_draws_training_images_anew_and_keeps_the_others() -> None:
    try:
        grey = data.load("mnist")
    except FileNotFoundError:
        pytest.skip("MNIST is not at hand")
    images, again = (likelihood.dynamic(500, 30, 40, seed) for seed in (0, 0))
    other = likelihood.dynamic(500, 30, 40, 1)
    first, second = images.train(0, 1), images.train(1, 3)
    assert (len(first), len(second), len(images.train(2, 50))) == (500, 1500, likelihood.COPIES * 500)
    assert (len(images.valid), len(images.test)) == (40, 30)
    for x in (first, second, images.valid, images.test):
        assert set(x.unique().tolist()) == {0.0, 1.0}
    # The same seed, stage and split give the same pixels, as a run that goes on needs; others do not.
    for made in (lambda i: i.train(1, 3), lambda i: i.valid, lambda i: i.test):
        assert torch.equal(made(images), made(again)) and not torch.equal(made(images), made(other))
    assert not torch.equal(first, second[:500]) and not torch.equal(second[:500], second[500:1000])
    # Each pixel is one as often as its grey level says; validation images are the last ones.
    level, count = grey.train["x"][:500], likelihood.COPIES
    drawn = images.train(2, 50).reshape(count, 500, -1)
    between = (level > 0.1) & (level < 0.9)
    error = ((drawn.mean(0) - level) / (level * (1 - level) / count).sqrt())[between]
    assert len(error) > 20_000 and abs(float(error.mean())) < 5 / len(error) ** 0.5
    assert float(error.std()) == pytest.approx(1, abs=0.05)
    assert torch.equal(drawn[:, level == 0].amax(), torch.tensor(0.0))
    assert float((images.valid - grey.train["x"][-40:]).abs().mean()) < 0.1
    assert float((images.test - grey.test["x"][:30]).abs().mean()) < 0.1


def test_densities_of_orders_are_averaged_one_after_another() -> None:
    try:
        data.load("binarized_mnist")
    except FileNotFoundError:
        pytest.skip("MNIST is not at hand")
    with seen() as shown:
        found = likelihood.any_order(True, 0, stages=())
    pair, test = shown[0].result.bound.pair, data.load("binarized_mnist").test["x"][:20]
    with torch.no_grad(), shown[0].result.state():
        for count in (1, 2, 4):
            scores = [logsigmoid((2 * test - 1) * f(test)).sum(-1).double() for f in pair.conditionals()[:count]]
            expected = -torch.stack(scores).exp().mean(0).log().mean()
            assert found[f"{count} orders"] == pytest.approx(float(expected), rel=1e-6)
        assert found["figure"] == pytest.approx(-float(pair.log_evidence(test).double().mean()), rel=1e-6)
    assert found["4 orders"] < found["2 orders"] + math.log(2)


def test_ordered_numbers_of_a_chain_are_the_first_and_its_distance_from_the_second() -> None:
    rows = np.array([[0.9, 0.1], [0.4, 0.6]])
    draws = {"rows": rows, "mu1": np.array(3.0), "mu_gap": np.array(6.5)}
    found = POSTERIORS["hmm_example-hmm_example"].columns(draws)
    assert {n: float(v) for n, v in found.items()} == {
        "theta1[1]": 0.9,
        "theta2[2]": 0.6,
        "mu[1]": 3.0,
        "mu[2]": 9.5,
    }


def test_the_bound_of_a_belief_net_is_that_of_the_objective_that_is_best_in_training(monkeypatch) -> None:
    try:
        data.load("binarized_mnist")
    except FileNotFoundError:
        pytest.skip("MNIST is not at hand")
    with seen() as shown:
        found = likelihood.belief_net_bound(True, 0, layers=(200,), epochs=1)
    best = min(("NVIL", "VIMCO", "RWS"), key=lambda name: found[f"{name}, train"])
    assert found["figure"] == found[best]
    # The ELBO by Pyro, of which the figure is one draw: the bound of 50 particles is tighter by more than its spread.
    (first,), valid = shown, data.load("binarized_mnist").valid["x"][:20]
    with torch.no_grad(), first.result.state():
        halves = first.result.bound.pair.model, first.result.bound.pair.guide
        losses = torch.tensor([Trace_ELBO().loss(*halves, valid) for _ in range(50)]) / len(valid)
    assert found["NVIL"] == pytest.approx(float(losses.mean()), abs=5 * float(losses.std()))
    # An ELBO of fits of a few steps: better than a coin for each pixel.
    assert all(0 < found[name] < 784 * math.log(2) for name in ("NVIL", "VIMCO", "RWS"))


def test_a_record_is_checked_by_the_weights_of_its_first_seed(tmp_path, monkeypatch) -> None:
    def evaluated(quick: bool, seed: int) -> dict[str, float]:
        result, _ = trained_by_stages(
            lambda: FVSBN(6), ROWS, stages=STAGES[:2], score=lambda r: log_evidence(r, ROWS).mean, batch=50, seed=seed
        )
        return {"figure": -log_evidence(result, ROWS, "exact").mean}

    monkeypatch.setattr("ppl_models.ledger.RECIPES", {"made": recipe(run=evaluated, seeds=1)})
    answer = CliRunner().invoke(app, ["reproduce", "made", "--check", "--out", str(tmp_path)])
    assert answer.exit_code == 2 and "recipe: expected weights on record, got none of made" in answer.stderr
    ledger.reproduce(recipe(run=evaluated, seeds=2), tmp_path)
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["made.safetensors.gz"]
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["made.png"]
    answer = CliRunner().invoke(app, ["reproduce", "made", "--check", "--out", str(tmp_path)])
    assert answer.exit_code == 0, answer.stderr
    now, then = map(float, re.findall(r"(\d+\.\d+) (?:now|on record)", answer.stdout))
    assert now == pytest.approx(then, abs=0.002)
    line = json.loads((tmp_path / "made.jsonl").read_text())
    line["details"]["figure"][0] += 0.1
    (tmp_path / "made.jsonl").write_text(json.dumps(line) + "\n")
    answer = CliRunner().invoke(app, ["reproduce", "made", "--check", "--out", str(tmp_path)])
    assert answer.exit_code == 1 and "which is on record, got" in answer.stderr


def test_posteriors_beyond_a_limit_are_drawn_red(tmp_path) -> None:
    found = {"figure": 1, "a-one: worst z": 3.9, "a-one: sd off by": 0.05, "b-two: worst z": math.inf}
    judged = by_measure(found | {"b-two: sd off by": 0.2})
    assert judged.figures == {"worst z": {"a-one": 3.9, "b-two": math.inf}, "sd off by": {"a-one": 0.05, "b-two": 0.2}}
    assert judged.limits == {"worst z": WORST_Z, "sd off by": SPREAD}
    for axes in pictures.judgements(judged).axes:
        (blue,), (red,) = (dot.get_facecolors() for dot in axes.collections)
        assert blue[2] > blue[0] and red[0] > red[2]
    # What is not finite is an arrow, twice as far as the limit.
    (_, beyond), (_, near) = (axes.collections for axes in pictures.judgements(judged).axes)
    assert beyond.get_offsets()[0, 0] == 2 * WORST_Z and near.get_offsets()[0, 0] == 0.2
    assert len(beyond.get_paths()[0].vertices) < len(near.get_paths()[0].vertices)
    path = pictures.write(judged, "judged", tmp_path / "pictures" / "judged.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "made",
    [
        lambda: (_mean, AutoMultivariateNormal(_mean)),
        lambda: BernoulliMixture(6, components=3, guide=AutoDelta),
        lambda: (shifted := _Shifted(), AutoNormal(shifted)),
    ],
    ids=["a guide", "a pair", "two modules"],
)
def test_the_weights_of_a_guide_are_kept_though_it_has_none_until_it_is_called(made, tmp_path) -> None:
    states = []
    for read in (False, True):
        with weights_at(tmp_path / "weights.gz", read=read):
            pair = made()
            result = fitted(pair, ROWS, steps=40, learning_rate=0.05, draws=1, seed=0, progress=False)
        assert len(result.losses) == (0 if read else 40)
        modules = [half for half in (pair if isinstance(pair, tuple) else (pair,)) if isinstance(half, torch.nn.Module)]
        states.append([module.state_dict() for module in modules])
    assert all(states[0])
    torch.testing.assert_close(states[1], states[0], rtol=0.001, atol=0.001)


def test_every_pair_that_is_fitted_finds_its_own_weights_again(tmp_path) -> None:
    def states(read: bool) -> list[dict[str, torch.Tensor]]:
        with weights_at(tmp_path / "weights.gz", read=read):
            schedule = {"steps": 20, "batch": 50, "learning_rate": 0.01, "draws": 1, "progress": False}
            fits = [duelled(lambda: GAN(6, 2, hidden=(4,)), ROWS, Adversarial(), seed=k, **schedule) for k in (0, 1)]
        assert all(len(result.losses) == (0 if read else 20) for _, result in fits)
        return [pair.state_dict() for pair, _ in fits]

    kept, again = states(read=False), states(read=True)
    assert not torch.equal(kept[0]["generator.0.weight"], kept[1]["generator.0.weight"])
    for k in (0, 1):
        with isolated(k):
            built = GAN(6, 2, hidden=(4,)).state_dict()
        for name, value in again[k].items():
            # Discriminators are as they were built: nothing is evaluated by them.
            expected = built[name] if name.startswith("discriminator") else kept[k][name]
            torch.testing.assert_close(value, expected, rtol=0.001, atol=1e-6)
        assert not torch.allclose(kept[k]["generator.0.weight"], built["generator.0.weight"], atol=1e-3)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda whole: whole[:-9], "a whole file of weights, got .*weights.gz"),
        (lambda whole: b"", "a whole file of weights, got .*weights.gz"),
        (lambda whole: gzip.compress(save({"2/bias": torch.zeros(3)})), "those of fit 1 in .*weights.gz"),
        (lambda whole: gzip.compress(save({"1/other": torch.zeros(3)})), "those of FVSBN, got other too"),
    ],
    ids=["cut", "empty", "none", "of another pair"],
)
def test_weights_of_something_else_are_refused(damage, said: str, tmp_path) -> None:
    path, run = tmp_path / "weights.gz", partial(trained, steps=2, draws=1, seed=0, progress=False)
    with weights_at(path):
        run(lambda: FVSBN(6), ROWS)
    path.write_bytes(damage(path.read_bytes()))
    with weights_at(path, read=True), pytest.raises(ValueError, match=f"^weights: expected {said}"):
        run(lambda: FVSBN(6), ROWS)


def test_weights_of_stages_of_another_pair_are_refused(tmp_path) -> None:
    staged([-2, -3, -1, -2], tmp_path)
    path = tmp_path / "weights" / "made.safetensors.gz"
    path.write_bytes(gzip.compress(save({"1/bias": torch.zeros(6)})))
    with pytest.raises(ValueError, match="^weights: expected those of FVSBN, got 1/bias too"):
        staged([], tmp_path, read=True)


def test_weights_beyond_half_precision_are_kept_whole(tmp_path) -> None:
    one, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    before = {n: v.clone() for n, v in one.state_dict().items()}
    with torch.no_grad():
        one.bias.copy_(torch.tensor([-8e4, 0.1, 2.0]))
    Weights(tmp_path / "weights.gz").keep(before, one.state_dict())
    expected = other.weight.clone()
    Weights(tmp_path / "weights.gz", read=True).restore(other)
    # What training has left as it was is not in the file.
    assert torch.equal(other.bias, one.bias) and torch.equal(other.weight, expected)


class _Shifted(torch.nn.Module):
    """A mean with a prior, and a shift of each feature that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Linear(1, 6, bias=False)

    def forward(self, x: torch.Tensor) -> None:
        pyro.module("shift", self.shift)
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu + self.shift.weight[:, 0], 1.0).to_event(1), obs=x)


def _mean(x: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(6), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("name", "image", "curve"), [("bars", True, 50), ("gan_ring", False, 60), ("infogan_digits", True, 20)]
)
def test_a_run_is_drawn_with_its_losses_and_rows(name: str, image: bool, curve: int, tmp_path) -> None:
    with seen() as shown:
        ledger.RECIPES[name].run(True, 0)
    (one,) = shown
    assert len(one.losses) == curve
    # The losses of the figure's own pair, per row: of several starts the one that was taken.
    np.testing.assert_allclose(one.losses * len(one.rows["x"]), one.result.losses)
    axes = Figure().subplots(1, 2)
    pictures.learning_curve(axes[0], one)
    pictures.rows_made(one.result.bound.pair, one.rows)(axes[1])
    assert [line.get_label() for line in axes[0].lines] == (["training"] if name == "bars" else ["guide", "model"])
    for line, losses in zip(axes[0].lines, one.losses.reshape(curve, -1).T, strict=True):
        assert 0 < line.get_xdata()[-1] < curve
        np.testing.assert_allclose(line.get_ydata(), losses)
    assert bool(axes[1].images) is image and bool(axes[1].collections) is not image
    path = pictures.write(one, "a run", tmp_path / "pictures" / f"{name}.png")
    assert path.stat().st_size < 200_000


def test_quick_records_stay_out_of_the_table(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ppl_models.ledger.entries.RECIPES", {"made": recipe()})
    assert ledger.reproduce(recipe(), tmp_path, quick=True)["seeds"] == 1
    assert "| 2.5 | - | - |" in ledger.table(tmp_path)
    ledger.reproduce(recipe(), tmp_path)
    ledger.reproduce(recipe(), tmp_path, quick=True)
    assert "| 2.5 | 2.00 ± 1.00 | 2 |" in ledger.table(tmp_path)


def test_a_figure_that_is_not_finite_is_not_recorded(tmp_path) -> None:
    with pytest.raises(ArithmeticError, match="made: the figure is nan; nothing was recorded"):
        ledger.reproduce(recipe(run=lambda quick, seed: {"figure": float("nan")}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_interrupted_recipe_records_nothing(tmp_path) -> None:
    def model() -> None:
        runs[0] += 1
        if runs[0] == 20:
            raise KeyboardInterrupt
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0), obs=torch.ones(()))

    def run(quick: bool, seed: int) -> dict[str, float]:
        return {"figure": float(fit((model, lambda: None), steps=100, progress=False, compile=False).losses[-1])}

    runs = [0]
    with pytest.raises(KeyboardInterrupt):
        ledger.reproduce(recipe(run=run), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_line_that_is_cut_short_breaks_neither_reading_nor_the_next_record(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ppl_models.ledger.entries.RECIPES", {"made": recipe()})
    path = tmp_path / "made.jsonl"
    first = ledger.reproduce(recipe(), tmp_path)
    path.write_bytes(path.read_bytes() + b'{"recipe": "made", "fig')
    second = ledger.reproduce(recipe(), tmp_path, seeds=1)
    path.write_bytes(path.read_bytes() + b"[1]\n\xff\n")
    with pytest.warns(UserWarning, match="expected a record") as warned:
        assert ledger.records(tmp_path) == [first, second]
    said = [str(w.message) for w in warned]
    assert [f"{path}, line {k}: expected a record" in line for k, line in zip((2, 4, 5), said, strict=True)] == 3 * [
        True
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files by the system")
def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path) -> None:
    path = tmp_path / "made.jsonl"
    ledger.reproduce(recipe(), tmp_path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OSError, match="No space left"):
            ledger.reproduce(recipe(), tmp_path, seeds=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_the_commit_is_that_of_the_project_and_of_no_repository_around_it(tmp_path, monkeypatch) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "notes.txt").write_text("of another project")
    git("add", ".")
    git("commit", "-m", "One")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for folder in (tmp_path / "site-packages", tmp_path):
        place = folder / "ppl_models" / "ledger" / "record.py"
        place.parent.mkdir(parents=True)
        place.write_text("")
        monkeypatch.setattr("ppl_models.ledger.record.__file__", str(place))
        assert record._commit().startswith("unknown-")
    git("add", ".")
    git("commit", "-m", "Two")
    assert re.fullmatch("[0-9a-f]{12}", record._commit())


@pytest.mark.parametrize("entry", RECIPES.values(), ids=list(RECIPES))
def test_a_recipe_says_what_it_is(entry: Recipe) -> None:
    assert RECIPES[entry.name] is entry
    assert entry.sure in GRADES
    assert entry.better in ("lower", "higher")
    assert entry.source and entry.protocol and entry.title


def by_function(name: str) -> Any:
    """A recipe is slow to test where one before it runs the same function at another setting."""
    functions = [getattr(r.run, "func", r.run) for r in RECIPES.values()]
    place = list(RECIPES).index(name)
    return pytest.param(name, marks=pytest.mark.slow if functions[place] in functions[:place] else ())


def benchmark(name: str) -> Benchmark:
    """In place of the wheel's files: observations and draws of the prior."""
    task = simulators.TASKS[name]
    with isolated(0):
        constants = {"design_matrix": torch.randn(100, 10), "stimulus_I": torch.randn(100)}
        theta = task.prior.sample((10, 200))
        made = Benchmark(theta, theta, constants)
        return replace(made, observations=task.simulate(theta[:, 0], made))


@pytest.mark.parametrize("name", [by_function(name) for name in RECIPES])
def test_the_quick_size_of_a_recipe_runs_from_the_command_line(name: str, tmp_path, monkeypatch) -> None:
    try:
        data.load("binarized_mnist"), data.load("mnist"), data.load("posteriordb/sblri-blr")
    except FileNotFoundError:
        pytest.skip("MNIST, or posteriordb, is not at hand")
    if name.startswith("npe_"):
        monkeypatch.setattr(simulators, "read_benchmark", benchmark)
    answer = CliRunner().invoke(app, ["reproduce", name, "--quick", "--out", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    assert "quick: not comparable" in answer.stdout
    assert "published" in answer.stdout
    (record,) = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    # A generator of a few steps may make no row that passes for data.
    assert record["quick"] and record["figure"] >= 0
    again = record["details"].get("the same by numpy", record["details"]["figure"])
    assert again == pytest.approx(record["details"]["figure"], rel=1e-5)


def test_the_command_lists_recipes_and_refuses_others(tmp_path) -> None:
    answer = CliRunner().invoke(app, ["reproduce"])
    assert all(name in answer.stdout for name in RECIPES)
    answer = CliRunner().invoke(app, ["reproduce", "bernouli_mixture_500", "--out", str(tmp_path)])
    assert answer.exit_code == 2
    assert "recipe: unknown 'bernouli_mixture_500'; nearest: bernoulli_mixture_500" in answer.stderr


def test_the_readme_has_the_ledger_as_it_is() -> None:
    assert ledger.table() in README.read_text()


def test_posteriors_are_judged_by_their_means_spreads_and_chains() -> None:
    rng = np.random.default_rng(0)
    theirs, ours = rng.normal(size=(10, 1000)), rng.normal(size=(64, 250))
    reference = {"beta[1]": torch.tensor(theirs), "sigma": torch.tensor(theirs + 3)}

    def judge(one: np.ndarray, other: np.ndarray) -> tuple[bool, ...]:
        z, spread, r_hat = judged({"beta[1]": one, "sigma": other}, reference)
        return z < WORST_Z, spread < SPREAD, r_hat < R_HAT

    assert judge(ours, ours + 3) == (True, True, True)
    # The standard error of the difference of means is 0.013.
    assert judge(ours, ours + 3.1) == (False, True, True)
    assert judge(1.2 * ours, ours + 3) == (True, False, True)
    for wrong in (np.nan, np.inf):
        spoilt = ours.copy()
        spoilt[0, 0] = wrong
        assert judge(ours, spoilt + 3) == judge(ours[:1], spoilt[:1] + 3) == (False, False, False)
    assert judge(ours[:1], ours[:1] + 3)[2]
    apart = ours + 0.5 * (-1) ** np.arange(64)[:, None]
    assert judge(apart / apart.std(), ours + 3) == (True, True, False)


def test_a_record_keeps_the_protocol_that_it_was_obtained_by(tmp_path, monkeypatch) -> None:
    ledger.reproduce(recipe(protocol="ten epochs"), tmp_path)
    monkeypatch.setattr("ppl_models.ledger.entries.RECIPES", {"made": recipe(protocol="fifty epochs")})
    assert "| ten epochs |" in ledger.table(tmp_path) and "fifty" not in ledger.table(tmp_path)
    assert "| fifty epochs |" in ledger.table(tmp_path / "none")


@pytest.mark.parametrize(
    ("better", "figure", "error", "met"),
    [
        ("lower", 2.4, None, True),
        ("lower", 2.6, None, False),
        ("lower", 2.6, 0.06, True),
        ("lower", 2.6, 0.04, False),
        ("higher", 2.6, None, True),
        ("higher", 2.4, None, False),
        ("higher", 2.4, 0.06, True),
    ],
)
def test_a_figure_is_met_at_or_beyond_the_published_one(better: str, figure: float, error: Any, met: bool) -> None:
    record = {"figure": figure, "standard_error": error}
    assert recipe(better=better).met(record) is met
    assert recipe(better=better, published=None).met(record) is None
