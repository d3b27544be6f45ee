"""Data that are read by rows: memory-mapped arrays, tensors of files, and datasets."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from inference import (
    Result,
    calibrate,
    fit,
    ksd,
    log_evidence,
    log_weights,
    loo,
    pointwise_log_likelihood,
    posterior_predictive,
    sample,
    sensitivity,
)
from inference.checkpoint import CheckpointError
from inference.core import source
from inference.core.minibatch import Permutation
from inference.core.packing import fingerprints
from inference.draws import scoring
from inference.kernels import NUTS
from ppl_models import GaussianNaiveBayes

QUIET: dict[str, Any] = {"steps": 25, "batch": 40, "draws": 60, "progress": False}


def model(y: Tensor, w: Tensor | None = None, size: int | None = None, rows: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    with pyro.plate("rows", size or len(y), subsample=rows):
        sd = torch.ones(len(y)) if w is None else 1 / w
        pyro.sample("y", dist.Normal(mu, sd[:, None]).to_event(1), obs=y)


def pair() -> Any:
    return model, AutoNormal(model)


@pytest.fixture
def y() -> np.ndarray:
    return np.random.default_rng(0).normal(2.0, 1.0, (300, 3))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits at which a small array is read by rows."""
    monkeypatch.setattr(source, "MAPPED_NUMBERS", 0)
    monkeypatch.setattr(source, "SAMPLE", 50)
    monkeypatch.setattr(source, "BLOCK_ROWS", 64)
    monkeypatch.setattr(scoring, "JOINT_ROWS", 64)


def mapped(path: Path, values: np.ndarray) -> np.ndarray:
    written = np.memmap(path, values.dtype, "w+", shape=values.shape)
    written[:] = values
    written.flush()
    return np.memmap(path, values.dtype, "r", shape=values.shape)


class Rows(Dataset):
    """Items that are mappings."""

    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, k: int) -> dict[str, Any]:
        return {n: v[k] for n, v in self.columns.items()}


def of_file(path: Path, values: np.ndarray) -> Tensor:
    mapped(path, values.astype(np.float32))
    return torch.from_file(str(path), shared=True, size=values.size, dtype=torch.float32).reshape(values.shape)


@pytest.mark.usefixtures("small")
def test_rows_that_are_read_give_the_fit_of_rows_in_memory(tmp_path: Path, y: np.ndarray) -> None:
    whole = fit(pair(), y, **QUIET)
    single = torch.as_tensor(y).float()
    kinds = {
        "a memory-mapped array": mapped(tmp_path / "y", y),
        "a part of one": mapped(tmp_path / "more", np.concatenate([y, y]))[: len(y)],
        "a tensor of a file": of_file(tmp_path / "tensor", y),
        "a dataset of tuples": TensorDataset(single),
        "a dataset of mappings": Rows(y=single),
    }
    for kind, data in kinds.items():
        result = fit(pair(), data, **QUIET)
        assert result.bound.source is not None, kind
        np.testing.assert_array_equal(result.losses, whole.losses, err_msg=kind)
        torch.testing.assert_close(log_weights(result), log_weights(whole), rtol=1e-4, atol=1e-4, msg=kind)
        # What shows single rows shows some of them, whose densities are their own.
        likelihood = result.idata["log_likelihood"]["y"]
        assert likelihood.shape == (1, 60, 50)
        expected = dist.Normal(result.draws["mu"][:, None], 1.0).to_event(1).log_prob(single[result.bound.data["rows"]])
        np.testing.assert_allclose(likelihood[0], expected, rtol=1e-4)
        assert result.idata.attrs["rows"] == "50 of 300, evenly spaced"


@pytest.mark.usefixtures("small")
def test_data_of_several_names_are_read_together(tmp_path: Path, y: np.ndarray) -> None:
    w = np.random.default_rng(1).uniform(0.5, 2.0, len(y))
    whole = fit(pair(), {"y": y, "w": w}, **QUIET)
    for data in (
        {"y": mapped(tmp_path / "y", y), "w": w},
        TensorDataset(*(torch.as_tensor(v).float() for v in (y, w))),
    ):
        np.testing.assert_array_equal(fit(pair(), data, **QUIET).losses, whole.losses)


@pytest.mark.usefixtures("small")
def test_a_fit_of_read_rows_goes_on_and_is_saved(tmp_path: Path, y: np.ndarray) -> None:
    data, kept = mapped(tmp_path / "y", y), tmp_path / "kept"
    whole = fit(pair(), data, **QUIET)
    fit(pair(), data, checkpoint=kept, **QUIET)
    np.testing.assert_array_equal(fit(pair(), data, checkpoint=kept, **QUIET).losses, whole.losses)
    with pytest.raises(CheckpointError, match="data y"):
        fit(
            pair(),
            mapped(tmp_path / "other", np.where(np.arange(300)[:, None] == 299, 0.0, y)),
            checkpoint=kept,
            **QUIET,
        )
    found = Result.load(whole.save(tmp_path / "saved"), pair(), data)
    assert torch.equal(log_weights(found), log_weights(whole))


def test_a_hash_by_blocks_is_that_of_the_whole(y: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BLOCK_ROWS", 64)
    assert source.Source({"y": y}).fingerprints() == fingerprints({"y": y})


@pytest.mark.usefixtures("small")
def test_the_checks_of_a_pair_see_all_rows(tmp_path: Path, y: np.ndarray) -> None:
    values = y.astype(np.float32)
    values[201, 1] = np.nan
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        fit(GaussianNaiveBayes(3, 2), {"x": mapped(tmp_path / "y", values)}, **QUIET)


@pytest.mark.usefixtures("small")
def test_what_cannot_be_read_by_rows_is_refused_in_a_line(tmp_path: Path, y: np.ndarray) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(y)

    rows = TensorDataset(torch.as_tensor(y).float())
    with pytest.raises(ValueError, match="expected a map-style Dataset"):
        fit(pair(), Stream(), **QUIET)
    with pytest.raises(ValueError, match=r"y: expected data in memory, got a Dataset; fit\(batch=...\)"):
        fit(pair(), rows, progress=False)
    with pytest.raises(ValueError, match="y: expected data in memory, got a Dataset"):
        sample(model, rows)
    with pytest.raises(ValueError, match="arguments size and rows"):
        fit((lambda y: None, lambda y: None), rows, **QUIET)
    with pytest.raises(ValueError, match="expected a Dataset alone, .* got also 1 more"):
        fit(pair(), {"y": rows, "w": np.ones(300)}, **QUIET)
    with pytest.raises(ValueError, match="expected the same number of rows"):
        fit(pair(), {"y": mapped(tmp_path / "y", y), "w": mapped(tmp_path / "w", np.ones(299))}, **QUIET)
    with pytest.raises(ValueError, match="items of up to 2 parts"):
        fit(pair(), TensorDataset(*[torch.zeros(99)] * 5), **QUIET)
    with pytest.raises(ValueError, match="data: expected the rows to score"):
        log_evidence(fit(pair(), rows, **QUIET), progress=False)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 17, 1000])
def test_an_order_that_is_computed_is_a_permutation(count: int) -> None:
    random = torch.Generator().manual_seed(0)
    orders = [Permutation(count, random)(torch.arange(count)) for _ in range(20)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(count))
    if count == 1000:
        # As of independent uniform orders: the correlation of two has standard deviation 1 / sqrt(999).
        stacked = torch.stack([torch.arange(count), *orders]).double()
        assert torch.corrcoef(stacked).fill_diagonal_(0).abs().max() < 5 / 999**0.5
        steps = torch.stack(orders).diff(dim=1).abs().double()
        assert abs(steps.mean() - 1001 / 3) < 5 * 236 / len(steps.flatten()) ** 0.5


def test_epochs_of_many_rows_see_each_row_once(y: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.runners.descent.PERMUTED_ROWS", 100)
    seen: list[int] = []

    def watched(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        seen.extend([] if rows is None else rows.tolist())
        model(y, None, size, rows)

    fit((watched, AutoNormal(model)), y, batch=70, steps=10, compile=False, draws=4, progress=False)
    epochs = [seen[:300], seen[300:600]]
    assert all(sorted(e) == list(range(300)) for e in epochs) and epochs[0] != epochs[1]


LIMITED = """
import json, resource, sys
import numpy as np, pyro, torch
import pyro.distributions as dist
from pyro.infer.autoguide import AutoNormal
from inference import fit

path, rows, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
y = np.memmap(path, np.float32, "r", shape=(rows, 4))

def model(y, size=None, rows=None):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(4), 3.0).to_event(1))
    with pyro.plate("rows", size or len(y), subsample=rows):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)

resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    np.array(y)
    refused = False
except MemoryError:
    refused = True
guide = AutoNormal(model, init_loc_fn=lambda site: torch.full((4,), 3.0))
result = fit((model, guide), y, batch=200, steps=80, learning_rate=0.2, compile=False, progress=False)
print(json.dumps({"refused": refused, "mean": result.draws["mu"].mean(0).tolist()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process without mapped files")
def test_a_fit_on_an_array_larger_than_the_memory_of_its_process_ends_right(tmp_path: Path) -> None:
    rows, limit = 300_000_000, 2**31
    path = tmp_path / "y"
    with path.open("wb") as file:
        # Rows of zeros, which take no space on the disk.
        file.truncate(rows * 16)
    command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(path), str(rows), str(limit)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    assert rows * 16 > 2 * limit and found["refused"]
    # The posterior is N(0, 1 / rows); the noise of the last steps is left.
    assert np.abs(found["mean"]).max() < 0.3


@pytest.mark.usefixtures("small")
def test_what_is_said_of_all_rows_is_not_computed_from_some(tmp_path: Path, y: np.ndarray) -> None:
    result = fit(pair(), mapped(tmp_path / "y", y), **QUIET)
    asked: dict[str, Any] = {
        "ksd": ksd,
        "loo": loo,
        "sensitivity": sensitivity,
        "pointwise_log_likelihood": pointwise_log_likelihood,
        "calibrate": calibrate,
    }
    for name, function in asked.items():
        with pytest.raises(ValueError, match="expected all rows in memory .* got 50 of 300, evenly spaced"):
            raise AssertionError(f"{name}: {function(result)}")
    assert pointwise_log_likelihood(result, y[:7].astype(np.float32)).shape == (60, 7)


@pytest.mark.usefixtures("small")
def test_a_size_that_is_asked_for_is_not_that_of_the_rows_in_memory(tmp_path: Path, y: np.ndarray) -> None:
    def plain(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        with pyro.plate("rows", size or len(y), subsample=rows):
            pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)

    result = fit((plain, AutoNormal(plain)), mapped(tmp_path / "y", y), **QUIET)
    assert posterior_predictive(result, size=5)["y"].shape == (60, 5, 3)


@pytest.mark.usefixtures("small", "alone")
def test_chains_of_a_memory_mapped_array_go_on_from_a_folder_with_all_of_its_rows(
    tmp_path: Path, y: np.ndarray
) -> None:
    data = mapped(tmp_path / "y", y)
    chains = sample(model, data, NUTS, draws=20, warmup=30, chains=2, progress=False)
    found = Result.load(chains.save(tmp_path / "saved"), model, data)
    assert found.bound.source is None and found.bound.rows == 300
    for name, draws in chains.extend(10).draws.items():
        assert torch.equal(found.extend(10).draws[name], draws)
    # So does a fit that took all rows at each step.
    whole = fit(pair(), data, steps=5, draws=10, progress=False)
    assert Result.load(whole.save(tmp_path / "whole"), pair(), data).bound.source is None
