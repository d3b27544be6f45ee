r"""Chains in the processes of a group: each process runs an ensemble of its own, and all have the chains of all.

The processes talk once, at the end, when the ensembles are joined along ``chain`` in the order of ranks. The ensemble
of rank 0 is that of a single process with the same seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from inference.checkpoint import Checkpoint
from inference.core.group import from_first, gathered, part_ways, ranks
from inference.further import Continuation, FurtherDraws
from inference.runners.base import ChainRun


def seed_of_rank(seed: int) -> int:
    """A seed of this process's own; that of rank 0 is the seed itself."""
    rank = ranks()[0]
    return int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]) if rank else seed


def checkpoint_of_rank(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint of this process: in a group, a folder of the given one for each rank."""
    rank, count = ranks()
    return checkpoint if checkpoint is None or count == 1 else checkpoint.part(f"rank {rank}")


def joined(run: ChainRun) -> ChainRun:
    """The ensembles of all processes as one run; ensembles of other lengths are cut to the shortest.

    All processes have the same random state after it.
    """
    count = ranks()[1]
    if count == 1:
        return run
    ours = {n: v.cpu() for n, v in run.draws.items()}
    about = (ours, run.stats, run.restarted, run.ended, run.setup, run.execution, run.method)
    draws, stats, restarted, ended, setup, execution, method = zip(*gathered(about), strict=True)
    if len(set(method)) > 1:
        raise RuntimeError(f"kernel: expected the same in all processes, got {', '.join(method)}")
    _meet()
    values, columns = _along_chains(list(draws), list(stats), run.chains)
    return replace(
        run,
        draws={n: v.to(run.draws[n].device) for n, v in values.items()},
        stats=columns,
        chains=run.chains * count,
        setup=max(setup),
        execution=execution[0] if len(set(execution)) == 1 else ", ".join(execution),
        more=_OfAll(run.more, run.chains),
        restarted=sum(restarted),
        ended=next(filter(None, ended), ""),
    )


@dataclass(frozen=True)
class _OfAll(FurtherDraws):
    """Further draws of all ensembles, for which all processes have to ask; a file holds nothing of them.

    Attributes:
        own: Further draws of this process's ensemble.
        chains: Its number of chains.
    """

    own: FurtherDraws
    chains: int

    def __call__(self, size: int, seed: int) -> dict[str, Tensor]:
        """So many draws of the latent sites, as many from each ensemble."""
        part_ways()
        own = self.own(-(-size // ranks()[1]), seed_of_rank(seed))
        each = gathered({n: v.cpu() for n, v in own.items()})
        _meet()
        return {n: torch.cat([v[n] for v in each])[:size] for n in each[0]}

    def extend(self, draws: int) -> Continuation:
        """Let the chains of all ensembles go on by so many draws each."""
        part_ways()
        own = self.own.extend(draws)
        values, stats = zip(*gathered((own.draws, own.stats)), strict=True)
        _meet()
        return Continuation(
            *_along_chains(list(values), list(stats), self.chains), own.seconds, _OfAll(own.more, self.chains)
        )


def _meet() -> None:
    """Give all processes the same random state."""
    pyro.set_rng_seed(from_first(lambda: int(torch.randint(2**31, ()))))


def _along_chains(
    draws: list[dict[str, Tensor]], stats: list[dict[str, np.ndarray]], chains: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Draws (chains * draws, ...) and statistics (chains, draws) of ensembles, one after another."""
    least = min(next(iter(s.values())).shape[1] for s in stats)

    def cut(value: Tensor) -> Tensor:
        return value.unflatten(0, (chains, -1))[:, :least].flatten(0, 1)

    return (
        {n: torch.cat([cut(v[n]) for v in draws]) for n in draws[0]},
        {n: np.concatenate([s[n][:, :least] for s in stats]) for n in stats[0]},
    )
