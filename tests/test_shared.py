"""Fits whose rows are shared among processes: two processes of gloo take the steps of one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shared_work
from torch import distributed

from inference.objectives import Compiled, Shared

WORK = Path(shared_work.__file__)
GLOO = distributed.is_available() and distributed.is_gloo_available()
pytestmark = pytest.mark.skipif(not GLOO, reason="torch was built without gloo")


def together(case: str, folder: Path, count: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Processes of one group, after their ends."""
    command = [sys.executable, str(WORK), case]
    running = [
        subprocess.Popen([*command, str(k), str(count), str(folder)], stderr=subprocess.PIPE, text=True)
        for k in range(count)
    ]
    said = [process.communicate(timeout=300)[1] for process in running]
    return [subprocess.CompletedProcess(p.args, p.returncode, stderr=s) for p, s in zip(running, said, strict=True)]


def assert_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(got["losses"], expected["losses"], rtol=1e-5)
    assert got["params"].keys() == expected["params"].keys()
    for name, value in got["params"].items():
        np.testing.assert_allclose(value, expected["params"][name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    ended = together("alike", tmp_path)
    assert [p.returncode for p in ended] == [0, 0], ended
    first, second = (json.loads((tmp_path / f"alike-{k}.json").read_text()) for k in (0, 1))
    for case, expected in shared_work.alike().items():
        assert_close(first[case], expected)
        assert first[case] == second[case], f"{case}: the processes have different results"
    assert first["compiled"]["execution"] == "fused"
    # The second process began elsewhere, and took the values of the first.
    expected = shared_work.program()
    assert_close(first["program"], expected)
    assert first["program"] == second["program"]
    assert first["program"]["whole"] == pytest.approx(expected["whole"], rel=1e-5)
    noisy = [r["noisy"] for r in (first, second)]
    assert noisy[0].pop("seen") != noisy[1].pop("seen"), "the processes have the same noise"
    assert noisy[0] == noisy[1], "the processes have different results"
    said = first["refusals"]
    assert "size and rows" in said["pair"] and "M-step" in said["objective"]
    assert said["batch"] == "batch: expected a row per process, 2, got 1"
    assert said["data"].startswith("y: expected the same in all processes")


def test_a_process_that_fails_ends_the_group_with_its_error_and_the_checkpoint_stands(tmp_path: Path) -> None:
    first, second = together("failing", tmp_path)
    told = "ArithmeticError: the model of one process has failed"
    assert (first.returncode, second.returncode) == (1, 1)
    assert second.stderr.strip().endswith(told)
    assert f"rank 1 failed, and with it the group: {told}" in first.stderr
    assert list((tmp_path / "kept").glob("*.safetensors"))


def test_a_process_that_dies_ends_the_group(tmp_path: Path) -> None:
    first, second = together("dying", tmp_path)
    assert (first.returncode, second.returncode) == (1, 3)
    assert first.stderr.strip()


def test_shared_says_what_it_needs() -> None:
    with pytest.raises(TypeError, match="objective: expected an ELBO with loss_and_grads, got object"):
        Shared(object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Shared.Compiled"):
        Compiled(Shared(shared_work.Trace_ELBO()))
