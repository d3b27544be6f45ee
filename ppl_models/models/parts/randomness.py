"""Random sources other than torch's own, which all threads of a process share."""

from __future__ import annotations

import torch
from torch import Tensor


def bernoulli(p: Tensor, random: torch.Generator | None = None) -> Tensor:
    """Zeros and ones by their probabilities, from a source on the CPU or torch's own: the same on every device."""
    return p.bernoulli() if random is None else (torch.rand(p.shape, generator=random, dtype=p.dtype).to(p) < p).to(p)
