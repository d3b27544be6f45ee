"""Results in folders: whole or absent, refused where damaged or foreign, and loaded into the user's own pair."""

import errno
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from inference import Result, fit, posterior_predictive, sample, saved
from inference.core import files
from inference.core.bound import bind
from inference.core.packing import read_packed, write_packed
from inference.kernels import HMC, NUTS, ChEES, Gibbs
from inference.saved import ABOUT, IDATA, TENSORS

Y = torch.tensor([1.0, 2.0, 4.0]).double()


def model(y: Tensor | None = None, size: int = 3) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 2.0))
    sd = pyro.sample("sd", dist.LogNormal(torch.zeros(()).double(), 0.5))
    with pyro.plate("rows", size):
        pyro.sample("y", dist.Normal(mu, sd), obs=y)


def fitted(guide: Any = AutoMultivariateNormal, **settings: Any) -> Result:
    return fit((model, guide(model)), {"y": Y}, steps=40, draws=50, progress=False, **settings)


def load(path: Path, guide: Any = AutoMultivariateNormal, data: Any = {"y": Y}) -> Result:  # noqa: B006
    return Result.load(path, (model, guide(model)), data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fitted().save(tmp_path / "run")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_a_fit_of_plain_pyro_functions_goes_on(guide: Any, tmp_path: Path) -> None:
    before = set(pyro.get_param_store().keys())
    result = fitted(guide)
    loaded = load(result.save(tmp_path / "run"), guide)
    same(loaded.draws, result.draws)
    same(loaded.draw(100, seed=4), result.draw(100, seed=4))
    same(posterior_predictive(loaded, {}, size=7), posterior_predictive(result, {}, size=7))
    # And once more, from what was loaded.
    again = load(loaded.save(tmp_path / "again"), guide)
    same(again.draw(100, seed=4), result.draw(100, seed=4))
    assert set(pyro.get_param_store().keys()) == before


SHALLOW = partial(NUTS, max_tree_depth=4, full_mass=False)


@pytest.mark.parametrize(
    ("kernel", "compile"),
    [
        *((kernel, False) for kernel in (ChEES, NUTS, SHALLOW)),
        *(pytest.param(kernel, True, marks=pytest.mark.slow) for kernel in (ChEES, NUTS, SHALLOW)),
    ],
)
def test_chains_go_on_from_a_folder(kernel: Any, compile: bool, tmp_path: Path) -> None:
    result = sample(model, {"y": Y}, kernel, draws=20, warmup=60, chains=3, compile=compile, progress=False)
    loaded = Result.load(result.save(tmp_path / "run"), model, {"y": Y})
    same(loaded.draw(50, seed=4), result.draw(50, seed=4))
    assert loaded.idata.sample_stats.equals(result.idata.sample_stats)


def test_finite_sites_of_gibbs_go_on(tmp_path: Path) -> None:
    def mixed(y: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6]).double()).to_event(1))
        a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("y", dist.Normal(z.sum(-1) + a, 1.0), obs=y)

    y = torch.tensor(1.5).double()
    result = sample(mixed, y, Gibbs, draws=12, warmup=20, chains=4, progress=False)
    loaded = Result.load(result.save(tmp_path / "run"), mixed, y)
    same(loaded.draw(24, seed=4), result.draw(24, seed=4))


def test_chains_of_other_kernels_are_read_but_cannot_go_on(tmp_path: Path) -> None:
    kernel = partial(HMC, trajectory_length=1.0)
    result = sample(model, {"y": Y}, kernel, draws=8, warmup=8, chains=1, progress=False)
    loaded = Result.load(result.save(tmp_path / "run"), model, {"y": Y})
    same(loaded.draws, result.draws)
    with pytest.raises(ValueError, match="draw: chains of HMC cannot go on from a file; sample again, with more draws"):
        loaded.draw(5)


def test_modules_get_their_parameters_and_buffers(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()

        def model(self, x: Tensor, y: Tensor) -> None:
            pyro.module("net", self.net)
            sd = pyro.param("sd", torch.tensor(1.0).double(), constraint=dist.constraints.positive)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(self.net(x)[:, 0], sd), obs=y)

        def guide(self, x: Tensor, y: Tensor) -> None:
            pyro.module("net", self.net)

    x = torch.randn(20, 1, generator=torch.Generator().manual_seed(0)).double()
    data = {"x": x, "y": x[:, 0] * 2}
    result = fit(Pair(), data, steps=30, learning_rate=0.05, progress=False)
    pair = Pair()
    loaded = Result.load(result.save(tmp_path / "run"), pair, data)
    same(loaded.params, result.params)
    assert float(loaded.params["sd"]) != 1.0
    mine, theirs = (dict(p.named_buffers()) for p in (pair, result.bound.pair))
    same(mine, theirs)
    assert float(theirs["net.1.running_mean"].abs().max()) > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            lambda path: load(path, AutoNormal),
            r"pair: expected no parameter AutoNormal.locs.mu, which the saved Result does not have",
        ),
        (lambda path: load(path, data={}), "data: expected y, as in the saved Result, got none"),
        (lambda path: Result.load(path, lambda y: None, {"y": Y}), "pair: expected"),
    ],
)
def test_another_pair_or_no_data_get_one_line(given: Callable[[Path], Any], said: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=said):
        given(folder)


def test_other_data_are_told(folder: Path) -> None:
    with pytest.warns(UserWarning, match="data: y differs from that of the saved Result"):
        load(folder, data={"y": Y + 1})


class Harmful:
    """Runs code where a pickle is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["PWNED"])),)


@pytest.mark.parametrize("name", [ABOUT, TENSORS, IDATA])
@pytest.mark.parametrize("damage", ["cut short", "empty", "a pickle", "a torch file", "missing"])
def test_a_damaged_or_foreign_file_is_refused_by_name_and_no_code_of_it_runs(
    name: str, damage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PWNED", str(tmp_path / "pwned"))
    file = folder / name
    if damage == "missing":
        file.unlink()
    elif damage == "a torch file":
        torch.save({"x": Harmful()}, file)
    elif damage == "a pickle":
        file.write_bytes(pickle.dumps(Harmful()))
    else:
        file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2 if damage == "cut short" else 0])
    if damage == "missing" and name == IDATA:
        assert not load(folder).idata.children
        return
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        load(folder)
    assert not (tmp_path / "pwned").exists()


def test_a_later_format_is_refused(folder: Path) -> None:
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(ValueError, match=r"expected format 2, got 99; another version may read it"):
        load(folder)


def test_a_kernel_that_the_file_names_is_one_of_ours(tmp_path: Path) -> None:
    result = sample(model, {"y": Y}, NUTS, draws=8, warmup=8, chains=2, progress=False)
    path = result.save(tmp_path / "run")
    about = json.loads((path / ABOUT).read_text())
    about["more"]["kernel"] = "os.system"
    (path / ABOUT).write_text(json.dumps(about))
    with pytest.raises(ValueError, match="kernel: expected one of ChEES, Gibbs, NUTS, got 'os.system'"):
        Result.load(path, model, {"y": Y}).draw(4)


def test_a_folder_that_is_no_result_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("1")
    result = fitted()
    with pytest.raises(FileExistsError, match=r"thesis: expected no file, or a folder with result\.json"):
        result.save(tmp_path / "thesis")
    assert [p.name for p in tmp_path.rglob("*")] == ["thesis", "chapter.txt"]
    with pytest.raises(FileNotFoundError, match="expected the folder of a saved Result"):
        load(tmp_path / "thesis")


def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = fitted(learning_rate=0.5)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files, "_flush", full)
        with pytest.raises(OSError, match="No space left"):
            other.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    other.save(folder)
    same(load(folder).draws, other.draws)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


KILLED = """
import sys
from pathlib import Path
import torch, pyro, pyro.distributions as dist
from inference import fit
from pyro.infer.autoguide import AutoNormal

def model():
    x = pyro.sample("x", dist.Normal(torch.zeros(200_000), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(0.0))

result = fit((model, AutoNormal(model)), steps=1, draws=4, progress=False)
print("ready", flush=True)
while True:
    result.save(sys.argv[1])
    print("saved", flush=True)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_folder(tmp_path: Path) -> None:
    """Ten kills at random times of a process that writes again and again."""

    def large() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(200_000), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(0.0))

    random, path = np.random.default_rng(), tmp_path / "run"
    for _ in range(10):
        command = [sys.executable, "-c", KILLED, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "saved\n"]
            time.sleep(random.uniform(0, 0.5))
            process.kill()
        if path.exists():
            loaded = Result.load(path, (large, AutoNormal(large)))
            assert loaded.draws["x"].shape == (4, 200_000)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_of_the_system_with_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = fitted(learning_rate=0.5)
    monkeypatch.setattr(saved, "TENSORS", "/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{folder}'"):
        other.save(folder)
    monkeypatch.undo()
    assert load(folder).method == other.method


def test_a_result_that_a_kill_has_left_beside_its_place_is_named(folder: Path) -> None:
    folder.rename(folder.with_name(".run.1a2b3c4d"))
    with pytest.raises(FileNotFoundError, match=r"none with result\.json; .*\.run\.1a2b3c4d is one"):
        load(folder)


def test_what_was_written_is_said(folder: Path) -> None:
    about = json.loads((folder / ABOUT).read_text())
    assert about["method"] == "SVI (Trace_ELBO)"
    assert about["data"]["y"]["shape"] == [3]
    assert {"torch", "pyro-ppl", "ppl-models", "python"} <= about["versions"].keys()
    assert np.isfinite(about["seconds"]["run"])


def test_three_losses_are_written_by_their_numbers(tmp_path: Path) -> None:
    result = replace(fitted(), losses=np.arange(12.0).reshape(4, 3))
    result.save(tmp_path / "run")
    assert (tmp_path / "run" / "losses.csv").read_text().startswith("step,loss_0,loss_1,loss_2\n0,0.0,1.0,2.0")


@pytest.mark.parametrize(("kernel", "chains"), [(ChEES, 8), (NUTS, 2), (Gibbs, 3)])
def test_chains_are_extended_alike_from_a_result_and_from_its_folder(tmp_path, kernel, chains) -> None:
    def model(y):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu + z, 1.0), obs=y)

    def finite(y):
        z = pyro.sample("z", dist.Bernoulli(0.4).expand([2]).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    y = torch.tensor([0.3, 1.2, -0.4, 0.8])
    pair = finite if kernel is Gibbs else model
    result = sample(pair, y, kernel, draws=20, warmup=30, chains=chains, progress=False)
    result.save(tmp_path / "held")
    longer = result.extend(15, seed=3)
    loaded = Result.load(tmp_path / "held", pair, y).extend(15, seed=3)
    for name, values in longer.idata["posterior"].data_vars.items():
        assert values.shape[:2] == (chains, 35)
        np.testing.assert_array_equal(values, loaded.idata["posterior"][name])
        if name in result.draws:  # those of a summed-out site are drawn anew
            np.testing.assert_array_equal(values[:, :20], result.idata["posterior"][name])
    for name, values in longer.idata["sample_stats"].data_vars.items():
        np.testing.assert_array_equal(values, loaded.idata["sample_stats"][name])
    # Where the longer chains end is where they go on.
    once, twice = longer.extend(5, seed=4), loaded.extend(5, seed=4)
    assert all(torch.equal(once.draws[n], twice.draws[n]) for n in once.draws)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kernel", [ChEES, NUTS, Gibbs])
def test_chains_that_go_on_twice_have_noise_of_their_own_each_time(kernel) -> None:
    """Chains with the noise of an earlier stretch come together with it: NUTS repeats its draws to the last digit."""

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if kernel is Gibbs:
            pyro.sample("z", dist.Bernoulli(0.4))

    result = sample(model, None, kernel, draws=20, warmup=100, chains=8, progress=False)
    longer = result.extend(150).extend(150)
    draws = longer.draws["x"].unflatten(0, (8, 320)).double()
    first, second = draws[:, 70:170], draws[:, 220:320]
    correlation = np.corrcoef(first.flatten(), second.flatten())[0, 1]
    # Of 2,400 numbers, of which neighbours in a chain may be correlated.
    assert abs(correlation) < 0.3


def test_a_fit_has_no_chains_to_extend() -> None:
    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    result = fit((model, AutoNormal(model)), torch.tensor(0.3), steps=2, progress=False)
    with pytest.raises(ValueError, match="extend: expected chains of ChEES, Gibbs or NUTS, got none"):
        result.extend()


def test_tensors_from_files_and_arrays_begin_where_those_of_torch_do(tmp_path: Path) -> None:
    """The last digits of a matrix product hang on it (MKL on AMD): rows of 8 numbers of 4 bytes end anywhere."""
    loaded = load(fitted().save(tmp_path / "run"))
    values = {str(n): torch.ones(n, dtype=torch.float32) for n in (1, 3, 5, 7)}
    buffer = np.zeros(40, dtype=np.float32)
    offset = (-buffer.ctypes.data % 64) // 4 + 1
    given = bind((lambda y: None, lambda y: None), {"y": buffer[offset : offset + 7]}).data["y"]
    read = read_packed(write_packed(tmp_path / "file.safetensors", values))
    chains = sample(model, {"y": Y}, ChEES, draws=250, warmup=8, chains=16, compile=False, progress=False)
    assert given.numel() == 7
    assert all(t.data_ptr() % 64 == 0 for t in (given, *read.values(), *loaded.draws.values(), *loaded.params.values()))
    assert all(t.data_ptr() % 64 == 0 for t in chains.draws.values())


@pytest.mark.parametrize("kernel", [None, ChEES, NUTS, HMC], ids=["fit", "ChEES", "NUTS", "HMC"])
def test_a_result_goes_to_another_process_and_goes_on_there(kernel: Any) -> None:
    lengths = {"draws": 8, "warmup": 8, "chains": 4 if kernel in (ChEES, NUTS) else 1, "compile": False}
    result = sample(model, {"y": Y}, kernel, progress=False, **lengths) if kernel else fitted()
    sent = pickle.loads(cloudpickle.dumps(result))
    assert not sent.bound.memo
    same(sent.draws, result.draws)
    same(posterior_predictive(sent, seed=3), posterior_predictive(result, seed=3))
    assert sent.idata.equals(result.idata)
    assert str(sent.diagnosis) == str(result.diagnosis)
    if kernel is not HMC:
        same(sent.draw(7, seed=2), result.draw(7, seed=2))
