"""A shift of every seed, so that a test which holds at one seed only is found.

``PPL_MODELS_SEED_SHIFT=7 pytest`` adds 7 million to every seed that torch, Pyro and NumPy get. What a test asserts
of random numbers has to hold for any of them. Figures printed in documentation are those of their own seeds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

SHIFT = int(os.environ.get("PPL_MODELS_SEED_SHIFT", "0"))
_amount = 1_000_000 * SHIFT
_manual_seed, _default_rng = torch.manual_seed, np.random.default_rng


def shifted(seed: Any) -> Any:
    """A seed moved by the shift; what is not a number (None, a sequence, a bit generator) stays as it is."""
    return (int(seed) + _amount) % 2**32 if isinstance(seed, int | np.integer) else seed


class Generator(torch.Generator):
    """A generator whose seed is moved by the shift."""

    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed(shifted(seed))


def install() -> None:
    """Move every seed from now on."""
    torch.manual_seed = lambda seed: _manual_seed(shifted(seed))
    torch.Generator = Generator  # type: ignore[misc]
    np.random.default_rng = lambda seed=None: _default_rng(shifted(seed))


@contextmanager
def unmoved() -> Iterator[None]:
    """Seeds as they are written, inside the block."""
    global _amount
    before, _amount = _amount, 0
    try:
        yield
    finally:
        _amount = before
