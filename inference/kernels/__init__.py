"""MCMC kernels for ``sample``: Pyro's and ours.

A kernel is a subclass of ``pyro.infer.mcmc.mcmc_kernel.MCMCKernel``. ``sample`` takes a function that builds the kernel
from the model: ``NUTS``, or ``partial(NUTS, full_mass=True)``.
"""

from pyro.infer import HMC

from inference.kernels.chees import ChEES
from inference.kernels.gibbs import Gibbs
from inference.kernels.nuts import NUTS

__all__ = ["HMC", "NUTS", "ChEES", "Gibbs"]
