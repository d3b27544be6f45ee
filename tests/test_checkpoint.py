"""Runs that were killed go on: losses, parameters and draws are those of a run that was not, to the last bit."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import Case
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam, ExponentialLR
from pyro.optim.clipped_adam import ClippedAdam as torch_clipped_adam
from torch import Tensor, nn

from inference import Checkpoint, Joint, Result, compare, fit, isolated, sample
from inference.checkpoint import FILE, CheckpointError
from inference.compiler import policy
from inference.core.packing import pack, read_packed, unpack, write_packed
from inference.kernels import HMC, NUTS, ChEES, Gibbs
from inference.objectives import Adversarial
from ppl_models.zoo.entries import ZOO
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.methods import settings

Run = Callable[..., Result]


class Killed(BaseException):
    """In place of SIGKILL, which the tests of processes send."""


class Killing(Checkpoint):
    """A checkpoint after every step, or block of steps, of a run that is killed when so many have been written."""

    def __init__(self, folder: Path, left: int) -> None:
        super().__init__(folder)
        self.left = left

    @property
    def due(self) -> bool:
        return True

    def write(self, state: Any, draws: Any = None) -> bool:
        written = super().write(state, draws)
        self.left -= 1
        if not self.left:
            raise Killed
        return written


class Dying(Checkpoint):
    """A checkpoint of a comparison, of which one method is killed."""

    def __init__(self, folder: Path, method: str) -> None:
        super().__init__(folder)
        self.method = method

    def part(self, name: str) -> Checkpoint:
        return Killing(super().part(name).folder, 2 if name == self.method else 0)


def goes_on(make: Callable[[int], Any], run: Run, folder: Path, kills: tuple[int, ...] = (1, 1, 3)) -> Result:
    """Kill a run again and again, let it go on, and compare it with one that was not killed."""
    whole = run(make(0))
    for start, left in enumerate(kills):
        # A run goes on with a pair of other parameters: all that counts is in the checkpoint.
        with pytest.raises(Killed):
            run(make(start), checkpoint=Killing(folder, left))
    last, over = (run(make(seed), checkpoint=folder) for seed in (8, 9))
    for again in (last, over):
        same(again, whole)
    return last


def same(one: Result, other: Result) -> None:
    assert np.array_equal(one.losses, other.losses)
    for mine, theirs in ((one.params, other.params), (one.draws, other.draws)):
        assert mine.keys() == theirs.keys()
        assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == []
    assert one.idata.attrs == other.idata.attrs
    if "sample_stats" in one.idata.children:
        assert one.idata["sample_stats"].equals(other.idata["sample_stats"])
        mine, theirs = one.draw(20), other.draw(20)
        assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == []


ENTRIES = [e for e in ZOO.values() if any("checkpoint" in settings(m) for m in e.fits.values())]


TRACED = {"naive_bayes", "gaussian_mixture", "vae", "gan", "diffusion", "sigmoid_belief_net"}
"""Entries whose traced fits are killed outside of the long tests too."""


def by_cost(entry: Entry, how: str) -> Any:
    marks = pytest.mark.slow if how == "traced" and entry.name not in TRACED else ()
    return pytest.param(entry, how, id=f"{how}-{entry.name}", marks=marks)


@pytest.mark.parametrize(("entry", "how"), [by_cost(e, how) for how in ("eager", "traced") for e in ENTRIES])
def test_a_fit_of_every_entry_goes_on(entry: Entry, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(entry)
    monkeypatch.setattr(policy, "execution_of_fit", lambda *_: how)
    name = next(n for n, m in entry.fits.items() if "checkpoint" in settings(m))
    chosen = {"steps": 8, "draws": 10, "batch": 15, "progress": False}
    known = settings(entry.fits[name])
    if "batch" not in getattr(entry.fits[name], "keywords", {"batch": 128}):
        del chosen["batch"]
    method = partial(entry.fits[name], **{n: v for n, v in chosen.items() if n in known})
    goes_on(case.pair, lambda pair, **more: method(pair, case.data, **more), tmp_path / "run")


Y = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, sd).to_event(1), obs=y)


def plain(_: int = 0) -> Any:
    return model, AutoNormal(model)


OPTIMIZERS = {
    "with rates and betas that go round": lambda: Joint(
        torch.optim.Adam,
        {"lr": 0.02},
        schedule=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=12),
    ),
    "joint, of Pyro, whose rate is its own": lambda: Joint(torch_clipped_adam, {"lr": 0.05, "lrd": 0.9}),
    "of Pyro": lambda: ClippedAdam({"lr": 0.02, "lrd": 0.99}),
    "of Pyro with a schedule": lambda: ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "gamma": 0.9}
    ),
    "joint": lambda: Joint(
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9},
        schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=3),
        clip_norm=1.0,
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_state_of_an_optimizer_goes_on(optimizer: Any, tmp_path: Path) -> None:
    def run(pair: Any, **more: Any) -> Result:
        return fit(pair, Y, steps=9, draws=10, optimizer=optimizer(), progress=False, **more)

    goes_on(plain, run, tmp_path / "run")


def test_blocks_of_a_fused_fit_go_on(tmp_path: Path) -> None:
    run = partial(fit, data=Y, steps=270, draws=10, compile=True, progress=False)
    # Killed before the program was made, after a first step of it, in the middle of blocks, and in the last steps.
    last = goes_on(plain, run, tmp_path / "run", kills=(1, 2, 3, 4))
    assert last.idata.attrs["execution"] == "fused"


class Noisy(nn.Module):
    """A guide with a network that has a buffer, and dropout in its training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))

    def model(self, y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), dist.constraints.positive)
        with pyro.plate("rows", size or len(y), subsample=rows):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z[..., None].expand(*z.shape, 2), scale).to_event(1), obs=y)

    def guide(self, y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        pyro.module("net", self.net)
        with pyro.plate("rows", size or len(y), subsample=rows):
            pyro.sample(
                "z", dist.Bernoulli(logits=self.net(y)[..., 0]), infer={"baseline": {"use_decaying_avg_baseline": True}}
            )


@pytest.mark.parametrize("compile", [False, True])
def test_minibatches_buffers_and_baselines_go_on(compile: bool, tmp_path: Path) -> None:
    y = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    run = partial(fit, data=y, objective=TraceGraph_ELBO, steps=11, batch=5, draws=10, compile=compile, progress=False)

    def make(seed: int) -> Any:
        with isolated(seed):
            pair = Noisy()
        return pair.model, pair.guide

    goes_on(make, run, tmp_path / "run", kills=(2, 3, 3))


def of_each_row(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    """A mean for each row, by a parameter that appears when its row is first drawn."""
    with pyro.plate("rows", size or len(y), subsample=rows):
        places = range(len(y)) if rows is None else rows.tolist()
        mu = torch.stack([pyro.param(f"mu{k}", torch.tensor(1.0), dist.constraints.positive) for k in places])
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


ROWS = torch.tensor([1.0, 2.0, 3.0, 10.0, 11.0, 12.0])


@pytest.mark.filterwarnings("ignore:.*runs eagerly from now on")
@pytest.mark.parametrize("compile", [False, True])
def test_parameters_that_appear_late_go_on(compile: bool, tmp_path: Path) -> None:
    def run(_: Any, **more: Any) -> Result:
        fixed = {"steps": 16, "batch": 2, "learning_rate": 0.1, "draws": 4, "progress": False}
        return fit((of_each_row, lambda y, **_: None), ROWS, compile=compile, **fixed, **more)

    # Killed after one step, when four parameters are unknown, and again at once.
    goes_on(lambda _: None, run, tmp_path / "run", kills=(1, 1, 2, 4))


@pytest.mark.parametrize("how", ["eager", "traced"])
def test_players_that_take_turns_go_on(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "execution_of_fit", lambda *_: how)
    case = Case(ZOO["gan"])

    def run(pair: Any, **more: Any) -> Result:
        objective = Adversarial(r1=0.1, turns=(2, 1))
        optimizer = Joint(torch.optim.Adam, objective.settings(guide={"lr": 0.01}, model={"lr": 0.001}))
        chosen = {"steps": 14, "batch": 16, "optimizer": optimizer, "draws": 10, "progress": False}
        return fit(pair, case.data, objective, **chosen, **more)

    goes_on(case.pair, run, tmp_path / "run", kills=(1, 2, 3, 5))


def test_patience_ends_where_it_would_have(tmp_path: Path) -> None:
    run = partial(fit, data=Y, steps=400, patience=20, learning_rate=0.1, draws=10, progress=False)
    last = goes_on(plain, run, tmp_path / "run", kills=(5, 30))
    assert len(last.losses) < 400


def test_a_folder_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    run = partial(fit, steps=5, draws=10, progress=False, checkpoint=tmp_path / "run")
    run(plain(), Y)
    with pytest.raises(ValueError, match=r"checkpoint: .*run is of a run with steps 5, got 6; use another folder$"):
        run(plain(), Y, steps=6)
    with pytest.raises(ValueError, match=r"is of a run with data y [0-9a-f]{8}, got y [0-9a-f]{8}; use another"):
        run(plain(), Y + 1)
    with pytest.raises(ValueError, match=r"objective Trace_ELBO\(.*num_particles=1.*, got .*num_particles=3"):
        run(plain(), Y, objective=Trace_ELBO(num_particles=3))
    with pytest.raises(ValueError, match="learning_rate 0.02, got 0.1"):
        run(plain(), Y, learning_rate=0.1)
    # The number of draws is no part of the run.
    assert run(plain(), Y, draws=20).size == 20


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04K\x01.", b"\xff" * 100], ids=range(4))
def test_a_file_that_is_no_checkpoint_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"^checkpoint: .*checkpoint\.safetensors: expected a checkpoint, got a file"):
        fit(plain(), Y, steps=5, checkpoint=tmp_path, progress=False)
    assert (tmp_path / FILE).read_bytes() == content


def test_a_checkpoint_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    fit(plain(), Y, steps=5, checkpoint=tmp_path, progress=False)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="expected a checkpoint, got a file that cannot be read"):
        fit(plain(), Y, steps=5, checkpoint=tmp_path, progress=False)


def test_other_parameters_are_refused_by_name(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.shift = nn.Linear(1, width)

        def model(self, y: Tensor) -> None:
            pyro.module("shift", self.shift)
            mu = pyro.sample("mu", dist.Normal(self.shift.bias.sum(), 3.0).expand([2]).to_event(1))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)

    def run(width: int) -> None:
        pair = Wide(width)
        fit((pair.model, AutoNormal(pair.model)), Y, steps=5, checkpoint=tmp_path, progress=False)

    run(2)
    wanted = r"^checkpoint: it holds a parameter shift\.weight of shape \(2, 1\), and the pair \(3, 1\)$"
    with pytest.raises(CheckpointError, match=wanted):
        run(3)


PRIOR = 3.0


def scaled(scale: float) -> Any:
    def model(y: Tensor, noise: float = 1.0) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, scale * PRIOR))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, noise).expand([2]).to_event(1), obs=y)

    return model


def test_other_numbers_in_data_code_and_closures_are_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in (partial(fit, steps=4, draws=5), partial(sample, draws=5, warmup=5, chains=4, compile=False)):

        def run(model: Any, noise: float = 1.0, verb: Any = verb) -> Result:
            pair = (model, AutoNormal(model)) if verb.func is fit else model
            return verb(pair, {"y": Y, "noise": noise}, progress=False, checkpoint=tmp_path / verb.func.__name__)

        same(run(scaled(1.0)), run(scaled(1.0)))
        with pytest.raises(CheckpointError, match=r"is of a run with data .*noise 1\.0, got .*noise 0\.1; use another"):
            run(scaled(1.0), 0.1)
        with pytest.raises(CheckpointError, match="is of a run with code of the model [0-9a-f]+, got [0-9a-f]+; use"):
            run(scaled(0.01))
        with monkeypatch.context() as patched:
            patched.setitem(globals(), "PRIOR", 4.0)
            with pytest.raises(CheckpointError, match="is of a run with code of the model"):
                run(scaled(1.0))
    chains = partial(sample, scaled(1.0), Y, draws=5, warmup=5, chains=4, compile=False, progress=False)
    chains(kernel=ChEES, checkpoint=tmp_path / "kernels")
    with pytest.raises(CheckpointError, match=r"is of a run with kernel ChEES\(.*\), got <lambda> [0-9a-f]+\(\)"):
        chains(kernel=lambda model: NUTS(model), checkpoint=tmp_path / "kernels")


@pytest.mark.parametrize("compile", [False, True])
def test_a_fit_goes_on_in_as_many_threads(compile: bool, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        y = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))

        def wide(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(torch.zeros(64), 3.0).to_event(1))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)

        run = partial(fit, data=y, steps=24, draws=5, compile=compile, progress=False)
        goes_on(lambda _: (wide, AutoNormal(wide)), run, tmp_path / "run", kills=(5, 6))
    finally:
        torch.set_num_threads(1)


class Counting(nn.Module):
    """A pair that anneals by a counter of its own, with a network in a closure of its guide."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.taken = 0
        with isolated(seed):
            net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

        def guide(y: Tensor) -> None:
            pyro.module("net", net)
            with pyro.plate("rows", len(y)):
                pyro.sample("z", dist.Normal(net(y)[..., 0], 1.0))

        self.guide = guide

    def model(self, y: Tensor) -> None:
        self.taken += 1
        with pyro.plate("rows", len(y)), pyro.poutine.scale(scale=min(1.0, self.taken / 20)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).to_event(1), obs=y)


@pytest.mark.filterwarnings("ignore:.*runs eagerly from now on")
@pytest.mark.parametrize("compile", [False, True])
def test_counters_and_networks_in_closures_go_on(compile: bool, tmp_path: Path) -> None:
    def run(pair: Any, **more: Any) -> Result:
        # What draws show depends on the counter, too: they are compared where all have ended by the same number.
        fixed = {"steps": 12, "draws": 5, "compile": compile, "progress": False}
        return fit((pair.model, pair.guide), Y.repeat(4, 1), **fixed, **more)

    whole = run(Counting(0))
    for start, left in enumerate((3, 4)):
        with pytest.raises(Killed):
            run(Counting(start), checkpoint=Killing(tmp_path, left))
    last = run(Counting(8), checkpoint=tmp_path)
    assert np.array_equal(last.losses, whole.losses)
    assert [n for n in whole.params if not torch.equal(whole.params[n], last.params[n])] == []


def test_one_joint_optimizer_serves_two_fits_as_two_would() -> None:
    def run(optimizer: Joint) -> Result:
        return fit(plain(), Y, steps=8, draws=5, optimizer=optimizer, progress=False)

    make = partial(Joint, torch.optim.Adam, {"lr": 0.1})
    shared = make()
    for _ in range(2):
        assert np.array_equal(run(shared).losses, run(make()).losses)


class Once(ChEES):
    """A kernel whose state is not all that it depends on."""

    resumes = False


def test_a_kernel_that_does_not_say_that_it_resumes_has_no_checkpoint(tmp_path: Path) -> None:
    run = partial(sample, model, Y, draws=5, warmup=5, chains=4, compile=False, progress=False)
    with pytest.raises(CheckpointError, match="expected ChEES, Gibbs or NUTS, got Once, whose chains cannot"):
        run(kernel=Once, checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="once runs without a checkpoint: checkpoint: expected ChEES"):
        found = compare(plain, Y, {"once": lambda pair, data, **more: run(kernel=Once, **more)}, checkpoint=tmp_path)
    assert found.results["once"].method == "Once"


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_the_same_call_again_goes_on_with_the_same_objective(
    tmp_path: Path, ctrl_c: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = TraceEnum_ELBO()
    pair = plain()
    run = partial(fit, pair, Y, objective, steps=40, draws=5, compile=False, progress=False)
    whole = fit(plain(), Y, TraceEnum_ELBO(), steps=40, draws=5, compile=False, progress=False)
    calls = [0]

    def pressed(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 20:
            signal.raise_signal(signal.SIGINT)
        return loss_and_grads(*args, **kwargs)

    loss_and_grads = objective.loss_and_grads
    with monkeypatch.context() as patched:
        patched.setattr(TraceEnum_ELBO, "loss_and_grads", lambda self, *a, **k: pressed(*a, **k))
        with pytest.warns(UserWarning, match="interrupted at step 20 of 40"):
            part = run(checkpoint=tmp_path)
    assert part.interrupted
    same(run(checkpoint=tmp_path), whole)


def test_values_in_files_come_back(tmp_path: Path) -> None:
    class Other:
        pass

    value = {
        "a": (1, 2.5, float("inf"), None, True, "text"),
        3: [torch.arange(6).reshape(2, 3).T, torch.zeros(0), torch.tensor(1, dtype=torch.uint8)],
        ("k", 1): {"b": np.arange(3, dtype=np.uint32)},
    }
    packed, tensors = pack(value)
    for back in (unpack(packed, tensors), read_packed(write_packed(tmp_path / "file.safetensors", value))):
        assert back["a"] == value["a"]
        for mine, theirs in zip(back[3], value[3], strict=True):
            assert torch.equal(mine, theirs)
            assert mine.dtype == theirs.dtype
        assert back["k", 1]["b"].dtype == np.uint32
        assert list(back) == list(value)
    with pytest.raises(TypeError, match="got Other, which no file can hold"):
        pack({"a": [Other()]})


def test_checkpoints_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("inference.checkpoint.perf_counter", lambda: now[0])

    def slow(*_: Any) -> None:
        now[0] += 3.0

    monkeypatch.setattr("inference.checkpoint.write_packed", slow)
    kept = Checkpoint(tmp_path, every=10)
    kept.begin({})
    written = 0
    while now[0] < 10_000:
        now[0] += 0.1
        if kept.due:
            kept.write({})
            written += 1
    assert 3.0 * written <= 0.02 * now[0]
    assert written > 50


def chains(pair: Any, kernel: Any, folder: Path, kills: tuple[int, ...], **settings: Any) -> Result:
    chosen = {"draws": 30, "warmup": 50, "chains": 6, "progress": False, **settings}
    return goes_on(lambda _: pair, lambda pair, **more: sample(pair, Y, kernel, **chosen, **more), folder, kills)


def labelled(y: Tensor) -> None:
    """A mixture: finite labels beside continuous means."""
    means = pyro.sample("means", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(means[z.long()][..., None].expand(*z.shape, 2), 1.0).to_event(1), obs=y)


def labels(y: Tensor) -> None:
    """Finite labels alone."""
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("kernel", "warmup", "kills"),
    [
        (ChEES, 100, (7, 2, 3)),
        (None, 50, (1, 1, 1)),
        (partial(NUTS, full_mass=False, max_tree_depth=3), 300, (5, 3, 5)),
    ],
    ids=["ChEES", "default", "NUTS"],
)
def test_chains_go_on(kernel: Any, warmup: int, kills: tuple[int, ...], tmp_path: Path) -> None:
    # Killed in the middle of a window of the warmup, after it, and among the draws.
    chains(model, kernel, tmp_path / "run", kills, compile=False, warmup=warmup)


@pytest.mark.parametrize("kernel", [ChEES, pytest.param(NUTS, marks=pytest.mark.slow)])
def test_fused_chains_go_on(kernel: Any, tmp_path: Path) -> None:
    last = chains(model, kernel, tmp_path / "run", (2, 1), compile=True)
    assert last.idata.attrs["execution"] == "fused"


@pytest.mark.parametrize("pair", [labelled, labels])
def test_chains_of_gibbs_go_on(pair: Any, tmp_path: Path) -> None:
    chains(pair, Gibbs, tmp_path / "run", (7, 50, 5), compile=False, draws=20)


def test_chains_that_were_moved_are_counted_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def far() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        # A second mode of far lower density, in which chains are caught.
        pyro.factor("mode", torch.logaddexp(-100 * (x - 0.5).square().sum(-1), -100 * (x + 1.5).square().sum(-1) - 60))

    def run(**more: Any) -> Result:
        return sample(far, None, ChEES, draws=20, warmup=100, chains=32, compile=False, progress=False, **more)

    whole = run()
    assert whole.idata["posterior"].attrs["restarted"] > 0
    with pytest.raises(Killed):
        run(checkpoint=Killing(tmp_path, 9))
    same(run(checkpoint=tmp_path), whole)
    assert run(checkpoint=tmp_path).idata["posterior"].attrs["restarted"] == whole.idata["posterior"].attrs["restarted"]


def test_chains_in_processes_have_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^checkpoint: expected ChEES, Gibbs or NUTS, got HMC, whose chains cannot"):
        sample(model, Y, HMC, draws=10, warmup=10, checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_chains_of_other_networks_are_refused(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)

    def through(y: Tensor) -> None:
        pyro.module("net", net)
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(net(mu), 1.0).to_event(1), obs=y)

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def model(self, y: Tensor) -> None:
            through(y)

    run = partial(sample, draws=10, warmup=10, chains=8, compile=False, progress=False, checkpoint=tmp_path)
    run(Through().model, Y)
    with torch.no_grad():
        net.weight += 1.0
    with pytest.raises(ValueError, match=r"is of a run with networks net.weight [0-9a-f]{8}, .*; use another folder$"):
        run(Through().model, Y)


@pytest.mark.parametrize("warming", [True, False])
def test_interrupted_chains_keep_what_they_have(
    warming: bool, tmp_path: Path, ctrl_c: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = NUTS.advance

    def interrupted(self: Any) -> Any:
        moves = advance(self)
        if self._taken == (25 if warming else 100):
            signal.raise_signal(signal.SIGINT)
        return moves

    short = partial(NUTS, max_tree_depth=2)
    run = partial(sample, model, Y, short, draws=75, warmup=50, chains=3, compile=False, progress=False)
    whole = run()
    with monkeypatch.context() as patched:
        patched.setattr(NUTS, "advance", interrupted)
        if warming:
            with pytest.raises(KeyboardInterrupt):
                run(checkpoint=tmp_path)
        else:
            with pytest.warns(UserWarning, match="interrupted at draw 50 of 75"):
                part = run(checkpoint=tmp_path)
            assert part.interrupted
            assert part.diagnosis.advice[0].startswith("The run was interrupted at draw 50 of 75")
            for name, value in part.draws.items():
                expected = whole.draws[name].unflatten(0, (3, 75))[:, :50].flatten(0, 1)
                assert torch.equal(value, expected)
    # What is on disk agrees with it: the run goes on.
    same(run(checkpoint=tmp_path), whole)


def test_a_comparison_goes_on_with_the_method_that_was_under_way(tmp_path: Path) -> None:
    ran: list[str] = []

    def counted(name: str, method: Any) -> Any:
        def run(pair: Any, data: Any, **more: Any) -> Result:
            ran.append(name)
            return method(pair, data, **more)

        return run

    fitted = counted("SVI", partial(fit, steps=40, draws=50, progress=False))
    chained = counted("chains (ChEES)", partial(sample, draws=20, warmup=30, chains=8, compile=False, progress=False))
    closed = counted("closed", lambda pair, data: fit(pair, data, steps=0, draws=50, progress=False))
    # A method that takes no checkpoint is run anew.
    methods = {"closed": lambda pair, data: closed(pair, data), "SVI": fitted, "chains (ChEES)": chained}
    run = partial(compare, plain, Y, methods)
    whole = run().table
    with pytest.raises(Killed):
        run(checkpoint=Dying(tmp_path, "SVI"))
    assert ran[-2:] == ["closed", "SVI"]
    with pytest.raises(Killed):
        run(checkpoint=Dying(tmp_path, "chains (ChEES)"))
    table = run(checkpoint=tmp_path).table
    timed = ["seconds", "seconds_total", "ess_per_s", "ess_per_s_total"]
    assert table.drop(columns=timed).equals(whole.drop(columns=timed))
    # Seconds are those of all parts of a run.
    again = run(checkpoint=tmp_path).table
    assert again.loc["SVI", "seconds"] == pytest.approx(table.loc["SVI", "seconds"], rel=0.5)
    with pytest.raises(CheckpointError, match="is of a run with data y"):
        compare(plain, Y + 1, methods, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="is of a run with seed 0, got 1; use another folder"):
        run(seed=1, checkpoint=tmp_path)
    assert Checkpoint(tmp_path).part("SVI (Trace_ELBO)").folder == tmp_path / "svi_trace_elbo"
    with pytest.raises(ValueError, match="differ in their letters and digits, got SVI, svi"):
        compare(plain, Y, {"SVI": fitted, "svi": fitted}, checkpoint=tmp_path)


@pytest.mark.parametrize("verb", ["fit", "sample"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {
        "fit": lambda **more: fit(plain(), Y, steps=12, draws=10, progress=False, **more),
        "sample": partial(sample, model, Y, ChEES, draws=40, warmup=20, chains=8, compile=False, progress=False),
    }[verb]
    whole = run()
    with pytest.raises(Killed):
        run(checkpoint=Killing(tmp_path, 3))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.warns(UserWarning, match=r"checkpoint: cannot be written \(.*\); the last one stands"):
            last = run(checkpoint=Killing(tmp_path, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    same(last, whole)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    # What stands goes on.
    same(run(checkpoint=tmp_path), whole)


HELD = """
import sys, time
from inference import Checkpoint
with Checkpoint(sys.argv[1]) as kept:
    kept.begin({})
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_in_use_is_refused_by_who_has_it_and_free_after_a_kill(tmp_path: Path) -> None:
    def run(**more: Any) -> Result:
        return fit(plain(), Y, steps=3, draws=5, progress=False, **more)

    chains = partial(sample, model, Y, ChEES, draws=5, warmup=5, chains=4, compile=False, progress=False)
    methods = {"SVI": partial(fit, steps=3, draws=5, progress=False)}
    verbs = (run, chains, partial(compare, plain, Y, methods))
    with subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for verb in verbs:
            with pytest.raises(CheckpointError, match=rf"^checkpoint: .* in use by process {other.pid} on .*folder$"):
                verb(checkpoint=tmp_path)
        assert not (tmp_path / FILE).exists()
        other.kill()
    whole = run()
    same(run(checkpoint=tmp_path), whole)
    # It is free again after an end, an error and an interrupt.
    with pytest.raises(CheckpointError, match="is of a run with"):
        run(checkpoint=tmp_path, seed=1)
    same(run(checkpoint=tmp_path), whole)


def test_another_thread_is_refused_a_folder_in_use(tmp_path: Path) -> None:
    with Checkpoint(tmp_path) as kept, ThreadPoolExecutor(1) as thread:
        kept.begin({})
        with pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} on"):
            thread.submit(Checkpoint(tmp_path).begin, {}).result()
    Checkpoint(tmp_path).begin({})


def test_a_folder_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("inference.core.files.fcntl.flock", none)
    assert fit(plain(), Y, steps=3, draws=5, progress=False, checkpoint=tmp_path).size == 5
