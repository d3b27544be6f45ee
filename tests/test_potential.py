"""Compiled programs: the same numbers as Pyro's own, nothing frozen, and a word where they cannot be had."""

from collections import OrderedDict
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import Case
from pyro.infer import NUTS
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from torch import Tensor

from inference import sample
from inference.compiler import fuse, policy
from inference.compiler.capture import Untraceable, traced
from inference.compiler.potential import BatchedPotential, CompiledPotential, compile_kernel
from inference.core.handlers import isolated
from inference.kernels import ChEES, Gibbs
from ppl_models.zoo.entries import ZOO


@pytest.fixture(params=ZOO.values(), ids=list(ZOO))
def case(request) -> Case:
    """The entries that have a potential: a likelihood, and a continuous latent site."""
    case = Case(request.param)
    if not case.likelihood or not case.latent or case.finite:
        pytest.skip("no potential")
    return case


quiet = partial(sample, progress=False)


def mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2).double()))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 3.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        member = (z[..., None] == torch.arange(2)).double()
        pyro.sample("y", dist.Normal((member @ mu[..., None]).squeeze(-1), 0.5), obs=y)


def constrained(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0).double(), 1.0))
    share = pyro.sample("share", dist.Beta(torch.tensor(2.0).double(), 2.0))
    corr = pyro.sample("corr", dist.LKJCholesky(2, torch.tensor(1.0).double()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MultivariateNormal(share * torch.ones(2).double(), scale_tril=scale * corr), obs=y)


PLAIN = {
    "mixture": (mixture, torch.tensor([-2.0, -1.8, 2.1, 1.9, 2.2]).double()),
    "constrained": (constrained, torch.tensor([[0.1, 0.4], [-0.3, 1.2], [0.8, 0.6]]).double()),
}


def agree(model, at_once: bool = False) -> None:
    """Hold the value and gradient of the traced potential against Pyro's at ten random points."""
    start, potential, _, _ = initialize_model(model)
    program = CompiledPotential(potential, start)
    if at_once:
        program.fuse()
    torch.manual_seed(1)
    for _ in range(10):
        point = {n: torch.randn_like(v) for n, v in start.items()}
        gradients, energy = potential_grad(potential, point)
        ours, value = potential_grad(program, point)
        torch.testing.assert_close(value, energy, rtol=1e-9, atol=1e-9)
        for name in start:
            torch.testing.assert_close(ours[name], gradients[name], rtol=1e-7, atol=1e-7)


def test_the_traced_potential_of_every_row_is_pyros(case: Case) -> None:
    with isolated(0):
        agree(partial(case.pair().model, **case.data))


def agree_for_many(model) -> None:
    """Hold energies and gradients of five chains at once against Pyro's, one by one."""
    start, potential, _, _ = initialize_model(model)
    many = BatchedPotential(potential, start, 5)
    torch.manual_seed(1)
    points = {n: torch.randn(5, *v.shape).to(v) for n, v in start.items()}
    energies, gradients = many.run(many.pack(points))
    named = many.unpack(gradients)
    for k in range(5):
        expected, energy = potential_grad(potential, {n: v[k] for n, v in points.items()})
        torch.testing.assert_close(energies[k].to(energy), energy, rtol=1e-5, atol=1e-5)
        for name in start:
            torch.testing.assert_close(named[name][k], expected[name], rtol=1e-3, atol=1e-3)


def test_many_chains_of_every_row_have_pyros_potential(case: Case) -> None:
    with isolated(0):
        agree_for_many(partial(case.pair().model, **case.data))


@pytest.mark.parametrize("name", PLAIN)
def test_many_chains_of_plain_models_have_pyros_potential(name: str) -> None:
    model, y = PLAIN[name]
    with isolated(0):
        agree_for_many(partial(model, y))


def test_terms_of_the_data_are_computed_once() -> None:
    x = torch.ones(3).double()

    def potential(values):
        return (values["a"] - x.exp().log1p().sum()) ** 2

    many = BatchedPotential(potential, {"a": torch.ones(()).double()}, 4)
    targets = [str(n.target) for n in many.forward.__self__.graph.nodes]
    assert not any("exp." in t or "log1p" in t for t in targets)
    assert any("sub" in t for t in targets)


def test_all_chains_share_one_product_with_the_data() -> None:
    x = torch.arange(12.0).double().reshape(6, 2)

    def potential(values):
        left, right = (x @ values["a"][:, None]).squeeze(-1), values["b"] @ x.T
        return left.sigmoid().sum() + (left @ right.T).square().sum() + (values["b"] @ values["b"].T).sum()

    example = {"a": torch.ones(2).double(), "b": torch.ones(3, 2).double()}
    many = BatchedPotential(potential, example, 5)
    targets = [str(n.target) for n in many.forward.__self__.graph.nodes]
    # Left are the products of a chain with itself: their forward pass and two gradients at most.
    assert any("aten.mm." in t for t in targets)
    assert sum("bmm" in t for t in targets) < str(traced_naively(potential, example)).count("aten.bmm.default")
    values = {
        n: torch.randn((5, *v.shape), generator=torch.Generator().manual_seed(0)).double() for n, v in example.items()
    }
    energies, gradients = many.run(many.pack(values))
    for k in range(5):
        leaves = {n: v[k].clone().requires_grad_() for n, v in values.items()}
        energy = potential(leaves)
        energy.backward()
        torch.testing.assert_close(energies[k], energy.detach())
        torch.testing.assert_close(many.unpack(gradients)["a"][k], leaves["a"].grad)
        torch.testing.assert_close(many.unpack(gradients)["b"][k], leaves["b"].grad)


def traced_naively(potential, example):
    """The graph of five chains as vmap leaves it."""
    many = {n: v.expand(5, *v.shape).clone() for n, v in example.items()}
    value = torch.func.grad_and_value(lambda *v: potential(dict(zip(example, v, strict=True))), argnums=(0, 1))
    return traced(torch.vmap(value), *many.values()).code


def test_a_potential_with_noise_of_its_own_is_refused() -> None:
    with pytest.raises(Untraceable, match="random operation"):
        BatchedPotential(lambda v: v["a"] ** 2 * torch.rand(()), {"a": torch.ones(())}, 4)


@pytest.mark.parametrize("name", PLAIN)
def test_fused_potentials_of_plain_models_are_pyros(name: str) -> None:
    model, y = PLAIN[name]
    with isolated(0):
        agree(partial(model, y), at_once=True)


@pytest.mark.slow
def test_chains_of_a_compiled_potential_have_the_conjugate_posterior() -> None:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0).double(), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    result = quiet(model, torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]), draws=800, warmup=300, chains=2, compile=True)
    assert result.idata.attrs["execution"] == "fused"
    posterior, effective = dist.Gamma(torch.tensor(16.0), 6.0), result.diagnosis.min_ess_bulk
    assert effective > 200
    assert abs(float(result.draws["rate"].mean() - posterior.mean)) < 4 * float(posterior.stddev) / effective**0.5
    assert float(result.draws["rate"].std()) == pytest.approx(float(posterior.stddev), rel=4 / effective**0.5)
    assert result.draw(10)["rate"].shape == (10,)


def test_a_traced_chain_is_the_eager_chain_to_the_last_digit() -> None:
    model, y = PLAIN["mixture"]
    run = partial(quiet, model, y, NUTS, draws=30, warmup=30, chains=2)
    eager, traced = run(compile=False), run(compile="auto")
    assert (eager.idata.attrs["execution"], traced.idata.posterior.attrs["execution"]) == ("eager", "traced")
    torch.testing.assert_close(traced.draws["mu"], eager.draws["mu"], rtol=1e-6, atol=1e-6)


def test_the_work_ahead_decides() -> None:
    with isolated(0):
        start, potential, _, _ = initialize_model(partial(*PLAIN["mixture"]))
        for calls, expected in ((100, "eager"), (1000, "traced"), (100_000, "fused")):
            kernel = NUTS(potential_fn=potential)
            kernel.initial_params = start
            assert compile_kernel(kernel, calls, "auto") == expected


def test_a_graph_of_thousands_of_operations_is_not_fused_by_itself() -> None:
    """What fusing costs grows faster than the graph: work ahead that pays for a small one does not for a large one."""
    calls = policy.FUSE_POTENTIAL_OPERATIONS
    assert policy.worth_fusing(calls / 300, 300, "auto", 300)
    assert not policy.worth_fusing(calls / 2000, 2000, "auto", 2000)
    assert policy.worth_fusing(calls, 2000, "auto", 2000)
    assert not policy.worth_fusing(calls, 5000, "auto", 5000)
    assert policy.worth_fusing(1, 5000, True, 5000)


def test_whoever_has_spent_what_fusing_costs_fuses() -> None:
    cost = policy.FUSE_POTENTIAL_OPERATIONS
    assert not policy.worth_fusing(0, 300, "auto", 300, kept=True, spent=cost - 1)
    assert policy.worth_fusing(0, 300, "auto", 300, spent=cost)
    assert not policy.worth_fusing(0, 2 * policy.FUSED_NODES, "auto", 2 * policy.FUSED_NODES, spent=3 * cost)
    assert not policy.worth_fusing(0, 5000, "auto", 5000, spent=1e12)
    assert not policy.worth_fusing(0, 300, False, 300, spent=cost)


@pytest.mark.parametrize("kind", ["NUTS", "ChEES", "Gibbs"])
def test_runs_without_a_program_are_counted_for_later_ones(kind: str, monkeypatch) -> None:
    given = list[tuple[float, int, float]]()
    monkeypatch.setattr(fuse, "_SPENT", OrderedDict())

    def worth(calls: float, operations: int, mode: Any, nodes: int, kept: bool, spent: float) -> bool:
        given.append((calls, operations, spent))
        return False

    monkeypatch.setattr(policy, "worth_fusing", worth)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 3.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((), 0.5).double())) if kind == "Gibbs" else 0.0
            pyro.sample("y", dist.Normal(mu + z, 1.0), obs=y)

    def run(count: int = 6) -> float:
        given.clear()
        kernel: Any = {"kernel": Gibbs} if kind == "Gibbs" else {}
        chains, y = 4 if kind == "NUTS" else 8, torch.randn(count).double()
        quiet(model, {"y": y}, draws=8, warmup=8, chains=chains, **kernel)
        # What others have spent decides at the beginning alone.
        assert all(spent == 0 for _, _, spent in given[1:])
        return given[0][2]

    assert run() == 0
    (first,) = fuse._SPENT.values()
    # Each of the 16 transitions takes a gradient at least.
    assert run() == first >= 16 * given[0][1] > 0
    assert run(count=7) == 0
    assert run() > first
    monkeypatch.setattr(policy, "SPENT_KEYS", 1)
    run()
    assert run(count=7) == 0


def test_a_loop_over_time_is_not_fused(monkeypatch) -> None:
    monkeypatch.setattr(policy, "MAX_FUSED_NODES", 100)
    monkeypatch.setattr(policy, "FUSE_POTENTIAL_OPERATIONS", 1000)
    monkeypatch.setattr(ChEES, "fuse", lambda self, *_: pytest.fail("fused"))

    def walk(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(()).double(), 1.0))
        state = x
        for t in range(20):
            state = 0.9 * state + torch.sin(state) * y[t]
        pyro.factor("end", -(state**2))

    result = quiet(walk, torch.ones(20).double(), chains=8, draws=20, warmup=20)
    assert result.idata.attrs["execution"] == "traced"


@pytest.mark.filterwarnings("ignore:.*cannot be mapped over draws")
def test_a_model_that_its_values_steer_runs_eagerly_and_says_so() -> None:
    def steered(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu if mu > 0 else 2 * mu, 1.0), obs=y)

    with pytest.warns(UserWarning, match="runs eagerly, because it cannot be traced"):
        result = quiet(steered, torch.ones(3).double(), NUTS, draws=20, warmup=20, chains=2, compile=True)
    assert result.idata.attrs["execution"] == "eager"


def test_a_frozen_branch_is_found_out() -> None:
    calls = [0]

    def counting(values):
        calls[0] += 1
        return (values["x"] ** 2).sum() * (1.0 if calls[0] == 1 else 3.0)

    with pytest.raises(Untraceable, match="the traced potential gives"):
        CompiledPotential(counting, {"x": torch.ones(2)})


@pytest.mark.filterwarnings("ignore:torch.cholesky is deprecated")
def test_a_matrix_that_cannot_be_factorised_is_nan_in_its_own_chain() -> None:
    eye = torch.eye(2).double()
    functions = (
        lambda a: torch.linalg.cholesky(a).diagonal().log().sum(),
        lambda a: torch.linalg.inv(a).sum(),
        lambda a: torch.linalg.solve(a, torch.ones(2).double()).sum(),
        lambda a: torch.cholesky(a).diagonal().log().sum(),
        lambda a: torch.cholesky(a, upper=True).diagonal().log().sum(),
        # Of a matrix that is not finite there is no decomposition.
        lambda a: torch.linalg.eigh(spread / a[0, 0]).eigenvalues.square().sum(),
        lambda a: torch.linalg.eigvalsh(spread / a[0, 0]).square().sum(),
        lambda a: torch.linalg.svd(spread / a[0, 0]).S.sum(),
    )
    spread = torch.tensor([[1.0, 0.3], [0.3, 2.0]]).double()
    for function in functions:

        def potential(values, function=function):
            return function((1 + values["shift"]) * eye) + values["shift"] ** 2

        many = BatchedPotential(potential, {"shift": torch.ones(()).double()}, 3)
        energies, gradients = many.run(torch.tensor([[0.5], [-1.0], [2.0]]).double())
        assert energies.isfinite().tolist() == [True, False, True]
        assert gradients[[0, 2]].isfinite().all()
        one = CompiledPotential(potential, {"shift": torch.ones(()).double()})
        got = one({"shift": torch.tensor(-1.0).double()})
        torch.testing.assert_close(got, energies[1], equal_nan=True)
        for shift in (0.5, 2.0):
            truth = potential({"shift": torch.tensor(shift).double()})
            torch.testing.assert_close(one({"shift": torch.tensor(shift).double()}), truth)
            torch.testing.assert_close(energies[0 if shift == 0.5 else 2], truth)


def test_a_branch_that_the_chains_meet_later_is_found_out() -> None:
    """Whatever lets a read of a value through the recording: the chains' own starts and draws tell."""
    side = [0.0]

    def potential(values):
        x = values["x"]
        return x**2 / 2 + (3 * x**2 if side[0] * float(x.detach().abs().max() > 0.5) else 0.0)

    many = BatchedPotential(lambda v: v["x"] ** 2 / 2, {"x": torch.zeros(()).double()}, 8)
    many._potential = potential
    positions = torch.linspace(-0.4, 0.4, 8).double()[:, None]
    many.check(positions)
    side[0] = 1.0
    many.check(positions)
    with pytest.raises(Untraceable, match="at draws of the chains"):
        many.check(positions * 3)


@pytest.mark.filterwarnings("ignore:.*cannot be mapped over draws")
def test_a_branch_on_a_value_that_python_reads_is_not_frozen() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(()).double(), 1.0))
        if x.tolist() > 1:
            pyro.factor("high", torch.tensor(-20.0).double())

    with pytest.warns(UserWarning, match="NUTS in place of ChEES, because it cannot be traced"):
        result = quiet(model, draws=20, warmup=20, compile=False)
    assert result.method == "NUTS"


def steep(values):
    return (values["x"] ** 2).sum()


def test_a_potential_that_differs_far_from_its_start_is_found_out() -> None:
    program = CompiledPotential(steep, {"x": torch.zeros(2)})
    # Stands for a compiler's mistake, which only shows beyond 5.
    program._potential = lambda values: steep(values) + 3 * (values["x"] > 5).sum()
    far, near = {"x": torch.full((2,), 6.0)}, {"x": torch.zeros(2)}
    assert program(near) == 0
    with pytest.warns(UserWarning, match=r"call 2: the traced potential gives 72.0, the model 78.0; it runs eagerly"):
        assert program(far) == 78
    assert program(far) == 78


@pytest.mark.parametrize("kind", [CompiledPotential, partial(BatchedPotential, chains=4)])
def test_a_potential_is_looked_at_where_chains_start(kind) -> None:
    traced_once = [False]

    def forked(values):
        """Gives the graph one branch and the eager model two, beyond 1."""
        x = values["x"]
        beyond = torch.relu(x - 1).sum() if traced_once[0] else 0.0 * x.sum()
        traced_once[0] = True
        return (x**2).sum() + beyond

    with pytest.raises(Untraceable, match="the traced potential gives"):
        kind(forked, {"x": torch.zeros(2)})


def test_tracing_leaves_the_random_state_and_torch_as_they_were() -> None:
    def noisy(values):
        return (values["x"] * torch.randn(2)).sum()

    item = Tensor.item
    torch.manual_seed(0)
    state = torch.get_rng_state()
    traced(lambda x: noisy({"x": x}), torch.ones(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert Tensor.item is item
    assert torch._C._get_tracing_state() is None
    graph = traced(lambda x: noisy({"x": x}), torch.ones(2))
    assert not torch.equal(graph(torch.ones(2)), graph(torch.ones(2)))


def test_without_a_compiler_the_graph_runs_unfused_and_one_line_says_so(monkeypatch) -> None:
    monkeypatch.setattr(fuse.shutil, "which", lambda _: None)
    fuse.has_compiler.cache_clear()
    graph = traced(lambda x: x.exp(), torch.ones(2))
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler was found"):
        assert fuse.fused(graph, [torch.ones(2)]) is graph
    fuse.has_compiler.cache_clear()


def test_bad_mode_gets_one_line() -> None:
    with pytest.raises(ValueError, match="compile: expected True, False or \"auto\", got 'fast'"):
        quiet(*PLAIN["mixture"], compile="fast")
