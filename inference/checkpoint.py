r"""The folder from which a run that was killed goes on: what a fit, or chains, are in the middle of.

``checkpoint.safetensors`` is replaced as a whole every so many seconds. It holds tensors and JSON, and no code: what
the run was asked for, parameters and buffers, the state of optimizer or kernel, the random state, losses. Draws that
chains have made stand in files of their own, each of which is written once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim
from safetensors import SafetensorError
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import check_positive
from inference.core.contracts import Objective
from inference.core.handlers import random_state, set_random_state
from inference.core.packing import read_packed, write_packed
from inference.saved import buffers_of, dotted, fingerprints

FILE, BLOCKS = "checkpoint.safetensors", "draws-{:05d}.safetensors"
"""Names of the files."""


FORMAT = 1
"""Version of the format, which a reader has to know."""


EVERY = 30.0
"""Seconds between two checkpoints."""


SHARE = 50
"""Times that a checkpoint took in writing which have to pass before the next: at most two percent of a run."""


class CheckpointError(ValueError):
    """A run cannot go on from the folder that it was given."""


class Checkpoint:
    r"""A folder from which a run goes on when it is started again with the same arguments.

    Losses and draws are those of a run that was not interrupted, to the last bit on the same machine. A run that was
    finished is not repeated. Nothing is lost but the seconds since the last checkpoint.

    Args:
        folder: Where it is kept; made if it is missing. One folder serves one run.
        every: Seconds between two checkpoints. The next one waits longer where writing takes more than two percent of
            the time.

    Raises:
        ValueError: ``every`` is not a positive number.
        CheckpointError: In a run: the folder is of another one, or its file is damaged or foreign.

    Example:
        >>> kept = Checkpoint("runs/eight_schools", every=10)  # then fit(pair, data, checkpoint=kept)
    """

    def __init__(self, folder: str | Path, every: float = EVERY) -> None:
        check_positive("every", every)
        self.folder, self.every = Path(folder), float(every)
        self._asked: dict[str, Any] = {}
        self._written, self._took = perf_counter(), 0.0

    @staticmethod
    def of(where: str | Path | Checkpoint | None) -> Checkpoint | None:
        """A checkpoint of a folder, or of one that was given."""
        if where is None:
            return None
        return where if isinstance(where, Checkpoint) else Checkpoint(where)

    def part(self, name: str) -> Checkpoint:
        """The checkpoint of a part of the run, in a folder of this one."""
        stem = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        return Checkpoint(self.folder / (stem or "_"), self.every)

    def begin(self, asked: Mapping[str, Any]) -> Any:
        """Where the run is, or None if it has not begun.

        Args:
            asked: What the run is asked for, which has to be the same when it goes on.

        Raises:
            CheckpointError: The folder is of another run, or its file is damaged, foreign, or of a later format.
            OSError: The folder cannot be made.
        """
        self._asked = dict(asked)
        self._written = perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
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

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return perf_counter() - self._written >= max(self.every, SHARE * self._took)

    def write(self, state: Any, draws: tuple[int, Any] | None = None) -> bool:
        """Replace the checkpoint, and before that write new draws to the file of a number.

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
                write_packed(self.folder / BLOCKS.format(draws[0]), draws[1])
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

    def blocks(self, number: int) -> Any:
        """The draws of a file."""
        return _read(self.folder / BLOCKS.format(number))


def asked_of(bound: BoundPair, **settings: Any) -> dict[str, Any]:
    """What a run is asked for: the pair, its data and settings, as JSON."""
    shown = {n: v if v is None or isinstance(v, bool | int | float | str) else str(v) for n, v in settings.items()}
    sites = {n: list(s.shape) for n, s in bound.sites.items()}
    return {"pair": bound.name, "sites": sites, "data": fingerprints(bound.data), **shown}


def networks_of(bound: BoundPair) -> dict[str, Any]:
    """Fingerprints of the parameters and buffers of a pair's modules, which chains leave as they are."""
    return fingerprints({n: v for m in bound.modules for n, v in m.state_dict().items()})


def named(what: Any) -> str:
    """An objective, an optimizer, or a factory of a kernel as text: its name and its plain settings."""
    if isinstance(what, PyroOptim):
        constructors = {n: v for n, v in vars(what).items() if n.startswith("pt_")}
        given = {n: getattr(v, "__name__", v) for n, v in constructors.items()} | getattr(what, "kwargs", {})
    else:
        given = getattr(what, "keywords", None) or getattr(what, "__dict__", {})
    turning = getattr(what, "cycle", ())
    shown = {n: named(v) if isinstance(v, ELBO) else v for n, v in given.items() if n not in turning and n[0] != "_"}
    function = getattr(what, "func", what)
    kind = getattr(function, "__name__", type(function).__name__)
    return f"{kind}({', '.join(f'{n}={v}' for n, v in sorted(shown.items()) if _is_plain(v))})"


def take(bound: BoundPair, objective: ELBO | None = None) -> dict[str, Any]:
    """Parameters, buffers, the state of an objective and the random state, as they are now."""
    store = pyro.get_param_store()._params
    return {
        "parameters": {n: v.detach() for n, v in store.items()},
        "buffers": buffers_of(bound.modules),
        "objective": None if objective is None else _attributes(objective),
        "random": random_state(),
    }


def put(held: Mapping[str, Any], bound: BoundPair, objective: ELBO | None = None) -> None:
    """Put what :func:`take` has taken into the parameters, buffers and attributes that there are."""
    store, buffers = dict(pyro.get_param_store()._params), buffers_of(bound.modules)
    for what, now, then in (("parameter", store, held["parameters"]), ("buffer", buffers, held["buffers"])):
        for name in {**then, **now}:
            wanted, got = (tuple(d[name].shape) if name in d else "none" for d in (then, now))
            if wanted != got:
                raise CheckpointError(
                    f"checkpoint: it holds a {what} {dotted(name)} of shape {wanted}, and the pair {got}"
                )
        with torch.no_grad():
            for name, value in then.items():
                now[name].copy_(value)
    if objective is not None:
        _assign(objective, held["objective"])
    set_random_state(held["random"])


def _attributes(objective: ELBO) -> dict[str, Any]:
    """Attributes of an objective that steps may change, and those of the objectives that it has."""
    asked = Objective.of(objective)
    inner = {n: _attributes(v) for n, v in vars(objective).items() if isinstance(v, ELBO)}
    tensors = {n: v for n, v in vars(objective).items() if isinstance(v, Tensor)}
    return {"plain": asked.constants(), "tensors": tensors, "inner": inner}


def _assign(objective: ELBO, held: Mapping[str, Any]) -> None:
    own = vars(objective)
    own.update(held["plain"])
    for name, value in held["tensors"].items():
        now = own.get(name)
        if isinstance(now, Tensor) and (now.shape, now.dtype) == (value.shape, value.dtype):
            now.copy_(value)
        else:
            own[name] = value.to(now.device) if isinstance(now, Tensor) else value
    for name, inner in held["inner"].items():
        _assign(own[name], inner)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, bool | int | float | str)


def _read(path: Path) -> Any:
    try:
        return read_packed(path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path}: expected this file, got none") from None
    except (ValueError, KeyError, TypeError, IndexError, OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"checkpoint: {path}: expected a checkpoint, got a file that cannot be read ({reason})"
        ) from None


def _shown(value: Any) -> str:
    """A value of what was asked, in short."""
    if isinstance(value, dict):
        return ", ".join(f"{n} {str(v.get('sha256', v))[:8] if isinstance(v, dict) else v}" for n, v in value.items())
    return "none" if value is None else str(value)


def losses_of(held: Any) -> list[Any]:
    """Losses from an array (steps,) or (steps, k): numbers or tuples of them."""
    values = np.asarray(held, dtype=float)
    return values.tolist() if values.ndim < 2 else [tuple(row) for row in values.tolist()]
