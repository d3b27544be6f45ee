"""Kernels that ``sample`` runs: Pyro's own, and ours.

Each is a subclass of ``pyro.infer.mcmc.mcmc_kernel.MCMCKernel``.
``sample`` takes a factory from the model to the kernel: ``NUTS``, or ``partial(NUTS, full_mass=True)``.
"""

from pyro.infer import HMC, NUTS

from inference.kernels.chees import ChEES
from inference.kernels.gibbs import Gibbs

__all__ = ["HMC", "NUTS", "ChEES", "Gibbs"]
