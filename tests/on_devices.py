"""Devices: a device that only pretends shows constants of the CPU, and random states of all devices are restored."""

import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import Case
from pretended import MixedDevices, Pretended, on_a_pretended_device
from pyro.infer import NUTS
from pyro.infer.autoguide import AutoNormal
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from inference import (
    Result,
    classify,
    compare,
    fit,
    isolated,
    log_evidence,
    pointwise_log_likelihood,
    posterior_predictive,
    prior_predictive,
    sample,
)
from inference.compiler.constants import pack_constants
from inference.core.bound import bind
from inference.core.handlers import preserved_rng, random_state, set_random_state
from inference.kernels import ChEES, Gibbs
from ppl_models import BayesianNetwork, LogisticRegression
from ppl_models.models.pair import Pair
from ppl_models.zoo.entries import ZOO
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.methods import settings

SHORT = {"steps": 1, "draws": 4, "progress": False}
quick_sample = partial(sample, draws=4, warmup=2, chains=2, compile=False, progress=False)


@pytest.fixture(params=ZOO.values(), ids=list(ZOO), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def trained(entry: Entry, pair: Pair, data: dict[str, Tensor], method: str) -> Result:
    """One step of a method, which goes without nothing."""
    run, rows = entry.fits[method], len(next(iter(data.values())))
    asked = {n: v for n, v in SHORT.items() if n in settings(run)}
    if "batch" in getattr(run, "keywords", {}):
        asked["batch"] = rows // 2
    result = run(pair, data, **asked)
    assert [said for said in result.diagnosis.unjudged if not said.startswith("Pareto k")] == []
    assert result.idata.children.keys() >= {"observed_data"} or not result.groups
    assert not [said for said in result.groups.left_out.said if not said.startswith("Pareto k")]
    return result


# A parameter may have other strides than its gradient.
@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_a_pair_runs_on_another_device(case: Case) -> None:
    """Model, guide, objectives, predictive groups, potential and pictures: no constant of the CPU takes part."""
    entry, pair, latent = case.entry, case.pair(), bool(case.latent)
    continuous = case.likelihood and latent and not case.finite
    heldout = dict(case.dataset.test)
    # MAP is SVI with another guide. TraceGraph_ELBO has a subclass of tensors of its own, which holds no other one.
    methods = [n for n in entry.fits if n != "MAP" and (entry.name, n) != ("sigmoid_belief_net", "mean field")]
    with on_a_pretended_device() as device:
        pair, data = pair.to(device), {n: v.to(device) for n, v in case.data.items()}
        result, *_ = (trained(entry, pair, data, method) for method in methods)
        drawn = {**prior_predictive(pair, data, draws=2), **result.params, **result.draws}
        if entry.name != "sigmoid_belief_net" and case.likelihood:
            # Its guide has a parameter per row. Rows on the CPU are moved to where the pair is.
            drawn |= posterior_predictive(result, heldout or None)
        assert all(type(v) is not Pretended for v in drawn.values())
        if continuous:
            potential(pair, data)
        if case.dataset.shape:
            with torch.no_grad():
                for images, _ in pair.pictures(**{n: v.to(device) for n, v in heldout.items()}).values():
                    assert images.device == device


def potential(pair: Pair, data: dict[str, Tensor]) -> None:
    bound = bind(pair, data)
    with isolated(0):
        start, energy, *_ = initialize_model(bound.model, (), bound.arguments())
        leaves = {n: v.detach().requires_grad_() for n, v in start.items()}
        energy(leaves).backward()
    assert all(type(v.grad) is Pretended for v in leaves.values())


class Planted(Pair):
    """A pair with a constant of the CPU in one place."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.loc = torch.nn.Parameter(torch.zeros(3))

    def constant(self, place: str, like: Tensor) -> Tensor:
        return torch.zeros(3) if self.place == place else like.new_zeros(3)

    def model(self, x: Tensor | None = None) -> None:
        z = pyro.sample("z", dist.Normal(self.loc.new_zeros(3), 1.0).to_event(1))
        with self.rows(x):
            pyro.sample("x", dist.Normal(z + self.constant("model", z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None) -> None:
        pyro.sample("z", dist.Normal(self.loc + self.constant("guide", self.loc), 1.0).to_event(1))


@pytest.mark.parametrize("place", ["model", "guide", "nowhere"])
def test_a_constant_of_the_cpu_is_found(place: str) -> None:
    with on_a_pretended_device() as device:
        data = torch.ones(4, 3, device=device)
        if place == "nowhere":
            fit(Planted(place).to(device), data, **SHORT)
            return
        with pytest.raises((MixedDevices, ValueError), match="a tensor of the CPU of shape"):
            fit(Planted(place).to(device), data, **SHORT)


def test_the_pretended_device_allows_what_cuda_allows() -> None:
    with on_a_pretended_device() as device:
        x = torch.arange(6.0).reshape(2, 3).to(device)
        assert (x + torch.tensor(1.0)).tolist() == (x + 1).tolist()
        assert x[torch.tensor([1])].device == device and x.cpu().device.type == "cpu"
        assert torch.zeros(3, device=x.device).device == torch.tensor(1.0, device=device).device == device
        y = x.clone()
        y[:, 0] = torch.tensor(7.0)
        assert y.tolist() == [[7.0, 1.0, 2.0], [7.0, 4.0, 5.0]]
        for mixed in (lambda: x + torch.zeros(3), lambda: x @ torch.zeros(3, 2), lambda: torch.zeros(9)[x.long()]):
            with pytest.raises(MixedDevices):
                mixed()
        with pytest.raises(MixedDevices):
            torch.stack([x[0, 0], torch.tensor(1.0)])
        with pytest.raises(MixedDevices, match="generator"):
            torch.randn(3, device=device, generator=torch.Generator())
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()


def regression() -> tuple[LogisticRegression, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    x = random.standard_normal((12, 2))
    with isolated(0):
        pair = LogisticRegression(2, 2, guide=AutoNormal)
    return pair, {"x": x, "y": (x[:, 0] > 0).astype(int)}


def test_fit_and_sample_move_pair_and_data_and_return_results_on_the_cpu() -> None:
    pair, data = regression()
    here = fit(*regression(), steps=20, draws=50, seed=1, progress=False)
    with on_a_pretended_device() as device:
        result = fit(pair, data, steps=20, draws=50, seed=1, device=device, progress=False)
        assert {p.device for p in pair.parameters()} == {result.bound.device} == {device}
        tensors = [*result.draws.values(), *result.params.values(), *result.draw(3).values()]
        assert all(type(v) is Tensor for v in tensors)
        assert type(classify(result, {"x": data["x"]})) is Tensor
        assert type(pointwise_log_likelihood(result, data)) is Tensor
        assert set(result.idata.children) == {"posterior", "posterior_predictive", "log_likelihood", "observed_data"}
        again = fit(pair, data, steps=1, draws=4, device="cpu", progress=False)
        assert {p.device.type for p in pair.parameters()} == {again.bound.device.type} == {"cpu"}
    np.testing.assert_allclose(result.losses, here.losses, rtol=1e-5)
    assert {n: v.shape for n, v in result.draws.items()} == {n: v.shape for n, v in here.draws.items()}


@pytest.mark.parametrize(
    "kernel", [partial(NUTS, max_tree_depth=2), partial(ChEES, max_steps=2)], ids=["NUTS", "ChEES"]
)
def test_chains_run_on_another_device_and_their_draws_are_on_the_cpu(kernel) -> None:
    pair, data = regression()
    with on_a_pretended_device() as device, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the chains run eagerly")
        result = quick_sample(pair, data, kernel, device=device)
        further = result.draw(5)
        assert set(result.idata.children) >= {"posterior", "posterior_predictive", "log_likelihood", "sample_stats"}
    assert all(type(v) is Tensor for v in (*result.draws.values(), *further.values()))


def test_gibbs_runs_on_another_device() -> None:
    case = Case(ZOO["sigmoid_belief_net"])
    pair = case.pair()
    with on_a_pretended_device() as device:
        result = quick_sample(pair, case.data, Gibbs, device=device)
        assert "posterior_predictive" in result.idata.children
    assert all(type(v) is Tensor for v in result.draws.values())


@pytest.mark.parametrize("estimator", ["importance", "annealed"])
def test_evidence_is_estimated_on_another_device(estimator: str) -> None:
    case = Case(ZOO["vae"])
    pair = case.pair()
    with on_a_pretended_device() as device:
        pair = pair.to(device)
        data = {n: v.to(device) for n, v in case.data.items()}
        evidence = log_evidence(pair, data, estimator, k=20, chains=2, temperatures=4, progress=False)
    assert type(evidence.values) is Tensor and evidence.values.isfinite().all()


def test_compare_moves_pairs_data_and_truth() -> None:
    entry = ZOO["naive_bayes"]
    case = Case(entry)
    methods = {n: partial(entry.methods[n], draws=30, progress=False) for n in ("exact", "MAP")}
    methods["MAP"] = partial(methods["MAP"], steps=1)
    here = case.entry.compare(case.dataset, methods)
    with on_a_pretended_device() as device:
        there = compare(case.pair, case.data, methods, truth=entry.truth, heldout=case.dataset.test, device=str(device))
        assert there.results["exact"].bound.device == device
    assert list(there.table.columns) == list(here.table.columns)
    assert there.table.loc["exact"].notna().equals(here.table.loc["exact"].notna())
    assert here.table.loc["exact", "lpd"] == pytest.approx(there.table.loc["exact", "lpd"], abs=1e-6)


def test_a_set_of_data_and_its_pair_are_loaded_on_a_device() -> None:
    entry = ZOO["bayesian_network"]
    with on_a_pretended_device() as device:
        dataset = entry.load(device=device)
        assert dataset.device == device and dataset.repeated >= 0
        assert isinstance(entry.pair(dataset), BayesianNetwork)
        assert entry.pair(dataset).concentration.device == device
        assert {v.device for v in dataset.to("cpu").test.values()} == {torch.device("cpu")}


@pytest.mark.parametrize(
    "verb", [fit, sample, lambda pair, data, **asked: compare(lambda: pair, data, {"fit": fit}, **asked)]
)
@pytest.mark.parametrize("device", ["cuda:99", "gpu", 3.5])
def test_a_device_that_is_not_there_is_one_clear_line(verb, device) -> None:
    with pytest.raises(ValueError, match="^device: expected a device that torch can use here .*, got '") as error:
        verb(*regression(), device=device)
    assert "\n" not in str(error.value)


def test_pair_and_data_apart_are_named() -> None:
    pair, data = regression()
    with on_a_pretended_device() as device, pytest.raises(ValueError, match="^device: expected pair and data on one"):
        fit(pair.to(device), {n: torch.as_tensor(v).float() for n, v in data.items()}, **SHORT)


def test_constants_are_packed_by_type_and_device() -> None:
    held = [torch.ones(2), torch.ones(3, device="meta"), torch.ones(3), torch.ones(1, dtype=torch.float64)]
    pack, call = pack_constants(lambda positions, *constants: constants, 0, held)
    packs = pack(held)
    assert sorted((str(p.device), p.dtype.itemsize, len(p)) for p in packs) == [
        ("cpu", 4, 5),
        ("cpu", 8, 1),
        ("meta", 4, 3),
    ]
    assert [c.shape for c in call(torch.zeros(1), *packs)] == [h.shape for h in held]


class Cuda:
    """Generators of two devices, in the place of torch's functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ready: bool = True) -> None:
        self.ready, self.states = ready, [torch.tensor([5]), torch.tensor([6])]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: self.ready)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for name in ("get_rng_state_all", "set_rng_state_all", "manual_seed_all", "get_rng_state", "set_rng_state"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        self.seeded: int | None = None

    def get_rng_state_all(self) -> list[Tensor]:
        assert self.ready, "asking would initialise the devices"
        return [s.clone() for s in self.states]

    def set_rng_state_all(self, states: list[Tensor]) -> None:
        self.states = [s.clone() for s in states]

    def get_rng_state(self, device: int) -> Tensor:
        return self.get_rng_state_all()[device]

    def set_rng_state(self, state: Tensor, device: int) -> None:
        self.states[device] = state.clone()

    def manual_seed_all(self, seed: int) -> None:
        self.seeded = seed
        self.states = [torch.tensor([seed + k]) for k in range(2)]

    def draw(self) -> None:
        """As much as torch would: the state moves."""
        self.states = [s + 1000 for s in self.states]


def drawing(cuda: Cuda):
    """A pair whose halves draw on the devices too."""

    def model(x: Tensor) -> None:
        cuda.draw()
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return model, AutoNormal(model)


@pytest.mark.parametrize(
    "verb",
    [
        lambda pair, x: fit(pair, x, steps=2, draws=4, progress=False),
        lambda pair, x: quick_sample(pair, x, partial(NUTS, max_tree_depth=2)),
        lambda pair, x: quick_sample(pair, x, partial(ChEES, max_steps=2)),
        lambda pair, x: prior_predictive(pair, x, draws=3),
        lambda pair, x: compare(lambda: pair, x, {"fit": partial(fit, steps=1, draws=4, progress=False)}),
    ],
    ids=["fit", "NUTS", "ChEES", "prior_predictive", "compare"],
)
def test_a_verb_leaves_the_generators_of_all_devices_as_they_were(verb, monkeypatch) -> None:
    cuda = Cuda(monkeypatch)
    pair, x = drawing(cuda), torch.ones(3, 2)
    before = [s.clone() for s in cuda.states]
    verb(pair, x)
    assert all(map(torch.equal, cuda.states, before))


def test_a_compiled_step_meets_the_noise_of_all_devices_again(monkeypatch) -> None:
    """The check of a program against the eager objective runs both from one state of all devices."""
    cuda = Cuda(monkeypatch)
    with isolated(0):
        state = random_state()
        with preserved_rng():
            cuda.draw()
            inside = cuda.get_rng_state_all()
        assert not torch.equal(cuda.states[0], inside[0])
        cuda.draw()
        set_random_state(state)
        assert all(map(torch.equal, cuda.states, state["cuda"]))


def test_devices_that_are_not_initialised_are_not_asked(monkeypatch) -> None:
    cuda = Cuda(monkeypatch, ready=False)
    torch.manual_seed(11)
    seed = torch.initial_seed()
    with isolated(3), preserved_rng():
        assert "cuda" not in random_state()
        cuda.ready = True  # as the first tensor on a device does
        cuda.draw()
    # They would have started from the seed of the CPU.
    assert cuda.states[0].tolist() == [seed]
    cuda.ready = False
    with isolated(3):
        pass
    assert cuda.seeded == seed
