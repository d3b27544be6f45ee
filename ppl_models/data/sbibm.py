"""Simulators of Lueckmann et al. 2021, "Benchmarking Simulation-Based Inference" (https://arxiv.org/abs/2101.04653).

The package ``sbibm`` is not installed: its requirements are many and old. Only files of its wheel are read.
"""

from __future__ import annotations

import bz2
import io
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_models.data.files import SBIBM, obtain


@dataclass(frozen=True)
class Benchmark:
    """The files of a simulator of Lueckmann et al. 2021.

    Attributes:
        observations: Ten observations, (10, C).
        reference: Draws of the posterior of each, (10, 10000, D).
        tensors: Constants of the simulator, by name.
    """

    observations: Tensor
    reference: Tensor
    tensors: dict[str, Tensor]


@lru_cache(maxsize=2)
def read_benchmark(name: str) -> Benchmark:
    """Observations, reference draws and constants of a simulator of the package ``sbibm``, from its wheel."""
    (path,) = obtain(SBIBM)
    with zipfile.ZipFile(path) as archive:
        folder = f"sbibm/tasks/{name}/files"

        def matrix(k: int, file: str) -> np.ndarray[Any, Any]:
            content = archive.read(f"{folder}/num_observation_{k}/{file}")
            content = bz2.decompress(content) if file.endswith(".bz2") else content
            return np.loadtxt(io.BytesIO(content), delimiter=",", skiprows=1, ndmin=2, dtype=np.float32)

        kept = [n for n in archive.namelist() if n.startswith(f"{folder}/") and n.endswith(".pt")]
        return Benchmark(
            torch.tensor(np.concatenate([matrix(k, "observation.csv") for k in range(1, 11)])),
            torch.tensor(np.stack([matrix(k, "reference_posterior_samples.csv.bz2") for k in range(1, 11)])),
            {Path(n).stem: torch.load(io.BytesIO(archive.read(n)), weights_only=True) for n in kept},
        )
