r"""Data as they are given: frames, arrays and sequences as tensors, and the types in which a model may take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from inference.core.contracts import Pair
from inference.core.memory import aligned
from inference.core.minibatch import lengths

ROUNDED = 1e-3
"""Largest rounding error of a column of data, in its standard deviations."""


EXACT = 2**24
"""Size up to which all whole numbers are numbers of single precision."""


@dataclass(frozen=True)
class Names:
    """Names that frames and series among the data bring along.

    Attributes:
        columns: Columns of a frame, by the name of its argument.
        categories: Categories of a series, in the order of their codes.
        rows: Index of the rows, where it is not the default one.
    """

    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: tuple[Any, ...] = ()

    def check(self, fitted: Names) -> None:
        """Raise a ValueError where columns or categories are not those of the fit: codes would mean something else."""
        for what in ("columns", "categories"):
            before, now = getattr(fitted, what), getattr(self, what)
            for name in before.keys() & now.keys():
                if before[name] != now[name]:
                    raise ValueError(
                        f"{name}: expected the {what} of the fit, {_shortly(before[name])}, got {_shortly(now[name])}"
                    )


def by_argument(frame: Any, accepted: Mapping[str, bool]) -> dict[str, Any]:
    """A frame that is all of the data: columns with the name of an argument, and the others as the first argument.

    Where the first argument is one of the columns, the others come by their own names.
    """
    names = [n for n in accepted if n not in ("size", "rows")]
    first = next(iter(names), "x")
    named = {str(c): frame[c] for c in frame.columns if str(c) in names}
    rest = [c for c in frame.columns if str(c) not in names]
    if not named:
        return {first: frame}
    if first in named:
        return {**named, **{str(c): frame[c] for c in rest}}
    return {**({first: frame[rest]} if rest else {}), **named}


def names_in(given: Mapping[str, Any]) -> Names:
    """Names of the columns, categories and rows of frames and series.

    Raises:
        ValueError: Two of them have different indices, or the same in another order, so that their rows do not belong
            together.
    """
    frames = {k: v for k, v in given.items() if type(v).__module__.startswith("pandas") and hasattr(v, "index")}
    columns = {k: tuple(map(str, v.columns)) for k, v in frames.items() if hasattr(v, "columns")}
    categories = {k: tuple(map(str, v.cat.categories)) for k, v in frames.items() if _is_category(v)}
    indexed = {k: v.index for k, v in frames.items() if not _is_default(v.index)}
    first = next(iter(indexed), "")
    for name, index in indexed.items():
        if len(index) == len(indexed[first]) and not index.equals(indexed[first]):
            raise ValueError(f"{name}: expected the index of {first}, got another; use {name}.loc[{first}.index]")
    counted = next((k for k, v in frames.items() if _is_default(v.index)), "")
    for name, index in indexed.items() if counted else ():
        if len(index) == len(frames[counted]) and index.is_unique and index.sort_values().equals(frames[counted].index):
            raise ValueError(
                f"{name}: expected the rows in the order of {counted}, got them in another; "
                f"use {name}.loc[{counted}.index]"
            )
    rows = tuple(v if isinstance(v, int | float | str) else str(v) for v in indexed[first]) if first else ()
    return Names(columns, categories, rows)


def _is_default(index: Any) -> bool:
    """Whether an index only counts the rows."""
    return type(index).__name__ == "RangeIndex" and (index.start, index.step) == (0, 1)


def _is_category(value: Any) -> bool:
    return str(getattr(value, "dtype", "")) == "category"


def _shortly(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def to_tensor(value: Any, name: str) -> Any:
    """A frame, a series, an array or a sequence as a tensor; tensors, strings and plain numbers as they are.

    Raises:
        ValueError: It holds something else than numbers; the columns of a frame are named.
    """
    if isinstance(value, Tensor | str | bool | int | float):
        return value
    if isinstance(value, Dataset):
        raise ValueError(f"{name}: expected data in memory, got a Dataset; fit(batch=...) reads its rows")
    if hasattr(value, "to_numpy"):
        value = _numeric(value, name) if type(value).__module__.startswith("pandas") else value.to_numpy()
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        value = value.copy()
    try:
        return aligned(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected numbers, got {type(value).__name__} ({error})") from None


def _numeric(frame: Any, name: str) -> np.ndarray:
    """The numbers of a pandas frame or series; missing ones are nan, and categories of a series are their codes."""
    if _is_category(frame):
        codes = frame.cat.codes.to_numpy().astype("int64")
        if (codes < 0).any():
            raise ValueError(f"{name}: expected a category in every row, got none in {int((codes < 0).sum())}")
        return codes
    columns = frame.dtypes.items() if hasattr(frame, "columns") else [(name, frame.dtype)]
    wrong = [f"{column} ({kind})" for column, kind in columns if getattr(kind, "kind", "O") not in "fiub"]
    if wrong:
        raise ValueError(
            f"{name}: expected columns of numbers, got {', '.join(wrong)}; give a column of "
            "categories as an argument of its own, of type category"
        )
    values = frame.to_numpy()
    return frame.to_numpy(dtype="float64", na_value=np.nan) if values.dtype == object else np.array(values)


def doubtful(named: Mapping[str, Any]) -> bool:
    """Whether there are numbers of another type than torch's default, which a model may not take."""
    return any(isinstance(v, Tensor) and v.dtype != torch.get_default_dtype() for v in named.values())


def readings(
    given: Mapping[str, Any], named: Mapping[str, Any], precision: torch.dtype
) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Types in which a model may take the data, the likeliest first, each with the names of what it rounds.

    Floats of arrays and frames take torch's default precision; tensors keep theirs. Whole numbers and booleans become
    floats of the model's precision where it does not take them as they are: one of them, or all.

    Args:
        given: Data as they came.
        named: The same as tensors.
        precision: Type of the model's own numbers.
    """
    default, plain = torch.get_default_dtype(), dict(named)
    numbers = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    long = tuple(k for k, v in numbers.items() if _wider(v, default) and not isinstance(given.get(k), Tensor))
    whole = [k for k, v in numbers.items() if is_whole(v)]
    starts = [({**plain, **{k: plain[k].to(default) for k in long}}, long), (plain, ())] if long else [(plain, ())]
    yield from starts
    for start, rounds in starts:
        for chosen in ([[k] for k in whole] if len(whole) > 1 else []) + [whole] * bool(whole):
            yield {**start, **{k: start[k].to(precision) for k in chosen}}, rounds


def is_whole(value: Any) -> bool:
    """Whether it is a tensor of integers or booleans."""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def checked(asked: Pair, named: dict[str, Any], precision: torch.dtype) -> dict[str, Any]:
    """The data in types that the pair's own checks take: whole numbers and booleans that they refuse, as floats.

    Raises:
        ValueError: The checks refuse them as floats too.
    """
    refused: dict[str, ValueError] = {}
    while True:
        try:
            asked.check(**named)
            return named
        except ValueError as error:
            name = str(error).partition(":")[0]
            if name in refused:
                raise refused[name] from None
            if not is_whole(named.get(name)):
                raise
            refused[name] = error
            named = {**named, name: named[name].to(precision)}


def _wider(value: Tensor, dtype: torch.dtype) -> bool:
    return value.is_floating_point() and value.dtype.itemsize > dtype.itemsize


def check_rounding(named: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
    """Raise a ValueError where a change of type has taken the differences between the entries of a column."""
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.numel() or taken[name].dtype == value.dtype:
            continue
        if is_whole(value) and (value.dtype.itemsize <= 2 or max(map(abs, map(int, value.aminmax()))) <= EXACT):
            continue
        columns = (value.reshape(len(value), -1) if value.dim() else value.reshape(1, -1)).double()
        error = (taken[name].double().reshape(columns.shape) - columns).abs().nan_to_num(0, 0, 0).amax(0)
        spread = columns.std(0, correction=0)
        if ((error > ROUNDED * spread) & (spread > 0)).any():
            raise ValueError(
                f"{name}: expected numbers that differ in their first six digits, got "
                f"{columns.flatten()[0].item():.10g}, ...; subtract their mean, or give a float64 tensor"
            )


def by_name(data: Any, accepted: Mapping[str, bool]) -> dict[str, Any]:
    """The data as they came, by name."""
    if data is None:
        return {}
    if hasattr(data, "columns") and type(data).__module__.startswith("pandas"):
        return by_argument(data, accepted)
    if isinstance(data, str | bytes):
        raise ValueError(f"data: expected a tensor, array, frame or mapping of names to them, got {data!r}")
    return (
        {str(k): v for k, v in data.items() if v is not None}
        if isinstance(data, Mapping)
        else {next(iter(accepted), "x"): data}
    )


def check_same_length(named: Mapping[str, Any]) -> None:
    found = lengths(named)
    if len(set(found.values())) > 1:
        said = ", ".join(f"{k} {n}" for k, n in found.items())
        raise ValueError(f"data: expected the same number of rows in each, got {said}")
