"""Memory of tensors that come from elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes on whose multiples torch's own tensors begin."""


def aligned(value: Any) -> Tensor:
    """A tensor, or an array as one, in memory that begins where torch's own does; a copy where it did not.

    The last digits of a matrix product may depend on where its factors begin (MKL on AMD processors), and those of
    files and of NumPy arrays begin at any multiple of 8 or 16 bytes: the same run would not be the same again.

    Example:
        >>> values = torch.arange(5.0)[1:]
        >>> aligned(values).data_ptr() % 64
        0
    """
    tensor = torch.as_tensor(value)
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT else tensor
