"""What a kernel that holds all its chains in one tensor offers to ``sample``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor


class Batched(MCMCKernel):
    r"""A kernel of many chains at once.

    In plain ``pyro.infer.MCMC`` a draw of a site is (chains, \*shape): its draws have chains as their second dimension.
    ``inference.sample`` reads them as chains, and runs the kernel block by block.

    Attributes:
        num_chains: Chains, which may be set before ``setup``.
        jit_compile: Whether ``setup`` compiles; may be set before it.
        block: Transitions that one call of ``advance`` makes.
        execution: How the kernel runs: ``eager``, ``traced`` or ``fused``.
        restarted: Chains that the warmup put elsewhere.
        gradients: Gradients of each chain so far.
        operations: What one gradient of all chains costs before it is fused (``potential.count_operations``).
        state: Where the chains stand, to go on from there again.
    """

    num_chains: int
    jit_compile: bool
    block: int
    execution: str
    restarted: int = 0
    gradients: int = 0
    operations: int = 0
    state: Any

    _initial: dict[str, Tensor] | None = None

    @property
    def initial_params(self) -> dict[str, Tensor]:
        r"""Values by name, (chains, \*shape), that the chains start from: finite, and unconstrained continuous ones."""
        return {} if self._initial is None else self._initial

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        wrong = [n for n, v in params.items() if v.dim() == 0 or len(v) != self.num_chains]
        if wrong:
            shape = tuple(params[wrong[0]].shape)
            raise ValueError(f"initial_params: expected ({self.num_chains}, ...) for {wrong[0]}, got {shape}")
        self._initial = params

    @property
    @abstractmethod
    def warming(self) -> bool:
        """Whether the next block is one of the warmup."""

    @abstractmethod
    def fuse(self) -> None:
        """Compile what is worth it, and run it once so that the cost is paid here."""

    @abstractmethod
    def advance(self) -> Any:
        """Run a block of transitions: the warmup's until it is over, then draws."""

    @abstractmethod
    def collect(self, blocks: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        r"""Blocks as values by site, (draws, chains, \*shape), and statistics, (draws, chains)."""
