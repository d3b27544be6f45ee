r"""Real data sets by name, and simulated ones with the truth that made them.

:func:`load` returns a :class:`Dataset`: rows to fit and rows to hold out. A set without a split of its
own is always split the same way (30 % held out, stratified by label, seed 0), so that results on one set
can be compared. Texts are split by distinct rows: all copies of a text are on one side. In four other sets
rows to hold out are also rows to fit, as different plants or documents have the same measurements or words
(:attr:`Dataset.repeated` counts them): 1 of 45 in ``iris``, 17 of 900 in ``xwindows`` (its own split),
2056 of 4873 in ``news20_w100`` and 37 of 1650 in ``sms_spam``; and 299 of 300 in ``lsat``, which has 30 patterns of
answers.

``breast_cancer``, ``wine``, ``iris`` and ``digits`` are those of scikit-learn;
``diabetes`` and ``linnerud``, of which y is the number of chin-ups, have a number y in place of labels.
``turned_digits`` has two domains without pairs, a, half of the digits, and b, the other half turned by a
quarter and inverted; ``descriptions`` are the letters of scikit-learn's texts on its data sets.
``posteriordb/NAME`` are the data of a posterior of posteriordb
(Magnusson et al. 2024) with its reference draws, for the nine names in ``files.POSTERIORS``.
Of :mod:`ppl_models.data.classics`, printed in papers: ``eight_schools``, ``rats``, ``lsat``, ``earthquakes`` and
``nile``; ``returns`` are simulated (:func:`~ppl_models.data.simulate.simulate_returns`). Sets of one series, and the
eight schools, hold nothing out.
From files:

- ``mnist`` (LeCun et al. 1998) and ``fashion_mnist`` (Xiao et al. 2017), with their own splits;
- ``binarized_mnist``, the static binarization of Larochelle and Murray (2011), in three splits without
  labels. The test images are MNIST's sorted by digit: they are not shuffled;
- ``omniglot`` (Lake et al. 2015) averaged down to 28 x 28: background is train, evaluation is test. This
  is *not* the 28 x 28 file of Burda et al. (2016), so likelihoods cannot be compared with that literature.
  No character is in both splits, so there are no labels;
- ``xwindows`` (Murphy 2012), documents on X-windows or MS-windows as occurrences of 600 words;
- ``news20_w100`` (Roweis), newsgroup postings as occurrences of 100 words;
- ``sms_spam`` (Almeida et al. 2011), messages as counts of the words that at least two of the messages
  in the training split contain; ``sms_text``, the letters of the same messages.

See :mod:`ppl_models.data.files` for the search path of the files, whose SHA-256 is checked.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ppl_models.data import files
from ppl_models.data.files import Arrays
from ppl_models.data.frames import ROWS, Roles, check_numbers, group_codes, is_csv, shown
from ppl_models.data.loaders import LOADERS, Raw, read
from ppl_models.data.simulate import check_count, check_floating, random_source


@dataclass(frozen=True)
class Dataset:
    """Rows to fit and rows to hold out.

    Attributes:
        name: Its name, as :func:`load` takes it.
        train: ``x``, a floating point tensor of shape (rows, features), or ``a`` and ``b`` of two domains; with labels
            also ``y`` of shape (rows,), an index into ``classes``: int64, or floating point with nan where the label
            is hidden.
        test: The same names.
        features: Names of the columns of ``x``.
        classes: Names of the classes; ``()`` without labels.
        valid: The same names, if the set has a third split.
        symbols: Of a set of texts, the symbol of each code in ``x``.
        shape: Of a set of images, height and width in pixels.
        levels: Of a set of images, the number of values of a pixel.
        names: Names along further dimensions, such as ``groups``.
        units: Of a number y, what was subtracted from it, and by what it was divided then.
        reference: Of a posterior of posteriordb, reference draws (10, 1000) of its parameters, ten chains.
    """

    name: str
    train: dict[str, Tensor]
    test: dict[str, Tensor]
    features: tuple[str, ...]
    classes: tuple[str, ...]
    valid: dict[str, Tensor] | None = None
    symbols: tuple[str, ...] = ()
    shape: tuple[int, int] | None = None
    levels: int | None = None
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reference: Mapping[str, Tensor] = field(default_factory=dict)
    units: tuple[float, float] = (0.0, 1.0)

    @cached_property
    def repeated(self) -> int:
        """Number of rows of ``test``, without their labels, that are also rows of ``train``."""
        columns = [n for n in self.train if n != "y"]
        # Two domains have rows of their own; other columns belong to one row.
        domains = [[n] for n in columns] if set(columns) == {"a", "b"} else [columns]
        known = [set(_rows(self.train, names)) for names in domains]
        found = [_rows(self.test, names) for names in domains]
        return sum(row in one for one, rows in zip(known, found, strict=True) for row in rows)

    @property
    def rows(self) -> int:
        """Number of rows of ``train``."""
        return len(next(iter(self.train.values())))

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return next(iter(self.train.values())).device

    def to(self, device: str | torch.device) -> Dataset:
        """The same rows on a device, such as "cuda"."""
        place = usable(device)
        moved: dict[str, Any] = {
            split: {name: rows.to(place) for name, rows in columns.items()}
            for split in ("train", "test", "valid")
            if (columns := getattr(self, split)) is not None
        }
        return replace(self, **moved)


def _rows(split: Mapping[str, Tensor], names: list[str]) -> list[bytes]:
    """The rows of some columns, each as its bytes."""
    if not split or not names:
        return []
    columns = [split[n].cpu().numpy() for n in names]
    return [b"".join(value.tobytes() for value in row) for row in zip(*columns, strict=True)]


def usable(device: str | torch.device) -> torch.device:
    """The device, if torch can use it on this machine; else a ValueError."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        why = " ".join(str(error).split("\n")[0].split())[:60]
        raise ValueError(
            f"device: expected a device that torch can use here, such as cpu, got {str(device)!r} ({why})"
        ) from None


def names() -> tuple[str, ...]:
    """The names that :func:`load` takes."""
    return tuple(LOADERS)


def load(
    name: str,
    *,
    standardise: bool = False,
    binarise: bool = False,
    unit: bool = False,
    labels: int | None = None,
    roles: Roles = ROWS,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Dataset:
    r"""Load a data set by name; download its files where they are missing.

    Args:
        name: One of :func:`names`; a posterior, such as ``posteriordb/kidiq-kidscore_momhsiq``; or a CSV file:
            ``flowers.csv``, with a column of labels ``flowers.csv#species``.
        standardise: Subtract the mean of each column and divide by its standard deviation (that of the
            population), both of the training split alone. A column that is constant there is centred only. The same
            is done to y where it is a number to regress on.
        binarise: 1 where x is above a threshold, else 0. The threshold is half of the full scale for images
            (0.5; 8 for ``digits``), 0 for counts, and otherwise, for each column, halfway between the
            smallest and the largest value in the training split. Binary sets stay as they are.
        unit: Scale pixels to [0, 1], also those of ``digits``, which are 0 to 16 otherwise.
        labels: Number of training rows that keep their label, the same number per class; y is then floating
            point, nan where hidden. None: all.
        roles: What the columns of a CSV file are: what is to be modelled, groups, and whether rows are held out. A
            ``target`` that is a "number" is standardised with x, also that of other sets, and a "count" is not.
        dtype: Floating point type of ``x``. Pixels are scaled to [0, 1], except those of ``digits``.
        device: Where the rows are, such as "cuda".

    Raises:
        ValueError: The name is unknown, there is no such device, two transformations are asked for, ``unit`` is asked
            for data other than images, ``labels`` do not fit the set, ``dtype`` is no floating point type, or a file
            in ``PPL_MODELS_DATA`` has the wrong SHA-256.
        FileNotFoundError: A file is nowhere to be found.

    Example:
        >>> wine = load("wine", standardise=True)
        >>> wine.train["x"].shape, wine.test["x"].shape, wine.classes
        (torch.Size([124, 13]), torch.Size([54, 13]), ('class_0', 'class_1', 'class_2'))
    """
    if str(name) in files.POSTERIORS:
        check_floating(dtype)
        return _of_posteriordb(name, dtype).to(usable(device))
    if name not in LOADERS and not is_csv(name):
        near = ", ".join(difflib.get_close_matches(str(name), LOADERS, cutoff=0.4)) or "none"
        raise ValueError(f"name: expected one of {', '.join(LOADERS)}, got {name!r} (nearest: {near})")
    place = usable(device)
    if standardise + binarise + unit > 1:
        chosen = [n for n, v in {"standardise": standardise, "binarise": binarise, "unit": unit}.items() if v]
        raise ValueError(
            f"standardise, binarise, unit: expected at most one of them to be True, got {', '.join(chosen)}"
        )
    check_floating(dtype)
    if roles.target not in ("label", "number", "count"):
        raise ValueError(f"roles: expected a target label, number or count, got {roles.target!r}")
    raw = read(name, roles)
    if unit and raw.shape is None:
        raise ValueError(f"unit: expected images, got {name}")
    splits: dict[str, dict[str, Tensor]] = {"train": {}, "test": {}}
    domains = {"x": raw.x} if raw.b is None else {"a": raw.x, "b": raw.b}
    for column, arrays in domains.items() if raw.x else ():
        for split, x in _transformed(raw, arrays, standardise, binarise, unit, dtype).items():
            splits.setdefault(split, {})[column] = x
    for split, y in raw.y.items():
        splits[split]["y"] = torch.tensor(y, dtype=torch.int64)
    units = (0.0, 1.0)
    if standardise and roles.target == "number":
        units = _units(raw.columns["y"]["train"])
    for column, arrays in raw.columns.items():
        for split, values in _column(arrays, units if column == "y" else (0.0, 1.0), dtype).items():
            splits[split][column] = values
    if labels is not None:
        if not raw.classes:
            raise ValueError(f"labels: expected a set with labels, got {name}")
        splits = {split: {**columns, "y": columns["y"].to(dtype)} for split, columns in splits.items()}
        splits["train"]["y"] = hide_labels(splits["train"]["y"], labels)
    return Dataset(
        name,
        splits["train"],
        splits["test"],
        raw.features,
        raw.classes,
        splits.get("valid"),
        raw.symbols,
        raw.shape,
        2 if binarise and raw.shape else raw.levels,
        raw.names,
        units=units,
    ).to(place)


def _of_posteriordb(name: str, dtype: torch.dtype) -> Dataset:
    """Data of a posterior of posteriordb as they are, and its reference draws."""
    stored, chains = files.read_posterior(name)
    train = {n: torch.tensor(v, dtype=dtype) for n, v in stored.items()}
    reference = {n: torch.tensor([c[n] for c in chains], dtype=torch.float64) for n in chains[0]}
    return Dataset(name, train, {}, (), (), reference=reference)


def prepared_rows(
    name: str,
    frame: Any,
    *,
    standardise: bool = False,
    binarise: bool = False,
    unit: bool = False,
    roles: Roles = ROWS,
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> dict[str, Tensor]:
    """Rows of a frame as :func:`load` prepares those of a set, without y: by the numbers of its training split.

    Args:
        name: The set.
        frame: A pandas DataFrame with a column per feature, and those of the set that are arguments of their own; other
            columns are left out.
        standardise: As for :func:`load`.
        binarise: As for :func:`load`.
        unit: As for :func:`load`.
        roles: As for :func:`load`.
        dtype: As for :func:`load`.

    Raises:
        ValueError: The set has two domains, or a column is missing, is no number or has missing values.
    """
    raw = read(name, roles)
    if raw.b is not None:
        raise ValueError(f"data: expected a set of rows, got {name} of two domains")
    needed = [*raw.features, *(n for n in roles.own if n != "group")]
    missing = [f for f in needed if f not in frame.columns]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"data: expected columns {', '.join(missing[:3])}{more}, got {shown(frame.columns)}")
    chosen = frame[needed]
    if needed:
        check_numbers(chosen)
    found = {n: torch.tensor(frame[n].to_numpy(float), dtype=dtype) for n in roles.own if n != "group"}
    if "group" in roles.own:
        found["group"] = torch.tensor(group_codes(frame, raw.names["groups"]))
    if raw.features:
        arrays = {"train": raw.x["train"], "rows": frame[list(raw.features)].to_numpy(float)}
        found["x"] = _transformed(raw, arrays, standardise, binarise, unit, dtype)["rows"]
    return found


def hide_labels(y: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Labels (N,) of which ``count``, equally many per class, are kept and all others are nan.

    Args:
        y: Floating point labels, 0 to K - 1.
        count: A multiple of K, at most K times the size of the smallest class.
        seed: Seed of the choice.
    """
    check_count("labels", count, 0)
    sizes = y.long().bincount()
    per_class = count // len(sizes)
    if not 0 < per_class <= int(sizes.min()) or count % len(sizes):
        most = len(sizes) * int(sizes.min())
        raise ValueError(f"labels: expected a multiple of {len(sizes)} (the classes) up to {most}, got {count}")
    order = torch.randperm(len(y), generator=random_source(seed))
    kept = torch.cat([order[y[order] == k][:per_class] for k in range(len(sizes))])
    hidden = torch.full_like(y, torch.nan)
    hidden[kept] = y[kept]
    return hidden


def _transformed(
    raw: Raw, arrays: Arrays, standardise: bool, binarise: bool, unit: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    scale = raw.scale * (2 * raw.threshold if unit and raw.threshold else 1)
    x = {split: torch.tensor(values, dtype=wide).div_(scale) for split, values in arrays.items()}
    if standardise:
        x = _standardised(x)
    elif binarise:
        threshold = (x["train"].amin(0) + x["train"].amax(0)) / 2 if raw.threshold is None else raw.threshold
        x = {split: values > threshold for split, values in x.items()}
    return {split: values.to(dtype) for split, values in x.items()}


def _column(arrays: Arrays, units: tuple[float, float], dtype: torch.dtype) -> dict[str, Tensor]:
    """A further column: codes as they are, numbers in such units."""
    if all(v.dtype.kind in "iu" for v in arrays.values()):
        return {split: torch.tensor(v, dtype=torch.int64) for split, v in arrays.items()}
    return {split: torch.tensor((v - units[0]) / units[1], dtype=dtype) for split, v in arrays.items()}


def _units(y: Any) -> tuple[float, float]:
    """Mean and standard deviation of a number; 1 where it is constant."""
    return float(y.mean()), float(y.std()) if y.max() > y.min() else 1.0


def _standardised(x: dict[str, Tensor]) -> dict[str, Tensor]:
    scale, centre = torch.std_mean(x["train"], 0, correction=0)
    # By its range: rounding gives a constant column a standard deviation that is small but not 0.
    low = x["train"].amin(0)
    constant = low == x["train"].amax(0)
    scale, centre = torch.where(constant, 1.0, scale), torch.where(constant, low, centre)
    return {split: values.sub(centre).div_(scale) for split, values in x.items()}
