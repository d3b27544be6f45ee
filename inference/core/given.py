r"""Data as they are given: frames, arrays and sequences as tensors, and the types in which a model may take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

ROUNDED = 1e-3
"""Largest rounding error of a column of data, in its standard deviations."""


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
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected numbers, got {type(value).__name__} ({error})") from None


def _numeric(frame: Any, name: str) -> np.ndarray:
    """The numbers of a pandas frame or series; missing ones are nan."""
    columns = frame.dtypes.items() if hasattr(frame, "columns") else [(name, frame.dtype)]
    wrong = [f"{column} ({kind})" for column, kind in columns if getattr(kind, "kind", "O") not in "fiub"]
    if wrong:
        raise ValueError(f"{name}: expected columns of numbers, got {', '.join(wrong)}; give categories as their codes")
    values = frame.to_numpy()
    return frame.to_numpy(dtype="float64", na_value=np.nan) if values.dtype == object else np.array(values)


def doubtful(named: Mapping[str, Any]) -> bool:
    """Whether there are numbers of another type than torch's default, which a model may not take."""
    return any(isinstance(v, Tensor) and v.dtype != torch.get_default_dtype() for v in named.values())


def readings(given: Mapping[str, Any], named: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Types in which a model may take the data, the likeliest first, each with the names of what it rounds.

    Floats of arrays and frames take torch's default precision; tensors keep theirs. Whole numbers and booleans become
    floats where the model does not take them as they are: one of them, or all.

    Args:
        given: Data as they came.
        named: The same as tensors.
    """
    default, plain = torch.get_default_dtype(), dict(named)
    numbers = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    long = tuple(k for k, v in numbers.items() if _wider(v, default) and not isinstance(given.get(k), Tensor))
    whole = [k for k, v in numbers.items() if not (v.is_floating_point() or v.is_complex())]
    starts = [({**plain, **{k: plain[k].to(default) for k in long}}, long), (plain, ())] if long else [(plain, ())]
    yield from starts
    for start, rounds in starts:
        for chosen in ([[k] for k in whole] if len(whole) > 1 else []) + [whole] * bool(whole):
            yield {**start, **{k: start[k].to(default) for k in chosen}}, rounds


def _wider(value: Tensor, dtype: torch.dtype) -> bool:
    return value.is_floating_point() and value.dtype.itemsize > dtype.itemsize


def check_rounding(named: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> None:
    """Raise a ValueError where rounding has taken the differences between the entries of a column."""
    for name, value in named.items():
        columns = value.reshape(len(value), -1) if value.dim() and value.numel() else value.reshape(1, -1)
        error = (rounded[name].to(value.dtype).reshape(columns.shape) - columns).abs().nan_to_num(0, 0, 0).amax(0)
        spread = columns.std(0, correction=0)
        if ((error > ROUNDED * spread) & (spread > 0)).any():
            raise ValueError(
                f"{name}: expected numbers that differ in their first six digits, got "
                f"{columns.flatten()[0].item():.9g}, ...; subtract their mean, or give a float64 tensor"
            )
