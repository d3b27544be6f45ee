"""Runs killed by SIGKILL at random times go on, and end in the numbers of a run that was not killed.

``pytest -m slow tests/test_kills.py -s`` kills fifty-five, and prints how many of each kind.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import seeds
from killed_work import CASES

from inference import open_draws
from inference.checkpoint import FILE
from inference.core.packing import read_packed

WORK = Path(__file__).parent / "killed_work.py"
KILLS = 5
"""Kills of each of eleven cases in the long test."""


def started(case: str, folder: str) -> subprocess.Popen[str]:
    group = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if case == "torchrun" else []
    command = [sys.executable, *group, str(WORK), case, folder, "0.2"]
    # A session of its own, to kill the processes that it starts with it.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def ends(process: subprocess.Popen[str]) -> str:
    with process:
        assert process.stdout is not None
        out = process.stdout.read()
    assert process.returncode == 0
    return out.strip()


def progress(folder: Path) -> dict[Path, int]:
    """Steps, or transitions, in each checkpoint below a folder; every file has to be whole."""
    found = {}
    for path in folder.rglob(FILE):
        state = read_packed(path)["state"]
        found[path] = len(state["losses"]) if "losses" in state else state.get("done", 0)
    return found


def drawn(folder: Path) -> dict[str, np.ndarray]:
    """The draws that chains have written; none before the first."""
    if not list(folder.glob("draws-*.nc")):
        return {}
    return {str(n): v.values for n, v in open_draws(folder)["posterior"].items()}


def killed(case: str, folder: Path, kills: int) -> int:
    """Kill a run so many times, let it end, and compare it with a whole one; return how often it was killed."""
    draw = random.Random(seeds.SHIFT)
    process = started(case, "-")
    begun = time.perf_counter()
    whole = ends(process)
    took, at, count = time.perf_counter() - begun, dict[Path, int](), 0
    parts = []
    while count < kills:
        process = started(case, str(folder))
        try:
            process.wait(draw.uniform(0.0, took))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            count += 1
        else:
            # It was over before: the next one begins anew.
            assert ends(process) == whole
            shutil.rmtree(folder)
            at, parts = {}, []
            continue
        now = progress(folder)
        # Nothing that was on disk is lost. A recipe takes the folder of a seed away when it has ended.
        assert case == "reproduce" or all(now[path] >= steps for path, steps in at.items())
        at = now
        parts.append(drawn(folder))
    assert ends(started(case, str(folder))) == whole
    # What could be read after each kill are the first of all draws.
    last = drawn(folder)
    for part in parts:
        assert [n for n, v in part.items() if not np.array_equal(v, last[n][:, : v.shape[1]])] == []
    # Over, it is not run again.
    assert ends(started(case, str(folder))) == whole
    return count


def test_a_killed_run_ends_as_a_whole_one(tmp_path: Path) -> None:
    killed("ChEES", tmp_path / "run", 1)


@pytest.mark.slow
def test_a_killed_group_of_processes_ends_as_a_whole_one(tmp_path: Path) -> None:
    whole, process = started("torchrun", "-"), started("torchrun", str(tmp_path))
    while not any(progress(tmp_path).values()):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert ends(started("torchrun", str(tmp_path))) == ends(whole)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_fifty_killed_runs_end_as_whole_ones(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = killed(case, tmp_path / "run", KILLS)
    with capsys.disabled():
        print(f"{case}: killed {count} times, ended as a whole run")
