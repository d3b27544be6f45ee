r"""Draws of chains on the disk: NetCDF files of some draws each, written once, and read as one DataTree.

``draws-00000.nc``, ``draws-00001.nc`` and so on stand in the folder of a checkpoint. Each is a DataTree with the groups
``posterior`` and ``sample_stats``, which ``xarray.open_datatree`` reads by itself; :func:`open_draws` joins them along
``draw``.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from inference.core.bound import BoundPair
from inference.core.checks import reason_of
from inference.core.files import write_whole
from inference.core.lazy import azb, xr
from inference.idata import dataset_of, dims_of, renamed, variables_of, write_netcdf

NAME = "draws-{:05d}.nc"
"""Name of the file of a number."""


Part = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
r"""Values by site (chains, draws, \*shape), and statistics by name (chains, draws)."""


def open_draws(folder: str | Path) -> xr.DataTree:
    r"""Open the draws that chains with a checkpoint have written so far: while they run, or after they were killed.

    Numbers are read from the files when they are asked for, and only those that are asked for. The draws are those of
    the files that are there at the call; a later call finds later ones.

    Args:
        folder: The folder of the checkpoint.

    Returns:
        DataTree for ArviZ, of the groups ``posterior`` (latent sites of the chains) and ``sample_stats``.

    Raises:
        FileNotFoundError: There are no draws: no run with a checkpoint, or one that is in its warmup.
        ValueError: A file is damaged or foreign.

    Example:
        >>> import arviz_stats as azs
        >>> azs.summary(open_draws("runs/eight_schools"))  # doctest: +SKIP
    """
    if not isinstance(folder, str | Path) or not str(folder).strip():
        raise ValueError(f"folder: expected the path of a folder, got {folder!r}")
    paths = files_of(Path(folder))
    if not paths:
        parts = sorted({p.parent.name for p in Path(folder).glob(f"*/{NAME.format(0)}")})
        got = f"none, but some in its folders {', '.join(parts[:3])}" if parts else "none"
        raise FileNotFoundError(f"folder: expected draws of chains with a checkpoint in {folder}, got {got}")
    # Its class is one of xarray's, which takes as long to import as torch.
    from inference.joined import joined

    return joined(paths, _counts(paths))


def files_of(folder: Path) -> list[Path]:
    """The files of draws in a folder, in their order."""
    numbered = (folder / NAME.format(k) for k in itertools.count())
    return list(itertools.takewhile(Path.is_file, numbered))


def count_of(paths: list[Path]) -> int:
    """Draws per chain in files.

    Raises:
        ValueError: A file is damaged or foreign.
    """
    return sum(_counts(paths))


def read_draws(path: Path) -> Part:
    """The draws of a file.

    Raises:
        ValueError: It is damaged or foreign.
    """
    try:
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            values = tree["posterior"].to_dataset().variables.values()
            stats = tree["sample_stats"].to_dataset().data_vars
            drawn = {v.attrs["site"]: v.values for v in values if "site" in v.attrs and "draw" in v.dims}
            return drawn, {str(n): v.values for n, v in stats.items()}
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise _refused(path, error) from None


def write_draws(path: Path, bound: BoundPair, part: Part, first: int, method: str) -> None:
    r"""Write some draws to a file, whole or not at all.

    Args:
        path: The file.
        bound: The pair.
        part: The draws.
        first: Number of draws before them.
        method: Name of the kernel.

    Raises:
        OSError: The file cannot be written.
    """
    values, stats = part
    sites = {n: torch.from_numpy(v).flatten(0, 1) for n, v in values.items()}
    chains, draws = next(iter(values.values())).shape[:2]
    names = variables_of(bound)
    try:
        posterior = dataset_of(bound, sites, {n: dims_of(bound, n) for n in sites if n in bound.sites}, chains)
    except ValueError:
        # Names along dimensions that xarray refuses cost no draws.
        posterior = azb.dict_to_dataset({names.get(n, n): v for n, v in values.items()}, check_conventions=False)
    for name in values:
        posterior[names.get(name, name)].attrs["site"] = name
    groups = renamed({"posterior": posterior, "sample_stats": azb.dict_to_dataset(stats, check_conventions=False)})
    along = {"draw": np.arange(first, first + draws)}
    tree = {g: d.assign_coords(along).assign_attrs(method=method) for g, d in groups.items()}
    write_whole(path, lambda file: write_netcdf(xr.DataTree.from_dict(tree), file, compress=False))


def _counts(paths: list[Path]) -> list[int]:
    """Draws per chain in each file."""
    # It is imported with xarray's engine.
    import h5py

    counts: list[int] = []
    for path in paths:
        try:
            with h5py.File(path) as file:
                first, count = int(file["posterior/draw"][0]), len(file["posterior/draw"])
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise _refused(path, error) from None
        if first != sum(counts):
            raise ValueError(f"{path}: expected draws from number {sum(counts)}, got those from {first}")
        counts.append(count)
    return counts


def _refused(path: Path, error: Exception) -> ValueError:
    reason = reason_of(error)
    return ValueError(f"{path}: expected a file of draws, got one that cannot be read ({reason})")
