"""Interface of kernels that hold all their chains in one tensor."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor


class Batched(MCMCKernel):
    r"""MCMC kernel that advances many chains at once.

    ``inference.sample`` runs the kernel in blocks of transitions and returns its chains as chains. Under plain
    ``pyro.infer.MCMC`` a draw of a site has shape (chains, \*shape), so chains are the second dimension of its draws.

    Attributes:
        num_chains: Number of chains; can be changed before ``setup``.
        jit_compile: Whether ``setup`` compiles; can be changed before ``setup``.
        block: Transitions per call of ``advance``.
        execution: How the kernel runs: ``eager``, ``traced`` or ``fused``.
        restarted: Number of chains that the warmup moved to the position of another chain.
        gradients: Gradient evaluations per chain so far.
        operations: Cost of one gradient of all chains before fusing (``potential.count_operations``).
        state: State of the chains and of the adaptation; assign it to resume from there.
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
        r"""Starting values by site, (chains, \*shape); those of continuous sites are unconstrained."""
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
        """Whether the next block belongs to the warmup."""

    @abstractmethod
    def fuse(self) -> None:
        """Compile the kernel, and run it once so that compilation happens here."""

    @abstractmethod
    def advance(self) -> Any:
        """Run one block of transitions: of the warmup until it is over, of draws after that."""

    @abstractmethod
    def collect(self, blocks: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        r"""Join blocks into values by site, (draws, chains, \*shape), and sample statistics, (draws, chains)."""
