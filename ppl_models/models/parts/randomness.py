"""Random states of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's global random state from a seed, and leave that of the CPU and of all cuda devices as it was."""
    initialised = torch.cuda.is_initialized()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if initialised else (), device_type="cuda"):
        torch.manual_seed(seed)
        yield
    if not initialised:
        # Cuda devices are seeded when they are initialised, as the CPU was.
        torch.cuda.manual_seed_all(torch.initial_seed())
