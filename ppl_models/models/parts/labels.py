"""One-hot labels, and lookup of table rows by label."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_by_label(table: Tensor, labels: Tensor) -> Tensor:
    """Row of a table for each label: table (..., K, D) and labels (..., N) give (..., N, D).

    A product with one-hot labels rather than an index: draws and enumerated labels broadcast on the left, and the
    gradient is one matrix product.
    """
    return one_hot(labels, table.shape[-2], table.dtype) @ table


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """One-hot labels (..., N, K). Unlike torch's own it does not read the labels back, so it can be traced."""
    return (labels[..., None] == torch.arange(classes, device=labels.device)).to(dtype)
