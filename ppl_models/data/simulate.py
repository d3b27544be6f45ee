r"""Simulated data with the truth that made them."""

from __future__ import annotations

from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def simulate_naive_bayes(
    rows: int, features: int = 30, classes: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Rows of a Gaussian naive Bayes model, and the parameters that made them.

    .. math::
        \pi \sim \mathrm{Dirichlet}(5, \dots, 5), \quad \mu_{kd} \sim N(0, 1), \quad
        \log_4 \sigma^2_{kd} \sim U(-1, 1), \quad
        y_n \sim \mathrm{Categorical}(\pi), \quad x_{nd} \sim N(\mu_{y_n d}, \sigma^2_{y_n d})

    Beyond the result at most one block of rows is held in memory. torch's global random state is left
    unchanged.

    Returns:
        The data, ``x`` of shape (rows, features) and ``y`` of shape (rows,), and the truth: ``weights``
        of shape (classes,), ``means`` and ``variances`` of shape (classes, features).

    Raises:
        ValueError: A count is below 1, or ``dtype`` is no floating point type.
    """
    for argument, count in (("rows", rows), ("features", features), ("classes", classes)):
        check_count(argument, count)
    check_floating(dtype)
    generator = random_source(seed)
    uniform = partial(torch.rand, generator=generator, dtype=torch.float64)
    # Sums of five exponentials are Gamma(5): torch's own Dirichlet takes no generator.
    gammas = -torch.log1p(-uniform(5, classes)).sum(0)
    truth = {
        "weights": (gammas / gammas.sum()).to(dtype),
        "means": torch.randn(classes, features, generator=generator, dtype=dtype),
        "variances": (4 ** (2 * uniform(classes, features) - 1)).to(dtype),
    }
    y = torch.multinomial(truth["weights"].double(), rows, replacement=True, generator=generator)
    x = torch.randn(rows, features, generator=generator, dtype=dtype)
    deviations = truth["variances"].sqrt()
    for block, labels in zip(torch.split(x, 65536), torch.split(y, 65536), strict=True):
        block.mul_(deviations[labels]).add_(truth["means"][labels])
    return {"x": x, "y": y}, truth


def simulate_modes(name: str, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Rows of a mixture of equal normals in the plane, a benchmark of generators that drop modes.

    ``ring``: eight on a circle of radius 1, of standard deviation 0.01. ``grid``: twenty-five on a grid from -4 to 4,
    two apart, of standard deviation 0.05 (Srivastava et al. 2017, Lin et al. 2018).

    Returns:
        x (rows, 2), the modes (K, 2) and their standard deviation.

    Raises:
        ValueError: The name is another, or there are fewer rows than one.
    """
    if name not in ("ring", "grid"):
        raise ValueError(f"name: expected ring or grid, got {name!r}")
    check_count("rows", rows)
    if name == "ring":
        angle = 2 * torch.pi * torch.arange(8) / 8
        centres, deviation = torch.stack([angle.cos(), angle.sin()], 1), 0.01
    else:
        line = torch.arange(-4.0, 5.0, 2.0)
        centres, deviation = torch.cartesian_prod(line, line), 0.05
    random = random_source(seed)
    which = torch.randint(len(centres), (rows,), generator=random)
    return centres[which] + deviation * torch.randn(rows, 2, generator=random), centres, deviation


def simulate_returns(length: int = 400, seed: int = 0) -> Tensor:
    r"""Returns of a GARCH(1, 1) process (length,), in percent: :math:`y_t \sim N(0.05, v_t)`.

    .. math:: v_1 = 1, \qquad v_t = 0.15 (y_{t-1} - 0.05)^2 + 0.75 v_{t-1} + 0.1

    Raises:
        ValueError: The length is below 1.
    """
    check_count("length", length)
    variance, drawn = torch.tensor(1.0, dtype=torch.float64), list[Tensor]()
    for noise in torch.randn(int(length), generator=random_source(seed), dtype=torch.float64):
        drawn.append(0.05 + variance.sqrt() * noise)
        variance = 0.15 * (drawn[-1] - 0.05) ** 2 + 0.75 * variance + 0.1
    return torch.stack(drawn)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless the value is an integer of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def random_source(seed: Any) -> torch.Generator:
    """A random generator from a seed, an integer of at least 0."""
    check_count("seed", seed, 0)
    return torch.Generator().manual_seed(int(seed))


def check_floating(dtype: Any) -> None:
    """Raise unless it is a floating point type of torch."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating point type, got {dtype!r}")
