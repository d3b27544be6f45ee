"""CSV files as data sets: a column per feature, and one of labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MARK = "#"
"""Between the path of a CSV file and its column of labels, in the name of a data set."""


class Roles(NamedTuple):
    """What the columns of a CSV file are, and whether rows are held out.

    Attributes:
        target: What the column of labels holds: "label", a "number" to regress on, or a "count".
        own: Names of columns that are arguments of the model of their own: ``group``, whose values are names, and
            others, which are numbers.
        inputs: Whether the other columns are features; else they are left out.
        whole: Whether all rows are fitted, in their order, as those of a series are.
    """

    target: str = "label"
    own: tuple[str, ...] = ()
    inputs: bool = True
    whole: bool = False


ROWS = Roles()
"""Rows of features, with or without a label."""


class Columns(NamedTuple):
    """Numbers (rows, features), labels (None without labels), the names of both, and further columns with names.

    Labels are codes of classes, or numbers.
    """

    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any] | None
    features: tuple[str, ...]
    classes: tuple[str, ...]
    own: Mapping[str, np.ndarray[Any, Any]] = {}
    groups: tuple[str, ...] = ()


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


def columns_of(name: str, roles: Roles = ROWS) -> Columns:
    """The columns of a CSV file, by the name of its data set; labels become codes, in the order of their names.

    Raises:
        ValueError: The file cannot be read, a feature is no number, a value is missing, there is no such column of
            labels, or one that the roles name, or a class has a single row.
    """
    path, _, label = name.partition(MARK)
    frame, file = read_csv(path), Path(path).name
    if label and label not in frame.columns:
        raise ValueError(f"label: expected a column of {file} ({shown(frame.columns)}), got {label!r}")
    if not label and roles.target != "label":
        raise ValueError(
            f"label: expected the column of {file} ({shown(frame.columns)}) that is to be modelled, got none"
        )
    unnamed = [str(c) for c in frame.columns if str(c).startswith("Unnamed: ")]
    if unnamed:
        raise ValueError(
            f"data: expected a name for each column of {file}, got none for column "
            f"{int(unnamed[0].removeprefix('Unnamed: ')) + 1}; pandas writes row numbers there, unless index=False"
        )
    lacking = [n for n in roles.own if n not in frame.columns or n == label]
    if lacking:
        raise ValueError(f"data: expected a column {lacking[0]} in {file}, got {shown(frame.columns)}")
    own, groups = {n: _own(frame, n) for n in roles.own}, tuple(_names(frame["group"])) if "group" in roles.own else ()
    features = frame.drop(columns=[*([label] if label else []), *roles.own])
    features = features if roles.inputs else features[[]]
    if roles.inputs:
        check_numbers(features)
    numbers = features.to_numpy(float)
    if not label:
        return Columns(numbers, None, tuple(map(str, features.columns)), (), own, groups)
    labels = frame[label]
    if labels.isna().any():
        raise ValueError(f"label: expected a label in every row, got none in {int(labels.isna().sum())} of {label}")
    if roles.target != "label":
        check_numbers(frame[[label]])
        return Columns(numbers, labels.to_numpy(float), tuple(map(str, features.columns)), (), own, groups)
    classes, codes = np.unique(labels.to_numpy(), return_inverse=True)
    few = classes[np.bincount(codes) < 2]
    if len(few) or len(classes) < 2:
        got = f"one of {few[0]}" if len(few) else f"{len(classes)} class"
        raise ValueError(f"label: expected two classes or more, of two rows or more, got {got}")
    return Columns(numbers, codes, tuple(map(str, features.columns)), tuple(map(str, classes)), own, groups)


def _own(frame: Any, name: str) -> np.ndarray[Any, Any]:
    """A column that is an argument of the model: numbers, or codes of groups in the order of their names."""
    if name != "group":
        check_numbers(frame[[name]])
        return frame[name].to_numpy(float)
    return group_codes(frame, tuple(_names(frame[name])))


def _names(column: Any) -> list[str]:
    return [str(v) for v in np.unique(column.dropna().to_numpy())]


def group_codes(frame: Any, groups: tuple[str, ...]) -> np.ndarray[Any, Any]:
    """Codes of the column ``group`` of a frame.

    Raises:
        ValueError: There is no such column, or a row has no group, or none of those known.
    """
    if "group" not in frame.columns:
        raise ValueError(f"data: expected a column group, got {shown(frame.columns)}")
    codes = {name: k for k, name in enumerate(groups)}
    values = frame["group"]
    wrong = values.isna() | ~values.astype(str).isin(codes)
    if wrong.any():
        raise ValueError(f"data: expected one of {shown(groups)} in column group, got {values[wrong].iloc[0]}")
    return values.astype(str).map(codes).to_numpy(np.int64)


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
