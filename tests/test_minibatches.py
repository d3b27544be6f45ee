"""Minibatches: the mean loss over them is the loss of all rows, for every objective that takes them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.messenger import Messenger
from torch import Tensor

from inference import fit
from inference.core.bound import bind
from inference.core.contracts import Objective
from inference.core.handlers import isolated
from inference.objectives import EM, IWAE, RWS, VIMCO, BetaELBO, WakeSleep

N, BATCH, PARTICLES = 12, 4, 3
X = torch.linspace(-1, 2, N).double()
NOISE = torch.randn(PARTICLES, N, generator=torch.Generator().manual_seed(0)).double()


class FixedNoise(Messenger):
    """Gives each row of a guide's normal sites the same noise, whichever minibatch it is in."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], dist.Normal) and not msg["is_observed"]:
            noise = (
                self.noise
                if msg["cond_indep_stack"]
                else self.noise[..., :1]
                if self.noise.dim() > 1
                else self.noise[0]
            )
            msg["value"] = msg["fn"].loc + msg["fn"].scale * noise


def local(x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    w = pyro.param("w", torch.tensor(0.7).double())
    pyro.deterministic("twice", 2 * w)
    pyro.factor("penalty", -3 * w.square())
    with pyro.plate("rows", size or len(x), subsample=rows):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(w + z, 1.0), obs=x)


def of_rows(x: Tensor, size: int | None = None, rows: Tensor | None = None, observations: Any = None) -> None:
    with pyro.plate("rows", size or len(x), subsample=rows):
        pyro.sample("z", dist.Normal(0.4 * x, 0.8))


def shared(x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("rows", size or len(x), subsample=rows):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_all(x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    pyro.sample("z", dist.Normal(torch.tensor(0.4).double(), 0.8))


SUMS = {
    "Trace_ELBO": (Trace_ELBO, 1),
    "TraceMeanField_ELBO": (TraceMeanField_ELBO, 1),
    "TraceGraph_ELBO": (TraceGraph_ELBO, 1),
    "TraceEnum_ELBO": (partial(TraceEnum_ELBO, max_plate_nesting=1), 1),
    "BetaELBO": (partial(BetaELBO, beta=2.0), 1),
    "IWAE": (partial(IWAE, PARTICLES), PARTICLES),
    "DReG": (partial(IWAE, PARTICLES, doubly=True), PARTICLES),
    "VIMCO": (partial(VIMCO, PARTICLES), PARTICLES),
    "RWS": (partial(RWS, PARTICLES), PARTICLES),
    "WakeSleep": (WakeSleep, 1),
}
ROWWISE = {"IWAE", "DReG", "VIMCO", "RWS", "WakeSleep"}


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize(
    ("name", "pair"),
    [
        *((name, (local, of_rows)) for name in SUMS),
        *((name, (shared, of_all)) for name in sorted(SUMS.keys() - ROWWISE)),
    ],
)
def test_the_mean_loss_of_minibatches_is_that_of_all_rows(name: str, pair: Any) -> None:
    make, particles = SUMS[name]

    def loss(rows: Tensor | None) -> float:
        named = {"x": X} if rows is None else {"x": X[rows], "size": N, "rows": rows}
        noise = NOISE if rows is None else NOISE[:, rows]
        if particles == 1:
            noise = noise[0] if name != "WakeSleep" else noise[:1]
        if pair[0] is shared:
            noise = NOISE[0, :1]
        with isolated(0):
            return float(make().loss(pair[0], FixedNoise(noise)(pair[1]), **named))

    assert Objective.of(make()).all_rows == ""
    parts = [loss(rows) for rows in torch.randperm(N).split(BATCH)]
    assert sum(parts) / len(parts) == pytest.approx(loss(None))


def test_the_mean_loss_of_minibatches_is_that_of_all_rows_where_states_are_summed_out() -> None:
    def mixture(x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        with pyro.plate("rows", size or len(x), subsample=rows):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3).double()), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2 * k, 1.0), obs=x)

    def loss(**named: Any) -> float:
        with isolated(0):
            return float(TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, lambda **_: None, **named))

    parts = [loss(x=X[rows], size=N, rows=rows) for rows in torch.randperm(N).split(BATCH)]
    assert sum(parts) / len(parts) == pytest.approx(loss(x=X))


ALL_ROWS = {
    "RenyiELBO": partial(RenyiELBO, 0.5),
    "ReweightedWakeSleep": ReweightedWakeSleep,
    "TraceTailAdaptive_ELBO": partial(TraceTailAdaptive_ELBO, num_particles=2),
    "TraceTMC_ELBO": TraceTMC_ELBO,
    "Trace_MMD": lambda: Trace_MMD(gp.kernels.RBF(1)),
    "EM": partial(EM, lambda *_: {}),
}


@pytest.mark.parametrize("make", ALL_ROWS.values(), ids=list(ALL_ROWS))
def test_an_objective_that_is_no_sum_over_rows_refuses_minibatches(make: Callable[[], Any]) -> None:
    kind = type(make()).__name__
    with pytest.raises(ValueError, match=f"batch: {kind} expected all rows at every step: .*; use "):
        fit((shared, AutoNormal(shared)), X, make, batch=BATCH, steps=3, progress=False)


def grouped(prior: Tensor, group: Tensor, y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    """Groups with a known prior mean each, and rows that belong to them."""
    with pyro.plate("groups", len(prior)):
        u = pyro.sample("u", dist.Normal(prior, 1.0))
    with pyro.plate("rows", size or len(y), subsample=rows):
        pyro.sample("y", dist.Normal(u[group], 1.0), obs=y)


@pytest.mark.parametrize("groups", [3, N])
def test_a_minibatch_cuts_what_the_plate_of_rows_holds(groups: int) -> None:
    """Data of groups stay whole, also where there are as many groups as rows."""
    group = torch.arange(N) % groups
    group = group.flip(0)
    data = {"prior": torch.linspace(-2, 2, groups), "group": group, "y": X.float()}
    bound = bind(grouped, data)
    assert bound.rows == N
    assert bound.cut == {"group", "y"}
    batch = bound.arguments(torch.tensor([1, 5]))
    assert {k: len(v) for k, v in batch.items() if isinstance(v, Tensor)} == {
        "prior": groups,
        "group": 2,
        "y": 2,
        "rows": 2,
    }
    result = fit((grouped, AutoNormal(grouped)), data, batch=BATCH, steps=1500, learning_rate=0.05, progress=False)
    count = torch.bincount(group, minlength=groups)
    exact = (data["prior"] + torch.zeros(groups).index_add(0, group, data["y"])) / (1 + count)
    assert (result.draws["u"].mean(0) - exact).abs().max() < 0.35


def test_rows_that_are_all_cut_need_no_run() -> None:
    def two(x: Tensor, y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", size or len(x), subsample=rows):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    bound = bind(two, {"x": X.float(), "y": X.float()})
    assert bound.cut == {"x", "y"}
