r"""Data that are read by rows: a memory-mapped array or tensor, or a map-style ``torch.utils.data.Dataset``.

A minibatch reads its own rows. All else that is asked of the data (shapes of sites, checks of the guide, predictive
groups of a Result) is answered by ``SAMPLE`` rows, evenly spaced, in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from inference.core.memory import aligned
from inference.core.spacing import spaced

SAMPLE = 1000
"""Rows in memory that stand for all where single ones are shown."""


MAPPED_NUMBERS = 10_000_000
"""Numbers of a memory-mapped array up to which it is read into memory as a whole."""


BLOCK_ROWS = 65_536
"""Rows that are read at once where all have to be."""


@dataclass(frozen=True, eq=False)
class Source:
    """Data of which rows are read by index.

    Attributes:
        columns: Arrays and tensors by name, each with an entry per row.
        items: A dataset whose items are rows by name; None: there is none.
        names: Names of what an item of the dataset holds, in its order.
        dtypes: Types that the model takes, by name; others stay as they are.
    """

    columns: Mapping[str, Any] = field(default_factory=dict)
    items: Any = None
    names: tuple[str, ...] = ()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else len(self.items)

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """The rows of some indices, by name, in memory."""
        indices = rows.cpu()
        found = {n: _take(v, indices) for n, v in self.columns.items()}
        if self.items is not None:
            found |= self._fetch(indices.tolist())
        return {n: v.to(device=rows.device, dtype=self.dtypes.get(n, v.dtype)) for n, v in found.items()}

    def sample(self) -> Tensor:
        """Indices of evenly spaced rows."""
        return spaced(len(self), SAMPLE)

    def blocks(self) -> Iterator[dict[str, Tensor]]:
        """All rows of the arrays, some at a time, as they are stored."""
        for start in range(0, len(self), BLOCK_ROWS):
            yield {n: _as_tensor(v[start : start + BLOCK_ROWS]) for n, v in self.columns.items()}

    def fingerprints(self) -> dict[str, Any]:
        """Shape, type and SHA-256 of the arrays, read by blocks; of a dataset, those of the sampled rows."""
        digests = {n: hashlib.sha256() for n in self.columns}
        for block in self.blocks() if self.columns else ():
            for name, value in block.items():
                digests[name].update(_bytes(value))
        first = self._fetch(self.sample().tolist()) if self.items is not None else {}
        shown = {n: {"shape": list(v.shape), "dtype": str(_as_tensor(v[:1]).dtype)} for n, v in self.columns.items()}
        return {
            **{n: {**shown[n], "sha256": digest.hexdigest()} for n, digest in digests.items()},
            **{
                n: {
                    "shape": [len(self), *v.shape[1:]],
                    "dtype": str(v.dtype),
                    "sha256 of sampled rows": hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest(),
                }
                for n, v in first.items()
            },
        }

    def _fetch(self, indices: list[int]) -> dict[str, Tensor]:
        many = getattr(self.items, "__getitems__", None)
        items = many(indices) if many is not None else [self.items[k] for k in indices]
        rows = default_collate(items)
        if isinstance(rows, Mapping):
            return {str(n): torch.as_tensor(v) for n, v in rows.items()}
        listed = rows if isinstance(rows, list | tuple) else [rows]
        if len(listed) > len(self.names):
            raise ValueError(
                f"data: expected items of up to {len(self.names)} parts ({', '.join(self.names)}), got {len(listed)}; "
                "give mappings of names"
            )
        return dict(zip(self.names, map(torch.as_tensor, listed), strict=False))


def source_of(given: Mapping[str, Any], names: Sequence[str]) -> Source | None:
    """The source of data that are to be read by rows; None where they are in memory, or small.

    Args:
        given: Data by name as they came, or a dataset under any one name.
        names: Names of the model's arguments, in their order.

    Raises:
        ValueError: A dataset cannot be read by index, comes with other data, or lengths differ.
    """
    sets = {n: v for n, v in given.items() if isinstance(v, Dataset)}
    if sets:
        items = next(iter(sets.values()))
        if isinstance(items, IterableDataset) or not hasattr(items, "__len__"):
            raise ValueError("data: expected a map-style Dataset, with __getitem__ and __len__, got one without")
        if len(given) > 1:
            raise ValueError(
                f"data: expected a Dataset alone, whose items may be mappings, got also {len(given) - 1} more"
            )
        if not len(items):
            raise ValueError("data: expected at least one row, got none")
        return Source(items=items, names=tuple(names))
    mapped = {n: v for n, v in given.items() if _is_mapped(v)}
    if sum(_numel(v) for v in mapped.values()) <= MAPPED_NUMBERS:
        return None
    counts = {n: len(v) for n, v in mapped.items()}
    count = max(counts.values())
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{n} {k}" for n, k in counts.items())
        raise ValueError(f"data: expected the same number of rows in each memory-mapped array, got {said}")
    return Source({n: v for n, v in given.items() if n in mapped or _rows_of(v) == count})


def _is_mapped(value: Any) -> bool:
    """Whether an array, or a tensor, lies in a memory-mapped file."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.device.type == "cpu" and value.untyped_storage().filename is not None
    base = value
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(value, np.ndarray) and isinstance(base, np.memmap) and value.ndim > 0


def _rows_of(value: Any) -> int | None:
    return len(value) if isinstance(value, Tensor | np.ndarray) and value.ndim else None


def _numel(value: Any) -> int:
    return int(value.numel() if isinstance(value, Tensor) else value.size)


def _take(column: Any, indices: Tensor) -> Tensor:
    return column[indices] if isinstance(column, Tensor) else _as_tensor(column[indices.numpy()])


def _bytes(value: Tensor) -> Any:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()


def _as_tensor(value: Any) -> Tensor:
    """Rows as a tensor of their own memory: those of a file may not be written to."""
    return value if isinstance(value, Tensor) else aligned(np.array(value))
