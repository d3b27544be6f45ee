"""What each process does where two train a pair together. It imports little: each process starts anew."""

from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from ppl_models import VAE


def work(rank: int, store: str, results: Any) -> None:
    """Train on a share of the rows, with the gradients averaged over both processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        pyro.set_rng_seed(0)
        pair = VAE(6, 2, hidden=(8,))
        x = (torch.rand(40, 6) < 0.3).float()
        rows = torch.arange(rank, 40, 2)
        pyro.set_rng_seed(1 + rank)
        loss = DistributedDataParallel(Trace_ELBO()(*pair.halves()))
        optimizer, losses = torch.optim.Adam(loss.parameters(), lr=0.05), []
        for _ in range(60):
            optimizer.zero_grad()
            value = loss(x[rows], size=40, rows=rows)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        results[rank] = losses, torch.cat([p.detach().flatten() for p in pair.parameters()]).tolist()
    finally:
        distributed.destroy_process_group()
