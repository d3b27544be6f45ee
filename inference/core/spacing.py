"""Evenly spaced places."""

from __future__ import annotations

import torch
from torch import Tensor


def spaced(size: int, most: int) -> Tensor:
    """Evenly spaced indices below ``size``, from the first to the last: all of them, but no more than ``most``.

    Example:
        >>> spaced(10, 4).tolist(), spaced(3, 4).tolist()
        ([0, 3, 6, 9], [0, 1, 2])
    """
    return torch.linspace(0, size - 1, min(size, most), dtype=torch.float64).long()
