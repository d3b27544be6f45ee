"""What several test files share."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from inference.core.handlers import isolated
from ppl_models.models.diffusion.denoisers import Denoiser

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers side by side: two threads each would wait for each other at every operation.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def alone() -> Iterator[None]:
    """A seed and a parameter store of its own, and one thread: the tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with isolated(0):
        yield
    torch.set_num_threads(threads)


WITHOUT = ("made", "markov_chain")
"""Rows of the zoo without latent sites: neither a posterior nor chains."""
SAMPLERS = ("gan", "conditional_gan")
"""Rows of the zoo without a likelihood: neither ELBO nor chains."""
LABELS = ("helmholtz_machine",)
"""Rows whose latent sites are all finite: no potential."""


def brief(name: str) -> dict[str, Any]:
    """Arguments of a row whose own size is too long for a test of all rows."""
    return {"steps": 2, "network": Denoiser(64, 128, 2, hidden=(8,))} if name == "diffusion" else {}
