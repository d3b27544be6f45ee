"""Compiled programs on the disk: found by what decides them, whole, bounded, and only from a folder of one's own."""

import errno
import hashlib
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import seeds
import torch
from torch import Tensor

from inference import sample
from inference.compiler import fuse, policy, store
from inference.compiler.capture import Untraceable
from inference.compiler.package import Package, write_package
from inference.core.handlers import isolated
from inference.core.private import scan
from inference.kernels import NUTS, ChEES, hamiltonian

HERE = Path(__file__).parent

Y = torch.tensor([1.0, 2.0, 4.0, 1.5]).double()
RUN = "import test_store; test_store.report()"


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


quick = partial(sample, model, kernel=ChEES, draws=20, warmup=20, chains=8, progress=False)


def report() -> None:
    """Print how chains ran that were asked for nothing, their draws, and whether a compiler was imported."""
    if seeds.SHIFT:
        # As in the process of the tests.
        seeds.install()
    result = quick(Y, seed=3)
    digest = hashlib.sha256(result.draws["mu"].numpy().tobytes()).hexdigest()
    print(result.idata.attrs["execution"], digest, "torch._inductor.codecache" in sys.modules)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "programs"))
    monkeypatch.setattr(fuse, "_PROGRAMS", OrderedDict())
    return tmp_path / "programs"


def cumulated(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums of scaled rows, by a loop."""

    def body(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return carry + scale * row, (carry + scale * row).clone()

    if torch.compiler.is_compiling():
        return scan(body, torch.zeros_like(x[0]), x)  # type: ignore[no-any-return]
    sums = (scale * x).cumsum(0)
    return sums[-1], sums


EXAMPLE = (torch.randn(5, 3), torch.tensor(2.0))


def compiled(key: Any = "sums", **settings: Any) -> Callable[..., Any]:
    return fuse.looped(cumulated, key, EXAMPLE, tuple, **settings)


def test_a_program_gives_what_its_function_gives_for_other_values_of_the_shapes(tmp_path: Path) -> None:
    with fuse.quietly():
        write_package(cumulated, EXAMPLE, tmp_path / "sums.pt2", fuse.LOOP_OPTIONS)
    program = Package(tmp_path / "sums.pt2", EXAMPLE, tuple)
    for x in (EXAMPLE[0], torch.arange(15.0).reshape(5, 3)):
        torch.testing.assert_close(program(x, EXAMPLE[1]), cumulated(x, EXAMPLE[1]))
    for x in (torch.ones(6, 3), torch.ones(3, 5).T, torch.ones(5, 3).double()):
        with pytest.raises(ValueError, match="expected tensors of the shapes, strides and types"):
            program(x, EXAMPLE[1])


def test_chains_of_another_process_find_the_program_and_its_draws_are_the_same(folder: Path) -> None:
    assert quick(Y, seed=3).idata.attrs["execution"] == "traced"
    result = quick(Y, seed=3, compile=True)
    assert result.idata.attrs["execution"] == "fused"
    # In this process, and for other data of the shape.
    assert quick(Y + 1, seed=3).idata.attrs["execution"] == "fused"
    assert quick(Y[:3], seed=3).idata.attrs["execution"] == "traced"
    assert quick(Y, seed=3, compile=False).idata.attrs["execution"] == "traced"
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True)
    digest = hashlib.sha256(result.draws["mu"].numpy().tobytes()).hexdigest()
    assert ended.stdout.split() == ["fused", digest, "False"]


def test_a_program_is_of_its_key_its_threads_its_sources_and_this_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = store.place("key")
    assert place == store.place("key")
    assert store.place("other") != place
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    store._decided.cache_clear()
    assert store.place("key") != place
    monkeypatch.undo()
    store._decided.cache_clear()
    one, two = (fuse._threaded("key") for _ in range(2))
    assert one == two
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert fuse._threaded("key") != one


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Programs that are written, in place of compiling: each is its number."""
    files: list[Path] = []

    def write(function: Any, example: Any, path: Path, options: Any) -> None:
        files.append(path)
        path.write_bytes(b"program %d" % len(files))

    monkeypatch.setattr(fuse, "write_package", write)
    monkeypatch.setattr(fuse, "Package", lambda path, *_: path.read_bytes())
    return files


@pytest.mark.parametrize("damage", ["cut", "exchanged", "no hash", "gone", "none"])
def test_a_file_that_is_not_as_it_was_written_is_not_loaded(damage: str, folder: Path, written: list[Path]) -> None:
    assert compiled() == b"program 1"
    (path,) = folder.glob("*.pt2")
    fuse._PROGRAMS.clear()
    assert compiled() == b"program 1"
    if damage == "no hash":
        path.with_suffix(".sha256").unlink()
    elif damage == "gone":
        path.unlink()
    elif damage != "none":
        path.write_bytes(b"prog" if damage == "cut" else b"program 7")
    fuse._PROGRAMS.clear()
    assert compiled() == (b"program 1" if damage == "none" else b"program 2")
    assert store.load(path, lambda file: file.read_bytes()) == compiled()


def test_a_program_that_cannot_be_made_is_tried_again_after_as_much_work(
    folder: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no program")

    for key in ("sums", "others"):
        fuse.spend(key, 5)
    compiled()
    monkeypatch.setattr(fuse, "write_package", fail)
    with pytest.raises(RuntimeError, match="no program"):
        compiled("others")
    assert fuse.spent("sums") == 5 and fuse.spent("others") == 0


def test_programs_of_code_from_elsewhere_are_not_kept(folder: Path, written: list[Path]) -> None:
    compiled(lasting=False)
    assert len(written) == 1
    assert not folder.exists()


def test_a_folder_to_which_others_can_write_is_not_used(folder: Path) -> None:
    assert store.folder() == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert store.folder() is None
    assert not store.holds("key")


def test_an_empty_variable_switches_it_off_and_a_folder_that_cannot_be_made_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.VARIABLE, "")
    assert store.folder() is None
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "file" / "programs"))
    assert store.folder() is None
    monkeypatch.delenv(store.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform.startswith("linux"):
        assert store.folder() == tmp_path / "ppl-models" / "programs"


def test_a_program_that_cannot_be_kept_runs_all_the_same(
    folder: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(store.shutil, "copyfile", full)
    assert compiled() == b"program 1"
    assert not list(folder.iterdir())


def test_what_was_not_used_for_the_longest_time_is_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "STORED_BYTES", 350)
    (made := folder.parent / "made").write_bytes(b"x" * 100)
    for age, name in enumerate("abc"):
        path = store.place(name)
        assert path is not None
        store.save(path, made)
        os.utime(path, (1000 + age, 1000 + age))
    first, further = store.place("a"), store.place("d")
    assert first is not None and further is not None
    assert store.load(first, lambda file: file.read_bytes()) == b"x" * 100
    store.save(further, made)
    assert [store.holds(name) for name in "abcd"] == [True, False, True, True]
    assert len(list(folder.iterdir())) == 6


@pytest.mark.parametrize("kernel", [ChEES, NUTS])
def test_the_program_of_a_users_own_transitions_is_for_this_process_alone(
    kernel: Any, folder: Path, written: list[Path]
) -> None:
    class Own(kernel):
        transitions = staticmethod(lambda *given: kernel.transitions(*given))

    with isolated(0):
        own = Own(partial(model, Y), num_chains=4)
        with pytest.warns(UserWarning, match="not fused: TypeError"):
            own.setup(10)
    assert len(written) == 1
    assert not own.compiled
    assert not folder.exists()


def test_a_program_is_compared_once_in_a_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []
    compare, refuses = hamiltonian._refuse_other_moves, [True, False, False, False]

    def counted(moves: Any, expected: Any) -> None:
        compared.append(True)
        compare(moves, expected)
        if refuses[len(compared) - 1]:
            raise Untraceable("another transition")

    monkeypatch.setattr(hamiltonian, "_refuse_other_moves", counted)
    with pytest.warns(UserWarning, match="not fused: another transition"):
        refused = quick(Y, compile=True, seed=1)
    assert refused.idata.attrs["execution"] == "traced"
    # One that did not agree is compared again; one that agreed is not, with other data either.
    draws = [quick(Y, compile=True, seed=1).draws["mu"] for _ in range(2)]
    quick(Y + 1, compile=True, seed=2)
    assert len(compared) == 2
    # From the disk it is compared again.
    monkeypatch.setattr(fuse, "_PROGRAMS", OrderedDict())
    draws.append(quick(Y, compile=True, seed=1).draws["mu"])
    assert len(compared) == 3
    assert all(torch.equal(d, draws[0]) for d in draws)


class Begun(Exception):
    """The first transition has begun."""


def begun(*_: Any) -> None:
    raise Begun


@pytest.mark.parametrize("keeps", [True, False])
def test_work_that_pays_for_half_of_a_program_compiles_one_that_is_kept(
    keeps: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: list[bool] = []
    monkeypatch.setattr(ChEES, "fuse", lambda self, *_: fused.append(True))
    if not keeps:
        monkeypatch.setenv(store.VARIABLE, "")
    with isolated(0):
        kernel = ChEES(partial(model, Y), num_chains=8, jit_compile=False)
        kernel.setup(20)
    assert kernel.kept == keeps
    ahead = kernel.expected * 40 * kernel.operations
    monkeypatch.setattr(policy, "FUSE_POTENTIAL_OPERATIONS", 1.5 * ahead)
    # It is decided before the first transition; later ones may take more gradients.
    monkeypatch.setattr("inference.runners.batched._Run._advance", begun)
    with pytest.raises(Begun):
        quick(Y)
    assert bool(fused) == keeps
