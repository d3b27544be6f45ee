"""The contenders' samplers, each as its library's users run it: ``prepare(posterior, ...) -> run(seed)``.

``run`` returns the draws by site, (chain, draw, ...), float64, and the seconds that they took, warm-up included. What
can be kept between runs (a compiled program) is made in ``prepare`` or kept by the library.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from .posteriors import Posterior, tensors

Draws = dict[str, np.ndarray]
Run = Callable[[int], tuple[Draws, float]]


def ours(posterior: Posterior, kernel: str | None = None, compile: bool | str = True, **settings: Any) -> Run:
    """``inference.sample``, compiled; the seconds leave out set-up and predictions, as those of the peers do."""
    import torch

    torch.set_default_dtype(torch.float64)

    from inference import kernels, sample

    pair, data = posterior.pyro(), tensors(posterior.data(), torch.float64)
    pair = pair.double() if isinstance(pair, torch.nn.Module) else pair
    chosen = getattr(kernels, kernel) if kernel else None

    def run(seed: int) -> tuple[Draws, float]:
        result = sample(pair, data, chosen, seed=seed, compile=compile, progress=False, **settings)
        return {n: result.idata.posterior[n].values for n in posterior.sites}, result.seconds["run"]

    return run


def pyro(posterior: Posterior, *, chains: int, warmup: int, draws: int) -> Run:
    """Pyro's own MCMC and NUTS, chains one after the other (Pyro keeps a core back)."""
    import torch

    torch.set_default_dtype(torch.float64)
    from pyro import set_rng_seed
    from pyro.infer import MCMC, NUTS

    pair, data = posterior.pyro(), tensors(posterior.data(), torch.float64)
    model = getattr(pair.double(), "model", pair) if isinstance(pair, torch.nn.Module) else pair

    def one(seed: int) -> Draws:
        set_rng_seed(seed)
        chain = MCMC(NUTS(model), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
        chain.run(**data)
        return {n: v.numpy() for n, v in chain.get_samples().items()}

    def run(seed: int) -> tuple[Draws, float]:
        started = perf_counter()
        done = [one(seed * 1000 + k) for k in range(chains)]
        return {n: np.stack([d[n] for d in done]) for n in posterior.sites}, perf_counter() - started

    return run


def numpyro(posterior: Posterior, *, chains: int, warmup: int, draws: int) -> Run:
    """NumPyro's NUTS as one program, which a second ``MCMC.run`` would trace and compile again (2.5 s a run)."""
    import jax
    import numpyro
    from numpyro.infer import NUTS

    numpyro.enable_x64()
    data = {n: jax.numpy.asarray(v) for n, v in posterior.data().items()}

    def begin(seed: int) -> tuple[Any, Any]:
        kernel = NUTS(posterior.numpyro())
        keys = jax.random.split(jax.random.PRNGKey(seed), chains)
        return kernel, jax.block_until_ready(kernel.init(keys, warmup, None, (), data))

    kernel, _ = begin(0)

    def transition(state: Any, _: Any) -> Any:
        state = kernel.sample(state, (), data)
        return state, state.z

    @jax.jit
    def program(state: Any) -> Any:
        state, _ = jax.lax.scan(lambda s, _: (transition(s, _)[0], None), state, None, length=warmup)
        drawn = jax.lax.scan(transition, state, None, length=draws)[1]
        constrained = jax.vmap(jax.vmap(kernel.postprocess_fn((), data)))(drawn)
        return {n: jax.numpy.swapaxes(constrained[n], 0, 1) for n in posterior.sites}

    def run(seed: int) -> tuple[Draws, float]:
        _, state = begin(seed)
        started = perf_counter()
        drawn = program(state)
        kept = {n: np.asarray(drawn[n]) for n in posterior.sites}
        return kept, perf_counter() - started

    return run


def nutpie(posterior: Posterior, *, chains: int, draws: int, warmup: int | None = None, **settings: Any) -> Run:
    import nutpie

    compiled = nutpie.compile_pymc_model(posterior.pymc(**posterior.data()))

    def run(seed: int) -> tuple[Draws, float]:
        started = perf_counter()
        shape = {"draws": draws, "tune": warmup, "chains": chains}
        trace = nutpie.sample(compiled, **shape, seed=seed, progress_bar=False, save_warmup=False, **settings)
        kept = {n: trace.posterior[n].values for n in posterior.sites}
        return kept, perf_counter() - started

    return run


def pymc(posterior: Posterior, *, chains: int, warmup: int, draws: int) -> Run:
    import pymc as pm

    model = posterior.pymc(**posterior.data())
    shape: dict[str, Any] = {"draws": draws, "tune": warmup, "chains": chains, "nuts_sampler": "pymc"}

    def run(seed: int) -> tuple[Draws, float]:
        started = perf_counter()
        with model:
            trace = pm.sample(**shape, random_seed=seed, progressbar=False, compute_convergence_checks=False)
        kept = {n: trace.posterior[n].values for n in posterior.sites}
        return kept, perf_counter() - started

    return run


def blackjax(posterior: Posterior, kernel: str, *, chains: int, warmup: int, draws: int, **settings: Any) -> Run:
    """BlackJAX on the potential, the starts and the transforms that NumPyro makes of its model; one program."""
    import jax
    import numpyro
    from numpyro.infer.util import initialize_model

    numpyro.enable_x64()
    data = {n: jax.numpy.asarray(v) for n, v in posterior.data().items()}
    start = partial(initialize_model, model=posterior.numpyro(), model_kwargs=data)
    info = start(jax.random.PRNGKey(0))
    density = lambda z: -info.potential_fn(z)  # noqa: E731
    sampler = {"chees": _chees, "nuts": _nuts}[kernel]

    @jax.jit
    def program(key: Any, positions: Any) -> Any:
        drawn = sampler(density, key, positions, chains, warmup, draws, **settings)
        constrained = jax.vmap(jax.vmap(info.postprocess_fn))(drawn)
        # Scanned draws come first; judges want chains first.
        return {n: jax.numpy.swapaxes(constrained[n], 0, 1) for n in posterior.sites}

    def run(seed: int) -> tuple[Draws, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, second = jax.random.split(jax.random.PRNGKey(seed))
            positions = jax.block_until_ready(start(jax.random.split(first, chains)).param_info.z)
            started = perf_counter()
            drawn = program(second, positions)
        # jit sorts the names; the order of the sites is the order of the quantities.
        kept = {n: np.asarray(drawn[n]) for n in posterior.sites}
        return kept, perf_counter() - started

    return run


def _chees(
    density: Any, key: Any, positions: Any, chains: int, warmup: int, draws: int, *, metric: str | None = None
) -> Any:
    import blackjax
    import jax
    import optax

    first, second = jax.random.split(key)
    adaptation = blackjax.chees_adaptation(density, chains, mass_matrix_estimation=metric)
    (states, tuned), _ = adaptation.run(first, positions, 0.1, optax.adam(0.025), warmup, max_sampling_steps=draws)
    step = jax.vmap(blackjax.dynamic_hmc(density, **tuned).step)

    def transition(states: Any, key: Any) -> Any:
        states, _ = step(jax.random.split(key, chains), states)
        return states, states.position

    return jax.lax.scan(transition, states, jax.random.split(second, draws))[1]


def _nuts(density: Any, key: Any, positions: Any, chains: int, warmup: int, draws: int) -> Any:
    import blackjax
    import jax

    first, second = jax.random.split(key)
    adaptation = blackjax.window_adaptation(blackjax.nuts, density)
    tune = lambda key, position: adaptation.run(key, position, warmup)[0]  # noqa: E731
    states, tuned = jax.vmap(tune)(jax.random.split(first, chains), positions)
    kernel = blackjax.nuts.build_kernel()

    def one(key: Any, state: Any, tuned: Any) -> Any:
        return kernel(key, state, density, **tuned)

    def transition(states: Any, key: Any) -> Any:
        states, _ = jax.vmap(one)(jax.random.split(key, chains), states, tuned)
        return states, states.position

    return jax.lax.scan(transition, states, jax.random.split(second, draws))[1]
