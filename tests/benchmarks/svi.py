"""Seconds of one SVI step in steady state, float32, Adam at 1e-3; a step of a VAE takes a new minibatch.

``fit``'s step is the difference of two fits of different lengths, both after a first that compiles: set-up cancels,
and the draws at the end are left out. The others run a loop of n steps (NumPyro: one ``svi.run``, jitted, so that its
compiling is left out too). The losses of all contenders at the initial parameters are held against those of Pyro:
z-scores by their Monte Carlo errors.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import numpy as np
import torch

from .posteriors import POSTERIORS, tensors
from .worker import stamp

RATE = 1e-3
CHECKED = 300
"""Draws of the loss at the initial parameters."""
FROZEN = 1e-12
"""A learning rate at which parameters stay where they are."""
Steps = Callable[[int], Any]
Losses = Callable[[int], np.ndarray]
WARM, QUICK = 1.0, 0.3
"""Seconds that a timed loop should last; a difference of two fits four times that, for their set-up varies."""


@dataclass(frozen=True)
class Case:
    """A pair and its data.

    Attributes:
        hidden: Hidden units of a VAE; None for AutoNormal on one of the posteriors.
    """

    title: str
    posterior: str = ""
    hidden: int | None = None
    batch: int | None = None

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        from .vae import images

        return POSTERIORS[self.posterior].data() if self.hidden is None else {"x": images()}

    @cached_property
    def data(self) -> dict[str, Any]:
        return tensors(self.arrays, torch.float32)

    def pair(self) -> Any:
        from pyro.infer.autoguide import AutoNormal
        from pyro.infer.autoguide.initialization import init_to_feasible

        from .vae import VAE

        if self.hidden:
            return VAE(self.hidden)
        made = POSTERIORS[self.posterior].pyro()
        model = getattr(made, "model", made)
        return model, AutoNormal(model, init_loc_fn=init_to_feasible)

    def minibatches(self) -> Callable[[], dict[str, Any]]:
        """Arguments of the model for one step: all data, or rows drawn without replacement in every pass."""
        if not self.batch:
            return lambda: self.data
        x, waiting = self.data["x"], []

        def take() -> dict[str, Any]:
            if not waiting:
                waiting.extend(torch.randperm(len(x)).split(self.batch))
            rows = waiting.pop()
            return {"x": x[rows], "size": len(x), "rows": rows}

        return take


CASES = {
    "vae_small": Case("VAE 784-200-50, batch 20", hidden=200, batch=20),
    "vae_medium": Case("VAE 784-400-50, batch 128", hidden=400, batch=128),
    "eight_schools": Case("Eight schools, AutoNormal", "eight_schools"),
    "logistic_regression": Case("Logistic regression 569 x 30, AutoNormal", "logistic_regression"),
}


def ours(case: Case) -> tuple[Callable[[int], float], Losses]:
    from inference import fit

    pair, settings = case.pair(), {"batch": case.batch, "progress": False, "draws": 1, "compile": True}

    def run(steps: int, **more: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fit(pair, case.data, steps=steps, **settings, **{"learning_rate": RATE, **more})

    def seconds(steps: int) -> float:
        return sum(taken for part, taken in run(steps).seconds.items() if part != "draws")

    return seconds, lambda count: run(count, learning_rate=FROZEN).losses


def _svi(case: Case, loss: Any, optimizer: Any = None) -> tuple[Steps, Losses]:
    import pyro
    from pyro.infer import SVI
    from pyro.optim import Adam

    pyro.clear_param_store()
    pair, take = case.pair(), case.minibatches()
    model, guide = pair if isinstance(pair, tuple) else (pair.model, pair.guide)
    svi = SVI(model, guide, optimizer or Adam({"lr": RATE}), loss=loss)

    def steps(count: int) -> None:
        for _ in range(count):
            svi.step(**take())

    def losses(count: int) -> np.ndarray:
        return np.array([svi.evaluate_loss(**take()) for _ in range(count)])

    return steps, losses


def pyro_svi(case: Case) -> tuple[Steps, Losses]:
    from pyro.infer import Trace_ELBO

    return _svi(case, Trace_ELBO())


def pyro_compiled(case: Case, *, joint: bool) -> tuple[Steps, Losses]:
    from pyro.infer import Trace_ELBO

    from inference import Joint
    from inference.objectives import Compiled

    return _svi(case, Compiled(Trace_ELBO()), Joint(torch.optim.Adam, {"lr": RATE}) if joint else None)


def numpyro_svi(case: Case, *, jitted: bool) -> tuple[Steps, Losses]:
    import jax
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.infer.initialization import init_to_feasible
    from numpyro.optim import Adam

    from .vae import VAE, numpyro_pair

    if case.hidden:
        (model, guide), data = numpyro_pair(VAE(case.hidden), case.arrays["x"], case.batch or 0), {}
    else:
        model = POSTERIORS[case.posterior].numpyro()
        guide, data = AutoNormal(model, init_loc_fn=init_to_feasible), {n: v.numpy() for n, v in case.data.items()}
    key = jax.random.PRNGKey(0)
    svi, still = (SVI(model, guide, Adam(rate), Trace_ELBO()) for rate in (RATE, FROZEN))
    state = svi.init(key, **data)
    programs: dict[int, Any] = {}

    def steps(count: int) -> None:
        nonlocal state
        if count not in programs:
            run = lambda state: svi.run(key, count, progress_bar=False, init_state=state, **data)[1:]  # noqa: E731
            programs[count] = jax.jit(run) if jitted else run
        state, _ = jax.block_until_ready(programs[count](state))

    def losses(count: int) -> np.ndarray:
        return np.asarray(still.run(key, count, progress_bar=False, **data).losses)

    return steps, losses


def _by_hand(case: Case, *, compile: bool, fused: bool) -> tuple[Steps, Losses]:
    from .meanfield import DENSITIES, MeanField
    from .vae import VAE

    take = case.minibatches()
    if case.hidden:
        module: torch.nn.Module = VAE(case.hidden)
        arguments = lambda: (take()["x"], len(case.data["x"]))  # noqa: E731
    else:
        module, arguments = MeanField(*DENSITIES[case.posterior](**case.data)), tuple
    loss = torch.compile(module) if compile else module
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE, **({"fused": True} if fused else {}))

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            value = loss(*arguments())
            value.backward()
            optimizer.step()

    def losses(count: int) -> np.ndarray:
        return np.array([loss(*arguments()).item() for _ in range(count)])

    return steps, losses


AS_CALLED, CALLED_FOR = "NumPyro svi.run, 10,000 steps as called", 10_000
"""Without jit, ``svi.run`` compiles at every call: here that is part of the cost of its steps."""
CONTENDERS: dict[str, Callable[[Case], tuple[Steps, Losses]]] = {
    "fit": ours,
    "Pyro SVI.step": pyro_svi,
    "Pyro SVI.step, loss=Compiled": partial(pyro_compiled, joint=False),
    "Pyro SVI.step, loss=Compiled, optimizer=Joint": partial(pyro_compiled, joint=True),
    "NumPyro svi.run": partial(numpyro_svi, jitted=True),
    AS_CALLED: partial(numpyro_svi, jitted=False),
    "PyTorch by hand": lambda case: _by_hand(case, compile=False, fused=False),
    "PyTorch by hand, fused Adam": lambda case: _by_hand(case, compile=False, fused=True),
    "PyTorch by hand, compiled, fused Adam": lambda case: _by_hand(case, compile=True, fused=True),
}


def cases(quick: bool) -> list[str]:
    return list(CASES)


def contenders(case: str, quick: bool) -> list[str]:
    # 10,000 steps of a VAE take a minute, of which compiling is no large part.
    return [n for n in CONTENDERS if n != AS_CALLED or not CASES[case].hidden]


def rounds_of(contender: str, rounds: int) -> int:
    return rounds


def prepare(case: str, contender: str, mode: str = "") -> Callable[[int], dict[str, Any]]:
    made = CONTENDERS[contender](CASES[case])
    target = QUICK if mode == "quick" else WARM
    state: dict[str, Any] = {}

    def loop(count: int) -> float:
        if contender == "fit":
            return made[0](count)  # type: ignore[no-any-return]
        started = perf_counter()
        made[0](count)
        return perf_counter() - started

    def measure(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        if not state:
            losses = made[1](CHECKED)
            state["loss"] = {"loss": float(losses.mean()), "loss_error": float(losses.std() / CHECKED**0.5)}
            loop(CHECKED)
            state["cold"] = stamp()["since_start"]
            # A full collection takes half a second: it would fall into one of two fits whose difference is taken.
            gc.collect()
            gc.freeze()
            state["steps"] = CALLED_FOR if contender == AS_CALLED else _enough(loop, target, contender == "fit")
        count = state["steps"]
        # Two fits of different lengths: what is not a step cancels.
        short = count // 10 if contender == "fit" else 0
        taken = loop(count) - (loop(short) if short else 0.0)
        return {"us": 1e6 * taken / (count - short), "steps": count, **stamp(), **state["loss"], "cold": state["cold"]}

    return measure


def _enough(loop: Callable[[int], float], target: float, difference: bool) -> int:
    """Steps that last about the target. Every length runs once before it is timed: its program may be its own."""
    count, target = (2500, 4 * target) if difference else (250, target)
    while True:
        loop(count)
        taken = loop(count) - (loop(count // 10) if difference else 0.0)
        if taken > 0.8 * target or count > 100_000:
            return count
        count = int(count * min(20.0, max(1.5, target / max(taken, 1e-3))))


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for case, contender in dict.fromkeys((r["case"], r["contender"]) for r in records):
        mine = [r for r in records if (r["case"], r["contender"]) == (case, contender)]
        done = [r for r in mine if "failed" not in r]
        row: dict[str, Any] = {"case": case, "contender": contender}
        if not done:
            made.append({**row, "note": mine[-1]["failed"]})
            continue
        pyro = [r for r in records if (r["case"], r["contender"]) == (case, "Pyro SVI.step") and "failed" not in r]
        us = np.array([r["us"] for r in done])
        base = float(np.median([r["us"] for r in pyro])) if pyro else None
        z = (done[0]["loss"] - pyro[0]["loss"]) / np.hypot(done[0]["loss_error"], pyro[0]["loss_error"]) if pyro else 0
        made.append(
            row
            | {
                "us/step": float(np.median(us)),
                "spread": float(np.subtract(*np.percentile(us, [75, 25]))),
                "steps/s": 1e6 / float(np.median(us)),
                "over Pyro": base / float(np.median(us)) if base else None,
                "loss z": float(z),
                "cold": done[0]["cold"],
                "peak MiB": max(r["peak_mib"] for r in done),
                "rounds": len(done),
                "note": "" if abs(z) < 5 else f"its loss {done[0]['loss']:.1f} is not Pyro's",
            }
        )
    return made
