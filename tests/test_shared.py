"""Fits whose rows are shared among processes: two processes of gloo take the steps of one."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shared_work
import torch
import xarray as xr
from torch import distributed

from inference import diagnose, isolated
from inference.checkpoint import FILE
from inference.core import group
from inference.core.packing import read_packed
from inference.further import Continuation, FurtherDraws
from inference.kernels import NUTS, ChEES
from inference.objectives import Compiled, Shared
from inference.runners import ranks

WORK = Path(shared_work.__file__)
GLOO = distributed.is_available() and distributed.is_gloo_available()
pytestmark = pytest.mark.skipif(not GLOO, reason="torch was built without gloo")


def together(case: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Two processes of one group."""
    command = [sys.executable, str(WORK), case]
    return [subprocess.Popen([*command, str(k), "2", str(folder)], stderr=subprocess.PIPE, text=True) for k in range(2)]


def ends(running: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and last words of each process."""
    said = [process.communicate(timeout=300)[1] for process in running]
    return [(p.returncode, text.strip()) for p, text in zip(running, said, strict=True)]


def results(case: str, folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{case}-{k}.json").read_text()) for k in range(2)]


def assert_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(got["losses"], expected["losses"], rtol=1e-5)
    assert got["params"].keys() == expected["params"].keys()
    for name, value in got["params"].items():
        np.testing.assert_allclose(value, expected["params"][name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    running = together("alike", tmp_path)
    whole, expected = shared_work.alike(), shared_work.program()
    assert ends(running) == [(0, "")] * 2
    first, second = results("alike", tmp_path)
    for case, one in whole.items():
        assert_close(first[case], one)
        assert first[case] == second[case], f"{case}: the processes have different results"
        assert first[case]["execution"] == ("traced" if "traced" in case else "eager")
    # The second process began elsewhere, and took the values of the first.
    assert_close(first["program"], expected)
    assert first["program"] == second["program"]
    assert first["program"]["whole"] == pytest.approx(expected["whole"], rel=1e-5)
    noisy = [r["noisy"] for r in (first, second)]
    assert noisy[0].pop("seen") != noisy[1].pop("seen"), "the processes have the same noise"
    assert noisy[0] == noisy[1], "the processes have different results"
    told = "ArithmeticError: the model of one process has failed"
    assert second["resumed"].pop("failed") == told
    assert first["resumed"].pop("failed") == f"RuntimeError: rank 1 failed, and with it the group: {told}"
    assert first["resumed"] == second["resumed"] == noisy[0], "a fit that went on has other numbers"
    said = first["refusals"]
    assert "size and rows" in said["pair"] and "M-step" in said["objective"]
    assert said["batch"] == "batch: expected a row per process, 2, got 1"
    assert said["data"].startswith("y: expected the same in all processes")


def test_two_processes_run_an_ensemble_each_and_have_the_chains_of_both(tmp_path: Path) -> None:
    running = together("chains", tmp_path)
    (tmp_path / "one").mkdir()
    whole = {k.__name__: shared_work.chains(tmp_path / "one", 0, k) for k in (ChEES, NUTS)}
    assert ends(running) == [(0, "")] * 2
    first, second = results("chains", tmp_path)
    assert first == second, "the processes have different results"
    for name, one in whole.items():
        both = first[name]
        assert (both["chains"], one["chains"]) == (8, 4)
        assert both["draws"][:200] == one["draws"], "the first ensemble is not that of one process"
        assert not set(both["draws"][200:]) & set(one["draws"]), "the ensembles have the same noise"
        assert both["kept"] and one["kept"]
        assert both["others"][:20] == one["others"] and len({*both["others"]}) > 30
        extended = np.reshape(both["extended"], (8, 60))
        assert np.array_equal(extended[:, :50].ravel(), both["draws"])
        assert len({*extended[:, 50:].ravel()}) > 60
        assert len({*both["further"]}) == 6
        assert "r_hat_nested" in both["columns"] and "r_hat_nested" not in one["columns"]
        assert 1 <= both["nested"] < 1.2
    # A mean of 8 chains of 50 draws around the conjugate one, with room for chains that are not independent draws.
    assert abs(np.mean(first["ChEES"]["draws"]) - 8.5 / 4.01) < 0.2


@pytest.mark.parametrize(("gap", "told"), [(0.0, False), (0.5, True), (3.0, True)])
def test_ensembles_that_disagree_are_told(gap: float, told: bool) -> None:
    """Two ensembles of eight chains each, at the same place or apart in one quantity of thirty."""
    draws = np.random.default_rng(0).normal(size=(16, 200, 30))
    draws[8:, :, 7] += gap
    posterior = xr.Dataset({"mu": (("chain", "draw", "k"), draws)}, attrs={"processes": 2})
    stats = xr.Dataset({"diverging": (("chain", "draw"), np.zeros((16, 200), dtype=bool))})
    diagnosis = diagnose(xr.DataTree.from_dict({"posterior": posterior, "sample_stats": stats}))
    assert any("Nested R-hat is" in line and "mu[7]" in line for line in diagnosis.advice) == told
    assert diagnosis.converged == (not told)


@dataclass(frozen=True)
class _Noisy(FurtherDraws):
    """Chains that are all noise."""

    def __call__(self, size: int, seed: int) -> dict[str, torch.Tensor]:
        return {"z": torch.rand(size)}

    def extend(self, draws: int) -> Continuation:
        return Continuation(self(draws, 0), {"lp": np.zeros((1, draws))}, 0.0, self)


@pytest.mark.parametrize("ask", [lambda more: more(4, 0)["z"], lambda more: more.extend(2).draws["z"]])
def test_ensembles_go_on_with_noise_of_their_own(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_rank(rank: int) -> list[float]:
        for module in (group, ranks):
            monkeypatch.setattr(module, "ranks", lambda: (rank, 2))
        with isolated(0):
            return ask(ranks._OfAll(_Noisy(), 1))[:2].tolist()

    monkeypatch.setattr(ranks, "gathered", lambda value: [value, value])
    monkeypatch.setattr(ranks, "from_first", lambda make: make())
    assert not set(of_rank(0)) & set(of_rank(1))
    assert of_rank(1) == of_rank(1)


@pytest.mark.slow
def test_two_processes_run_compiled_programs_as_one_does(tmp_path: Path) -> None:
    running = together("fused", tmp_path)
    whole = shared_work.fused()
    assert ends(running) == [(0, "")] * 2
    first, second = results("fused", tmp_path)
    for case, one in whole.items():
        assert_close(first[case], one)
        assert first[case] == second[case], f"{case}: the processes have different results"
        assert first[case]["execution"] == "fused"


def test_a_process_that_dies_ends_the_group(tmp_path: Path) -> None:
    (first, said), (second, _) = ends(together("dying", tmp_path))
    assert (first, second) == (1, 3)
    assert said.startswith("RuntimeError: rank 0: another process of the group has ended or does not answer")


@pytest.mark.skipif(sys.platform == "win32", reason="stops a process by a signal")
def test_a_process_that_hangs_ends_the_group_and_the_checkpoint_stands(tmp_path: Path) -> None:
    first, second = together("hanging", tmp_path)
    try:
        said = first.communicate(timeout=120)[1].strip()
        # It stands still: nothing but the time-out of the other has ended.
        assert second.poll() is None
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 1
    assert said.startswith("RuntimeError: rank 0: another process of the group has ended or does not answer")
    assert len(said.splitlines()) == 1
    taken = len(read_packed(tmp_path / "kept" / FILE)["state"]["losses"])
    assert 0 < taken < 20
    (tmp_path / "hanging.store").unlink()
    assert ends(together("hanging", tmp_path)) == [(0, "")] * 2
    one, other = results("hanging", tmp_path)
    # It went on from there, to the end of a fit in which no process stood still.
    assert len(one["seen"]) < one["whole"] - taken // 2
    assert one["losses"] == other["losses"]
    assert len(one["losses"]) == 20


def test_shared_says_what_it_needs() -> None:
    with pytest.raises(TypeError, match="objective: expected an ELBO with loss_and_grads, got object"):
        Shared(object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Shared.Compiled"):
        Compiled(Shared(shared_work.Trace_ELBO()))
