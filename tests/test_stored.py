"""Draws of chains in files: open_draws reads them while the run goes on, and a Result maps those of long chains."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import arviz_stats as azs
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from test_checkpoint import Killed, Killing, labelled, labels, model, same
from torch import Tensor

from inference import Checkpoint, Result, open_draws, sample
from inference.checkpoint import FILE, LOCK, CheckpointError
from inference.kernels import NUTS, ChEES, Gibbs
from inference.runners import drawn

SHORT = partial(NUTS, max_tree_depth=2)
Y = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])


def run(pair: Any = model, kernel: Any = SHORT, **more: Any) -> Result:
    chosen = {"draws": 110, "warmup": 50, "chains": 3, "compile": False, "progress": False, **more}
    return sample(pair, Y, kernel, **chosen)


def equal_so_far(tree: xr.DataTree, whole: Result) -> int:
    """The number of draws of a store, which are the first ones of a whole run in values, types, names and labels."""
    count = tree["posterior"].sizes["draw"]
    for group in ("posterior", "sample_stats"):
        expected = whole.idata[group].to_dataset().isel(draw=slice(0, count))
        found = tree[group].to_dataset()
        if group == "posterior":
            # What is derived from the draws of the chains is not there.
            expected = expected[list(found.data_vars)]
        xr.testing.assert_equal(found, expected)
        assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in expected.items()}
    assert set(map(str, tree["posterior"].data_vars)) == set(whole.draws)
    return int(count)


@pytest.mark.parametrize(
    ("pair", "kernel", "kills"),
    [(model, ChEES, (9, 4)), (model, SHORT, (4, 2)), (labelled, Gibbs, (80, 40)), (labels, Gibbs, (80, 40))],
    ids=["ChEES", "NUTS", "Gibbs", "Gibbs alone"],
)
def test_draws_of_a_killed_run_are_the_first_of_a_whole_one(
    pair: Any, kernel: Any, kills: tuple[int, ...], tmp_path: Path
) -> None:
    whole, counts = run(pair, kernel), []
    for left in kills:
        with pytest.raises(Killed):
            run(pair, kernel, checkpoint=Killing(tmp_path, left))
        counts.append(equal_so_far(open_draws(tmp_path), whole))
    assert 0 < counts[0] < counts[1] < 110
    same(run(pair, kernel, checkpoint=tmp_path), whole)
    assert equal_so_far(open_draws(tmp_path), whole) == 110


def test_draws_of_a_run_that_goes_on_are_read_by_arviz(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watched(Checkpoint):
        due = True

        def write(self, state: Any, draws: Any = None) -> bool:
            written = super().write(state, draws)
            if draws is not None:
                tree = open_draws(self.folder)
                seen.append(tree["posterior"].sizes["draw"])
                assert len(azs.summary(tree)) == 3
                one = xr.open_datatree(max(self.folder.glob("*.nc")), engine="h5netcdf")
                assert one["posterior"].draw[-1] == seen[-1] - 1
                one.close()
            return written

    run(checkpoint=Watched(tmp_path))
    assert seen == [25, 50, 75, 100, 110]


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draws in five files, of 25, and of 10 in the last one."""
    folder = tmp_path_factory.mktemp("parted")
    run(checkpoint=Killing(folder, 0))
    assert len(list(folder.glob("*.nc"))) == 5
    return folder


KEYS: list[dict[str, Any]] = [
    {},
    {"draw": 0},
    {"draw": -1},
    {"draw": 60, "chain": 1},
    {"draw": slice(20, 30)},
    {"draw": slice(None, None, 7), "chain": slice(1, 3)},
    {"draw": slice(100, 10, -9)},
    {"draw": slice(5, 5)},
    {"draw": [3, 99, 99, 25, 0]},
    {"draw": [24, 25], "chain": [2, 0], "mu_dim_0": 1},
    {"draw": xr.DataArray([1, 105], dims="pair"), "chain": xr.DataArray([0, 2], dims="pair")},
]


@pytest.mark.parametrize("key", KEYS, ids=map(str, range(len(KEYS))))
def test_what_is_asked_of_joined_files_is_what_is_in_them(key: dict[str, Any], parted: Path) -> None:
    lazy = open_draws(parted)["posterior"]["mu"]
    whole = xr.concat(
        [xr.load_dataset(p, group="posterior", engine="h5netcdf") for p in sorted(parted.glob("*.nc"))], "draw"
    )["mu"]
    xr.testing.assert_identical(lazy.isel(key).load(), whole.isel(key))


def is_mapped(address: int, folder: Path) -> bool:
    """Whether an address is one of a file that stood in a folder."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(v, 16) for v in line.split()[0].split("-"))
        if low <= address < high:
            return str(folder) in line
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads the mappings of a process as Linux shows them")
@pytest.mark.parametrize("held", [0, 2**40])
def test_many_draws_are_mapped_and_the_same(held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run()
    monkeypatch.setattr(drawn, "HELD", held)
    monkeypatch.setattr(drawn, "IN_MEMORY", 0)
    kept = Checkpoint(tmp_path, every=1e6)
    for again in (run(checkpoint=kept), run(checkpoint=kept)):
        same(again, whole)
        assert is_mapped(again.draws["mu"].data_ptr(), tmp_path)
        assert is_mapped(again.idata["posterior"]["mu"].values.ctypes.data, tmp_path)
        assert again.diagnosis.table.equals(whole.diagnosis.table)
    # With no room for more than a group there is a file for each.
    assert len(list(tmp_path.glob("*.nc"))) == (1 if held else 5)
    assert {p.name for p in tmp_path.iterdir() if p.suffix != ".nc"} == {FILE, LOCK}


def test_names_that_files_do_not_take_cost_no_draws(tmp_path: Path) -> None:
    class Odd:
        """A site with a slash, and one whose dimension has its own name."""

        guide = None

        def __init__(self) -> None:
            self.dims, self.coords = {"w": ("w",)}, {"w": ["a", "b"]}

        def model(self, y: Tensor) -> None:
            mu = pyro.sample("a/mu", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(mu + w, 1.0).to_event(1), obs=y)

    whole = run(Odd())
    with pytest.raises(Killed):
        run(Odd(), checkpoint=Killing(tmp_path, 5))
    tree = open_draws(tmp_path)
    assert tree["posterior"]["a_mu"].attrs["site"] == "a/mu"
    same(run(Odd(), checkpoint=tmp_path), whole)


def test_a_folder_without_draws_is_refused_in_one_line(parted: Path, tmp_path: Path) -> None:
    for wrong in (None, 3, "", " "):
        with pytest.raises(ValueError, match=r"^folder: expected the path of a folder, got "):
            open_draws(wrong)  # type: ignore[arg-type]
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"^folder: expected draws of chains .* in .*, got none$"):
            open_draws(folder)
    (tmp_path / "nuts").mkdir()
    (tmp_path / "nuts" / "draws-00000.nc").touch()
    with pytest.raises(FileNotFoundError, match="got none, but some in its folders nuts$"):
        open_draws(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", "half", "again", None], ids=range(5))
def test_a_damaged_file_of_draws_is_refused_by_name(content: Any, parted: Path, tmp_path: Path) -> None:
    for path in parted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    place = tmp_path / "draws-00002.nc"
    before = place.read_bytes()
    changed = {"half": before[: len(before) // 2], "again": (tmp_path / "draws-00001.nc").read_bytes()}
    if content is None:
        place.unlink()
    else:
        place.write_bytes(changed.get(content, content))
        with pytest.raises(ValueError, match=r"draws-00002\.nc: expected (a file of draws|draws from number 50), "):
            open_draws(tmp_path)
    with pytest.raises(CheckpointError, match=r"^checkpoint: .*draws-00002\.nc: expected "):
        run(checkpoint=tmp_path)
    assert (tmp_path / FILE).read_bytes() == (parted / FILE).read_bytes()


def test_further_draws_follow_those_that_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run().extend(20, seed=3)
    monkeypatch.setattr(drawn, "IN_MEMORY", 0)
    found = run(checkpoint=tmp_path).extend(20, seed=3)
    assert [n for n in expected.draws if not torch.equal(expected.draws[n], found.draws[n])] == []
    back = Result.load(found.save(tmp_path / "saved"), model, Y)
    assert [n for n in found.draws if not torch.equal(back.draws[n], found.draws[n])] == []
