r"""What is known of the tensors of a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Form:
    """What is known of a tensor of a graph: all but its values."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> Form | None:
        """The form of a tensor; None for one that has no strides."""
        strided = value.layout is torch.strided
        return cls(value.shape, value.stride(), value.dtype, value.device) if strided else None

    @property
    def contiguous(self) -> bool:
        """Whether the tensor lies in memory row by row."""
        return torch.empty(self.shape, device="meta").stride() == self.strides

    def empty(self) -> Tensor:
        """A tensor of this form."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
