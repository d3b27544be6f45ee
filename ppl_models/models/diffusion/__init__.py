"""The diffusion chain and what can be done with a trained one."""
