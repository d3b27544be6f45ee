"""CSV files as data sets: a column per feature, and one of labels."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MARK = "#"
"""Between the path of a CSV file and its column of labels, in the name of a data set."""


class Columns(NamedTuple):
    """Numbers (rows, features), codes of the labels (None without labels), and the names of both."""

    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any] | None
    features: tuple[str, ...]
    classes: tuple[str, ...]


def csv_name(path: str, label: str | None = None) -> str:
    """Name of the data set of a CSV file: its whole path, and its column of labels.

    Example:
        >>> csv_name("/data/flowers.csv", "species")
        '/data/flowers.csv#species'
    """
    return f"{Path(path).absolute()}{MARK}{label}" if label else str(Path(path).absolute())


def is_csv(name: Any) -> bool:
    """Whether a data set is a CSV file, by its name."""
    return isinstance(name, str) and name.partition(MARK)[0].lower().endswith(".csv")


def read_csv(path: str | Path) -> Any:
    """A CSV file as a frame.

    Raises:
        ValueError: It cannot be read, its first line has numbers in place of names, or a line has more values than
            there are names.
    """
    import pandas as pd

    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"data: expected a CSV file, got {path} ({reason})") from None
    if not isinstance(frame.index, pd.RangeIndex):
        # pandas takes what is too much for the names of the rows.
        raise ValueError(f"data: expected a name for each column of {path}, got {len(frame.columns)} for more")
    if _is_row(list(frame.columns)):
        raise ValueError(f"data: expected names of columns in the first line of {path}, got {shown(frame.columns)}")
    return frame


def _is_row(names: list[str]) -> bool:
    """Whether the names of columns are a row: numbers all of them, or some not whole, as those of pixels may be."""
    numbers = [n for n in names if _is_number(n)]
    return len(numbers) == len(names) or any("." in n or not float(n).is_integer() for n in numbers)


def _is_number(name: str) -> bool:
    with suppress(ValueError):
        float(name)
        return True
    return False


def columns_of(name: str, numeric: bool = False) -> Columns:
    """The columns of a CSV file, by the name of its data set; labels become codes, in the order of their names.

    With ``numeric`` the column of labels is one of numbers, and stays as it is.

    Raises:
        ValueError: The file cannot be read, a feature is no number, a value is missing, there is no such column of
            labels, or a class has a single row.
    """
    path, _, label = name.partition(MARK)
    frame = read_csv(path)
    if label and label not in frame.columns:
        raise ValueError(f"label: expected a column of {Path(path).name} ({shown(frame.columns)}), got {label!r}")
    unnamed = [str(c) for c in frame.columns if str(c).startswith("Unnamed: ")]
    if unnamed:
        raise ValueError(
            f"data: expected a name for each column of {Path(path).name}, got none for column "
            f"{int(unnamed[0].removeprefix('Unnamed: ')) + 1}; pandas writes row numbers there, unless index=False"
        )
    features = frame.drop(columns=[label] if label else [])
    check_numbers(features)
    numbers = features.to_numpy(float)
    if not label:
        return Columns(numbers, None, tuple(map(str, features.columns)), ())
    labels = frame[label]
    if labels.isna().any():
        raise ValueError(f"label: expected a label in every row, got none in {int(labels.isna().sum())} of {label}")
    if numeric:
        check_numbers(frame[[label]])
        return Columns(numbers, labels.to_numpy(float), tuple(map(str, features.columns)), ())
    classes, codes = np.unique(labels.to_numpy(), return_inverse=True)
    few = classes[np.bincount(codes) < 2]
    if len(few) or len(classes) < 2:
        got = f"one of {few[0]}" if len(few) else f"{len(classes)} class"
        raise ValueError(f"label: expected two classes or more, of two rows or more, got {got}")
    return Columns(numbers, codes, tuple(map(str, features.columns)), tuple(map(str, classes)))


def check_numbers(frame: Any) -> None:
    """Raise a ValueError that names the first column of a frame that has other things than finite numbers."""
    if not len(frame.columns):
        raise ValueError("data: expected a column of numbers, got none")
    wrong = [f for f, kind in frame.dtypes.items() if kind.kind not in "biuf" or not np.isfinite(frame[f]).all()]
    if wrong:
        raise ValueError(f"data: expected numbers in column {wrong[0]}, got {_first_wrong(frame[wrong[0]])}")
    if not len(frame):
        raise ValueError("data: expected at least one row, got none")


def shown(columns: Any) -> str:
    """The first names of columns."""
    names = [str(c) for c in columns]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


def _first_wrong(column: Any) -> str:
    for number, value in enumerate(column, 1):
        if isinstance(value, str) or not math.isfinite(value):
            return f"{value!r} in row {number}"
    return str(column.dtype)
