r"""The folder from which a run that was killed goes on: what a fit, or chains, are in the middle of.

``checkpoint.safetensors`` is replaced as a whole every so many seconds. It holds tensors and JSON, and no code: what
the run was asked for, parameters and buffers, the state of optimizer or kernel, the random state, losses. Draws that
chains have made stand in files of their own, each of which is written once.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim
from safetensors import SafetensorError
from torch import Tensor

from inference.compiler.reads import is_library
from inference.compiler.step import reachable
from inference.core.bound import BoundPair
from inference.core.checks import check_positive
from inference.core.contracts import Objective
from inference.core.handlers import random_state, set_random_state
from inference.core.packing import read_packed, write_packed
from inference.saved import dotted, fingerprints

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


class NoCheckpoint(CheckpointError):
    """A kernel's chains cannot go on from a file."""


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
    """What a run is asked for: the pair, its data and settings, as JSON.

    Of functions it holds a hash of their code, with the numbers and strings that they take from defaults, closures and
    globals; of modules their public attributes that are numbers and strings.
    """
    shown = {n: v if v is None or isinstance(v, bool | int | float | str) else str(v) for n, v in settings.items()}
    plain = {n: repr(v) for n, v in bound.data.items() if _is_plain(v)}
    halves = {"model": bound.model, "guide": bound.guide}
    return {
        "pair": bound.name,
        "sites": {n: list(s.shape) for n, s in bound.sites.items()},
        "data": {**fingerprints(bound.data), **plain},
        **{f"code of the {n}": code_of(half) for n, half in halves.items() if half is not None},
        "attributes": {f"{k}.{n}": v for k, m in enumerate(_own(bound)) for n, v in _plain_of(m).items()},
        "dtype": str(torch.get_default_dtype()),
        "device": str(bound.device),
        **shown,
    }


def _own(bound: BoundPair, *more: Any) -> list[torch.nn.Module]:
    """Modules that a pair uses, in closures too, whose classes are neither Pyro's nor torch's."""
    return [m for m in reachable(bound.model, bound.guide, *more) if not is_library(type(m).__module__)]


def _plain_of(module: torch.nn.Module) -> dict[str, Any]:
    held = {n: v for n, v in vars(module).items() if not n.startswith("_") and n != "training"}
    return {n: v for n, v in held.items() if isinstance(v, bool | int | float | str)}


def code_of(function: Any) -> str:
    """Hash of what a function does: its code, and plain values of its defaults, closure and globals."""
    parts: list[str] = []
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        waiting += [getattr(item, a) for a in ("__func__", "__wrapped__", "func", "fn") if hasattr(item, a)]
        if isinstance(item, partial):
            waiting += [*item.args, *item.keywords.values()]
            parts += [repr(v) for v in (*item.args, *item.keywords.items()) if _is_plain(v)]
        if not isinstance(item, FunctionType):
            parts.append(type(item).__qualname__)
            continue
        if is_library(item.__module__ or ""):
            parts.append(item.__qualname__)
            continue
        code = item.__code__
        parts.append(_code_text(code))
        cells = [c.cell_contents for c in item.__closure__ or () if _filled(c)]
        taken = [item.__globals__[n] for n in code.co_names if n in item.__globals__]
        given = [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).items(), *cells, *taken]
        parts += [repr(v) for v in given if _is_plain(v)]
        parts += [str(fingerprints({"": v})) for v in given if isinstance(v, Tensor) and not v.requires_grad]
        waiting += [v for v in given if isinstance(v, FunctionType | partial)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _code_text(code: CodeType) -> str:
    consts = [
        _code_text(c) if isinstance(c, CodeType) else repr(sorted(map(repr, c)) if isinstance(c, frozenset) else c)
        for c in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {consts}"


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def networks_of(bound: BoundPair) -> dict[str, Any]:
    """Fingerprints of the parameters and buffers of a pair's modules, which chains leave as they are."""
    return fingerprints({n: v for m in bound.modules for n, v in m.state_dict().items()})


def named(what: Any) -> str:
    """An objective, an optimizer, or a factory of a kernel as text: its name and its plain settings."""
    given = dict(getattr(what, "keywords", None) or getattr(what, "__dict__", {}))
    if isinstance(what, PyroOptim):
        # Joint has one optimizer, and Pyro's own one for each parameter.
        names = ("clip_norm", "clip_value", "schedule", "kwargs")
        given = {n: v for n, v in vars(what).items() if n.startswith("pt_") or n in names}
    # Pyro writes the nesting that it finds into its objectives.
    hidden = {*getattr(what, "cycle", ()), "max_plate_nesting"}
    shown = {n: _named_value(v) for n, v in sorted(given.items()) if n not in hidden and n[0] != "_"}
    function = getattr(what, "func", what)
    kind = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, FunctionType):
        kind = f"{kind} {code_of(function)}"
    return f"{kind}({', '.join(f'{n}={v}' for n, v in shown.items() if v is not None)})"


def _named_value(value: Any) -> str | None:
    if _is_plain(value):
        return repr(value)
    if isinstance(value, ELBO | FunctionType | partial):
        return named(value)
    return value.__name__ if isinstance(value, type) else None


def take(bound: BoundPair, objective: ELBO | None = None) -> dict[str, Any]:
    """Parameters, buffers, numbers of the modules, the state of an objective, and the random state, as they are now."""
    store = pyro.get_param_store()._params
    modules = reachable(bound.model, bound.guide, *_modules_of(objective))
    return {
        "parameters": {n: v.detach() for n, v in store.items()},
        "buffers": _buffers(modules),
        "numbers": [_plain_of(m) for m in _own(bound, *_modules_of(objective))],
        "objective": None if objective is None else _attributes(objective),
        "random": random_state(),
    }


def _modules_of(objective: ELBO | None) -> list[torch.nn.Module]:
    return [v for v in vars(objective).values() if isinstance(v, torch.nn.Module)] if objective is not None else []


def _buffers(modules: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """Buffers of each module's own, by its number and their name."""
    return {f"{k}.{n}": b for k, m in enumerate(modules) for n, b in m.named_buffers(recurse=False)}


def put(held: Mapping[str, Any], bound: BoundPair, objective: ELBO | None = None) -> None:
    """Put what :func:`take` has taken into the parameters, buffers and attributes that there are."""
    modules = reachable(bound.model, bound.guide, *_modules_of(objective))
    store, buffers = dict(pyro.get_param_store()._params), _buffers(modules)
    for what, now, then in (("parameter", store, held["parameters"]), ("buffer", buffers, held["buffers"])):
        for name in {**then, **now}:
            wanted, got = (tuple(d[name].shape) if name in d else "none" for d in (then, now))
            if wanted != got:
                told = f"a {what} {dotted(name)} of shape {wanted}, and the pair {got}"
                raise CheckpointError(f"checkpoint: it holds {told}")
        with torch.no_grad():
            for name, value in then.items():
                # One that was expanded cannot be written to.
                if not torch.equal(now[name].cpu(), value):
                    now[name].copy_(value)
    for module, numbers in zip(_own(bound, *_modules_of(objective)), held["numbers"], strict=True):
        vars(module).update(numbers)
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
        got = f"a file that cannot be read ({reason})"
        raise CheckpointError(f"checkpoint: {path}: expected a checkpoint, got {got}") from None


def _shown(value: Any) -> str:
    """A value of what was asked, in short."""
    if isinstance(value, dict):
        return ", ".join(f"{n} {str(v.get('sha256', v))[:8] if isinstance(v, dict) else v}" for n, v in value.items())
    return "none" if value is None else str(value)


def losses_of(held: Any) -> list[Any]:
    """Losses from an array (steps,) or (steps, k): numbers or tuples of them."""
    values = np.asarray(held, dtype=float)
    return values.tolist() if values.ndim < 2 else [tuple(row) for row in values.tolist()]
