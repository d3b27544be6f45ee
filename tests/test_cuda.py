"""What runs on a GPU: ``pytest -n0 -m cuda``. Without one all of it is skipped."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from laws import Case
from pyro.infer import NUTS
from torch import Tensor

from inference import Joint, Result, fit, log_evidence, posterior_predictive, sample
from inference.kernels import ChEES, Gibbs
from ppl_models.models.pair import Pair
from ppl_models.zoo.entries import ZOO
from ppl_models.zoo.methods import settings

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    # A parameter may have other strides than its gradient.
    pytest.mark.filterwarnings("ignore:grad and param do not obey"),
]
BOTH = [(name, compiled) for name in ZOO for compiled in (False, True)]


@pytest.fixture(autouse=True)
def generator_as_it_was() -> Iterator[None]:
    """No verb moves the generator of the GPU."""
    before = torch.cuda.get_rng_state()
    yield
    assert torch.equal(torch.cuda.get_rng_state(), before)


def on_gpu(case: Case) -> tuple[Pair, dict[str, Tensor]]:
    return case.pair().to("cuda"), {n: v.to("cuda") for n, v in case.data.items()}


def trained(case: Case, compiled: bool) -> Result:
    """A few steps of the first method that trains the pair's own guide."""
    method, (pair, data) = case.training, on_gpu(case)
    asked = {"steps": 4, "batch": 20, "draws": 4, "compile": compiled, "progress": False}
    if "batch" not in getattr(method, "keywords", {}) and case.entry.name != "diffusion":
        asked.pop("batch")
    return method(pair, data, **{n: v for n, v in asked.items() if n in settings(method)})


@pytest.mark.parametrize(("name", "compiled"), BOTH, ids=[f"{n}-{'compiled' if c else 'eager'}" for n, c in BOTH])
def test_an_entry_is_fitted(name: str, compiled: bool) -> None:
    case = Case(ZOO[name])
    result = trained(case, compiled)
    assert result.bound.device.type == "cuda"
    assert len(result.losses) == 4
    assert all(v.device.type == "cpu" for v in (*result.draws.values(), *result.params.values()))
    assert (result.idata.attrs["execution"] != "eager") == compiled
    if case.likelihood:
        assert "posterior_predictive" in result.idata.children


def test_a_compiled_fit_takes_the_steps_of_an_eager_one() -> None:
    """The program meets the noise of the eager objective: its check passes, and the losses are equal."""
    case = Case(ZOO["vae"])
    adam = partial(Joint, torch.optim.Adam, {"lr": 0.002})
    results = [
        fit(*on_gpu(case), steps=20, batch=20, optimizer=adam(), draws=4, compile=compiled, progress=False)
        for compiled in (False, True)
    ]
    assert results[1].losses.tolist() == pytest.approx(results[0].losses.tolist(), rel=1e-3)


CHAINED = [n for n in ("naive_bayes", "logistic_regression", "gaussian_mixture", "ppca", "vae")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CHAINED)
def test_chees_runs(name: str, compiled: bool) -> None:
    case = Case(ZOO[name])
    kernel = partial(ChEES, max_steps=8)
    result = sample(*on_gpu(case), kernel, draws=20, warmup=20, chains=16, compile=compiled, progress=False)
    assert result.idata.attrs["execution"] == ("fused" if compiled else "traced")
    check_chains(result, 16 * 20)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CHAINED[:3])
def test_nuts_runs(name: str, compiled: bool) -> None:
    case = Case(ZOO[name])
    kernel = partial(NUTS, max_tree_depth=3)
    result = sample(*on_gpu(case), kernel, draws=6, warmup=6, chains=2, compile=compiled, progress=False)
    check_chains(result, 12)


def test_gibbs_runs() -> None:
    case = Case(ZOO["sigmoid_belief_net"])
    check_chains(sample(*on_gpu(case), Gibbs, draws=6, warmup=6, chains=4, progress=False), 24)


def check_chains(result: Result, size: int) -> None:
    """Draws on the CPU, predictions made from them on the GPU, and chains that go on."""
    assert {len(v) for v in result.draws.values()} == {size}
    assert "posterior_predictive" in result.idata.children
    assert all(v.device.type == "cpu" and v.isfinite().all() for v in result.draw(7).values())


@pytest.mark.parametrize("estimator", ["importance", "annealed"])
def test_evidence_is_estimated(estimator: str) -> None:
    case = Case(ZOO["vae"])
    found = log_evidence(*on_gpu(case), estimator, k=200, chains=4, temperatures=20, progress=False)
    assert found.values.device.type == "cpu" and found.values.isfinite().all()


@pytest.mark.parametrize("name", [n for n in ZOO])
def test_pictures_are_made(name: str) -> None:
    case = Case(ZOO[name])
    if not case.dataset.shape:
        pytest.skip("no images")
    pair, _ = on_gpu(case)
    with torch.no_grad():
        grids = pair.pictures(**{n: v.to("cuda") for n, v in case.dataset.test.items()})
    assert all(images.device.type == "cuda" for images, _ in grids.values())


def test_verbs_move_pair_and_data() -> None:
    case = Case(ZOO["vae"])
    pair = case.pair()
    result = fit(pair, {n: v.numpy() for n, v in case.data.items()}, steps=2, draws=4, device="cuda", progress=False)
    assert {p.device.type for p in pair.parameters()} == {"cuda"}
    assert posterior_predictive(result, case.dataset.test)["x"].device.type == "cpu"
