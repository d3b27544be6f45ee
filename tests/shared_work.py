"""What each process does in ``test_shared.py``: ``python shared_work.py CASE RANK COUNT FOLDER`` in a group of gloo.

The process of a rank writes what it has at its end to ``FOLDER``; an error is one line on standard error.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pyro
import pyro.distributions as dist
import seeds
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, distributed

from inference import Checkpoint, checkpoint, fit, isolated, sample
from inference.compiler import policy
from inference.core import group
from inference.kernels import HMC, NUTS, ChEES
from inference.objectives import EM, Adversarial, Compiled, Shared

if __name__ == "__main__" and seeds.SHIFT:
    # As in the process of the tests.
    seeds.install()
random = torch.Generator().manual_seed(0)
Y = torch.randn(61, 3, generator=random) + torch.tensor([0.0, 1.0, 4.0])
QUIET: dict[str, Any] = {"progress": False, "draws": 4}


def normal(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    """A mixture of two, whose label is summed out; nothing of it is noise with a point as guide."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2, 3), 3.0).to_event(2))
    sd = pyro.sample("sd", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", size or len(y), subsample=rows):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[z.long()], sd).to_event(1), obs=y)


def points() -> Any:
    start = {"mu": torch.tensor([[0.0, 0.5, 3.0], [0.5, 1.0, 4.0]]), "sd": torch.ones(3)}
    return normal, AutoDelta(pyro.poutine.block(normal, hide=["z"]), init_loc_fn=lambda site: start[site["name"]])


def of_result(result: Any) -> dict[str, Any]:
    return {
        "losses": result.losses.tolist(),
        "params": {n: v.tolist() for n, v in result.params.items()},
        "draws": {n: v.tolist() for n, v in result.draws.items()},
        "execution": result.idata.attrs["execution"],
    }


def mixture(**more: Any) -> dict[str, Any]:
    return of_result(fit(points(), Y, **{"steps": 60, **QUIET, **more}))


def game_model(x: Tensor, z: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    """A generator without noise: its rows are a line in what is given."""
    loc, slope = pyro.param("loc", torch.tensor(0.0)), pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("rows", size or len(x), subsample=rows):
        real = pyro.sample("real", dist.Bernoulli(0.5))
        pyro.deterministic("x", torch.where(real[:, None] == 1, x, loc + slope * z), event_dim=1)


def game_guide(x: Tensor, z: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    a, b, c = (pyro.param(n, torch.tensor(0.0)) for n in "abc")
    with pyro.plate("rows", size or len(x), subsample=rows):
        pyro.sample("real", dist.Bernoulli(logits=(a + b * x + c * x.square()).squeeze(-1)))


def game(**more: Any) -> dict[str, Any]:
    """Two players, the first of which takes two steps to the other's one."""
    data = {"x": Y[:, 2:], "z": Y[:, :1]}
    objective = Adversarial(r1=0.1, turns=(2, 1))
    return of_result(fit((game_model, game_guide), data, objective, **{"steps": 45, "batch": 20, **QUIET, **more}))


def program(share: tuple[int, int] = (0, 1), seed: int = 0) -> dict[str, Any]:
    """A plain program of Pyro, whose parameters start elsewhere in each process."""

    def model(y: Tensor, size: int, rows: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        with pyro.plate("rows", size, subsample=rows):
            pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)

    def guide(y: Tensor, size: int, rows: Tensor) -> None:
        pyro.sample("mu", dist.Delta(pyro.param("at", lambda: torch.randn(3)), event_dim=1))

    rank, count = share
    with isolated(seed):
        objective = Shared(Compiled(Trace_ELBO(), fuse=False))
        svi, losses = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), objective), []
        for _ in range(30):
            rows = torch.arange(len(Y)).tensor_split(count)[rank]
            losses.append(svi.step(Y[rows], size=len(Y), rows=rows))
        rows = torch.arange(len(Y)).tensor_split(count)[rank]
        whole = svi.evaluate_loss(Y[rows], size=len(Y), rows=rows)
        return {"losses": losses, "params": {"at": pyro.param("at").tolist()}, "whole": whole}


SEEN: list[float] = []


FAILS, HANGS = threading.Event(), threading.Event()


def noisy(fails: bool = False, **more: Any) -> dict[str, Any]:
    """A guide that draws: each process has noise of its own, and all end with the same Result."""
    FAILS.set() if fails else FAILS.clear()

    def model(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        if size:
            SEEN.append(mu.item())
            if FAILS.is_set() and len(SEEN) == 12:
                raise ArithmeticError("the model of one process has failed")
            if HANGS.is_set() and len(SEEN) == 12:
                signal.raise_signal(signal.SIGSTOP)
        with pyro.plate("rows", size or len(y), subsample=rows):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(mu + z, 1.0), obs=y)

    def guide(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.3))
        with pyro.plate("rows", size or len(y), subsample=rows):
            pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    SEEN.clear()
    objective = TraceGraph_ELBO()
    found = of_result(fit((model, guide), Y[:, 0], objective, **{"steps": 20, "batch": 10, **QUIET, **more}))
    return {**found, "seen": list(SEEN)}


def refusals() -> dict[str, Any]:
    """What fit says in a group of pairs, objectives and data whose rows cannot be shared."""

    def whole(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0).expand([len(y)]).to_event(1), obs=y)

    def said(*args: Any, **named: Any) -> str:
        try:
            fit(*args, **{"steps": 5, **QUIET, **named})
        except ValueError as error:
            return str(error)
        return ""

    rank = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    return {
        "pair": said((whole, lambda y: None), Y[:, 0]),
        "objective": said(points(), Y, EM(lambda r, y, **_: {})),
        "batch": said(points(), Y, batch=1),
        "data": said(points(), Y + rank),
    }


def alike() -> dict[str, Any]:
    """All that two processes and one have to agree on."""
    with patch.object(policy, "TRACE_FIT_STEPS", 1):
        compiled = {"traced": mixture(batch=20), "traced game": game()}
    eager = {
        "eager": mixture(compile=False),
        "minibatched": mixture(compile=False, batch=20),
        "game": game(compile=False),
    }
    return {**eager, **compiled}


def fused() -> dict[str, Any]:
    """The same of programs that are compiled, which takes longer."""
    return {"fused": mixture(compile=True), "fused game": game(compile=True)}


def resumed(folder: Path, rank: int) -> dict[str, Any]:
    """A fit that goes on after one process has failed: what each process has heard, and the end."""
    kept = Checkpoint(folder / "kept", every=1e-6)
    try:
        with patch.object(checkpoint, "SHARE", 0), patch.object(group, "AGREE_STEPS", 1):
            noisy(checkpoint=kept, fails=rank == 1)
        failed = ""
    except (ArithmeticError, RuntimeError) as error:
        failed = f"{type(error).__name__}: {error}"
    assert (folder / "kept" / "checkpoint.safetensors").exists()
    found = noisy(checkpoint=kept)
    assert len(found.pop("seen")) < len(noisy()["seen"]), "the fit began again"
    return {**found, "failed": failed}


def dying(folder: Path, rank: int) -> dict[str, Any]:
    """One process ends without a word."""
    if rank == 1:
        os._exit(3)
    return mixture(compile=False)


def hanging(folder: Path, rank: int) -> dict[str, Any]:
    """One process stands still in the middle of a fit; without that it would go on from the checkpoint."""
    if rank == 1 and not (folder / "kept").exists():
        HANGS.set()
    with patch.object(checkpoint, "SHARE", 0), patch.object(group, "AGREE_STEPS", 1):
        found = noisy(checkpoint=Checkpoint(folder / "kept", every=1e-6))
    return {**found, "whole": len(noisy()["seen"])}


SECONDS = {"hanging": 8}
"""After which the processes of a case no longer wait for each other; those of others wait for a minute."""


def chains(folder: Path, rank: int, kernel: Any = ChEES) -> dict[str, Any]:
    """Chains of each process, joined; further ones; and a run that goes on."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 10.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 4.0, 1.5], dtype=torch.float64)
    run = partial(sample, model, kernel=kernel, draws=50, warmup=50, chains=4, progress=False, compile=False)
    result, alone = run(y), {}
    kept = run(y, checkpoint=folder / f"kept-{kernel.__name__}")
    again = run(y, checkpoint=folder / f"kept-{kernel.__name__}")
    if distributed.is_initialized():
        alone = {"extended": result.extend(10).draws["mu"].tolist(), "further": result.draw(6, seed=1)["mu"].tolist()}
    return {
        "draws": result.draws["mu"].tolist(),
        "chains": result.idata.posterior.sizes["chain"],
        "predicted": result.idata.posterior_predictive["y"].values.sum(),
        "columns": list(result.diagnosis.table.columns),
        "nested": float(result.diagnosis.table.get("r_hat_nested", pd.Series([float("nan")])).iloc[0]),
        "others": run(y, kernel=HMC, draws=10, warmup=5, chains=2).draws["mu"].tolist(),
        "kept": torch.equal(kept.draws["mu"], again.draws["mu"]) and torch.equal(kept.draws["mu"], result.draws["mu"]),
        **alone,
    }


CASES: dict[str, Callable[[Path, int, int], Any]] = {
    "alike": lambda folder, rank, count: {
        **alike(),
        "program": program((rank, count), seed=rank),
        "noisy": noisy(),
        "resumed": resumed(folder, rank),
        "refusals": refusals(),
    },
    "fused": lambda folder, rank, count: fused(),
    "chains": lambda folder, rank, count: {k.__name__: chains(folder, rank, k) for k in (ChEES, NUTS)},
    "hanging": lambda folder, rank, count: hanging(folder, rank),
    "dying": lambda folder, rank, count: dying(folder, rank),
}


if __name__ == "__main__":
    case, rank, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    store = f"file://{folder / case}.store"
    further = {"rank": rank, "world_size": count, "timeout": timedelta(seconds=SECONDS.get(case, 60))}
    distributed.init_process_group("gloo", init_method=store, **further)
    try:
        made = CASES[case](folder, rank, count)
        (folder / f"{case}-{rank}.json").write_text(json.dumps(made))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        distributed.destroy_process_group()
