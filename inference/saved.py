r"""The folder of a saved Result: JSON, tensors as safetensors, and a NetCDF file. Nothing in it is code.

``result.json`` says what the Result is and how it was made; ``tensors.safetensors`` holds parameters, buffers, draws,
losses and the state of chains; ``idata.nc`` is the DataTree, which ArviZ reads by itself; ``losses.csv`` has the losses
once more, for people and spreadsheets.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import reason_of
from inference.core.files import write_folder
from inference.core.handlers import evaluating, first_valid
from inference.core.lazy import pd, xr
from inference.core.memory import aligned
from inference.diagnostics.convergence import Diagnosis
from inference.idata import write_netcdf

FORMAT = 2
"""Version of the format, which a reader has to know."""


ABOUT, TENSORS, IDATA, LOSSES = "result.json", "tensors.safetensors", "idata.nc", "losses.csv"
"""Names of the files."""


PLAIN = ("method", "name", "seconds", "attrs", "data", "more", "versions", "about")
"""Attributes of ``Saved`` that stand in the JSON as they are."""


PACKAGES = ("ppl-models", "torch", "pyro-ppl", "arviz-base", "xarray", "numpy")
"""Packages whose versions are written."""


@dataclass
class Saved:
    r"""What the folder of a Result holds.

    Attributes:
        method: Name of the method.
        name: Name of the pair.
        seconds: Seconds by part of the run.
        attrs: Attributes of the DataTree.
        diagnosis: The diagnosis.
        data: Shape, type and SHA-256 of each tensor among the data, by name.
        more: How further draws are made, as JSON.
        versions: Versions of packages and of Python.
        tensors: Tensors by name, with a prefix: ``param/``, ``buffer/``, ``draws/``, ``state/``, and ``losses``.
        idata: The DataTree.
        about: What the caller of ``save`` adds, as JSON.
    """

    method: str
    name: str
    seconds: Mapping[str, float]
    attrs: Mapping[str, Any]
    diagnosis: Diagnosis
    data: Mapping[str, Any]
    more: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    idata: Any
    versions: Mapping[str, str] = field(default_factory=lambda: versions_of_packages())
    about: Mapping[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors with a prefix, by the rest of their names."""
        return {n.removeprefix(f"{prefix}/"): v for n, v in self.tensors.items() if n.startswith(f"{prefix}/")}

    @staticmethod
    def read(path: str | Path) -> Saved:
        """What the folder of a Result holds, without its pair.

        Raises:
            FileNotFoundError: There is none.
            ValueError: A file of it is damaged, foreign, or of a later format.
        """
        folder = Path(path)
        if not (folder / ABOUT).is_file():
            # Left by a process that was killed between the end of the old folder and the beginning of the new one.
            left = sorted(str(p.parent) for p in folder.parent.glob(f".{folder.name}.*/{ABOUT}"))
            hint = f"; {left[-1]} is one" if left else ""
            raise FileNotFoundError(f"{folder}: expected the folder of a saved Result, got none with {ABOUT}{hint}")
        about = _or_refuse(folder / ABOUT, lambda file: json.loads(file.read_text()))
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            got = about.get("format", "none") if isinstance(about, dict) else "none"
            raise ValueError(f"{folder / ABOUT}: expected format {FORMAT}, got {got}; another version may read it")
        tensors = {n: aligned(t) for n, t in _or_refuse(folder / TENSORS, load_file).items()}
        attrs = about["attrs"]
        idata = xr.DataTree(xr.Dataset(attrs=attrs))
        if (folder / IDATA).exists():
            idata = _or_refuse(folder / IDATA, partial(_read_netcdf))
        given = {n: about[n] for n in PLAIN}
        diagnosis = Diagnosis(**{n: _rich(v) for n, v in about["diagnosis"].items()})
        return Saved(**given, diagnosis=diagnosis, tensors=tensors, idata=idata)

    @staticmethod
    def below(path: str | Path) -> list[Path]:
        """Folders of Results right below a path; the path itself where it is one, or has none."""
        folders = sorted(p.parent for p in Path(path).glob(f"*/{ABOUT}") if not p.parent.name.startswith("."))
        return [Path(path)] if (Path(path) / ABOUT).is_file() or not folders else folders

    def write(self, path: str | Path) -> Path:
        """Write the folder, whole or not at all.

        Raises:
            FileExistsError: There is something else at the path.
            OSError: It cannot be written; what stood there stands.
        """
        about = {
            "format": FORMAT,
            **{n: getattr(self, n) for n in PLAIN},
            "diagnosis": {f.name: _plain(getattr(self.diagnosis, f.name)) for f in fields(Diagnosis)},
        }

        def writer(folder: Path) -> None:
            # Copies: tensors that share memory cannot be written, and views would be written whole.
            kept = {n: v.detach().cpu().clone(memory_format=torch.contiguous_format) for n, v in self.tensors.items()}
            (folder / ABOUT).write_text(json.dumps(about, indent=1, default=lambda value: np.asarray(value).tolist()))
            # By Python, whose errors say that a disk is full.
            (folder / TENSORS).write_bytes(save(kept))
            if self.idata.children:
                write_netcdf(self.idata, folder / IDATA)
            losses = self.tensors["losses"].numpy()
            if len(losses):
                width = losses.shape[1] if losses.ndim > 1 else 1
                columns = {1: ["loss"], 2: ["guide", "model"]}.get(width, [f"loss_{k}" for k in range(width)])
                pd.DataFrame(losses, columns=columns).to_csv(folder / LOSSES, index_label="step")

        return write_folder(path, writer, ABOUT)


def compare_data(saved: Saved, bound: BoundPair) -> None:
    """Warn where data are not those of the saved Result; raise ValueError where some are missing."""
    now = bound.fingerprints()
    missing = [n for n in saved.data if n not in now]
    if missing:
        raise ValueError(f"data: expected {', '.join(missing)}, as in the saved Result, got none")
    other = [n for n, v in saved.data.items() if now[n] != v]
    if other:
        warnings.warn(
            f"data: {', '.join(other)} differs from that of the saved Result, whose draws and diagnosis are of its own",
            stacklevel=5,
        )


def put_parameters(saved: Saved, bound: BoundPair) -> None:
    """Let the pair make its parameters, and give them and its buffers the saved values."""
    fitted, given = saved.more["kind"] == "guide", saved.part("param")
    make_parameters(bound, fitted)
    _ask_for(given, bound)
    store = pyro.get_param_store()
    own = [n for n in given if n not in store and "$$$" not in n]
    for name in own:
        # A parameter that the objective has made.
        pyro.param(name, given[name])
    buffers, held = buffers_of(bound.modules), saved.part("buffer")
    # A program in which a parameter is not called has none in the store: those of the file are what was learnt.
    for what, now, then in (("parameter", dict(store._params), given), ("buffer", buffers, held)):
        for name in [*then, *(n for n in now if n not in then)]:
            if name not in then:
                raise ValueError(f"pair: expected no {what} {dotted(name)}, which the saved Result does not have")
            wanted, got = tuple(then[name].shape), tuple(now[name].shape) if name in now else "none"
            if wanted != got:
                raise ValueError(f"pair: expected a {what} {dotted(name)} of shape {wanted}, got {got}")
    with torch.no_grad():
        for name, value in given.items():
            store._params[name].copy_(value)
        for name, value in held.items():
            buffers[name].copy_(value)


def make_parameters(bound: BoundPair, fitted: bool = True) -> None:
    """Let a pair put its parameters into the store, as a fit of it does, or chains."""
    # Chains have no use for the guide, and run in evaluation mode; a fit runs in the mode in which modules are built.
    with torch.no_grad(), evaluating(() if fitted else bound.modules):
        for half in (bound.guide, bound.model) if fitted else (bound.model,):
            if half is not None:
                first_valid(partial(poutine.trace(half).get_trace, **bound.arguments()))


def _ask_for(names: Iterable[str], bound: BoundPair) -> None:
    """Let Pyro modules put parameters into the store that no half uses by itself, as those of a discriminator."""
    for name in names:
        for module in bound.modules:
            if name not in pyro.get_param_store() and isinstance(module, PyroModule):
                with module._pyro_context, suppress(AttributeError):
                    # Behind the mark are the parameters of a plain torch module.
                    attrgetter(name.partition("$$$")[0])(module)


def buffers_of(modules: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """Buffers of modules by ``number.name``."""
    return {f"{k}.{n}": b for k, m in enumerate(modules) for n, b in m.named_buffers()}


def dotted(name: str) -> str:
    """Name of a parameter as torch writes it: ``decoder.0.weight`` for ``decoder$$$0.weight``."""
    return name.replace("$$$", ".")


def _read_netcdf(file: Path) -> Any:
    with xr.open_datatree(file, engine="h5netcdf") as tree:
        return tree.load()


def _or_refuse(file: Path, reader: Any) -> Any:
    """What a reader makes of a file; whatever it cannot read is one line with the file's name."""
    try:
        return reader(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: expected this file of a saved Result, got none") from None
    except (ValueError, KeyError, OSError, SafetensorError, RuntimeError) as error:
        reason = reason_of(error)
        raise ValueError(f"{file}: expected a file of a saved Result, got one that cannot be read ({reason})") from None


def versions_of_packages() -> dict[str, str]:
    """Versions of Python and of the packages on which a Result depends."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _plain(value: Any) -> Any:
    """A value of a diagnosis as JSON: tables by their columns."""
    if isinstance(value, pd.DataFrame):
        columns = {n: {"dtype": str(v.dtype), "values": v.tolist()} for n, v in value.items()}
        return {"columns": columns, "index": value.index.tolist(), "name": value.index.name}
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _rich(value: Any) -> Any:
    if isinstance(value, dict) and "columns" in value:
        index = pd.Index(value["index"], name=value["name"])
        columns = {n: pd.Series(c["values"], index, c["dtype"]) for n, c in value["columns"].items()}
        return pd.DataFrame(columns, index)
    return tuple(value) if isinstance(value, list) else value
