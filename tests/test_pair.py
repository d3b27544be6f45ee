"""The base class of all pairs: which rows a half sees, which arguments it takes, what is abstract."""

import inspect
from copy import deepcopy
from functools import partial, wraps
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from inference import fit, log_evidence, sample
from ppl_models.models.pair import HALVES, Pair, Visible, continuous

pytestmark = pytest.mark.usefixtures("alone")

X = torch.linspace(-2, 2, 6)
BATCH = torch.tensor([4, 1])


class RowMeans(Pair):
    """One latent mean per row, with a guide that has one parameter per row."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(len(X)))
        self.seen: list[Tensor] = []

    def model(self, x: Tensor | None = None) -> Tensor:
        with self.rows(x):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            return pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(self, x: Tensor, *, temperature: float = 1.0) -> None:
        with self.rows(x) as rows:
            self.seen.append(rows)
            pyro.sample("mean", dist.Normal(self.loc[rows], temperature))


class Nested(RowMeans):
    """The guide runs that of the base class, and the model once on the rows at hand and once on rows of its own."""

    def guide(self, x: Tensor, *, temperature: float = 1.0) -> None:
        super().guide(x, temperature=temperature)
        with poutine.block():
            self.here = self._plate(self.model, x)
            self.elsewhere = self._plate(self.model, size=3)
            self.after = self.minibatch

    def _plate(self, half: Any, *args: Any, **named: Any) -> Any:
        return poutine.trace(half).get_trace(*args, **named).nodes["mean"]["cond_indep_stack"][0].size


class Explicit(Pair):
    """A pair whose halves declare ``size`` and ``rows`` themselves."""

    def model(self, x: Tensor | None = None, *, size: int | None = None, rows: Tensor | None = None) -> Tensor:
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):  # type: ignore[arg-type]
            return pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(self, x: Tensor | None = None, **arguments: Any) -> None:
        self.arguments = arguments
        self.inner = poutine.trace(self.model).get_trace(x).nodes["x"]["scale"]


def test_a_minibatch_is_scaled_and_reaches_the_entries_of_its_rows() -> None:
    pair = RowMeans()
    Trace_ELBO().loss_and_grads(pair.model, pair.guide, X[BATCH], size=len(X), rows=BATCH)
    assert pair.seen[0].tolist() == BATCH.tolist()
    assert pair.loc.grad.nonzero().flatten().tolist() == sorted(BATCH.tolist())
    site = poutine.trace(pair.model).get_trace(X[BATCH], size=len(X), rows=BATCH).nodes["x"]
    assert site["scale"] == len(X) / len(BATCH)
    pair.guide(X)
    assert pair.seen[1].tolist() == list(range(len(X)))


def test_plain_svi_fits_one_latent_per_row_by_minibatches() -> None:
    pair = RowMeans()
    svi = SVI(pair.model, pair.guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.995}), Trace_ELBO())
    for step in range(900):
        rows = torch.arange(3) + 3 * (step % 2)
        # The posterior is N(x / 2, 1/2).
        svi.step(X[rows], size=len(X), rows=rows, temperature=0.5**0.5)
    torch.testing.assert_close(pair.loc.detach(), X / 2, atol=0.15, rtol=0)


def test_minibatches_reach_an_autoguide() -> None:
    class Mean(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.guide = AutoNormal(continuous(self.model))

        def model(self, x: Tensor | None = None) -> None:
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            with self.rows(x):
                pyro.sample("group", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    pair = Mean()
    trace = poutine.trace(pair.guide).get_trace(X[BATCH], size=len(X), rows=BATCH)
    assert "mean" in trace.nodes and "group" not in trace.nodes


def test_a_nested_call_takes_over_the_rows_of_the_outer_one() -> None:
    pair = Nested()
    pair.guide(X[BATCH], size=len(X), rows=BATCH)
    assert pair.seen[0].tolist() == BATCH.tolist()
    assert pair.here == len(BATCH)
    assert pair.elsewhere == 3
    assert pair.after.size == len(X) and pair.after.rows is BATCH
    assert pair.minibatch == (None, None)


def test_a_half_that_fails_leaves_no_rows_behind() -> None:
    pair = RowMeans()
    with pytest.raises(IndexError):
        pair.guide(torch.zeros(2), size=len(X), rows=torch.tensor([0, len(X)]))
    assert pair.minibatch == (None, None)


def test_halves_that_declare_size_and_rows_get_them() -> None:
    pair = Explicit()
    assert pair.model(size=4).shape == (4,)
    pair.guide(X[BATCH], size=len(X), rows=BATCH)
    assert pair.inner == len(X) / len(BATCH)
    assert pair.arguments == {}
    assert pair.minibatch == (None, None)


def test_without_size_or_data_there_are_no_rows() -> None:
    with pytest.raises(ValueError, match="size: expected the number of rows to draw when x is not given, got None"):
        RowMeans().model()


def test_an_argument_of_the_other_half_is_dropped_and_an_unknown_one_refused() -> None:
    pair = RowMeans()
    assert pair.model(X, temperature=2.0).shape == X.shape
    with pytest.raises(TypeError, match=r"RowMeans\.model\(\) got an unexpected keyword argument 'temprature'"):
        pair.model(X, temprature=2.0)
    with pytest.raises(TypeError, match=r"RowMeans\.guide\(\) got an unexpected keyword argument 'y'"):
        pair.guide(X, y=X)

    def own_guide(x: Tensor, width: float) -> None: ...

    pair.guide = own_guide  # type: ignore[method-assign]
    assert pair.model(X, width=2.0).shape == X.shape


def test_signatures_show_size_and_rows() -> None:
    pair = RowMeans()
    shown = inspect.signature(pair.model).replace(return_annotation=inspect.Signature.empty)
    assert str(shown).replace("torch.", "") == "(x: Tensor | None = None, *, size=None, rows=None)"
    assert list(inspect.signature(RowMeans.guide).parameters) == ["self", "x", "temperature", "size", "rows"]
    assert list(inspect.signature(poutine.block(pair.model)).parameters) == ["x", "size", "rows"]
    assert list(inspect.signature(wraps(pair.model)(lambda: None)).parameters) == ["x", "size", "rows"]
    assert list(inspect.signature(Explicit().guide).parameters) == ["x", "size", "rows", "arguments"]


def test_copies_and_state_do_not_know_of_minibatches() -> None:
    pair = RowMeans()
    pair.guide(X[BATCH], size=len(X), rows=BATCH)
    assert list(pair.state_dict()) == ["loc"]
    twin = deepcopy(pair)
    twin.load_state_dict({"loc": torch.ones(len(X))})
    twin.guide(X)
    assert len(twin.seen) == 2 and len(pair.seen) == 1
    assert pair.loc.sum() == 0 and twin.minibatch == (None, None)


def test_what_a_subclass_owes_is_abstract() -> None:
    class NoModel(Pair): ...

    class NoDistribution(Visible): ...

    for cls, name in ((NoModel, "model"), (NoDistribution, "distribution")):
        with pytest.raises(TypeError, match=f"Can't instantiate abstract class {cls.__name__} .*{name}"):
            cls()
    assert HALVES == ("model", "guide", "exact")


def test_names_of_a_dimension_are_its_coordinates() -> None:
    pair = RowMeans()
    assert pair.name_dimension("units", 3) == 3 and pair.coords == {}
    assert pair.name_dimension("units", ["a", "b"]) == 2 and pair.coords == {"units": ["a", "b"]}
    assert pair.name_dimension("units", np.int64(4)) == 4
    with pytest.raises(ValueError, match="units: expected at least one, got 0"):
        pair.name_dimension("units", 0)
    for wrong, line in (
        ("abc", "a number or a sequence of names, got 'abc'"),
        (2.5, "a number or a sequence of names, got 2.5"),
        (True, "a number or a sequence of names, got True"),
        (-3, "at least one, got -3"),
        (("a", "b", "a"), "different names, got 'a' twice"),
        ((), r"at least one, got \(\)"),
    ):
        with pytest.raises(ValueError, match=f"^units: expected {line}$"):
            pair.name_dimension("units", wrong)


@pytest.mark.parametrize(
    "verb",
    [
        partial(fit, steps=2, progress=False),
        partial(sample, draws=4, warmup=2, chains=2, progress=False, compile=False),
        partial(log_evidence, k=2),
    ],
    ids=["fit", "sample", "log_evidence"],
)
def test_a_seed_is_an_integer_from_zero_also_one_of_numpy(verb: Any) -> None:
    for seed in (-1, 2.5, "a"):
        with pytest.raises(ValueError, match=f"^seed: expected an integer of at least 0, got {seed!r}$"):
            verb(RowMeans(), X, seed=seed)
    one, two = (verb(RowMeans(), X, seed=seed) for seed in (3, np.int64(3)))
    assert one.mean == two.mean if hasattr(one, "mean") else torch.equal(one.draws["mean"], two.draws["mean"])
