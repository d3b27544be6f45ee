"""Files that are whole after kills, full disks and failing writers, and while others read them."""

import errno
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import arviz_base as azb
import numpy as np
import pytest
import xarray as xr

from inference import write_whole

WRITING = """
import importlib.util, itertools, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)

def slowly(path):
    with path.open("w") as file:
        for _ in range(20):
            file.write(str(turn % 10) * 1000)
            file.flush()
            time.sleep(0.001)

for turn in itertools.count():
    files.write_whole(sys.argv[2], slowly)
    print(turn, flush=True)
"""


def test_a_program_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, files = tmp_path / "numbers.txt", Path(sys.modules[write_whole.__module__].__file__)
    pick, seen, cut = random.Random(0), set(), 0
    for _ in range(12):
        command = [sys.executable, "-c", WRITING, str(files), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(pick.uniform(0, 0.1))
            process.kill()
        text = path.read_text()
        assert len(text) == 20_000 and len(set(text)) == 1
        seen.add(text[0])
        cut += len(list(tmp_path.iterdir())) - 1
    assert cut, "no write was cut: the test would pass without write_whole"


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("good")

    def full(new: Path) -> None:
        new.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(new: Path) -> None:
        new.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(OSError, match="No space left on device: .*table.csv"):
        write_whole(path, full)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


LARGE = """
import resource, sys
import arviz_base as azb
import numpy as np
from inference.core.files import write_whole
from inference.idata import write_netcdf
from functools import partial

idata = azb.from_dict({"posterior": {"x": np.random.default_rng(0).normal(size=(4, 500, 50))}})
idata.attrs["ended"] = "no"
write_whole(sys.argv[1], partial(write_netcdf, idata))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
idata.attrs["ended"] = "yes"
write_whole(sys.argv[1], partial(write_netcdf, idata))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of the size of files")
def test_a_file_of_draws_that_finds_no_room_ends_in_an_error_and_not_in_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "draws.nc"
    ended = subprocess.run([sys.executable, "-c", LARGE, str(path)], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert re.fullmatch(rf"OSError: \[Errno \d+\] .*: '{path}'", ended.stderr.splitlines()[-1])
    assert "Exception ignored" not in ended.stderr
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size > 600_000
    assert xr.open_datatree(path).attrs["ended"] == "no"


def test_the_new_file_has_the_mode_and_the_link_of_the_old_one(tmp_path: Path) -> None:
    path, link = tmp_path / "one.txt", tmp_path / "link.txt"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    assert write_whole(link, lambda new: new.write_text("new")) == link
    assert link.is_symlink() and path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    before = os.umask(0o022)
    try:
        fresh = write_whole(tmp_path / "two.txt", lambda new: new.write_text("new"))
    finally:
        os.umask(before)
    assert fresh.stat().st_mode & 0o777 == 0o644


def test_a_file_that_a_notebook_holds_open_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "svi.nc"
    old, new = (azb.from_dict({"posterior": {"mu": np.full((1, 4), value)}}) for value in (1.0, 2.0))
    write_whole(path, lambda place: old.to_netcdf(str(place)))
    held = xr.open_datatree(path)
    write_whole(path, lambda place: new.to_netcdf(str(place)))
    assert float(held.posterior["mu"].mean()) == 1.0
    held.close()
    assert float(xr.open_datatree(path).posterior["mu"].mean()) == 2.0
