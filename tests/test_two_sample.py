"""Two-sample figures: against known values, against scipy and brute force, their errors against repetition."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from inference.diagnostics import two_sample
from inference.diagnostics.two_sample import (
    classifier_test,
    coverage,
    energy_distance,
    mmd,
    modes,
    precision,
    recall,
    reverse_kl,
)

CENTRES = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])


def normal(rows: int, seed: int, *, shift: float = 0.0, width: int = 2) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_modes_are_counted_by_hand() -> None:
    x = torch.tensor([[0.0, 0.1], [0.0, -0.29], [0.0, 0.31], [10.0, 0.0], [4.0, 9.0]])
    found = modes(x, CENTRES, 0.1)
    assert (found.found, found.total) == (2, 3)
    assert found.quality.value == pytest.approx(3 / 5)
    assert found.quality.error == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    np.testing.assert_allclose(found.fractions, [3 / 5, 1 / 5, 1 / 5])
    assert found.reverse_kl == pytest.approx(0.6 * math.log(1.8) + 2 * 0.2 * math.log(0.6))


def test_reverse_kl_of_equal_and_of_missing_modes() -> None:
    assert reverse_kl(torch.full((8,), 1 / 8)) == pytest.approx(0, abs=1e-7)
    assert reverse_kl(torch.tensor([1.0, 0.0])) == pytest.approx(math.log(2))


def by_hand(x: np.ndarray, y: np.ndarray, kernel) -> float:
    """The unbiased discrepancy, pair by pair."""

    def own(v: np.ndarray) -> float:
        values = kernel(cdist(v, v))
        return (values.sum() - np.trace(values)) / (len(v) * (len(v) - 1))

    return own(x) + own(y) - 2 * kernel(cdist(x, y)).mean()


def test_distances_are_those_by_hand() -> None:
    x, y = normal(40, 0), normal(30, 1, shift=0.5)
    a, b = (v.double().numpy() for v in (x, y))
    assert energy_distance(x, y).value == pytest.approx(by_hand(a, b, lambda d: -d))
    gauss = by_hand(a, b, lambda d: np.exp(-0.5 * (d / 1.5) ** 2))
    assert mmd(x, y, bandwidths=(1.5,)).value == pytest.approx(gauss)


@pytest.mark.parametrize("shift", [0.0, 0.4])
@pytest.mark.parametrize("distance", [mmd, energy_distance])
def test_errors_of_distances_are_what_repetition_shows(distance, shift: float) -> None:
    found = [distance(normal(100, 2 * k), normal(120, 2 * k + 1, shift=shift)) for k in range(200)]
    values, errors = (np.array(v) for v in zip(*found, strict=True))
    # Where both samples have one law the larger of two noisy estimates is taken: up to a third too much. The spread of
    # 200 values is itself known to 5 % where they are normal, and to less where their tails are heavy, as here.
    assert 0.75 < np.sqrt(np.mean(errors**2)) / values.std() < 1.7
    if not shift:
        assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize(
    "fraction", [precision, recall, coverage, pytest.param(classifier_test, marks=pytest.mark.slow)]
)
def test_errors_of_fractions_are_what_repetition_shows(fraction, shift: float) -> None:
    """Binomial errors are 0.34 to 0.84 of the true ones."""
    count = 24 if fraction is classifier_test else 60
    found = [fraction(normal(200, 2 * k), normal(250, 2 * k + 1, shift=shift)) for k in range(count)]
    values, errors = (np.array(v) for v in zip(*found, strict=True))
    binomial = np.sqrt(np.mean(values * (1 - values)) / (400 if fraction is classifier_test else 225))
    assert 0.6 < np.sqrt(np.mean(errors**2)) / values.std(ddof=1) < 1.6
    assert np.sqrt(np.mean(errors**2)) > 1.05 * binomial


def test_an_error_from_blocks_is_that_of_a_mean_of_independent_rows() -> None:
    """It is 1 / sqrt(200) for 200 rows of variance 1; over 200 repetitions the root mean square is known to 1.3 %."""
    y = normal(200, 0)
    errors = [
        two_sample._with_error(lambda a, _: float(a[:, 0].mean()), normal(200, k), y, 1).error for k in range(200)
    ]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(200**-0.5, rel=0.1)


@pytest.mark.parametrize("distance", [mmd, energy_distance])
def test_distances_do_not_depend_on_the_blocks(distance, monkeypatch) -> None:
    x, y = normal(70, 0), normal(50, 1, shift=0.3)
    whole = distance(x, y)
    monkeypatch.setattr(two_sample, "BLOCK_NUMBERS", 150)
    part = distance(x, y)
    assert part.value == pytest.approx(whole.value, rel=1e-9)
    assert part.error == pytest.approx(whole.error, rel=1e-6)


def test_energy_distance_of_shifted_points_is_exact() -> None:
    x = torch.zeros(10, 1)
    assert energy_distance(x, x + 3).value == pytest.approx(6.0)


def test_the_classifier_test_sees_a_difference_and_none() -> None:
    same = classifier_test(normal(500, 0), normal(500, 1))
    assert abs(same.value - 0.5) < 4 * same.error
    far = classifier_test(normal(500, 0), normal(500, 1, shift=2.0))
    # The best classifier is right with probability Phi(sqrt(2)) = 0.921; of 1,000 rows, five standard errors are 0.043.
    assert 0.921 - 0.06 < far.value < 0.921 + 0.043
    linear = classifier_test(normal(500, 0), normal(500, 1, shift=2.0), make=LogisticRegression)
    assert 0.921 - 0.05 < linear.value < 0.921 + 0.043


def test_precision_recall_and_coverage_tell_dropped_modes_from_bad_rows() -> None:
    real = torch.cat([normal(200, 0), normal(200, 1, shift=20.0)])
    dropped = normal(400, 2)
    assert precision(real, dropped).value > 0.9
    assert recall(real, dropped).value < 0.55
    assert coverage(real, dropped).value < 0.55
    poor = torch.cat([normal(200, 3), normal(200, 4, shift=20.0), normal(400, 5, shift=-20.0)])
    assert precision(real, poor).value < 0.55
    assert recall(real, poor).value > 0.9


def test_precision_and_coverage_are_those_by_hand() -> None:
    real, made = normal(30, 0), normal(25, 1, shift=1.0)
    within = cdist(real, real)
    reach = np.sort(within, 1)
    between = cdist(real, made)
    assert precision(real, made, k=3).value == pytest.approx((between <= reach[:, 3][:, None]).any(0).mean())
    assert coverage(real, made, k=5).value == pytest.approx((between <= reach[:, 5][:, None]).any(1).mean())


def test_coverage_of_one_law_is_what_is_said() -> None:
    found = [coverage(normal(300, 2 * k), normal(300, 2 * k + 1)).value for k in range(20)]
    assert np.mean(found) == pytest.approx(1 - 2**-5, abs=0.01)


REFUSED = [
    (lambda: mmd(normal(1, 0), normal(5, 1)), r"x: expected at least two rows \(N, D\), got \(1, 2\)"),
    (
        lambda: energy_distance(normal(5, 0), normal(5, 1, width=3)),
        r"y: expected rows of shape \(2,\) as in x, got \(3,\)",
    ),
    (
        lambda: precision(normal(5, 0), normal(5, 1) * math.nan),
        "generated: expected finite numbers, got 10 non-finite ones",
    ),
]


@pytest.mark.parametrize(("call", "said"), REFUSED, ids=[r[1][:12] for r in REFUSED])
def test_what_is_refused_is_said_in_one_line(call, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_estimates_print_their_error() -> None:
    assert str(two_sample.Estimate(0.5, 0.012)) == "0.5 ± 0.012"
