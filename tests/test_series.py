"""Time series, Gaussian processes and an ODE as their users write them, by default ``sample``."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import series, timeseries
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from inference.compiler.potential import BatchedPotential
from inference.compiler.supports import follow_supports

pytestmark = pytest.mark.usefixtures("alone")
stored = pytest.mark.skipif(not timeseries.folder().exists(), reason="PPL_MODELS_DATA has no posteriordb")
LENGTH = 12


def potential_of(model: Callable[..., Any], data: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    start, potential, _, trace = initialize_model(partial(model, **data))
    return start, follow_supports(potential, trace) or potential


def test_garch_has_the_density_of_numpy() -> None:
    """Beside the Jacobian of the transforms; beta1 has the support (0, 1 - alpha1)."""
    y = timeseries.garch_data()["y"][:LENGTH]
    start, potential = potential_of(timeseries.garch, {"y": torch.as_tensor(y)})
    many = BatchedPotential(potential, start, 6)
    points = {n: torch.randn(6).double() for n in start}
    values = potential.constrain(points)
    jacobian = values["alpha0"].log() + (values["alpha1"] * (1 - values["alpha1"])).log()
    share = values["beta1"] / (1 - values["alpha1"])
    jacobian += (share * (1 - share)).log() + (1 - values["alpha1"]).log()
    columns = np.stack([values[n].numpy() for n in ("mu", "alpha0", "alpha1", "beta1")], -1)
    ours = -many.run(many.pack(points))[0] - jacobian
    # NumPy takes the spread of the series as the first deviation, as the model does.
    off = ours.numpy() - timeseries.garch_density(columns, y)
    np.testing.assert_allclose(off, off[0], rtol=1e-9)


def test_a_hidden_markov_chain_has_the_density_of_numpy_as_a_loop_and_by_enumeration() -> None:
    y = timeseries.hmm_data()["y"][:LENGTH]
    offs = []
    for model in (timeseries.hmm_loop, timeseries.hmm_markov):
        start, potential, transforms, _ = initialize_model(partial(model, y=torch.as_tensor(y)))
        many = BatchedPotential(potential, start, 5)
        torch.manual_seed(0)
        points = {n: torch.randn(5, *start[n].shape).double() for n in ("rows", "mu", "gap")}
        values = {n: transforms[n].inv(v) for n, v in points.items()}
        jacobian = sum(
            transforms[n].inv.log_abs_det_jacobian(v, values[n]).reshape(5, -1).sum(-1) for n, v in points.items()
        )
        columns = timeseries.SERIES["hmm_loop"].columns({n: v.numpy() for n, v in values.items()})
        exact = timeseries.hmm_density(np.stack(list(columns.values()), -1), y)
        offs.append((-many.run(many.pack(points))[0] - jacobian).numpy() - exact)
    for off in offs:
        np.testing.assert_allclose(off, off[0], rtol=1e-9)


def judged(name: str, **settings: Any) -> dict[str, float]:
    case = timeseries.SERIES[name]
    before = torch.get_default_dtype()
    try:
        draws = series.ours(case, 1, **settings)
    finally:
        torch.set_default_dtype(before)
    return series.judge(case.columns(draws), case.reference())


@stored
def test_a_gaussian_process_has_its_reference() -> None:
    found = judged("gp_regr", compile=False, draws=150, warmup=150)
    assert found["r_hat"] < 1.03
    assert found["error"] < 5 * found["floor"]


@stored
@pytest.mark.slow
@pytest.mark.skipif("PPL_MODELS_SERIES" not in os.environ, reason="takes minutes: set PPL_MODELS_SERIES")
@pytest.mark.parametrize("name", timeseries.SERIES)
def test_a_default_run_has_its_reference(name: str) -> None:
    found = judged(name)
    assert found["r_hat"] < 1.03
    assert found["error"] < 5 * found["floor"]
