"""NUTS of all chains at once: it leaves distributions as they are, builds Pyro's trees, and adapts as Stan does."""

from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import MCMC
from pyro.infer import NUTS as PyroNUTS
from torch import Tensor

from inference import sample
from inference.core.handlers import isolated
from inference.kernels import NUTS
from inference.kernels.nuts import _renewals
from inference.kernels.stepsize import StepSize
from inference.kernels.tree import _checkpoints

quiet = partial(sample, kernel=NUTS, progress=False)
pytestmark = pytest.mark.usefixtures("alone")

SCALES = torch.linspace(0.5, 2.0, 6).double()


def banana(values: dict[str, Tensor]) -> Tensor:
    """Minus the log density of x ~ N(0, 1), y | x ~ N(x ** 2, 0.5)."""
    x, y = values["z"].unbind()
    return x**2 / 2 + 2 * (y - x**2) ** 2


def gaussian() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(6).double(), SCALES).to_event(1))


def fixed(kernel: NUTS, step: float, *args: Any) -> NUTS:
    """A kernel after its set-up, without a warmup, at a given step size."""
    kernel.setup(0, *args)
    kernel._tuning[StepSize._fields.index("log_step")] = np.log(step)
    return kernel


@pytest.mark.parametrize("depth", [1, 2, 8], ids=["one doubling", "two doublings", "as many as it takes"])
def test_a_transition_leaves_the_distribution_as_it_is(depth: int) -> None:
    """Chains that start at exact draws are at exact draws after it, however coarse the steps."""
    chains = 20_000
    with isolated(depth):
        x = torch.randn(chains).double()
        start = torch.stack([x, x**2 + 0.5 * torch.randn(chains)], -1)
        kernel = NUTS(potential_fn=banana, num_chains=chains, max_tree_depth=depth, block=2, jit_compile=False)
        kernel.initial_params = {"z": start}
        moves = fixed(kernel, 0.5).advance()
    assert 0.2 < float(moves.acceptance.mean()) < 0.95, "steps are coarse, so that a wrong acceptance would show"
    assert int(moves.depth.max()) >= min(depth, 3)
    x, y = moves.position[-1].T.numpy()
    assert (x != start[:, 0].numpy()).mean() > 0.4
    for score in (x, (y - x**2) / 0.5):
        assert scipy.stats.kstest(score, "norm").pvalue > 1e-4
    # Where the density is low draws are few: the squares weigh them.
    for square in (x**2, ((y - x**2) / 0.5) ** 2):
        assert abs(square.mean() - 1) < 5 * (2 / chains) ** 0.5
    assert abs((x * (y - x**2)).mean()) < 5 * 0.5 / chains**0.5


def test_trees_are_as_long_as_those_of_pyro() -> None:
    """At one step size the numbers of leapfrog steps and the acceptance are of the same distributions."""
    draws, step = 400, 0.25
    with isolated(0):
        kernel = NUTS(gaussian, num_chains=8, block=draws // 8, jit_compile=False, full_mass=False)
        moves = fixed(kernel, step).advance()
        pyros = PyroNUTS(gaussian, step_size=step, adapt_step_size=False, adapt_mass_matrix=False)
        pyros.setup(0)
        params, steps = pyros.initial_params, []
        counted = [0]
        potential = pyros.potential_fn

        def counting(values: Any) -> Tensor:
            counted[0] += 1
            return potential(values)

        pyros.potential_fn = counting
        for _ in range(draws):
            counted[0] = 0
            params = pyros.sample(params)
            steps.append(counted[0])
    ours = moves.leapfrogs.flatten().numpy()
    # Successive draws are nearly independent: trajectories are of about half a period.
    error = (ours.var() / len(ours) + np.var(steps) / len(steps)) ** 0.5
    assert abs(ours.mean() - np.mean(steps)) < 6 * error
    assert scipy.stats.ks_2samp(ours, steps).pvalue > 1e-5
    assert abs(float(moves.acceptance.mean()) - pyros._mean_accept_prob) < 0.03


def test_trees_stop_where_a_recursion_over_all_leaves_says() -> None:
    """Each aligned subtree of the new half, and the whole, is tried by the sum of the momenta of all of its leaves."""
    with isolated(0):
        kernel = fixed(NUTS(gaussian, num_chains=8, block=10, jit_compile=False, full_mass=False), 0.25)
        *rest, noise = kernel._inputs(learning=False)
    with torch.no_grad():
        moves = kernel._run(*rest, noise)[2]
    start = rest[1].position
    for t, position in enumerate(moves.position):
        for c in range(8):
            said = int(moves.depth[t, c]), int(moves.leapfrogs[t, c])
            assert said == tree_of(start[:, c], noise.momentum[t, :, c], noise.direction[t, :, c].tolist(), 0.25)
        start = position
    assert len(moves.depth.unique()) > 1


def tree_of(q: Tensor, r: Tensor, sides: list[float], step: float) -> tuple[int, int]:
    """Depth and leapfrog steps of a tree of the model ``gaussian``, with the unit metric."""
    leaves, steps = [(q, r)], 0
    for depth, side in enumerate(sides):
        sign = -1 if side < 0.5 else 1
        (q, r), new = leaves[0 if sign < 0 else -1], list[tuple[Tensor, Tensor]]()
        for _ in range(2**depth):
            r = r - 0.5 * sign * step * q / SCALES**2
            q = q + sign * step * r
            r = r - 0.5 * sign * step * q / SCALES**2
            new.append((q, r))
            steps += 1
            if any(len(new) % 2**k == 0 and has_turned(new[-(2**k) :]) for k in range(1, depth + 1)):
                return depth, steps
        leaves = new[::-1] + leaves if sign < 0 else leaves + new
        if has_turned(leaves):
            return depth + 1, steps
    return len(sides), steps


def has_turned(leaves: list[tuple[Tensor, Tensor]]) -> bool:
    first, last = leaves[0][1], leaves[-1][1]
    between = torch.stack([r for _, r in leaves]).sum(0) - 0.5 * (first + last)
    return bool(min(first @ between, last @ between) <= 0)


@pytest.mark.parametrize("full_mass", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["dense", "diagonal"])
def test_a_correlated_normal(full_mass: bool) -> None:
    apart, scale = torch.arange(5).double(), torch.tensor([0.5, 1.0, 1.5, 2.0, 4.0]).double()
    covariance = scale[:, None] * 0.7 ** (apart[:, None] - apart).abs() * scale

    def model() -> None:
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(5).double(), covariance))

    result = quiet(model, kernel=partial(NUTS, full_mass=full_mass), draws=500, warmup=400, chains=4, compile=True)
    assert result.idata.attrs["execution"] == "fused"
    assert result.diagnosis.worst_r_hat < 1.02
    effective, sd = result.diagnosis.min_ess_bulk, covariance.diagonal().sqrt()
    assert effective > 400
    assert float((result.draws["x"].mean(0) / sd).abs().max()) < 5 / effective**0.5
    ratio = result.draws["x"].std(0) / sd
    assert float((ratio - 1).abs().max()) < 5 / effective**0.5
    # More draws go on from where the chains are.
    more = result.draw(2000)["x"]
    assert float((more.mean(0) / sd).abs().max()) < 7 / effective**0.5
    # The same program once more: its transitions are those of the traced block.
    blocks_agree(model, chains=4, full_mass=full_mass)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "chains"),
    [(gaussian, 3), (lambda: pyro.sample("x", dist.Normal(torch.zeros(()).double(), 2.0)), 1)],
    ids=["six dimensions", "one"],
)
def test_fused_blocks_are_the_traced_ones(model: Any, chains: int) -> None:
    blocks_agree(model, chains, block=4)


def blocks_agree(model: Any, chains: int, **settings: Any) -> None:
    """Twelve transitions: later ones magnify what rounding differs by."""
    moved = []
    for fuse in (False, True):
        with isolated(0):
            kernel = NUTS(model, num_chains=chains, jit_compile=False, **settings)
            kernel.setup(200)
            if fuse:
                kernel.fuse()
                assert kernel.execution == "fused"
            blocks = [kernel.advance() for _ in range(1 if kernel.block >= 12 else 3)]
            moved.append([torch.cat(parts)[:12] for parts in zip(*blocks, strict=True)])
    for traced, fused in zip(*moved, strict=True):
        assert len(traced) == 12
        torch.testing.assert_close(traced, fused, rtol=1e-6, atol=1e-6)


def test_each_leaf_is_checked_against_the_first_leaves_of_the_subtrees_that_it_completes() -> None:
    slots, levels = _checkpoints(6, torch.device("cpu"))
    kept: dict[int, int] = {}
    for leaf in range(32):
        if leaf % 2 == 0:
            kept[int(slots[leaf])] = leaf
        begun = sorted(kept[k] for k in levels[leaf].nonzero().flatten().tolist())
        # A subtree of 2 ** k leaves that ends at this one begins at a multiple of 2 ** k.
        ends = [k for k in range(1, 6) if (leaf + 1) % 2**k == 0]
        assert begun == sorted(leaf + 1 - 2**k for k in ends)


def test_windows_of_the_warmup_are_those_of_stan() -> None:
    assert sorted(_renewals(1000, 25)) == [75, 100, 150, 250, 450, 950]
    assert sorted(_renewals(500, 25)) == [75, 100, 150, 250, 450]
    assert sorted(_renewals(200, 25)) == [75, 100, 150]
    # Too short for any window.
    assert _renewals(20, 25) == set()
    assert all(t % 10 == 0 for t in _renewals(333, 10))


def test_every_chain_has_a_step_size_of_its_own_and_they_follow_the_acceptance_asked_for() -> None:
    found = []
    for target in (0.6, 0.95):
        kernel = partial(NUTS, target_accept_prob=target, max_tree_depth=6)
        stats = quiet(gaussian, kernel=kernel, draws=100, warmup=200, chains=4, compile=False).idata.sample_stats
        steps = stats.step_size.values
        assert (steps == steps[:, :1]).all(), "it is held after the warmup"
        assert len(np.unique(steps[:, 0])) == 4
        found.append((steps[:, 0].max(), float(stats.acceptance_rate.mean())))
    (long, low), (short, high) = found
    assert short < long
    # The mean of log step sizes is a cautious one, as in Stan.
    assert 0.5 < low < 0.88 < high


def test_the_first_step_size_is_found_from_far_off() -> None:
    """One leapfrog step of a normal of standard deviation s is accepted at 0.8 for a step of about s."""
    for sd in (1e-4, 1.0, 1e4):
        for guess in (1e-6, 1.0, 1e5):
            with isolated(0):
                kernel = NUTS(potential_fn=lambda v: (v["x"] / sd) ** 2 / 2, num_chains=50, step_size=guess)  # noqa: B023
                kernel.jit_compile = False
                kernel.initial_params = {"x": sd * torch.randn(50).double()}
                kernel.setup(100)
            steps = kernel._tuning[StepSize._fields.index("log_step")].exp() / sd
            assert 0.2 < float(steps.median()) < 8


def test_depth_and_divergences_are_told() -> None:
    def funnel() -> None:
        v = pyro.sample("v", dist.Normal(torch.zeros(()).double(), 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9).double(), (v / 2).exp()).to_event(1))

    kernel = partial(NUTS, max_tree_depth=3)
    result = quiet(funnel, kernel=kernel, draws=200, warmup=100, chains=4, compile=False)
    stats = result.idata.sample_stats
    assert int(stats.tree_depth.max()) == 3
    assert int(stats.n_steps.max()) == 7
    assert (stats.reached_max_treedepth.values == (stats.tree_depth.values == 3)).all()
    assert int(stats.diverging.sum()) == result.diagnosis.divergences
    # At a step far too long every transition diverges, at its first leaf.
    with isolated(0):
        moves = fixed(NUTS(gaussian, num_chains=2, block=5, jit_compile=False), 1e3).advance()
    assert bool(moves.diverging.all())
    assert moves.leapfrogs.unique().tolist() == [1]
    assert moves.depth.unique().tolist() == [0]
    assert moves.acceptance.unique().tolist() == [0]


def test_chains_that_are_done_leave_the_others_alone() -> None:
    """A chain's draws do not depend on how many other chains there are, given its noise."""
    with isolated(0):
        kernel = fixed(NUTS(gaussian, num_chains=5, block=6, jit_compile=False), 0.2)
        kernel._tuning[3, :2] = np.log(1.2)
        held, chains, tuning, metric, rules, noise = kernel._inputs(learning=False)
    with torch.no_grad():
        together = kernel._run(held, chains, tuning, metric, rules, noise)[2]
        for c in range(5):
            alone = [type(v)(*(t[..., c : c + 1] for t in v)) for v in (chains, noise)]
            run = type(kernel).transitions
            one = run(lambda q: quadratic(q), alone[0], tuning[:, c : c + 1], metric, rules, alone[1])[2]
            torch.testing.assert_close(one.position[..., 0], together.position[..., c])
            torch.testing.assert_close(one.leapfrogs[:, 0], together.leapfrogs[:, c])


def quadratic(q: Tensor) -> tuple[Tensor, Tensor]:
    """Energy and gradient of the model ``gaussian``, by hand."""
    gradient = q / SCALES[:, None] ** 2
    return 0.5 * (q * gradient).sum(0) + SCALES.log().sum() + 3 * np.log(2 * np.pi), gradient


def test_plain_mcmc_and_a_single_chain() -> None:
    with isolated(0):
        mcmc = MCMC(NUTS(gaussian, jit_compile=False), num_samples=30, warmup_steps=20, disable_progbar=True)
        mcmc.run()
    assert mcmc.get_samples()["x"].shape == (30, 4, 6)
    result = quiet(gaussian, draws=50, warmup=50, chains=1)
    assert result.idata.posterior["x"].shape == (1, 50, 6)


def test_a_model_that_cannot_be_traced_runs_eagerly_and_says_so() -> None:
    def reading() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.factor("f", torch.tensor(-(float(x.detach()) ** 2) / 2))

    kernel = NUTS(reading, num_chains=2, max_tree_depth=3, block=4)
    with isolated(0):
        with pytest.warns(UserWarning, match=r"the chains run eagerly, one after another.*float\(\)"):
            kernel.setup(0)
        moves = kernel.advance()
    assert kernel.execution == "eager"
    assert bool(moves.position.isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_chains": 0}, "num_chains: expected an integer of at least 1, got 0"),
        ({"max_tree_depth": 0}, "max_tree_depth: expected an integer of at least 1, got 0"),
        ({"step_size": -1.0}, "step_size: expected a positive number, got -1.0"),
        ({"target_accept_prob": 1.0}, "target_accept_prob: expected a number between 0 and 1, got 1.0"),
        ({"block": True}, "block: expected an integer of at least 1, got True"),
        ({"potential_fn": banana}, "model: expected either a model or a potential_fn"),
    ],
)
def test_bad_settings_get_one_line(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NUTS(gaussian, **arguments)
