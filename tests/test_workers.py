"""Worker processes: chains and other tasks side by side, what reaches a worker and what comes back."""

import importlib
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import seeds
import torch
from pyro.infer import NUTS as PyroNUTS
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel

from inference import sample
from inference.compiler import policy
from inference.runners import workers

sampling = importlib.import_module("inference.runners.processes")
quiet = partial(sample, progress=False)
Y = torch.tensor([0.3, 1.9, 0.8]).double()


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains run in two processes, however short they are."""
    monkeypatch.setattr(sampling, "cores", lambda: 2)
    monkeypatch.setattr(policy, "PROCESS_OPERATIONS", 0)


def shifted_model() -> Callable[..., None]:
    """A closure with a lambda and a parameter whose start is random."""
    scale = lambda: 1.0 + torch.arange(2).double()  # noqa: E731

    def model(y: torch.Tensor) -> None:
        shift = pyro.param("shift", lambda: torch.randn(()).double())
        x = pyro.sample("x", dist.Normal(torch.zeros(2).double(), scale()).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x.sum() + shift, 1.0), obs=y)

    return model


class Told(dict[int, tuple[int, str]]):
    """In place of progress bars: the last step and text of each chain."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        Told.last = self

    def __enter__(self) -> Callable[[int, int, str], None]:
        return lambda k, step, text: self.update({k: (step, text)})

    def __exit__(self, *error: Any) -> None:
        pass


class Where(PyroNUTS):
    """Tells which process it is in."""

    def logging(self) -> Any:
        return {"process": os.getpid()}


@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize("compile", [False, "auto"])
def test_draws_are_those_of_chains_one_after_another(monkeypatch, compile: bool | str) -> None:
    monkeypatch.setattr(sampling, "Bars", Told)
    run = partial(quiet, shifted_model(), Y, Where, draws=20, warmup=20, chains=3, seed=5, compile=compile)
    with seeds.unmoved():  # as they are in new processes
        two, told = run(), Told.last
        monkeypatch.setattr(sampling, "cores", lambda: 1)
        one = run()
    assert {k: step for k, (step, _) in told.items()} == {0: 40, 1: 40, 2: 40}
    assert len({text for _, text in told.values()}) == 2
    assert {text for _, text in Told.last.values()} == {f"process {os.getpid()}"}
    assert torch.equal(one.draws["x"], two.draws["x"])
    assert torch.equal(one.draw(10)["x"], two.draw(10)["x"])
    assert len(one.draws["x"].reshape(3, 20, 2)[:, -1].unique(dim=0)) == 3, "chains have draws of their own"


@pytest.mark.usefixtures("two_workers")
def test_what_cannot_be_carried_over_runs_in_this_process() -> None:
    lock, plain = threading.Lock(), shifted_model()

    def locked(y: torch.Tensor) -> None:
        with lock:
            plain(y)

    run = partial(quiet, data=Y, kernel=PyroNUTS, draws=10, warmup=10, chains=2, compile=False)
    with pytest.warns(UserWarning, match=r"^chains run one after another.*: TypeError: cannot pickle .*lock") as caught:
        here = run(locked)
    assert len(caught) == 1
    assert here.draws["x"].shape == (20, 2)


@pytest.mark.usefixtures("two_workers")
def test_a_module_that_a_worker_cannot_import_is_said(monkeypatch) -> None:
    module = type(sys)("only_here")
    exec("def double(x):\n    return 2 * x", vars(module))
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.warns(UserWarning, match=r"^tasks run one after another.*ModuleNotFoundError: No module named 'only_"):
        assert workers.side_by_side(partial(_apply, module.double), [1, 2], 2) == [2, 4]


def _apply(function: Callable[[int], int], task: int, say: workers.Say) -> int:
    return function(task)


def test_a_worker_has_the_settings_of_its_parent_and_no_workers_of_its_own(alone) -> None:
    def task(_: int) -> tuple[Any, ...]:
        inner = workers.side_by_side(lambda task, say: os.getpid(), [0, 1], 2)
        return torch.get_default_dtype(), pyro.settings.get("validate_infer"), os.getpid(), inner

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.settings.context(validate_infer=False):
            found = workers.run_jobs(task, [0, 1], 2, "run")
    finally:
        torch.set_default_dtype(before)
    for dtype, validate, pid, inner in found:
        assert dtype == torch.float64 and not validate
        assert pid != os.getpid() and inner == [pid, pid]
    assert workers.run_jobs(task, [0, 1], 2, "run")[0][:2] == (before, pyro.settings.get("validate_infer"))


def test_workers_that_were_killed_while_idle_are_replaced() -> None:
    where = partial(workers.side_by_side, lambda task, say: os.getpid(), [0, 1], 2)
    for pid in set(where()):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    assert os.getpid() not in where()


def test_tasks_that_wait_do_not_outlive_one_that_fails() -> None:
    """More than the queue of workers holds: their keeper, a thread, ended by a KeyError of its own."""

    def task(k: int, say: workers.Say) -> None:
        raise ZeroDivisionError(k)

    with pytest.raises(workers.Failed, match=r"^run \d+: ZeroDivisionError"):
        workers.side_by_side(task, list(range(20)), 2, name="run")
    assert mp.active_children() == []


def test_workers_are_new_where_a_source_has_changed_since(tmp_path, monkeypatch) -> None:
    (tmp_path / "some_source.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("some_source")
    now = time.time() + 3600
    assert not workers._changed(now)
    os.utime(tmp_path / "some_source.py", (now + 1, now + 1))
    assert workers._changed(now)


def test_short_chains_start_no_workers() -> None:
    """Of 134 operations a run, as in eight schools: 2000 transitions take minutes, and 100 seconds."""
    gradients = 4 * policy.NUTS_GRADIENTS
    assert policy.worth_processes(2000 * gradients, 134, 2)
    assert not policy.worth_processes(100 * gradients, 134, 2)
    assert policy.worth_processes(100 * gradients, 13_400, 2)
    assert not policy.worth_processes(10**6 * gradients, 134, 1)


@pytest.mark.parametrize("count", [1, 2])
def test_a_chain_that_fails_says_which_and_why(monkeypatch, count: int) -> None:
    monkeypatch.setattr(sampling, "cores", lambda: count)

    class Broken(MCMCKernel):
        def __init__(self, model) -> None:
            pass

        initial_params = property(lambda self: {"rate": torch.ones(())})

        def sample(self, params):
            raise ZeroDivisionError("no way on")

    with pytest.raises(RuntimeError, match=r"chain \d: ZeroDivisionError: no way on"):
        quiet(shifted_model(), Y, Broken, draws=4, warmup=0, chains=2)

    class Killed(Broken):
        def sample(self, params):
            os._exit(9)

    if count == 2:
        with pytest.raises(RuntimeError, match=r"^chain \d( or \d)? ended without an answer \(exit code: EXIT\(9\)\)"):
            quiet(shifted_model(), Y, Killed, draws=4, warmup=0, chains=2)


@pytest.mark.usefixtures("two_workers")
def test_a_warning_of_a_chain_reaches_whoever_asked_for_it() -> None:
    late = [0.0]

    class Late(PyroNUTS):
        """Changes the model after the warmup, which its program cannot know."""

        def end_warmup(self):
            late[0] = 3.0
            super().end_warmup()

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.factor("late", late[0] * x)

    with pytest.warns(UserWarning, match=r"chain [01]: call \d+: the traced potential gives .* may be wrong"):
        quiet(model, kernel=Late, draws=300, warmup=2, chains=2, compile="auto")


ENDLESS = """
import os, time, torch, pyro, pyro.distributions as dist
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from inference import sample
import inference.runners.processes as processes

class Endless(MCMCKernel):
    def __init__(self, model):
        self.transforms, self.initial_params, self.told = {}, {"x": torch.zeros(1)}, False
    initial_params = None
    def sample(self, params):
        if not self.told:
            os.write(1, b"%d\\n" % os.getpid())
            self.told = True
        time.sleep(0.01)
        return params

def model():
    x = pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.zeros(()))

processes.cores = lambda: 2
sample(model, None, Endless, draws=1_000_000, warmup=0, chains=2, compile=False, progress=False)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals as of a terminal")
@pytest.mark.parametrize("end", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_chains_of_a_script_end_with_their_parent(end: signal.Signals) -> None:
    """Ctrl-C reaches all processes of a terminal, and a kill the parent alone."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "-c", ENDLESS], start_new_session=True, **pipes)
    try:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        assert len({*pids, parent.pid}) == 3
        (os.killpg if end == signal.SIGINT else os.kill)(parent.pid, end)
        # Returns when all processes have closed the pipe.
        _, said = parent.communicate(timeout=60)
        if end == signal.SIGINT:
            assert said.count("Traceback") == 1 and said.strip().endswith("KeyboardInterrupt")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
