r"""Labels as one-hot rows, and tables looked up by label."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_by_label(table: Tensor, labels: Tensor) -> Tensor:
    r"""Rows of a table by label: table (..., K, \*event of one dimension), labels (..., N) -> (..., N, event).

    A product with one-hot labels instead of an index: draws and enumerated labels broadcast on the left,
    and its gradient is one matrix product.
    """
    return one_hot(labels, table.shape[-2], table.dtype) @ table


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """One-hot labels (..., N, K). Torch's own reads the labels' range back, which no graph can trace."""
    return (labels[..., None] == torch.arange(classes, device=labels.device)).to(dtype)
