"""``verify``: entries of the zoo are green, and each planted fault turns one red."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions.transforms import ExpTransform
from typer.testing import CliRunner

from inference import fit, sample
from inference.evidence import estimate
from inference.kernels import ChEES, trajectory
from inference.objectives import IWAE
from inference.objectives.importance import Weighted
from ppl_models import ZOO
from ppl_models.cli import app
from ppl_models.models.vae import VAE
from ppl_models.zoo.checks import Check, brute_force, verify
from ppl_models.zoo.entry import Entry

pytestmark = pytest.mark.usefixtures("alone")
IRIS = replace(ZOO["naive_bayes"], data="iris")


def by(objective: Any, entry: str = "vae") -> Entry:
    return replace(ZOO[entry], methods={"method": partial(fit, objective=objective)})


def run(entry: Entry, method: str | None = None) -> dict[str, Check]:
    return {check.name: check for check in verify(entry, method, quick=True)}


def failed(checks: dict[str, Check]) -> list[str]:
    return [n for n, c in checks.items() if c.passed is False]


# Green


SLOWER = pytest.param("sigmoid_belief_net", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["factor_analysis", "vae", SLOWER, "adversarial_autoencoder", "gan"])
def test_an_entry_is_green(name: str) -> None:
    checks = run(ZOO[name])
    assert failed(checks) == []
    passed = {n for n, c in checks.items() if c.passed}
    expected = {
        "factor_analysis": {"bound, SVI", "calibration, SVI", "log p(x)"},
        "vae": {"bound, SVI", "log p(x)"},
        "sigmoid_belief_net": {"bound, VIMCO", "log p(x)"},
    }
    assert passed == expected.get(name, set())
    # What could not be checked says why.
    assert all(c.figure for c in checks.values())


def test_the_sum_over_latents_is_that_of_a_pair_in_closed_form() -> None:
    entry = ZOO["ppca"]
    dataset = entry.load()
    pair, rows = entry.pair(dataset, factors=1), dataset.train["x"][:5]
    with torch.no_grad():
        torch.testing.assert_close(brute_force(pair, {"x": rows}), pair.log_evidence(rows).double())


@pytest.mark.slow
def test_conjugate_posteriors_and_their_chains_are_green() -> None:
    for method in ("exact", "ChEES"):
        checks = run(IRIS, method)
        assert checks[f"posterior, {method}"].passed, checks
    assert run(IRIS, "SVI")["posterior, SVI"].passed is None


class Wide(VAE):
    """A guide of which a few draws among thousands lie where the posterior is."""

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        own = super().posterior(x)
        return dist.Normal(own.mean, 4000 * own.stddev).to_event(1)


def test_a_guide_far_from_the_posterior_leaves_the_evidence_unchecked() -> None:
    check = run(replace(ZOO["vae"], make=Wide))["log p(x)"]
    assert check.passed is None and "the guide is too far from the posterior" in check.figure


# Faults


def test_the_sign_of_an_entropy() -> None:
    class Flipped(Trace_ELBO):
        def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            scored = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
            return -float(scored.log_prob_sum() + drawn.log_prob_sum())

    assert failed(run(by(Trace_ELBO), "method")) == []
    assert failed(run(by(Flipped), "method")) == ["bound, method"]


def test_joint_weights_in_place_of_weights_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed(run(by(partial(IWAE, 5)), "method")) == []

    def jointly(self: Any, log_weights: Tensor) -> Tensor:
        total = log_weights.sum(1).logsumexp(0) - math.log(self.num_particles)
        return (total / log_weights.shape[1]).expand(log_weights.shape[1])

    monkeypatch.setattr(Weighted, "bound", jointly)
    assert failed(run(by(partial(IWAE, 5)), "method")) == ["bound, method"]


@pytest.mark.parametrize("name", ["vae", "helmholtz_machine", "factor_analysis"])
def test_an_importance_weight_to_the_power_of_nine_tenths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def tempered(part: Any, rows: Tensor, tick: Any, *, k: int) -> tuple[Tensor, Tensor]:
        draws, density = part.guide({}, k)
        weights = 0.9 * (part.model(draws, k)[0].double() - density)
        return estimate._mean(weights.logsumexp(0), (2 * weights).logsumexp(0), k)

    monkeypatch.setattr(estimate, "_importance", tempered)
    assert "log p(x)" in failed(run(ZOO[name]))


def test_a_missing_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the logarithm that takes variances to the real line."""
    monkeypatch.setattr(ExpTransform, "log_abs_det_jacobian", lambda self, x, y: torch.zeros_like(x))
    assert failed(run(IRIS, "ChEES")) == ["posterior, ChEES"]


@pytest.mark.slow
def test_a_wrong_acceptance_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every proposal is accepted: the draws are those of the leapfrog steps, at a step size that is not small."""
    right = trajectory.run_block

    def accepting(density: Any, chains: Any, tuning: Any, metric: Any, rules: Any, noise: Any) -> Any:
        return right(density, chains, tuning, metric, rules, noise._replace(log_uniform=noise.log_uniform - 30.0))

    kernel = type("Accepting", (ChEES,), {"transitions": staticmethod(accepting)})
    broken = partial(kernel, target_accept_prob=0.3)
    entry = replace(IRIS, methods={"exact": IRIS.methods["exact"], "broken": partial(sample, kernel=broken)})
    assert failed(run(entry, "broken")) == ["posterior, broken"]


# The command


def test_the_command_prints_a_verdict_for_each_check_and_exits_with_one_where_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = CliRunner().invoke(app, ["verify", "ppca", "--quick"])
    assert done.exit_code == 0 and done.output.count("ok  ") == 3, done.output
    assert "checks passed" in done.output and "ppca: log p(x): importance" in done.output
    monkeypatch.setattr(Trace_ELBO, "loss", lambda *_, **__: 0.0)
    done = CliRunner().invoke(app, ["verify", "ppca", "--quick"])
    assert done.exit_code == 1 and "FAILED" in done.output
    assert "checks failed: ppca (bound, SVI)" in done.output


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "expected one pair, or --all, got none"),
        (["ppca", "--all"], "expected one pair, or --all, got both"),
        (["ppca", "--method", "SVJ"], "unknown 'SVJ'; nearest: SVI"),
        (["ppac"], "unknown 'ppac'; nearest: ppca"),
    ],
)
def test_wrong_arguments_are_answered_by_one_line(arguments: list[str], line: str) -> None:
    done = CliRunner().invoke(app, ["verify", *arguments])
    assert done.exit_code == 2 and line in " ".join(done.output.split())
