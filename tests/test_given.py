"""Data as people have them: frames, arrays, whole numbers, booleans; taken as sites need them, or refused by name."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoHierarchicalNormalMessenger, AutoNormal, AutoNormalMessenger
from torch import Tensor

from inference import fit, sample
from inference.core.bound import bind
from ppl_models.models.linear_models import LinearRegression
from ppl_models.models.regression import LogisticRegression

quiet = partial(fit, progress=False)
RANDOM = np.random.default_rng(0)
FRAME = pd.DataFrame(RANDOM.normal(size=(50, 2)), columns=["age", "income"])
TARGET = FRAME["age"] - 2 * FRAME["income"] + 0.1 * RANDOM.normal(size=50)


def regression(X: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 3.0).to_event(1))
    with pyro.plate("rows", len(X)):
        pyro.sample("y", dist.Normal(X @ w, 0.1), obs=y)


def double_regression(X: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]).double(), 3.0).to_event(1))
    with pyro.plate("rows", len(X)):
        pyro.sample("y", dist.Normal((X * w).sum(-1), 0.1), obs=y)


@pytest.mark.parametrize("data", [{"X": FRAME, "y": TARGET}, {"X": FRAME.to_numpy(), "y": TARGET.to_numpy()}])
def test_frames_and_arrays_take_the_precision_of_the_model(data: dict[str, Any]) -> None:
    bound = bind(regression, data)
    assert {v.dtype for v in bound.data.values()} == {torch.float32}
    assert {v.dtype for v in bind(double_regression, data).data.values()} == {torch.float64}
    X, y = FRAME.to_numpy(), TARGET.to_numpy()
    exact = np.linalg.solve(X.T @ X / 0.01 + np.eye(2) / 9, X.T @ y / 0.01)
    result = quiet((regression, AutoNormal(regression)), data, steps=600, learning_rate=0.1)
    np.testing.assert_allclose(result.draws["w"].mean(0), exact, atol=0.05)


def test_tensors_keep_their_type_and_one_that_does_not_fit_is_named() -> None:
    x, y = torch.tensor(FRAME.to_numpy()), torch.tensor(TARGET.to_numpy())
    assert bind(double_regression, {"X": x, "y": y}).data["X"] is x
    with pytest.raises(
        ValueError, match=r"data: expected types that the model takes, got X float64, y float64 .*X|float"
    ):
        quiet((regression, AutoNormal(regression)), {"X": x, "y": y})


def test_whole_numbers_in_a_product_become_floats() -> None:
    ages = pd.DataFrame({"age": [20, 30, 41], "married": [True, False, True]})
    bound = bind(regression, {"X": ages, "y": [1, 2, 3]})
    assert bound.data["X"].dtype == torch.float32
    torch.testing.assert_close(bound.data["X"], torch.tensor([[20.0, 1.0], [30.0, 0.0], [41.0, 1.0]]))


def labelled(labels: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("rows", len(labels)):
        pyro.sample("labels", dist.Bernoulli(p), obs=labels)


LABELS = [1, 0, 1, 1]


@pytest.mark.parametrize(
    "labels",
    [
        np.array(LABELS),
        np.array(LABELS, bool),
        torch.tensor(LABELS),
        torch.tensor(LABELS).bool(),
        pd.Series(LABELS),
        LABELS,
    ],
    ids=["array", "booleans", "tensor", "boolean tensor", "series", "list"],
)
def test_labels_of_zero_and_one_are_taken_in_any_type(labels: Any) -> None:
    assert bind(labelled, {"labels": labels}).data["labels"].dtype == torch.float32
    result = sample(labelled, {"labels": labels}, draws=60, warmup=60, progress=False)
    assert float(result.draws["p"].mean()) == pytest.approx(4 / 6, abs=0.03)


def test_labels_that_index_stay_whole_numbers() -> None:
    def model(group: Tensor, y: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=u[group]), obs=y)

    bound = bind(model, {"group": np.array([0, 1, 1]), "y": np.array([0, 1, 1])})
    assert (bound.data["group"].dtype, bound.data["y"].dtype) == (torch.int64, torch.float32)


def test_what_is_no_number_is_refused_by_the_name_of_its_column() -> None:
    people = FRAME.assign(city="Basel", born=pd.Timestamp("2000-01-01"))
    with pytest.raises(ValueError, match=r"X: expected columns of numbers, got city \(\w+\), born \(datetime.*\)"):
        bind(regression, {"X": people, "y": TARGET})
    with pytest.raises(ValueError, match="y: expected columns of numbers, got y"):
        bind(regression, {"X": FRAME, "y": people["city"]})
    missing = bind(regression, {"X": FRAME.astype("Float64").where(FRAME > -10), "y": TARGET}).data["X"]
    assert missing.dtype == torch.float32


def test_numbers_whose_differences_would_be_rounded_away_are_refused() -> None:
    times = 1.7e9 + np.arange(50.0)
    with pytest.raises(ValueError, match=r"X: expected numbers that differ in their first six digits, got 1700000000,"):
        bind(regression, {"X": times[:, None], "y": TARGET})
    seconds = times.astype("int64")[:, None]
    with pytest.raises(ValueError, match=r"X: expected numbers that differ in their first six digits, got 1700000000,"):
        bind(regression, {"X": seconds, "y": TARGET})
    assert bind(regression, {"X": seconds - seconds[0], "y": TARGET}).data["X"].dtype == torch.float32


def test_whole_numbers_that_the_checks_of_a_pair_refuse_become_floats() -> None:
    pair, x = LinearRegression(2), np.arange(12).reshape(6, 2)
    bound = bind(pair, {"x": x, "y": torch.tensor([3, 1, 4, 1, 5, 9])})
    assert bound.data["x"].dtype == bound.data["y"].dtype == torch.float32
    assert torch.equal(bound.data["x"], torch.tensor(x).float())
    assert bind(pair.double(), {"x": x, "y": x[:, 0]}).data["y"].dtype == torch.float64
    # What is wrong with them is said of them as they came.
    with pytest.raises(ValueError, match=r"y: expected a number per row \(6,\), got \(5,\)"):
        pair.check(torch.ones(6, 2), torch.arange(5.0))
    with pytest.raises(ValueError, match="y: expected labels 0 to 2, got 3"):
        bind(LogisticRegression(2, 3), {"x": x, "y": np.arange(6)})


@pytest.mark.parametrize("kind", [AutoNormalMessenger, AutoHierarchicalNormalMessenger])
def test_guides_that_are_messengers_get_the_data(kind: Any) -> None:
    """mu ~ N(0, 10^2), y_n ~ N(mu, 1): the posterior is N(sum y / 5.01, 1 / 5.01)."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 3.0, 2.5, 1.5])
    result = quiet((model, kind(model)), y, steps=900, learning_rate=0.05)
    assert float(result.draws["mu"].mean()) == pytest.approx(10 / 5.01, abs=0.12)
    assert float(result.draws["mu"].std()) == pytest.approx(5.01**-0.5, rel=0.2)


def effects(age: Tensor, city: Tensor, y: Tensor) -> None:
    """A regression with an effect per city, by columns of a frame."""
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    with pyro.plate("city", 3):
        u = pyro.sample("u", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(slope * age + u[city], 0.5), obs=y)


CITIES = pd.Categorical(["Bern", "Basel", "Chur"] * 20, categories=["Basel", "Bern", "Chur"])
PEOPLE = pd.DataFrame({"y": np.arange(60) % 3, "city": CITIES, "age": RANDOM.normal(size=60)})


def test_columns_of_a_frame_are_arguments_and_categories_keep_their_names() -> None:
    """u of a city is the mean of its y where the slope is 0: the mean is a normal one with 20 rows of variance 1/4."""
    bound = bind(effects, PEOPLE)
    assert {n: v.dtype for n, v in bound.data.items()} == {
        "age": torch.float32,
        "city": torch.int64,
        "y": torch.int64,
    }
    assert bound.data["city"][:3].tolist() == [1, 0, 2]
    result = sample(effects, PEOPLE, chains=8, draws=60, warmup=80, compile=False, progress=False)
    by_city = result.idata.posterior["u"].mean(("chain", "draw"))
    assert list(by_city.coords["city"].values) == ["Basel", "Bern", "Chur"]
    weight = 20 / (20 + 0.25 / 4)
    expected = {"Bern": 0.0, "Basel": 1.0 * weight, "Chur": 2.0 * weight}
    for city, mean in expected.items():
        # The slope moves an effect by its error times the mean age in a city.
        assert float(by_city.sel(city=city)) == pytest.approx(mean, abs=0.15)
    assert "u[Basel]" in result.summary().index


def test_other_columns_together_are_the_first_argument() -> None:
    frame = FRAME.assign(y=TARGET.to_numpy())
    bound = bind(regression, frame)
    torch.testing.assert_close(bound.data["X"], torch.tensor(FRAME.to_numpy(), dtype=torch.float32))
    torch.testing.assert_close(bound.data["y"], torch.tensor(TARGET.to_numpy(), dtype=torch.float32))
    assert bound.names.columns == {"X": ("age", "income")}
    # All of a frame, where no column has the name of an argument.
    assert set(bind(lambda x: None, FRAME).data) == {"x"}
    with pytest.raises(ValueError, match=r"data: expected arguments of the model \(age, city, y\), got height"):
        bind(effects, PEOPLE.assign(height=1.0))
    with pytest.raises(ValueError, match="data: expected age, which the model needs, got y, city"):
        bind(effects, PEOPLE.drop(columns="age"))


def test_columns_and_rows_of_a_frame_become_coordinates() -> None:
    class Rows:
        dims = {"w": ("X_columns",)}  # noqa: RUF012
        guide = None

        def model(self, X: Tensor, y: Tensor) -> None:
            regression(X, y)

    def density(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)

    people = FRAME.set_axis([f"person {k}" for k in range(50)])
    data = {"X": people, "y": TARGET.set_axis(people.index)}
    result = sample(Rows(), data, chains=4, draws=4, warmup=4, compile=False, progress=False)
    assert list(result.idata.posterior["w"].coords["X_columns"].values) == ["age", "income"]
    assert result.idata.observed_data["y"].coords["rows"].values[3] == "person 3"
    seen = sample(density, people, chains=4, draws=4, warmup=4, compile=False, progress=False).idata.observed_data
    assert seen["x"].dims == ("rows", "x_columns") and list(seen["x_columns"].values) == ["age", "income"]


def test_rows_columns_and_categories_that_do_not_belong_together_are_refused() -> None:
    people = FRAME.set_axis(range(10, 60))
    with pytest.raises(ValueError, match=r"y: expected the index of X, got another; use y.loc\[X.index\]"):
        bind(regression, {"X": people, "y": TARGET.set_axis(range(59, 9, -1))})
    with pytest.raises(ValueError, match="city: expected a category in every row, got none in 20"):
        bind(effects, PEOPLE.assign(city=CITIES.set_categories(["Bern", "Basel"])))
    bound = bind(effects, PEOPLE)
    with pytest.raises(
        ValueError, match="city: expected the categories of the fit, Basel, Bern, Chur, got Bern, Basel"
    ):
        bound.rebound(PEOPLE.assign(city=CITIES.set_categories(["Bern", "Basel", "Chur"])))
    with pytest.raises(ValueError, match="X: expected the columns of the fit, age, income, got income, age"):
        bind(regression, FRAME.assign(y=TARGET)).rebound(FRAME[["income", "age"]].assign(y=TARGET))
    # The same rows in another order, of which one frame counts its own.
    with pytest.raises(ValueError, match=r"y: expected the rows in the order of X, .* use y.loc\[X.index\]"):
        bind(regression, {"X": FRAME, "y": TARGET.sort_values()})
    bind(regression, {"X": FRAME, "y": TARGET.set_axis(range(10, 60))})
