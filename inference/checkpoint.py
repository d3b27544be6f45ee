r"""The folder from which a run that was killed goes on: what a fit, or chains, are in the middle of.

``checkpoint.safetensors`` is replaced as a whole every so many seconds. It holds tensors and JSON, and no code: what
the run was asked for, parameters and buffers, the state of optimizer or kernel, the random state, losses. Draws that
chains have made stand in files of their own, each of which is written once (:mod:`inference.stored`).
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError

from inference.core.checks import check_positive, reason_of
from inference.core.files import lock, stem_of
from inference.core.packing import read_packed, write_packed

FILE, LOCK = "checkpoint.safetensors", ".lock"
"""Names of the file, and of that of the run that has the folder."""


FORMAT = 2
"""Version of the format, which a reader has to know."""


EVERY = 30.0
"""Seconds between two checkpoints."""


SHARE = 50
"""Times that a checkpoint took in writing which have to pass before the next: at most two percent of a run."""


DAMAGED = (ValueError, KeyError, TypeError, IndexError, OSError, SafetensorError, RuntimeError)
"""What reading a damaged or foreign file raises."""


class CheckpointError(ValueError):
    """A run cannot go on from the folder that it was given."""


class NoCheckpoint(CheckpointError):
    """A kernel's chains cannot go on from a file."""


class Checkpoint:
    r"""A folder from which a run goes on when it is started again with the same arguments.

    Losses and draws are those of a run that was not interrupted, to the last bit on the same machine. A run that was
    finished is not repeated. Nothing is lost but the seconds since the last checkpoint. While it runs the folder is
    locked: another run, of another process or thread, is refused, and one that was killed leaves no lock.

    Args:
        folder: Where it is kept; made if it is missing. One folder serves one run.
        every: Seconds between two checkpoints. The next one waits longer where writing takes more than two percent of
            the time.

    Raises:
        ValueError: ``folder`` is no path, or ``every`` no positive number.
        CheckpointError: In a run: the folder is of another one, or in use, or its file is damaged or foreign.

    Example:
        >>> kept = Checkpoint("runs/eight_schools", every=10)  # then fit(pair, data, checkpoint=kept)
    """

    def __init__(self, folder: str | Path, every: float = EVERY) -> None:
        check_positive("every", every)
        if not isinstance(folder, str | Path) or not str(folder).strip():
            raise ValueError(f"folder: expected the path of a folder, got {folder!r}")
        self.folder, self.every = Path(folder), float(every)
        self._asked: dict[str, Any] = {}
        self._written, self._took = perf_counter(), 0.0
        self._unlock: Callable[[], Any] | None = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        """Let other runs have the folder."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    @staticmethod
    def of(where: str | Path | Checkpoint | None) -> Checkpoint | None:
        """A checkpoint of a folder, or of one that was given."""
        if where is None:
            return None
        if isinstance(where, Checkpoint):
            return where
        if not isinstance(where, str | Path) or not str(where).strip():
            raise ValueError(f"checkpoint: expected the path of a folder or a Checkpoint, got {where!r}")
        return Checkpoint(where)

    def part(self, name: str) -> Checkpoint:
        """The checkpoint of a part of the run, in a folder of this one."""
        return Checkpoint(self.folder / (stem_of(name) or "_"), self.every)

    def begin(self, asked: Mapping[str, Any]) -> Any:
        """Where the run is, or None if it has not begun; from now on other runs are refused, until a ``with`` ends.

        Args:
            asked: What the run is asked for, which has to be the same when it goes on.

        Raises:
            CheckpointError: The folder is of another run, or in use by one, or its file is damaged, foreign, or of
                another format.
            OSError: The folder cannot be made.
        """
        self._asked = dict(asked)
        self._written = perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()
        path = self.folder / FILE
        if not path.exists():
            return None
        held = _read(path)
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            got = held.get("format", "none") if isinstance(held, dict) else "none"
            raise CheckpointError(
                f"checkpoint: {path}: expected format {FORMAT}, got {got}; another version may read it"
            )
        before = held["asked"]
        other = [n for n in {**before, **self._asked} if before.get(n) != self._asked.get(n)]
        if other:
            told = "; ".join(f"{n} {_shown(before.get(n))}, got {_shown(self._asked.get(n))}" for n in other[:3])
            raise CheckpointError(f"checkpoint: {self.folder} is of a run with {told}; use another folder")
        if held["torch"] != torch.__version__:
            warnings.warn(
                f"checkpoint: {self.folder} was written by torch {held['torch']}, and this is {torch.__version__}: "
                "last digits may differ from those of a run that was not interrupted",
                stacklevel=4,
            )
        return held["state"]

    def _take(self) -> None:
        """Lock the folder."""
        if self._unlock is not None:
            return
        try:
            # Where there is no with block, the lock goes with this object.
            self._unlock = weakref.finalize(self, os.close, lock(self.folder / LOCK))
        except BlockingIOError as error:
            raise CheckpointError(
                f"checkpoint: {self.folder}: expected a folder that no other run has, got one in use by {error}; wait "
                "for it to end, or use another folder"
            ) from None

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return perf_counter() - self._written >= max(self.every, SHARE * self._took)

    def write(self, state: Any, draws: Callable[[], Any] | None = None) -> bool:
        """Replace the checkpoint, and before that write new draws by a function.

        Where it cannot be written, as on a full disk, a warning says so: the last one stands, and the run goes on.

        Returns:
            Whether it was written.

        Raises:
            TypeError: The state holds something that no file can hold.
        """
        started = perf_counter()
        content = {"format": FORMAT, "asked": self._asked, "torch": torch.__version__, "state": state}
        try:
            if draws is not None:
                draws()
            write_packed(self.folder / FILE, content)
        except TypeError as error:
            raise TypeError(f"checkpoint: {error}") from None
        except OSError as error:
            stands = "the last one stands" if (self.folder / FILE).exists() else "there is none"
            warnings.warn(f"checkpoint: cannot be written ({error}); {stands}, and the run goes on", stacklevel=3)
            return False
        finally:
            self._written = perf_counter()
            self._took = self._written - started
        return True


def _read(path: Path) -> Any:
    try:
        return read_packed(path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path}: expected this file, got none") from None
    except DAMAGED as error:
        reason = reason_of(error)
        got = f"a file that cannot be read ({reason})"
        raise CheckpointError(f"checkpoint: {path}: expected a checkpoint, got {got}") from None


def _shown(value: Any) -> str:
    """A value of what was asked, in short."""
    if isinstance(value, dict):
        return ", ".join(f"{n} {str(v.get('sha256', v))[:8] if isinstance(v, dict) else v}" for n, v in value.items())
    return "none" if value is None else str(value)
