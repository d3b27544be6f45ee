"""A pytest plugin that runs tests written for Pyro with compiled objectives and with ChEES in place of Pyro's kernels.

``pyro_suite.py`` starts pytest with it; the environment says what to replace (``PEERS_MODE``: ``plain`` or ``ours``),
the longest time of a test (``PEERS_SECONDS``), which tests to run (``PEERS_EVERY``: every so many-th), and the file to
which one line per test is appended (``PEERS_OUT``).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pyro.infer.mcmc
import pytest
from pyro import poutine

from inference.compiler.objective import Compiled
from inference.core.handlers import preserved_rng
from inference.kernels import ChEES

OBJECTIVES = (
    "Trace_ELBO",
    "TraceEnum_ELBO",
    "TraceGraph_ELBO",
    "TraceMeanField_ELBO",
    "TraceTailAdaptive_ELBO",
    "TraceTMC_ELBO",
    "Trace_MMD",
    "RenyiELBO",
    "ReweightedWakeSleep",
)
CHAINS, WARMUP = 16, 300
"""Chains of ChEES, and its least warmup: it adapts across chains, with fewer transitions than a single chain takes."""


class _Runs:
    """How the calls of the objectives in the present test ran: ``traced``, or why not, with counts.

    A model may reach this plugin through the object of its test; without a ``__dict__`` the counts are not taken for
    something that the model reads.
    """

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def count(self, how: str) -> None:
        self.counts[how] = self.counts.get(how, 0) + 1


_runs = _Runs()


class TimedOut(BaseException):
    """A test took too long."""


def compiled(elbo: type) -> type:
    """A class of objectives as Pyro's, whose every call of loss and gradients is that of a program."""

    class Instead(Compiled):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(elbo(*args, **kwargs), fuse=False)

        def prepare(self, model: Any, guide: Any, args: Any, kwargs: Any, update: Any = None) -> Any:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                program, inputs = super().prepare(model, guide, args, kwargs, update)
                for _ in range(2):
                    # The first call of each kind runs eagerly, and may change an attribute of the objective, which
                    # makes the next a first one too; here it is made again, to be that of a program.
                    if program is None and not self.reason:
                        self._first(model, guide, args, kwargs)
                        program, inputs = super().prepare(model, guide, args, kwargs, update)
            how = "traced" if program is not None else self.reason or "a first call"
            _runs.count(how)
            for w in told:
                if "runs eagerly" not in str(w.message):
                    warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
            return program, inputs

        def _first(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
            store = pyro.get_param_store()._params
            with preserved_rng(), poutine.block():
                before = {n: (p.detach().clone(), p.grad) for n, p in store.items()}
                self.objective.loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[attr-defined]
                for name, p in store.items():
                    value, p.grad = before.get(name, (p.detach(), None))
                    p.data.copy_(value)

    Instead.__name__ = Instead.__qualname__ = elbo.__name__
    return Instead


class Chains(ChEES):
    """ChEES as a kernel of a single chain: each draw is that of the next chain."""

    def __init__(self, model: Any = None, potential_fn: Any = None, *args: Any, **theirs: Any) -> None:
        kept = {k: theirs[k] for k in ("transforms", "max_plate_nesting", "target_accept_prob") if k in theirs}
        if isinstance(theirs.get("full_mass"), bool):
            kept["full_mass"] = theirs["full_mass"]
        super().__init__(model, potential_fn, num_chains=CHAINS, jit_compile=False, block=5, **kept)

    @property
    def initial_params(self) -> dict[str, Any]:
        return {n: v[0] for n, v in super().initial_params.items()}

    @initial_params.setter
    def initial_params(self, params: dict[str, Any]) -> None:
        self._initial = {n: v.expand(CHAINS, *v.shape).clone() for n, v in params.items()}

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            super().setup(max(warmup_steps, WARMUP), *args, **kwargs)
        why = [str(w.message).partition("traced: ")[2] for w in told if "eagerly" in str(w.message)]
        how = why[0] if why else "traced"
        _runs.count(how)
        self._asked, self._out = warmup_steps, list[dict[str, Any]]()

    def sample(self, params: dict[str, Any]) -> dict[str, Any]:
        while self._handed < self._warmup:
            super().sample(self._last)
        if self._asked:
            self._asked -= 1
            return {n: v[0] for n, v in self._last.items()}
        if not self._out:
            many = super().sample(self._last)
            self._out = [{n: v[c] for n, v in many.items()} for c in range(CHAINS)]
        return self._out.pop()


def pytest_configure(config: Any) -> None:
    """Replace the names before any test module imports them."""
    if os.environ["PEERS_MODE"] != "ours":
        return
    for name in OBJECTIVES:
        elbo = getattr(pyro.infer, name)
        ours = compiled(elbo)
        setattr(pyro.infer, name, ours)
        setattr(sys.modules[elbo.__module__], name, ours)
    for module in (pyro.infer, pyro.infer.mcmc, pyro.infer.mcmc.hmc, pyro.infer.mcmc.nuts):
        for name in ("HMC", "NUTS"):
            if hasattr(module, name):
                setattr(module, name, type(name, (Chains,), {}))


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Keep every so many-th test."""
    items[:] = items[:: int(os.environ["PEERS_EVERY"])]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    """Bound the time of a test."""

    def stop(*_: Any) -> None:
        raise TimedOut(f"longer than {os.environ['PEERS_SECONDS']} s")

    _runs.counts.clear()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(int(os.environ["PEERS_SECONDS"]))
    try:
        return (yield)
    finally:
        signal.alarm(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[Any]:
    """Append the outcome of a test as one line."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        error = "" if call.excinfo is None else call.excinfo.exconly().replace("\n", " ")[:300]
        outcome = "timed out" if error and call.excinfo.errisinstance(TimedOut) else report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "expected to fail"
        line = {"test": item.nodeid, "outcome": outcome, "error": error, "runs": dict(_runs.counts), "s": call.duration}
        with open(os.environ["PEERS_OUT"], "a") as file:
            file.write(json.dumps(line) + "\n")
    return report
