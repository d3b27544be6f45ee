"""How the cost of a gradient grows: with chains (eight schools), rows and dimensions (logistic regression).

Microseconds of one leapfrog step for all chains at once, or of one value and gradient, warm, float64; ours against
JAX on NumPyro's potential. A leapfrog step is what a kernel pays: many in one compiled call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from .posteriors import POSTERIORS, Arrays, tensors
from .worker import stamp

LEAPFROGS = 64
STEP = 0.001
Call = Callable[[], int]
"""Does some work; returns how many gradients of all chains it took."""
AXES: dict[str, tuple[int, ...]] = {
    "chains": (1, 4, 16, 64, 128, 256, 1024, 4096),
    "rows": (1_000, 10_000, 100_000, 1_000_000),
    "dimensions": (10, 100, 1_000, 10_000),
}
TITLES = {
    "chains": "one leapfrog step of all chains, eight schools",
    "rows": "value and gradient, logistic regression, 10 columns",
    "dimensions": "value and gradient, logistic regression, 1,000 rows",
}
SECONDS = 0.3
"""How long a measurement repeats its call, at least three times."""


def regression(rows: int, columns: int) -> Arrays:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, columns))
    return {"x": x, "y": (rng.random(rows) < 1 / (1 + np.exp(-x[:, 0]))).astype(np.int64)}


def our_leapfrogs(chains: int) -> Call:
    """Transitions of our batched kernel's program, with steps so short that all are trajectories of many."""
    import torch

    torch.set_default_dtype(torch.float64)
    try:
        from inference.kernels.chees import ChEES
    except ImportError:
        raise RuntimeError("inference has no batched kernel yet") from None

    schools = POSTERIORS["eight_schools"]
    model = partial(schools.pyro(), **tensors(schools.data(), torch.float64))
    kernel = ChEES(model, num_chains=2, step_size=STEP, trajectory_length=STEP * LEAPFROGS, max_steps=LEAPFROGS)
    # One chain learns nothing across chains, so the kernel takes two at least; its leapfrog knows no such bound.
    kernel.num_chains = chains
    kernel.setup(0)
    return lambda: int(kernel.advance().leapfrogs.sum())


def our_gradient(rows: int, columns: int) -> Call:
    """Value and gradient of the program that our NUTS runs on."""
    import torch
    from pyro.infer import NUTS

    from inference.compiler.potential import CompiledPotential
    from ppl_models.models.regression import LogisticRegression

    torch.set_default_dtype(torch.float64)
    data = tensors(regression(rows, columns), torch.float64)
    kernel = NUTS(partial(LogisticRegression(columns).double().model, **data))
    kernel.setup(0)
    program = CompiledPotential(kernel.potential_fn, kernel.initial_params)
    program.fuse()
    values = {n: v.detach().requires_grad_() for n, v in kernel.initial_params.items()}

    def call() -> int:
        torch.autograd.grad(program(values), list(values.values()))
        return 1

    return call


def _numpyro_potential(model: Any, data: Arrays, chains: int) -> tuple[Any, Any]:
    import jax
    import numpyro
    from numpyro.infer.util import initialize_model

    numpyro.enable_x64()
    arrays = {n: jax.numpy.asarray(v) for n, v in data.items()}
    info = initialize_model(jax.random.split(jax.random.PRNGKey(0), chains), model, model_kwargs=arrays)
    return info.potential_fn, info.param_info.z


def jax_leapfrogs(chains: int) -> Call:
    import jax

    schools = POSTERIORS["eight_schools"]
    potential, start = _numpyro_potential(schools.numpyro(), schools.data(), chains)
    slope = jax.vmap(jax.grad(potential))

    def leapfrog(_: int, state: Any) -> Any:
        position, momentum, force = state
        move = partial(jax.tree.map, lambda a, b: a + STEP * b)
        kick = partial(jax.tree.map, lambda a, b: a - 0.5 * STEP * b)
        momentum = kick(momentum, force)
        position = move(position, momentum)
        force = slope(position)
        return position, kick(momentum, force), force

    @jax.jit
    def run(position: Any, momentum: Any) -> Any:
        return jax.lax.fori_loop(0, LEAPFROGS, leapfrog, (position, momentum, slope(position)))

    momentum = jax.tree.map(jax.numpy.ones_like, start)

    def call() -> int:
        jax.block_until_ready(run(start, momentum))
        return LEAPFROGS

    return call


def jax_gradient(rows: int, columns: int) -> Call:
    import jax

    potential, start = _numpyro_potential(
        POSTERIORS["logistic_regression"].numpyro(), regression(rows, columns), chains=1
    )
    one = jax.tree.map(lambda v: v[0], start)
    run = jax.jit(jax.value_and_grad(potential))

    def call() -> int:
        jax.block_until_ready(run(one))
        return 1

    return call


CONTENDERS: dict[str, tuple[Callable[[int], Call], Callable[[int, int], Call]]] = {
    "ours": (our_leapfrogs, our_gradient),
    "JAX (NumPyro's potential)": (jax_leapfrogs, jax_gradient),
}


def cases(quick: bool) -> list[str]:
    return [f"{axis}={n}" for axis, points in AXES.items() for n in (points[::3] if quick else points)]


def contenders(case: str, quick: bool) -> list[str]:
    return list(CONTENDERS)


def rounds_of(contender: str, rounds: int) -> int:
    return rounds


def prepare(case: str, contender: str, mode: str = "") -> Callable[[int], dict[str, Any]]:
    axis, _, size = case.partition("=")
    leapfrogs, gradient = CONTENDERS[contender]
    n = int(size)
    call = {"chains": lambda: leapfrogs(n), "rows": lambda: gradient(n, 10), "dimensions": lambda: gradient(1000, n)}
    run = call[axis]()

    def measure(seed: int) -> dict[str, Any]:
        run()
        taken, seconds = [], 0.0
        while len(taken) < 3 or seconds < SECONDS:
            started = perf_counter()
            count = run()
            seconds += perf_counter() - started
            taken.append((perf_counter() - started) / count)
        return {"us": 1e6 * float(np.median(taken)), **stamp()}

    return measure


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for case, contender in dict.fromkeys((r["case"], r["contender"]) for r in records):
        mine = [r for r in records if (r["case"], r["contender"]) == (case, contender)]
        done = [r["us"] for r in mine if "failed" not in r]
        axis, _, size = case.partition("=")
        row: dict[str, Any] = {"case": axis, "contender": contender, "size": int(size)}
        if not done:
            made.append({**row, "note": mine[-1]["failed"]})
            continue
        spread = float(np.subtract(*np.percentile(done, [75, 25])))
        made.append({**row, "us": float(np.median(done)), "spread": spread, "rounds": len(done), "note": ""})
    return made
