"""Verbs that take turns between threads, and what an interrupt (Ctrl-C) leaves."""

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import NUTS
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from inference import Result, compare, exclusive, fit, prior_predictive, sample
from inference.compiler import policy
from inference.core import handlers
from inference.runners import processes, workers
from inference.runners.work import _Largest
from ppl_models import FVSBN, LogisticRegression, SigmoidBeliefNet

Y = torch.tensor([1.0, 2.0, 4.0, 1.5])
quiet = partial(fit, draws=30, progress=False)


def regression() -> Callable[..., None]:
    """A model with the same names as every other one of it."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    return model


def pair() -> tuple[Any, Any]:
    model = regression()
    return model, AutoNormal(model)


def fitted(seed: int) -> tuple[np.ndarray, Tensor]:
    result = quiet(pair(), Y + seed, steps=1005 if seed == 1 else 20, seed=seed)
    return result.losses, result.draws["mu"]


def drawn(seed: int) -> tuple[np.ndarray, Tensor]:
    values = prior_predictive(regression(), Y, draws=200, seed=seed)
    return values["mu"].numpy(), values["y"]


def moments(seed: int) -> tuple[np.ndarray, Tensor]:
    """Importance sampling by a method of a pair, or a fit beside it."""
    if seed % 2:
        return fitted(seed)
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(seed))
    found = LogisticRegression(2, 2).moments(x, torch.arange(60) % 2)
    return found["intercept"][0].numpy(), found["weights"][0]


NETS = SigmoidBeliefNet(40, layers=(3,)), FVSBN(40)


def pictured(seed: int) -> tuple[np.ndarray, Tensor]:
    """Pictures that a pair draws, or a fit beside it."""
    if seed % 2:
        return fitted(seed)
    shown = [net.pictures()[name][0] for net, name in zip(NETS, ("prior", "samples"), strict=True)]
    return shown[0].numpy(), shown[1]


@pytest.mark.parametrize("verb", [fitted, drawn, moments, pictured])
def test_verbs_in_two_threads_give_what_they_give_one_after_another(verb, alone) -> None:
    before = pyro.settings.get("validate_distributions_pyro")
    # A thread that begins beside a fit takes the fit's number of torch's threads, which rounding depends on.
    with handlers.threads_set(1):
        serial = [verb(seed) for seed in range(4)]
        with ThreadPoolExecutor(3) as pool:
            at_once = list(pool.map(verb, range(4)))
    for one, other in zip(serial, at_once, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert not dict(pyro.get_param_store())
    assert pyro.settings.get("validate_distributions_pyro") == before


def test_a_child_process_has_a_turn_of_its_own() -> None:
    held, done = threading.Event(), threading.Event()
    call = exclusive(lambda: held.set() or done.wait(60))
    thread = threading.Thread(target=call)
    thread.start()
    held.wait()
    child = mp.get_context("fork").Process(target=exclusive(lambda: None))
    child.start()
    child.join(30)
    done.set()
    thread.join()
    assert child.exitcode == 0, "it waits for a thread that it does not have"


def pressing(times: int = 1) -> tuple[Any, Any]:
    """A pair in whose twentieth run Ctrl-C is pressed."""
    model, guide = pair()
    runs = [0]

    def pressed(y: Tensor) -> None:
        runs[0] += 1
        for _ in range(times * (runs[0] == 20)):
            signal.raise_signal(signal.SIGINT)
        model(y)

    return pressed, guide


def interrupted(pair: Any, data: Any, **arguments: Any) -> Result:
    return quiet(pressing(), data, steps=100, compile=False, **arguments)


def test_a_fit_that_is_interrupted_says_so(ctrl_c, tmp_path) -> None:
    with pytest.warns(UserWarning, match="interrupted at step"):
        result = interrupted(None, Y)
    assert 0 < len(result.losses) < 20
    assert result.interrupted
    assert result.ended == f"interrupted at step {len(result.losses)} of 100"
    assert f"interrupted at step {len(result.losses)} of 100" in str(result.diagnosis)
    assert xr.open_datatree(result.save(tmp_path / "svi.nc")).attrs["ended"] == result.ended
    whole = quiet(pair(), Y, steps=3)
    assert not whole.interrupted and whole.ended == "" and "ended" not in whole.idata.attrs


def test_a_fit_that_stops_where_it_is_not_finite_says_so() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        runs[0] += 1
        pyro.factor("edge", torch.tensor(float("nan")) if runs[0] == 21 else mu)
        pyro.sample("y", dist.Normal(mu, 1.0).expand([4]).to_event(1), obs=y)

    runs = [0]
    with pytest.warns(UserWarning, match="not finite at step"):
        result = quiet((model, AutoNormal(model)), Y, steps=100, compile=False)
    assert result.ended == f"stopped at step {len(result.losses)} of 100, where loss or gradient is not finite"
    assert not result.interrupted
    assert "not finite" in str(result.diagnosis)


def test_a_second_ctrl_c_ends_a_fit_at_once(ctrl_c) -> None:
    with pytest.raises(KeyboardInterrupt):
        quiet(pressing(2), Y, steps=100, compile=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert pyro.settings.get("validate_distributions_pyro")
    assert handlers._turn.depth == 0


def test_compare_raises_an_interrupt(ctrl_c) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare(pair, Y, {"whole": partial(quiet, steps=5), "cut": interrupted})


@pytest.mark.parametrize("kernel", [None, NUTS], ids=["one process", "workers"])
def test_chains_that_are_interrupted_raise_and_leave_nothing(kernel, ctrl_c, monkeypatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 2)
    workers._end_pool()  # of other tests

    def press() -> None:
        # Ctrl-C in a terminal reaches every process.
        while kernel and not mp.active_children() and not over.wait(0.05):
            pass
        for worker in mp.active_children():
            os.kill(worker.pid, signal.SIGINT)
        if not over.wait(0.3):
            os.kill(os.getpid(), signal.SIGINT)

    # In the warmup: chains that have draws already end in those.
    endless = partial(sample, warmup=10**6, draws=10, progress=False, compile=False)
    over, threads, stored = threading.Event(), torch.get_num_threads(), set(pyro.get_param_store().keys())
    timer = threading.Timer(1.0, press)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            endless(regression(), Y, kernel, chains=2 if kernel else None)
    finally:
        over.set()
        timer.join()
    assert mp.active_children() == []
    assert torch.get_num_threads() == threads
    assert pyro.settings.get("validate_distributions_pyro")
    assert set(pyro.get_param_store().keys()) == stored


@pytest.mark.parametrize(("rows", "compile", "expected"), [(40, False, 1), (40, True, 1), (300_000, False, 2)])
def test_a_fit_takes_threads_by_the_size_of_its_work(rows: int, compile: bool, expected: int, monkeypatch) -> None:
    # Beside another worker a test has one core.
    monkeypatch.setattr("inference.runners.base.cores", lambda: 2)
    model, guide = pair()
    # Runs by number of threads, in an array: a list that grows is a change of which a recorded step would be told.
    seen = np.zeros(3, dtype=int)

    def watched(y: Tensor) -> None:
        seen[torch.get_num_threads()] += 1
        model(y)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quiet((watched, guide), torch.randn(rows), steps=4, draws=4, compile=compile)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen[1] >= 1
    # Steps after the first one; what is before and after them has the threads of the caller.
    assert expected == 1 or seen[2] >= 3 + seen[1]
    if expected == 1:
        assert seen[1] >= (2 if compile else 4)


def test_the_work_of_a_network_is_that_of_its_products() -> None:
    layer, x = torch.nn.Linear(784, 200), torch.randn(20, 784)
    with _Largest() as largest:
        layer(x).sum().backward()
    assert largest.numbers == 20 * 784 * 200 // policy.PRODUCTS_PER_NUMBER
    assert policy.threads_of_fit(largest.numbers, 2) == 2
    with _Largest() as largest:
        (torch.ones(3, 1).expand(3, 10**6)[:, 0] * 2).sum()
    assert largest.numbers == 3, "a view is no work"
